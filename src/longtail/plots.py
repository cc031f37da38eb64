"""Plots of one run or data set, as SVG for a page or as PNG. Classes are in order of frequency, head first."""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from longtail.data.paths import printable
from longtail.files import atomic_write

GROUP_COLORS = {"many": "#4477aa", "medium": "#b8860b", "few": "#cc5566"}
GROUP_COLORS |= {
    name: color
    for names in (("head", "middle", "tail"), ("frequent", "common", "rare"))
    for name, color in zip(names, ("#4477aa", "#b8860b", "#cc5566"), strict=True)
}
_EAST_ASIAN_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans", "WenQuanYi Zen Hei", "Microsoft YaHei"),
    *("PingFang SC", "Hiragino Sans", "Malgun Gothic"),
)
INK = "#808890"  # legible on white and on near-black, since the page follows the reader's choice
LINE_COLORS = ("#4477aa", "#cc5566", "#b8860b", "#603cfc", "#549ca8", "#a84824", "#6c84fc")
"""Legible on both, and apart from each other with protanopia and deuteranopia too."""
_LINE_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^")
_MARKED = 12  # points of a long line that have a marker


def new_axes(width: float = 8.0, height: float = 2.8) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes; the size is in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    plain_style(axes)
    return figure, axes


def plain_style(axes: Axes) -> None:
    """Remove the frame, and use colours that are legible on white and on black."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(INK)
        label.set_fontsize(9)


def draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], index: int, label: str) -> None:
    """Draw one of several lines so that it differs from the others in dashes and marker, not in its colour alone.

    Args:
        axes: to draw on.
        x: of the points.
        y: of the points.
        index: of the line; 84 differ, 12 without their colours.
        label: in the legend.
    """
    # markers of several lines through the same points are not all at the same ones
    every = max(1, len(x) // _MARKED)
    axes.plot(
        x,
        y,
        color=LINE_COLORS[index % len(LINE_COLORS)],
        linestyle=_LINE_STYLES[index % len(_LINE_STYLES)],
        marker=_MARKERS[index % len(_MARKERS)],
        markevery=(index % every, every),
        markersize=4,
        linewidth=1.6,
        label=label,
    )


def svg(figure: Figure, label: str) -> str:
    """Return a figure as an ``<svg>`` element; text stays text.

    Args:
        figure: to draw.
        label: what it shows, which a screen reader says in its place.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "longtail"}), warnings.catch_warnings():
        # the reader's browser draws the text, so what matplotlib's own font lacks does not matter
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    drawing = text[text.index("<svg") + len("<svg") :]
    return f'<svg role="img" aria-label="{html.escape(label)}"{drawing}'


def class_histogram(
    names: Sequence[str], counts: Sequence[int], groups: Sequence[str], counted: str = "training images"
) -> Figure:
    """Draw the training images, or pixels, of every class, head first, coloured by group."""
    figure, axes = new_axes()
    bottom = 0.8 if min(counts) < 1000 else min(counts) / 3
    axes.set_yscale("log")
    axes.set_ylim(bottom, 1.3 * max(*counts, 1))
    _bars(axes, list(enumerate(counts)), groups, bottom)
    if max(counts) < 100 * max(min(counts), 1):  # within two decades, powers of ten alone would be one label or two
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(counted)
    label_classes(axes, names)
    _group_legend(axes, groups)
    return figure


def _bars(axes: Axes, heights: Sequence[tuple[int, float]], groups: Sequence[str], bottom: float = 0.0) -> None:
    """Draw bars of (class, height), one outline for each group: a shape for each of 8,000 classes takes ten seconds."""
    for group in dict.fromkeys(groups):
        bars = np.array([(i, max(height, bottom)) for i, height in heights if groups[i] == group]).reshape(-1, 2)
        left, right, top = bars[:, 0] - 0.425, bars[:, 0] + 0.425, bars[:, 1]
        base = np.full_like(top, bottom)
        corners = np.stack([left, base, left, top, right, top, right, base, left, base], axis=1).reshape(-1, 2)
        codes = np.tile([Outline.MOVETO, *(Outline.LINETO,) * 3, Outline.CLOSEPOLY], len(bars))
        axes.add_patch(PathPatch(Outline(corners, codes), facecolor=GROUP_COLORS[group], linewidth=0))


def per_class(
    names: Sequence[str], accuracy: Sequence[float | None], groups: Sequence[str], label: str = "accuracy, %"
) -> Figure:
    """Draw the accuracy, or IoU, of every class, head first; a dot is a 0, a gap a class without test images."""
    figure, axes = new_axes()
    shown = [(i, value) for i, value in enumerate(accuracy) if value is not None]
    _bars(axes, shown, groups)
    zeros = [i for i, value in shown if value == 0]
    axes.scatter(
        zeros,
        [0] * len(zeros),
        14,
        color=[GROUP_COLORS[groups[i]] for i in zeros],
        clip_on=False,
        linewidths=0,
        zorder=3,
    )
    axes.set_ylim(0, 100)
    axes.set_ylabel(label)
    label_classes(axes, names)
    _group_legend(axes, groups, zeros=bool(zeros))
    return figure


_MIN_BIN_IMAGES = 10  # of a bin of the reliability diagram, for its accuracy to be joined to its neighbours' by a line


def reliability(diagram: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw accuracy against confidence, one colour per shot group.

    The size of a dot shows how many images are in its bin, the bar the 95 % interval of its accuracy; bins of fewer
    than ten images are not joined by a line.
    """
    figure, axes = new_axes(height=3.2)
    axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=":")
    for group, bins in diagram.items():
        x, y = [entry["confidence"] for entry in bins], [entry["accuracy"] for entry in bins]
        color, total = GROUP_COLORS[group], sum(entry["images"] for entry in bins)
        joined = [
            (a, b if entry["images"] >= _MIN_BIN_IMAGES else math.nan) for a, b, entry in zip(x, y, bins, strict=True)
        ]
        axes.plot([a for a, _ in joined], [b for _, b in joined], color=color, linewidth=1.4, label=group)
        axes.scatter(x, y, [8 + 160 * entry["images"] / total for entry in bins], color=color, alpha=0.6)
        for a, entry in zip(x, bins, strict=True):
            if "interval" in entry:
                axes.plot([a, a], entry["interval"], color=color, linewidth=0.8, alpha=0.5)
    axes.set_xlim(0, 101)
    axes.set_ylim(0, 101)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def rejection(curve: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the accuracy over the most confident images against the share of them that is kept."""
    figure, axes = new_axes(height=2.4)
    axes.plot(
        [point["kept"] for point in curve], [point["accuracy"] for point in curve], color=LINE_COLORS[0], linewidth=1.6
    )
    axes.set_xlim(100, 0)
    axes.set_xlabel("most confident images that are kept, %")
    axes.set_ylabel("accuracy, %")
    return figure


def plain_text(text: str) -> str:
    """Return a name as Matplotlib takes it: printable, and without a dollar sign that would start a formula."""
    return printable(text).replace("$", r"\$")


def label_classes(axes: Axes, names: Sequence[str]) -> None:
    """Write the names of the classes below the axes, if there are few enough."""
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel("classes, from head to tail")
    if len(names) <= 20:
        shown = [plain_text(name if len(name) <= 12 else f"{name[:11]}…") for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=0 if len(names) <= 10 else 45)


def _group_legend(axes: Axes, groups: Sequence[str], zeros: bool = False) -> None:
    handles: list[Artist] = [
        Patch(color=color, label=group) for group, color in GROUP_COLORS.items() if group in groups
    ]
    if zeros:
        handles.append(Line2D([], [], color=INK, marker="o", markersize=4, linestyle="", label="0 %"))
    axes.legend(
        handles=handles, frameon=False, fontsize=8, labelcolor=INK, ncols=4, loc="lower right", bbox_to_anchor=(1, 1)
    )


def curves(lines: Mapping[str, Sequence[float]], epochs: Sequence[int], label: str) -> Figure:
    """Draw values over epochs."""
    figure, axes = new_axes()
    for index, (name, values) in enumerate(lines.items()):
        # dots and dashes let a line show that lies under another, as the two halves of a GML loss do
        draw_line(axes, epochs, values, index, name.replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=6, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    installed = {font.name for font in fontManager.ttflist}
    families = [*mpl.rcParams["font.family"], *(name for name in _EAST_ASIAN_FONTS if name in installed)]
    for text in figure.findobj(Text):
        text.set_fontfamily(families)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
        atomic_write(path, lambda partial: figure.savefig(partial, dpi=140, facecolor="white", format="png"))
