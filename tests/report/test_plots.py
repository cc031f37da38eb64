"""What the plots draw, read from their lines and dots."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtail import plots
from longtail.evaluation.calibration import calibration_metrics, group_numbers, reliability


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
