"""Detections in the format of COCO's result files: a list of image_id, category_id, bbox and score."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longtail.data.detection import Annotations, Detections
from longtail.errors import LongtailError
from longtail.evaluation.detection_matches import coco_masks


def to_results(
    detections: Sequence[Detections], image_ids: Sequence[int | str], class_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Return detections as COCO's result files have them.

    Args:
        detections: of each image.
        image_ids: of the images.
        class_ids: C ids of the classes in the annotations.
    """
    results = []
    for image_id, each in zip(image_ids, detections, strict=True):
        boxes = torch.cat([each.boxes[:, :2], each.boxes[:, 2:] - each.boxes[:, :2]], dim=1).double()
        rows = zip(each.labels.tolist(), boxes.tolist(), each.scores.tolist(), strict=True)
        for index, (label, box, score) in enumerate(rows):
            entry = {"image_id": image_id, "category_id": class_ids[label], "bbox": box, "score": score}
            if each.masks is not None:
                mask = dict(each.masks[index])
                if isinstance(mask["counts"], bytes):
                    mask["counts"] = mask["counts"].decode()
                entry["segmentation"] = mask
            results.append(entry)
    return results


def read_results(path: Path, annotations: Annotations) -> list[Detections]:
    """Return the detections of a result file, in the order of the annotations' images.

    Args:
        path: the file.
        annotations: of the images, with their ids and those of the classes.

    Raises:
        LongtailError: it is no such file, or names an image or class that the annotations have not.
    """
    entries = load_results(path, annotations.category_ids)
    image_of = {image_id: index for index, image_id in enumerate(annotations.image_ids)}
    label_of = {class_id: label for label, class_id in enumerate(annotations.category_ids)}
    by_image: list[list[dict[str, Any]]] = [[] for _ in annotations.files]
    with_masks = bool(entries) and all(entry.get("segmentation") for entry in entries)
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        if entry["image_id"] not in image_of:
            raise LongtailError(f"{where}: image_id {entry['image_id']!r} is not among the images of the annotations")
        box = entry["bbox"] if "bbox" in entry else coco_masks().toBbox(entry["segmentation"]) if with_masks else None
        if box is None or len(box) != 4 or not all(map(_is_number, box)):
            raise LongtailError(f"{where}: expected a bbox of four numbers (x, y, width, height)")
        by_image[image_of[entry["image_id"]]].append({**entry, "bbox": list(box)})
    return [_detections(found, label_of, with_masks) for found in by_image]


def load_results(path: Path, class_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return the entries of a result file as they are.

    Args:
        path: the file.
        class_ids: C ids of the classes in the annotations.

    Raises:
        LongtailError: it is no such file, or names a class that the annotations have not.
    """
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise LongtailError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise LongtailError(f"{path}: is no json: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(entries, list):
        raise LongtailError(f"{path}: expected a list of detections, as COCO's result files hold it")
    known = frozenset(class_ids)
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or not {"image_id", "category_id", "score"} <= set(entry):
            raise LongtailError(f"{where}: expected image_id, category_id, bbox and score")
        if entry["category_id"] not in known:
            raise LongtailError(
                f"{where}: category_id {entry['category_id']!r} is not among the annotations' categories"
            )
        if not _is_number(entry["score"]):
            raise LongtailError(f"{where}: expected a number as its score, got {entry['score']!r}")
    return entries


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _detections(entries: list[dict[str, Any]], label_of: dict[int, int], with_masks: bool) -> Detections:
    entries = sorted(entries, key=lambda entry: -entry["score"])
    boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        boxes.float(),
        torch.tensor([label_of[entry["category_id"]] for entry in entries], dtype=torch.int64),
        torch.tensor([entry["score"] for entry in entries], dtype=torch.float32),
        tuple(entry["segmentation"] for entry in entries) if with_masks else None,
    )
