"""What the report of a detector's run shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from longtail import plots
from longtail.data.class_order import head_first
from longtail.data.data_uri import file_data_uri
from longtail.data.detection.data import GROUPS, lvis_groups
from longtail.inference.model_config import ModelConfig
from longtail.tasks.base import Metrics, ReportSections
from longtail.tasks.detection.error_images import error_image

_KINDS = {
    "other": "on {other}",
    "double": "a second one of an object",
    "shifted": "off its object",
    "nothing": "no object there",
}


def report_sections(
    run: Path, model_config: ModelConfig, test: Mapping[str, Metrics], columns: Sequence[tuple[str, str]]
) -> ReportSections:
    """Return the sections, see :meth:`longtail.tasks.base.Task.report`."""
    names, objects = model_config.class_names, model_config.class_counts
    counts = model_config.image_counts or objects
    main = test[model_config.predicts_under]
    groups, order = lvis_groups(counts), head_first(counts)
    ordered = [names[i] for i in order], [groups[i] for i in order]
    average = main["per_class"]
    intervals = main.get("per_class_interval", [None] * len(names))
    low_high = main.get("intervals", {}).get("ap")
    interval = (
        "" if low_high is None else f" AP has the 95 % interval {low_high[0]:.1f} to {low_high[1]:.1f} over images."
    )
    figures = [
        (
            "Class distribution",
            plots.class_histogram(ordered[0], [counts[i] for i in order], ordered[1], "training images"),
        ),
        ("AP over training images", _over_images(counts, average, intervals, groups, names)),
    ]
    if main.get("curves"):
        figures.append(("Precision and recall at IoU 0.5", _curves(main["curves"], names)))
    return ReportSections(
        counted="training objects",
        note="AP is COCO's: the mean over IoU thresholds from 0.50 to 0.95 and over the classes with test objects. A "
        f"class is rare with at most 10 training images, common with at most 100, else frequent.{interval} Intervals "
        "are over images, by the bootstrap: they leave out what another training would change.",
        columns=[(name, title) for name, title in columns if name in main and (name not in GROUPS or name in groups)],
        group_sizes={group: groups.count(group) for group in GROUPS},
        figures=figures,
        header=[
            "class",
            "train objects",
            "train images",
            "group",
            "test objects",
            "AP, %",
            "95 % interval",
            "AP50, %",
            "threshold",
            "recall, %",
            "precision, %",
        ],
        classes=[
            [
                names[i],
                f"{objects[i]:,}",
                f"{counts[i]:,}",
                groups[i],
                f"{main['objects'][i]:,}",
                average[i],
                "" if intervals[i] is None else f"{intervals[i][0]:.0f} to {intervals[i][1]:.0f}",
                main["per_class_ap50"][i],
                *_operating_point(main["operating_points"][i]),
            ]
            for i in order
        ],
        errors=_errors(run, names, main.get("examples", {})),
        errors_note="At IoU 0.5. A false detection, or a missed object, is outlined in red, the annotated objects "
        "around it in blue dashes. At most one of an image and three of a class. In the table below, the threshold is "
        "the score of a class's best F1, with recall and precision there; it is chosen on these test images.",
        errors_width=10,
    )


def _operating_point(point: Mapping[str, float] | None) -> tuple[str, float | None, float | None]:
    return ("", None, None) if point is None else (f"{point['score']:.2f}", point["recall"], point["precision"])


def _errors(
    run: Path, names: Sequence[str], examples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[tuple[str, list[tuple[str, Any, str]]]]:
    """Return the examples of which the run has kept a picture."""
    sections: list[tuple[str, list[tuple[str, Any, str]]]] = []
    for kind, heading in (
        ("false", "False detections of highest score"),
        ("missed", "Missed objects, rare classes first"),
    ):
        pictures: list[tuple[str, Any, str]] = []
        for number, entry in enumerate(examples.get(kind, ())):
            file = error_image(run, kind, number)
            if not file.is_file():
                continue
            name = names[entry["class"]]
            if kind == "missed":
                pictures.append((file_data_uri(file), name, f"a missed object of the class {name}"))
                continue
            other = names[entry["other"]] if "other" in entry else ""
            what, score = _KINDS[entry["kind"]].format(other=other), f"{entry['score']:.0f}\N{NO-BREAK SPACE}%"
            caption = Markup("<bdi>{}</bdi>, {}<br><span class=soft>{}</span>").format(name, score, what)
            pictures.append((file_data_uri(file), caption, f"{name}, {score}: {what}"))
        if pictures:
            sections.append((heading, pictures))
    return sections


def _over_images(
    counts: Sequence[int],
    average: Sequence[float | None],
    intervals: Sequence[Sequence[float] | None],
    groups: Sequence[str],
    names: Sequence[str],
) -> Figure:
    """Draw AP against training images, a dot a class, with intervals, and names where they are few."""
    figure, axes = plots.new_axes(height=3.2)
    axes.set_xscale("log")
    for group in GROUPS:
        points = [(i, value) for i, value in enumerate(average) if groups[i] == group and value is not None]
        if not points:
            continue
        color = plots.GROUP_COLORS[group]
        x = [max(counts[i], 1) for i, _ in points]
        axes.scatter(x, [value for _, value in points], 22, color=color, label=group, alpha=0.8, linewidths=0)
        for place, (index, value) in zip(x, points, strict=True):
            ends = intervals[index]
            if ends is not None:
                axes.plot([place, place], ends, color=color, linewidth=0.9, alpha=0.6)
            if len(names) <= 20:
                text = plots.plain_text(names[index])
                axes.annotate(
                    text,
                    (place, value),
                    (5, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=plots.INK,
                )
    for border in (10, 100):
        axes.axvline(border, color=plots.INK, linewidth=0.6, linestyle=":")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    low, high = min(counts, default=1), max(counts, default=1)
    axes.set_xlim(max(0.7, 0.6 * low), 2.5 * max(high, 1))
    axes.set_ylim(0, 100)
    axes.set_xlabel("training images of the class")
    axes.set_ylabel("AP, %")
    axes.legend(frameon=False, fontsize=8, labelcolor=plots.INK, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def _curves(curves: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Draw precision against recall, a line a class."""
    figure, axes = plots.new_axes(height=3.2)
    for index, curve in enumerate(curves):
        name = plots.plain_text(names[curve["class"]])
        plots.draw_line(axes, curve["recall"], curve["precision"], index, name)
    axes.set_xlim(0, 101)
    axes.set_ylim(0, 101)
    axes.set_xlabel("recall, %")
    axes.set_ylabel("precision, %")
    axes.legend(frameon=False, fontsize=8, labelcolor=plots.INK, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure
