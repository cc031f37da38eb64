"""What is printed of a detector's metrics, and what cannot be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longtail.errors import LongtailError
from longtail.tasks.base import EvaluationRequest
from longtail.tasks.detection.predict import check_request

_MOST_CLASSES = 20  # that are printed, each on a line


def check_evaluation(request: EvaluationRequest) -> None:
    """Raise LongtailError if something is asked for that is not for detectors."""
    check_request(request.prior, request.options, request.coverage)
    if request.test_prior is not None:
        raise LongtailError(f"--test_prior {request.test_prior}: is for models that classify whole images")


def metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the interval of AP, the metrics of masks, and the classes if they are few; from what ``--json`` holds."""
    lines = [] if len(metrics["priors"]) == 1 else [f"under the {metrics['prior']} prior:"]
    for title, values in (("AP", metrics), ("mask AP", metrics.get("masks"))):
        if values is None:
            continue
        ends = values.get("intervals", {}).get("ap")
        interval = "" if ends is None else f", 95 % interval over images {ends[0]:.1f} to {ends[1]:.1f}"
        masks = "" if values is metrics else f", AP50 {_number(values['ap50'])}, AP75 {_number(values['ap75'])}"
        lines.append(f"{title} {_number(values['ap'])}{masks}{interval}")
    names, counts = metrics["class_names"], metrics.get("class_counts")
    if len(names) <= _MOST_CLASSES:
        intervals = metrics.get("per_class_interval", [None] * len(names))
        for label, name in enumerate(names):
            ends = intervals[label]
            interval = "" if ends is None else f" ({ends[0]:.1f} to {ends[1]:.1f})"
            trained = "" if counts is None else f", {counts[label]:,} training objects"
            lines.append(
                f"{name}: AP {_number(metrics['per_class'][label])}{interval}, "
                f"AP50 {_number(metrics['per_class_ap50'][label])}, {metrics['objects'][label]:,} test objects{trained}"
            )
    return lines


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"
