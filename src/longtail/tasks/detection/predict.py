"""Objects in image files: a table of boxes, drawings, and a result file in COCO's format."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from longtail.data.detection import DEFAULT_POST_PROCESSING, Detections, PostProcessing
from longtail.data.image_io import open_image, read_or_record, to_rgb
from longtail.data.palette import class_colors
from longtail.data.paths import printable
from longtail.data.prefetch import prefetch
from longtail.errors import LongtailError
from longtail.evaluation.detection_results import load_results, to_results
from longtail.files import write_text
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
from longtail.inference.pictures import OBJECTS, PictureNames, write_picture
from longtail.tasks.base import PredictionRequest
from longtail.tasks.detection.detector import Detector
from longtail.tasks.detection.drawing import draw_detections

RESULTS = "detections.json"
_ADVICE = "name another --out"


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
    names, most = model.config.class_names, request.top or DEFAULT_POST_PROCESSING.max_detections
    classes = dict(zip(model.config.class_ids or range(1, len(names) + 1), names, strict=True))
    drawings = None if request.out is None else PictureNames(request.out, (OBJECTS,))
    earlier = [] if request.out is None else _earlier_results(request.out / RESULTS, files, classes)
    unreadable: dict[Path, str] = {}
    opened: list[tuple[Path, Image.Image | None]] = []  # the image if it is to be drawn on, of those not yet written

    def decoded() -> Iterator[Image.Image]:
        for file, image in prefetch(lambda file: read_or_record(_open_rgb, file, unreadable), files):
            if image is not None:
                opened.append((file, None if request.out is None else image))
                yield image

    found: list[tuple[Path, Detections, dict[str, Any]]] = []  # with the record of the image
    kept: list[dict[str, Any]] = []
    model.log_prior(request.prior)  # refused before the first image
    post_processing = PostProcessing(score_threshold=threshold, max_detections=most)
    found_in_each = model.find(decoded(), post_processing, request.prior)
    try:
        for each in tqdm(found_in_each, total=len(files), unit="image", disable=not request.progress, leave=False):
            file, image = opened.pop(0)
            detections = _above(each, threshold, most)
            record: dict[str, Any] = {"path": str(file), "objects": _objects(detections, names)}
            found.append((file, detections, record))
            if drawings is not None and image is not None:
                (drawing,) = drawings.paths(file)
                write_picture(drawing, draw_detections(image, detections, names), file)
                record["drawing"] = str(drawing)
    finally:  # also what was found before Ctrl-C, or before an image that fails
        if request.out is not None and found:
            kept = _of_others(earlier, [file for file, _, _ in found])
            _write_results(request.out / RESULTS, found, classes, kept)
    readable_files(files, unreadable)  # an error if there is none
    notes = [f"objects with a score of at least {threshold:g}"]
    if request.out is not None:
        notes.append(f"drawings and {RESULTS} (category {next(iter(classes))} is {names[0]}): {request.out}")
    if kept:
        others = len({entry["file_name"] for entry in kept})
        notes.append(f"{RESULTS} keeps the objects of earlier predictions of other images ({others:,})")
    rows = [row for file, _, record in found for row in object_rows(file, record["objects"])]
    return PredictionOutput([record for _, _, record in found], OBJECTS_HEADER, rows, notes, unreadable)


def find_objects(model: Detector, image: Image.Image, prior: Prior) -> list[dict[str, Any]]:
    """Return the objects of one RGB image with the colours of their classes, for a web page."""
    limits = DEFAULT_POST_PROCESSING  # the page hides a part of it
    unsorted = next(model.find([image], limits, prior))
    detections = _above(unsorted, limits.score_threshold, limits.max_detections)
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


def _earlier_results(path: Path, files: Sequence[Path], classes: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return the entries of the result file of earlier predictions; none if there is no file.

    Raises:
        LongtailError: it is another program's file, or objects in other images are of classes that the model lacks.
    """
    if not path.exists():
        return []
    try:
        entries = load_results(path)
    except LongtailError as error:
        raise LongtailError(f"{error}; it is no file of longtail predict, which would replace it: {_ADVICE}") from None
    if not all("file_name" in entry for entry in entries):
        raise LongtailError(f"{path}: has entries without file_name, which longtail predict would lose; {_ADVICE}")
    for entry in _of_others(entries, files):
        class_id = entry["category_id"]
        if class_id not in classes or entry.get("category_name", classes[class_id]) != classes[class_id]:
            raise LongtailError(
                f"{path}: category {class_id!r} of {printable(entry['file_name'])}, which is not predicted now, is no "
                f"class of this model; {_ADVICE}"
            )
    return entries


def _of_others(entries: Sequence[dict[str, Any]], files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the entries of a result file that are not of some images."""
    paths = {file.resolve() for file in files}
    others = {name for name in {entry["file_name"] for entry in entries} if Path(name).resolve() not in paths}
    return [entry for entry in entries if entry["file_name"] in others]


def _write_results(
    path: Path,
    found: Sequence[tuple[Path, Detections, dict[str, Any]]],
    classes: Mapping[int, str],
    kept: Sequence[dict[str, Any]],
) -> None:
    """Write the entries of earlier predictions and the objects that were found, and add their ``image_id`` to records.

    With paths and names, as the ids of annotations that the file is evaluated on may be others.
    """
    files, detections, records = zip(*found, strict=True)
    ids = _image_ids(files, {entry["image_id"] for entry in kept})
    results = to_results(detections, ids, list(classes), [str(file) for file in files], list(classes.values()))
    lines = [json.dumps(entry) for entry in [*kept, *results]]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")  # an object a line
    for record, image_id in zip(records, ids, strict=True):
        record["image_id"] = image_id


def _image_ids(files: Sequence[Path], taken: set[int | str]) -> list[int]:
    """Return the numbers in the names of COCO's files (000000012.jpg is 12), or 1, 2, … where not all have such.

    Args:
        files: of the images.
        taken: ids of other images.
    """
    stems = [file.stem for file in files]
    if all(stem.isascii() and stem.isdigit() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(taken.union(numbers)) == len(taken) + len(numbers):
            return numbers
    free = (number for number in itertools.count(1) if number not in taken)
    return list(itertools.islice(free, len(files)))
