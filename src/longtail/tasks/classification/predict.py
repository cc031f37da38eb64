"""Classes and probabilities of image files, as they are printed and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from longtail.errors import LongtailError
from longtail.inference.options import TTA
from longtail.inference.output import PredictionOutput, prediction_table, readable_files
from longtail.inference.recognizer import Recognizer
from longtail.tasks.base import PredictionRequest, check_inference_options
from longtail.tasks.classification.calibration import conformal_images
from longtail.tasks.classification.console import conformal_line, estimate_lines


def predict_files(model: Recognizer, files: Sequence[Path], request: PredictionRequest) -> PredictionOutput:
    """Return the most probable classes of image files."""
    if request.out is not None:
        raise LongtailError(f"--out {request.out}: is for models that label pixels or find objects")
    check_inference_options(request.options, "image", "predict")
    if request.threshold is not None:
        raise LongtailError(f"--threshold {request.threshold:g}: is for models that find objects")
    tta = request.options.fixed_tta
    notes = [] if request.coverage is None else [_check_coverage(model, request.coverage, tta)]
    unreadable: dict[Path, str] = {}
    top: list[list[tuple[str, float]]] = []
    sets: list[list[str]] = []
    estimated = None
    for part in model.predict_batches(
        files, prior=request.prior, coverage=request.coverage, tta=tta, unreadable=unreadable
    ):
        top += part.top(request.top or 3)
        sets += part.sets or []
        estimated = part.prior
    readable = readable_files(files, unreadable)
    if estimated is not None:
        notes += estimate_lines({estimated.method: dataclasses.asdict(estimated)}, model.config.class_names)
    return prediction_table(readable, top, None if request.coverage is None else sets, notes, unreadable)


def _check_coverage(model: Recognizer, coverage: float, tta: TTA) -> str:
    """Return what the conformal sets rest on; raise LongtailError if that is so little that they hold every class."""
    model.conformal_thresholds(coverage, tta)  # raises where there are no validation images
    images, classes = conformal_images(model, coverage), len(model.config.class_names)
    if images["classes_below_minimum"] == classes:
        raise LongtailError(
            f"coverage: no class has {images['minimum_per_class']} validation images; every set would be all "
            f"{classes:,} classes"
        )
    return conformal_line(images)
