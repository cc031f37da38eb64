"""Plots that compare runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from longtail.experiments.records import Record, columns, imbalances_of, methods_of, summarize
from longtail.plots import INK, LINE_COLORS, draw_line, label_classes, new_axes, plain_style, plain_text


def comparison(records: Sequence[Record]) -> Figure:
    """Draw every run as a dot, seeds joined across methods, and the mean of each method as a bar.

    A row an imbalance factor, where there are several.
    """
    methods, factors = methods_of(records), imbalances_of(records)
    names = [entry for entry in columns(records) if all(record.metrics[entry[0]] is not None for record in records)]
    width = max(2.4, 0.42 * len(methods))
    shown = [plain_text(name if len(name) <= 28 else f"{name[:27]}…") for name in methods]
    height = 3.4 + 0.06 * max(0, max(map(len, shown)) - 10)  # room for names that stand aslant
    figure = Figure(figsize=(width * len(names) + 0.6, height * len(factors)), layout="constrained")
    place = {method: position for position, method in enumerate(methods)}
    for (row, factor), (column, (name, title)) in itertools.product(enumerate(factors), enumerate(names)):
        here = [record for record in records if record.imbalance == factor]
        axes = figure.add_subplot(len(factors), len(names), row * len(names) + column + 1)
        plain_style(axes)
        for seed in sorted({record.seed for record in here}):
            line = [(place[r.method], r.metrics[name]) for r in here if r.seed == seed]
            axes.plot(*zip(*sorted(line), strict=True), color=INK, linewidth=0.7, alpha=0.6, marker="o", markersize=3)
        for method in methods:
            summary = summarize(here, method, name)
            if summary is None:
                continue
            color = LINE_COLORS[place[method] % len(LINE_COLORS)]
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
    figure, axes = new_axes(height=3.2)
    for index, (name, values) in enumerate(lines.items()):
        points = []
        for place in range(len(values)):
            near = values[max(0, place - window // 2) : place + window // 2 + 1]
            present = [value for value in near if value is not None]
            points.append(sum(present) / len(present) if present else float("nan"))
        draw_line(axes, range(len(points)), points, index, plain_text(name))
    axes.set_ylim(0, min(101, 1.05 * axes.get_ylim()[1]))
    axes.set_ylabel(label)
    label_classes(axes, names)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure
