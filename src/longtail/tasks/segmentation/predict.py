"""Labels of the pixels of image files, written as label images and overlays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longtail.data.image_io import open_image, read_or_record
from longtail.errors import LongtailError
from longtail.inference.output import PredictionOutput, readable_files
from longtail.tasks.base import PredictionRequest
from longtail.tasks.segmentation.label_images import write_segmentation
from longtail.tasks.segmentation.segmenter import Segmenter


def predict_files(model: Segmenter, files: Sequence[Path], request: PredictionRequest) -> PredictionOutput:
    """Write the labels of every image as a PNG, and an overlay."""
    if request.prior == "estimate" or request.coverage is not None:
        raise LongtailError("--prior estimate and --coverage are for models that classify whole images")
    if request.threshold is not None:
        raise LongtailError(f"--threshold {request.threshold:g}: is for models that find objects")
    out = request.out or Path("segmented")
    model.log_prior(request.prior)  # refused before the first image
    names = model.config.class_names
    records: list[dict[str, Any]] = []
    unreadable: dict[Path, str] = {}
    for file in tqdm(files, unit="image", disable=not request.progress, leave=False):
        image = read_or_record(open_image, file, unreadable)
        if image is None:
            continue
        labels = next(model.segment(image, request.prior, request.options))
        counts = labels.flatten().bincount(minlength=len(names))
        present = [index for index in counts.argsort(descending=True).tolist() if counts[index]]
        label_file, overlay_file = write_segmentation(out, file, labels, len(names))
        shares = {names[index]: float(counts[index]) / labels.numel() for index in present}
        records.append({"path": str(file), "labels": str(label_file), "overlay": str(overlay_file), "shares": shares})
    readable_files(files, unreadable)  # an error if there is none
    rows = [
        [
            record["path"],
            record["labels"],
            ", ".join(f"{name} {value:.3f}" for name, value in list(record["shares"].items())[: request.top or 3]),
        ]
        for record in records
    ]
    notes = [f"labels (value 1 is {names[0]}) and overlays: {out}"]
    return PredictionOutput(records, ["path", "labels", "largest shares"], rows, notes, unreadable)
