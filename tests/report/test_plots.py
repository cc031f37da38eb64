"""What the plots draw, read from their lines and dots."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtail import plots
from longtail.evaluation.calibration import calibration_metrics, group_numbers, reliability
from longtail.report.plots import along_the_tail


def drawn_bins(diagram: dict[str, list[dict[str, Any]]], group: str) -> tuple[list[float], list[list[float]], int]:
    """Return the heights of the line of a group, its interval bars, and its number of dots."""
    (axes,) = plots.reliability(diagram).axes
    (line,) = (line for line in axes.lines if line.get_label() == group)
    color = plots.GROUP_COLORS[group]
    bars = [other.get_ydata() for other in axes.lines if other.get_color() == color and other is not line]
    (dots,) = (dots for dots, name in zip(axes.collections, diagram, strict=True) if name == group)
    return (
        np.asarray(line.get_ydata(), dtype=float).tolist(),
        [np.asarray(bar, dtype=float).tolist() for bar in bars],
        len(dots.get_offsets()),  # type: ignore[arg-type]
    )


def test_small_bins_are_not_joined_and_have_their_intervals() -> None:
    bins = [
        {"confidence": 30.0, "accuracy": 25.0, "images": 10, "interval": [7.0, 59.0]},
        {"confidence": 50.0, "accuracy": 100.0, "images": 9, "interval": [66.0, 100.0]},
        {"confidence": 70.0, "accuracy": 0.0, "images": 1, "interval": [0.0, 98.0]},
        {"confidence": 90.0, "accuracy": 88.0, "images": 200, "interval": [83.0, 92.0]},
        {"confidence": 97.0, "accuracy": 95.0, "images": 300, "interval": [92.0, 97.0]},
    ]
    heights, bars, dots = drawn_bins({"many": bins, "few": bins[:1]}, "many")
    # a line ends at nan: the small bins are joined neither to each other nor to their neighbours
    assert [math.isnan(height) for height in heights] == [False, True, True, False, False]
    assert [height for height in heights if not math.isnan(height)] == [25.0, 88.0, 95.0]
    assert dots == 5
    assert bars == [entry["interval"] for entry in bins]


def test_the_diagram_of_an_evaluation_is_drawn() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(300, 4) * 2, torch.randint(4, (300,))
    groups = group_numbers(["many", "many", "medium", "few"])
    diagram = calibration_metrics(reliability(scores.log_softmax(dim=1), labels, groups))["diagram"]
    for group, bins in diagram.items():
        images = [entry["images"] for entry in bins]
        assert min(images) < 10 < max(images)  # so that the diagram has bins of both kinds
        heights, bars, dots = drawn_bins(diagram, group)
        assert [math.isnan(height) for height in heights] == [count < 10 for count in images]
        assert bars == [list(entry["interval"]) for entry in bins]
        assert all(
            low - 1e-9 <= entry["accuracy"] <= high + 1e-9 for entry, (low, high) in zip(bins, bars, strict=True)
        )
        assert dots == len(bins)


def test_names_that_are_not_utf8_are_drawn_as_they_are_printed(tmp_path: Path) -> None:
    figure = plots.class_histogram([os.fsdecode(b"caf\xe9"), "a$b$"], [3, 1], ["many", "few"])
    plots.save_png(figure, tmp_path / "x.png")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [r"caf\xe9", r"a\$b\$"]


@pytest.mark.filterwarnings("error")
def test_names_that_no_font_has_give_no_warning(tmp_path: Path) -> None:
    figure, axes = plots.new_axes()
    axes.set_xlabel("\u732b \U0001f98a")
    plots.save_png(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize("window", [1, 10])
def test_lines_are_told_apart_without_their_colours(window: int) -> None:
    names = [f"method {index}" for index in range(12)]
    figure = along_the_tail({name: [50.0] * 40 for name in names}, ["c"] * 40, window, "accuracy, %")
    curves = plots.curves({name: [1.0, 2.0] for name in names}, [1, 2], "loss")
    for lines in (figure.axes[0].lines, curves.axes[0].lines):
        assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(names)
        assert all(line.get_marker() not in {"", "None"} for line in lines)
    many = plots.curves({str(index): [1.0] for index in range(84)}, [1], "loss").axes[0].lines
    assert len({(line.get_linestyle(), line.get_marker(), line.get_color()) for line in many}) == 84


# on linear RGB: Machado et al., A Physiologically-based Model for Simulation of Color Vision Deficiency, 2009
VISION = {
    "normal": np.eye(3),
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
}
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def linear_rgb(color: str) -> np.ndarray:
    """Return the (3,) linear components of an sRGB colour, from 0 to 1."""
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def cielab(linear: np.ndarray) -> np.ndarray:
    """Return (3,) L*, a*, b* of linear sRGB components under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], LUMINANCE, [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear.clip(0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colours_of_lines_differ_for_everybody(vision: str) -> None:
    seen = {color: cielab(np.array(VISION[vision]) @ linear_rgb(color)) for color in plots.LINE_COLORS}
    for a, b in itertools.combinations(plots.LINE_COLORS, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 20, (a, b)


@pytest.mark.parametrize("paper", ["#ffffff", "#14171a"])
def test_colours_of_lines_are_legible(paper: str) -> None:
    for color in plots.LINE_COLORS:
        light, dark = sorted((float(LUMINANCE @ linear_rgb(each)) + 0.05 for each in (paper, color)), reverse=True)
        assert light / dark > 3, color  # WCAG 2.2, 1.4.11


def test_an_accuracy_of_0_is_no_class_without_test_images() -> None:
    axes = plots.per_class(["a", "b", "c"], [80.0, 0.0, None], ["many", "few", "few"]).axes[0]
    (dots,) = axes.collections
    assert np.asarray(dots.get_offsets()).tolist() == [[1, 0]]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["many", "few", "0 %"]
    full = plots.per_class(["a"], [80.0], ["many"]).axes[0].get_legend()
    assert full is not None
    assert [text.get_text() for text in full.get_texts()] == ["many"]


def test_a_screen_reader_says_what_a_plot_shows() -> None:
    text = plots.svg(plots.new_axes()[0], 'Accuracy of "a" & <b>')
    assert text.startswith('<svg role="img" aria-label="Accuracy of &quot;a&quot; &amp; &lt;b&gt;" ')


def test_bars_of_thousands_of_classes_are_a_few_shapes() -> None:
    names, groups = [f"class {i}" for i in range(3000)], ["many"] * 1000 + ["few"] * 2000
    for figure in (
        plots.class_histogram(names, [3000 - i for i in range(3000)], groups),
        plots.per_class(names, [i / 30 for i in range(3000)], groups),
    ):
        assert plots.svg(figure, "x").count("<path") < 100
