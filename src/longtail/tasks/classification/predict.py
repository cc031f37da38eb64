"""Classes and probabilities of image files, as they are printed and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from longtail.errors import LongtailError
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
    unreadable: dict[Path, str] = {}
    predictions = model.predict(files, prior=request.prior, coverage=request.coverage, tta=tta, unreadable=unreadable)
    readable = readable_files(files, unreadable)
    notes = []
    if request.coverage is not None:
        notes.append(conformal_line(conformal_images(model, request.coverage)))
    if predictions.prior is not None:
        estimate = {predictions.prior.method: dataclasses.asdict(predictions.prior)}
        notes += estimate_lines(estimate, predictions.class_names)
    return prediction_table(readable, predictions.top(request.top or 3), predictions.sets, notes, unreadable)
