"""Objects in image files: a table of boxes, drawings, and a result file in COCO's format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from longtail.data.detection import Detections
from longtail.data.image_io import open_image, read_or_record, to_rgb
from longtail.data.palette import class_colors
from longtail.data.prefetch import prefetch
from longtail.errors import LongtailError
from longtail.evaluation.detection_results import to_results
from longtail.files import atomic_write, write_text
from longtail.inference.model import Prior
from longtail.inference.options import InferenceOptions
from longtail.inference.output import (
    OBJECT_THRESHOLD,
    OBJECTS_HEADER,
    PredictionOutput,
    object_records,
    object_rows,
    readable_files,
)
from longtail.tasks.base import PredictionRequest
from longtail.tasks.detection.detector import Detector
from longtail.tasks.detection.drawing import draw_detections

RESULTS = "detections.json"
_MOST = 100  # of an image
_PAGE_THRESHOLD = 0.05  # of what a web page is sent, which hides a part of it


def check_request(prior: str, options: InferenceOptions, coverage: float | None) -> None:
    """Raise LongtailError if something is asked for that is not for detectors."""
    if prior == "estimate" or coverage is not None:
        raise LongtailError("--prior estimate and --coverage: are for models that classify whole images")
    if options != InferenceOptions():
        raise LongtailError("--tta, --tta_scales and --sliding_window: are not for models that find objects")


def predict_files(model: Detector, files: Sequence[Path], request: PredictionRequest) -> PredictionOutput:
    """Return the objects of image files; write drawings and a result file if a folder is given."""
    check_request(request.prior, request.options, request.coverage)
    threshold = OBJECT_THRESHOLD if request.threshold is None else request.threshold
    names, most = model.config.class_names, request.top or _MOST
    unreadable: dict[Path, str] = {}
    opened: list[tuple[Path, str, Image.Image | None]] = []  # with its drawing's name, of those not yet written

    def decoded() -> Iterator[Image.Image]:
        images = prefetch(lambda file: read_or_record(_open_rgb, file, unreadable), files)
        for drawing, (file, image) in zip(_drawing_names(files), images, strict=True):
            if image is not None:
                opened.append((file, drawing, None if request.out is None else image))
                yield image

    records: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    every: list[Detections] = []
    model.log_prior(request.prior)  # refused before the first image
    found_in_each = model.find(decoded(), score_threshold=threshold, max_detections=most, prior=request.prior)
    readable: list[Path] = []
    for each in tqdm(found_in_each, total=len(files), unit="image", disable=not request.progress, leave=False):
        file, drawing, image = opened.pop(0)
        readable.append(file)
        detections = _above(each, threshold, most)
        every.append(detections)
        objects = _objects(detections, names)
        record: dict[str, Any] = {"path": str(file), "objects": objects}
        if request.out is not None and image is not None:
            record["drawing"] = str(request.out / drawing)
            _write_drawing(request.out / drawing, image, detections, names)
        records.append(record)
        rows += object_rows(file, objects)
    readable_files(files, unreadable)  # an error if there is none
    notes = [f"objects with a score of at least {threshold:g}"]
    if request.out is not None:
        ids = _image_ids(readable)
        class_ids = model.config.class_ids or tuple(range(1, len(names) + 1))
        # with paths and names, as the ids of annotations that the file is evaluated on may be others
        results = to_results(every, ids, class_ids, [str(file) for file in readable], names)
        lines = [json.dumps(entry) for entry in results]
        write_text(request.out / RESULTS, "[\n" + ",\n".join(lines) + "\n]\n")  # an object a line
        for record, image_id in zip(records, ids, strict=True):
            record["image_id"] = image_id
        notes.append(f"drawings and {RESULTS} (category {class_ids[0]} is {names[0]}): {request.out}")
    return PredictionOutput(records, OBJECTS_HEADER, rows, notes, unreadable)


def find_objects(model: Detector, image: Image.Image, prior: Prior) -> list[dict[str, Any]]:
    """Return the objects of one RGB image with the colours of their classes, for a web page."""
    unsorted = next(model.find([image], score_threshold=_PAGE_THRESHOLD, max_detections=_MOST, prior=prior))
    detections = _above(unsorted, _PAGE_THRESHOLD, _MOST)
    names = model.config.class_names
    css = [f"rgb{color}" for color in class_colors(len(names))]
    objects = zip(_objects(detections, names), detections.labels.tolist(), strict=True)
    return [{**entry, "color": css[label]} for entry, label in objects]


def _open_rgb(file: Path) -> Image.Image:
    return to_rgb(open_image(file))


def _above(detections: Detections, threshold: float, most: int) -> Detections:
    """Return the detections from a score up, on the CPU, the highest first."""
    boxes, labels, scores = (tensor.detach().cpu() for tensor in detections[:3])
    order = scores.argsort(descending=True, stable=True)
    kept = order[scores[order] >= threshold][:most]
    masks = None if detections.masks is None else tuple(detections.masks[index] for index in kept.tolist())
    return Detections(boxes[kept], labels[kept], scores[kept], masks)


def _objects(detections: Detections, names: Sequence[str]) -> list[dict[str, Any]]:
    boxes, labels, scores = (tensor.tolist() for tensor in detections[:3])
    return object_records(boxes, labels, scores, names)


def _image_ids(files: Sequence[Path]) -> list[int]:
    """Return the numbers in the names of COCO's files (000000012.jpg is 12), or 1, 2, … where not all have such."""
    stems = [file.stem for file in files]
    if all(stem.isascii() and stem.isdigit() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return [int(stem) for stem in stems]
    return list(range(1, len(files) + 1))


def _drawing_names(files: Sequence[Path]) -> list[str]:
    """Return the name of every drawing; a number tells images of one name from several folders apart."""
    names: list[str] = []
    taken = Counter[str]()
    for file in files:
        taken[file.stem] += 1
        number = "" if taken[file.stem] == 1 else f"-{taken[file.stem]}"
        names.append(f"{file.stem}-objects{number}.jpg")
    return names


def _write_drawing(path: Path, image: Image.Image, detections: Detections, names: Sequence[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtailError(f"{path.parent}: cannot be made: {error.strerror}") from None
    drawing = draw_detections(image, detections, names)
    atomic_write(path, lambda partial: drawing.save(partial, "JPEG", quality=90))
