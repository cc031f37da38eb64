"""Labels of the pixels of image files, written as label images and overlays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from longtail.errors import LongtailError
from longtail.inference.label_images import Labels, predict_label_images
from longtail.inference.output import SEGMENTED, PredictionOutput
from longtail.tasks.base import PredictionRequest
from longtail.tasks.segmentation.segmenter import Segmenter


def predict_files(model: Segmenter, files: Sequence[Path], request: PredictionRequest) -> PredictionOutput:
    """Write the labels of every image as a PNG, and an overlay."""
    if request.prior == "estimate" or request.coverage is not None:
        raise LongtailError("--prior estimate and --coverage are for models that classify whole images")
    if request.threshold is not None:
        raise LongtailError(f"--threshold {request.threshold:g}: is for models that find objects")
    model.log_prior(request.prior)  # refused before the first image

    def predict(image: Image.Image) -> Labels:
        labels: Labels = next(model.segment(image, request.prior, request.options)).numpy()
        return labels

    out = request.out or SEGMENTED
    return predict_label_images(files, predict, model.config.class_names, out, request.top, request.progress)
