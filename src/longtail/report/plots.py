"""Plots, as SVG text for a page or as PNG. Legend: C classes, in order of frequency from head to tail."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from longtail.evaluation.comparison import Record, columns, imbalances_of, methods_of, summarize

GROUP_COLORS = {"many": "#4477aa", "medium": "#b8860b", "few": "#cc5566"}
GROUP_COLORS |= dict(zip(("head", "middle", "tail"), GROUP_COLORS.values(), strict=True))
_INK = "#808890"  # legible on white and on near-black, since the page follows the reader's choice
_LINES = (
    *("#4477aa", "#cc5566", "#228833", "#b8860b", "#aa3377", "#66aacc"),
    *("#808890", "#e07b39", "#6655cc", "#99aa33", "#dd88bb"),
)


def _axes(width: float = 8.0, height: float = 2.8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _bare(axes)
    return figure, axes


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(_INK)
        label.set_fontsize(9)


def svg(figure: Figure) -> str:
    """Return a figure as an ``<svg>`` element; text stays text."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "longtail"}), warnings.catch_warnings():
        # the reader's browser draws the text, so what matplotlib's own font lacks does not matter
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def class_histogram(
    names: Sequence[str], counts: Sequence[int], groups: Sequence[str], counted: str = "training images"
) -> Figure:
    """Draw the training images, or pixels, of every class, head first, coloured by group."""
    figure, axes = _axes()
    axes.bar(range(len(counts)), counts, color=[GROUP_COLORS[group] for group in groups], width=0.85)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.8 if min(counts) < 1000 else min(counts) / 3)
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    axes.set_ylabel(counted)
    _name_classes(axes, names)
    _group_legend(axes, groups)
    return figure


def per_class(
    names: Sequence[str], accuracy: Sequence[float | None], groups: Sequence[str], label: str = "accuracy, %"
) -> Figure:
    """Draw the accuracy, or IoU, of every class, head first; a class that the test has not leaves a gap."""
    figure, axes = _axes()
    shown = [(i, value) for i, value in enumerate(accuracy) if value is not None]
    axes.bar(
        [i for i, _ in shown],
        [value for _, value in shown],
        color=[GROUP_COLORS[groups[i]] for i, _ in shown],
        width=0.85,
    )
    axes.set_ylim(0, 100)
    axes.set_ylabel(label)
    _name_classes(axes, names)
    _group_legend(axes, groups)
    return figure


def reliability(diagram: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw accuracy against confidence of every bin, a line a shot group; dots are as large as their bins are full."""
    figure, axes = _axes(height=3.2)
    axes.plot([0, 100], [0, 100], color=_INK, linewidth=0.8, linestyle=":")
    for group, bins in diagram.items():
        x, y = [entry["confidence"] for entry in bins], [entry["accuracy"] for entry in bins]
        color = GROUP_COLORS[group]
        axes.plot(x, y, color=color, linewidth=1.4, label=group)
        total = sum(entry["images"] for entry in bins)
        axes.scatter(x, y, [8 + 160 * entry["images"] / total for entry in bins], color=color, alpha=0.6)
    axes.set_xlim(0, 101)
    axes.set_ylim(0, 101)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def rejection(curve: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the accuracy over the most confident images against the share of them that is kept."""
    figure, axes = _axes(height=2.4)
    axes.plot(
        [point["kept"] for point in curve], [point["accuracy"] for point in curve], color=_LINES[0], linewidth=1.6
    )
    axes.set_xlim(100, 0)
    axes.set_xlabel("most confident images that are kept, %")
    axes.set_ylabel("accuracy, %")
    return figure


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel("classes, from head to tail")
    if len(names) <= 20:
        # a dollar sign would start a formula
        shown = [(name if len(name) <= 12 else f"{name[:11]}…").replace("$", r"\$") for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=0 if len(names) <= 10 else 45)


def _group_legend(axes: Axes, groups: Sequence[str]) -> None:
    patches = [Patch(color=color, label=group) for group, color in GROUP_COLORS.items() if group in groups]
    axes.legend(
        handles=patches, frameon=False, fontsize=8, labelcolor=_INK, ncols=3, loc="lower right", bbox_to_anchor=(1, 1)
    )


def curves(lines: Mapping[str, Sequence[float]], epochs: Sequence[int], label: str) -> Figure:
    """Draw values over epochs."""
    figure, axes = _axes()
    for index, (name, values) in enumerate(lines.items()):
        # dots and dashes let a line show that lies under another, as the two halves of a GML loss do
        color, style = _LINES[index % len(_LINES)], ("-", "--", ":", "-.")[index % 4]
        axes.plot(epochs, values, style, color=color, label=name.replace("_", " "), linewidth=1.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK, ncols=6, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def comparison(records: Sequence[Record]) -> Figure:
    """Draw every run as a dot, seeds joined across methods, and the mean of each method as a bar.

    A row an imbalance factor, where there are several.
    """
    methods, factors = methods_of(records), imbalances_of(records)
    names = [entry for entry in columns(records) if all(getattr(record, entry[0]) is not None for record in records)]
    width = max(2.4, 0.42 * len(methods))
    shown = [(name if len(name) <= 28 else f"{name[:27]}…").replace("$", r"\$") for name in methods]
    height = 3.4 + 0.06 * max(0, max(map(len, shown)) - 10)  # room for names that stand aslant
    figure = Figure(figsize=(width * len(names) + 0.6, height * len(factors)), layout="constrained")
    place = {method: position for position, method in enumerate(methods)}
    for (row, factor), (column, (name, title)) in itertools.product(enumerate(factors), enumerate(names)):
        here = [record for record in records if record.imbalance == factor]
        axes = figure.add_subplot(len(factors), len(names), row * len(names) + column + 1)
        _bare(axes)
        for seed in sorted({record.seed for record in here}):
            line = [(place[r.method], getattr(r, name)) for r in here if r.seed == seed]
            axes.plot(*zip(*sorted(line), strict=True), color=_INK, linewidth=0.7, alpha=0.6, marker="o", markersize=3)
        for method in methods:
            summary = summarize(here, method, name)
            if summary is None:
                continue
            color = _LINES[place[method] % len(_LINES)]
            axes.errorbar(
                place[method],
                summary.mean,
                yerr=summary.deviation,
                color=color,
                fmt="_",
                markersize=min(26, 110 / len(methods)),
                capsize=min(5, 22 / len(methods)),
                lw=2,
            )
        upright = len(methods) <= 5 and max(map(len, shown)) <= 10
        axes.set_xticks(range(len(methods)), shown, rotation=0 if upright else 60, ha="center" if upright else "right")
        axes.set_xlim(-0.6, len(methods) - 0.4)
        axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))
        axes.set_title(title if factor is None else f"{title}, imbalance {factor:g}")
        if column == 0:
            axes.set_ylabel("accuracy, %: mean and deviation over seeds")
    return figure


def along_the_tail(
    lines: Mapping[str, Sequence[float | None]], names: Sequence[str], window: int, label: str
) -> Figure:
    """Draw a value of every class, head first, a line a method; each point the mean over ``window`` classes around."""
    figure, axes = _axes(height=3.2)
    for index, (name, values) in enumerate(lines.items()):
        points = []
        for place in range(len(values)):
            near = values[max(0, place - window // 2) : place + window // 2 + 1]
            present = [value for value in near if value is not None]
            points.append(sum(present) / len(present) if present else float("nan"))
        color, dot = _LINES[index % len(_LINES)], "o" if window == 1 else ""
        axes.plot(points, color=color, linewidth=1.4, marker=dot, markersize=3, label=name.replace("$", r"\$"))
    axes.set_ylim(0, min(101, 1.05 * axes.get_ylim()[1]))
    axes.set_ylabel(label)
    _name_classes(axes, names)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=140, facecolor="white")
