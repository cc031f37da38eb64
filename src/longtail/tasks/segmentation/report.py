"""What the report of a segmentation shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from longtail import plots
from longtail.data.class_order import frequency_thirds, head_first
from longtail.data.palette import class_colors
from longtail.inference.model_config import ModelConfig
from longtail.tasks.base import Metrics, ReportSections
from longtail.tasks.segmentation.overlays import worst_examples


def report_sections(
    run: Path, model_config: ModelConfig, test: Mapping[str, Metrics], columns: list[tuple[str, str]]
) -> ReportSections:
    """Return the sections, see :meth:`longtail.tasks.base.Task.report`."""
    names, counts = model_config.class_names, model_config.class_counts
    groups, main = frequency_thirds(counts), test[model_config.predicts_under]
    order, iou = head_first(counts), main["per_class"]
    ordered = [names[i] for i in order], [groups[i] for i in order]
    return ReportSections(
        counted="labelled training pixels",
        note="Intersections and unions are summed over the test set. Head, middle and tail are thirds of the classes "
        "by their training pixels.",
        columns=columns,
        group_sizes={group: groups.count(group) for group in ("head", "middle", "tail")},
        figures=[
            (
                "Class distribution",
                plots.class_histogram(ordered[0], [counts[i] for i in order], ordered[1], "training pixels"),
            ),
            ("IoU by class", plots.per_class(ordered[0], [iou[i] for i in order], ordered[1], "IoU, %")),
        ],
        header=["class", "training pixels", "third", "IoU, %", "accuracy, %", "boundary IoU, %"],
        classes=[
            [
                names[i],
                f"{counts[i]:,}",
                groups[i],
                *(main[name][i] for name in ("per_class", "per_class_accuracy", "per_class_boundary")),
            ]
            for i in order
        ],
        examples=worst_examples(run, main["worst"]),
        examples_note="Test images with the most wrong pixels of a class: the image, the true labels, the prediction, "
        "and their difference (missed in red, wrongly predicted in blue, errors between other classes in grey).",
        colors=[(name, f"rgb{color}") for name, color in zip(names, class_colors(len(names)), strict=True)],
    )
