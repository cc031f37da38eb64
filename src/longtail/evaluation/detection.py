"""Metrics of detections: average precision of COCO and LVIS, by class, by groups of classes, with intervals.

Average precision and recall come from faster-coco-eval, intervals over images from a table of matches
(:mod:`longtail.evaluation.detection_matches`). Legend: N images, C classes, T IoU thresholds.

Sources: Lin et al., *Microsoft COCO: Common Objects in Context*, ECCV 2014; Gupta, Dollár & Girshick, *LVIS: A Dataset
for Large Vocabulary Instance Segmentation*, CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longtail.data.detection import Annotations, Detections
from longtail.data.detection.data import GROUPS, lvis_groups
from longtail.data.detection.run_lengths import check_runs
from longtail.errors import LongtailError
from longtail.evaluation.detection_matches import (
    IOU_THRESHOLDS,
    MAX_DETECTIONS,
    MAX_DETECTIONS_FEDERATED,
    Array,
    DetectionTable,
    IoUType,
    MatchTable,
    coco_library,
    detection_table,
    encode_mask,
    match_table,
)

RESAMPLES = 1000
"""Sets of images that an interval over images comes from."""
MIN_INTERVAL_IMAGES = 5
"""Images of a class from which on it has an interval: to draw fewer again and again says too little."""
_AREAS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
_BEYOND_AREAS = 1e12  # pixels: an object of no range is ignored, and by the usual IoU, as only crowds can be marked so
_MAX_PAIRS = 2_000_000  # of images and classes that the library looks at in one pass; it holds an entry for each


def detection_metrics(
    detections: Sequence[Detections],
    annotations: Annotations,
    *,
    image_counts: Sequence[int] | None = None,
    iou_type: IoUType = "bbox",
    max_detections: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the metrics of detections, in percent; None where there is no object to be found.

    Annotations with ``negatives`` are evaluated as LVIS: a class counts only in the images where it is known whether it
    is there, a detection that matches nothing is no error where a class is ``incomplete``, and 300 detections of an
    image count, over all classes.

    The intervals are over images: the middle 95 % of the metric over sets of N images that are drawn from the N with
    replacement. They leave out what another training of the detector, other classes, or another place to take
    photographs would change, and are too narrow for a class that few images have.

    Args:
        detections: N, in the order of the images.
        annotations: of the N images.
        image_counts: (C,) training images of each class, by which classes are rare, common or frequent; no groups if
            not given.
        iou_type: whether boxes or masks are compared.
        max_detections: the most of an image and class, or of an image if federated; 100 and 300 if not given.
        resamples: sets of images that intervals come from; 0 for no intervals.
        seed: of the draws.

    Returns:
        ``ap`` (mean over IoU 0.50 to 0.95 and over the classes with objects), ``ap50``, ``ap75``, ``ap_small``,
        ``ap_medium``, ``ap_large`` (objects by area: 32² and 96² pixels), ``ar`` (mean recall over the thresholds),
        with groups ``frequent``, ``common``, ``rare``; ``per_class`` (AP), ``per_class_ap50``, ``objects`` and
        ``class_images`` (those of each class that count, and the images they are in), ``operating_points`` (score of
        best F1 at IoU 0.50 with precision and recall there, chosen on these very images), ``images``; with intervals
        ``intervals`` by metric and ``per_class_interval``.

    Raises:
        LongtailError: the extra is missing or too old, or detections and annotations do not fit.
    """
    classes = len(annotations.class_names)
    if image_counts is not None and len(image_counts) != classes:
        raise LongtailError(f"image_counts: expected one for each of {classes} classes, got {len(image_counts)}")
    table = detection_table(detections, annotations, iou_type, max_detections)
    federated = annotations.negatives is not None
    limit = max_detections or (MAX_DETECTIONS_FEDERATED if federated else MAX_DETECTIONS)
    precision, recall = _coco_evaluation(table, annotations, iou_type, limit)
    matches = match_table(table, annotations)
    counts, class_images = matches.object_counts.sum(axis=0), (matches.object_counts > 0).sum(axis=0)
    members = _members(image_counts, classes)
    by_class = precision[:, :, 0]
    metrics: dict[str, Any] = {name: _percent(value) for name, value in _summary(by_class.T[None], members).items()} | {
        f"ap_{name}": _percent(_mean(precision[:, :, index + 1])) for index, name in enumerate(_AREAS)
    }
    metrics |= {
        "ar": _percent(_mean(recall)),
        "per_class": [_percent(_mean(values)) for values in by_class],
        "per_class_ap50": [_percent(_mean(values[:1])) for values in by_class],
        "objects": counts.tolist(),
        "class_images": class_images.tolist(),
        "operating_points": [_operating_point(matches, label, int(count)) for label, count in enumerate(counts)],
        "images": len(annotations),
    }
    if resamples:
        metrics |= _intervals(matches, members, class_images, resamples, seed)
    return metrics


def _members(image_counts: Sequence[int] | None, classes: int) -> dict[str, Array]:
    """Return the classes of each group, bool."""
    if image_counts is None:
        return {}
    groups = np.array(lvis_groups(image_counts))
    return {group: groups == group if classes else np.zeros(0, dtype=bool) for group in GROUPS}


def _mean(values: Array) -> float:
    """Return the mean of what is no NaN, NaN if nothing is."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _percent(value: float | Array) -> float | None:
    number = float(np.asarray(value).ravel()[0])
    return None if np.isnan(number) else 100 * number


def _summary(precision: Array, members: Mapping[str, Array]) -> dict[str, Array]:
    """Return (B,) values of the metrics from (B, T, C) average precision, NaN where no class has objects."""

    def over_classes(values: Array) -> Array:  # (B, T, C): a class has all thresholds or none
        present = ~np.isnan(values)
        sums = np.where(present, values, 0.0).sum(axis=(1, 2))
        counts = present.sum(axis=(1, 2))
        mean: Array = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
        return mean

    whole = {
        "ap": over_classes(precision),
        "ap50": over_classes(precision[:, :1]),
        "ap75": over_classes(precision[:, 5:6]),
    }
    return whole | {group: over_classes(precision[:, :, chosen]) for group, chosen in members.items()}


def _intervals(
    matches: MatchTable, members: Mapping[str, Array], class_images: Array, resamples: int, seed: int
) -> dict[str, Any]:
    whole: dict[str, list[Array]] = {}
    by_class: list[Array] = []
    for precision in matches.resampled_precision(resamples, seed):
        for name, values in _summary(precision, members).items():
            whole.setdefault(name, []).append(values)
        by_class.append(precision.mean(axis=1))
    classes = np.concatenate(by_class)
    return {
        "intervals": {name: _middle(np.concatenate(values)) for name, values in whole.items()},
        "per_class_interval": [
            _middle(classes[:, label]) if images >= MIN_INTERVAL_IMAGES else None
            for label, images in enumerate(class_images.tolist())
        ],
    }


def _middle(values: Array) -> list[float] | None:
    """Return the ends of the middle 95 % in percent; sets of images without the class say nothing."""
    present = values[~np.isnan(values)]
    return None if len(present) == 0 else [100 * float(end) for end in np.quantile(present, (0.025, 0.975))]


def _operating_point(matches: MatchTable, label: int, objects: int) -> dict[str, float] | None:
    """Return the score of best F1 at IoU 0.50, in [0, 1], with precision and recall from that score up, in percent."""
    scores, precision, recall = matches.precision_recall(label)
    if objects == 0 or not recall.any():
        return None
    last = np.r_[scores[1:] != scores[:-1], True]  # of equal scores all are taken or none
    scores, precision, recall = scores[last], precision[last], recall[last]
    best = int((2 * precision * recall / np.maximum(precision + recall, 1e-12)).argmax())
    return {
        "score": float(scores[best]),
        "precision": 100 * float(precision[best]),
        "recall": 100 * float(recall[best]),
    }


def _coco_evaluation(
    table: DetectionTable, annotations: Annotations, iou_type: IoUType, limit: int
) -> tuple[Array, Array]:
    """Return (C, T, 4) average precision, of all objects and by area, and (C, T) recall; NaN without objects."""
    library = coco_library()
    classes, images = len(annotations.class_names), len(annotations)
    ranges = {name: list(area) for name, area in _AREAS.items()}
    precision = np.full((classes, len(IOU_THRESHOLDS), 1 + len(ranges)), np.nan)
    recall = np.full((classes, len(IOU_THRESHOLDS)), np.nan)
    objects, results = _object_entries(annotations, iou_type), _result_entries(table)
    order = np.argsort(table.labels, kind="stable")
    sizes = annotations.sizes.tolist()
    info = [{"id": index + 1, "height": height, "width": width} for index, (height, width) in enumerate(sizes)]
    if annotations.negatives is not None:
        incomplete = annotations.incomplete or [frozenset[int]()] * images
        for entry, negative, partial in zip(info, annotations.negatives, incomplete, strict=True):
            entry |= {
                "neg_category_ids": [label + 1 for label in negative],
                "not_exhaustive_category_ids": [label + 1 for label in partial],
            }
    step = max(1, _MAX_PAIRS // max(1, images))
    for start in range(0, classes if images else 0, step):
        labels = range(start, min(classes, start + step))
        begin, end = np.searchsorted(table.labels[order], (labels.start, labels.stop))
        sets = []
        for entries in (
            [each for label in labels for each in objects[label]],
            [results[index] for index in np.sort(order[begin:end]).tolist()],
        ):
            one = library.COCO()
            one.dataset = {
                "images": info,
                "categories": [{"id": label + 1, "frequency": "f"} for label in labels],
                "annotations": entries,
            }
            one.createIndex()
            sets.append(one)
        evaluation = library.COCOeval_faster(
            *sets, iou_type, ranges=ranges, lvis_style=annotations.negatives is not None, print_function=_silent
        )
        evaluation.params.maxDets = [limit]
        evaluation.evaluate()
        evaluation.accumulate()
        values = evaluation.eval["precision"][..., 0]  # (T, recall levels, classes, areas)
        precision[labels.start : labels.stop] = np.where(values < 0, np.nan, values).mean(axis=1).transpose(1, 0, 2)
        values = evaluation.eval["recall"][:, :, 0, 0]
        recall[labels.start : labels.stop] = np.where(values < 0, np.nan, values).T
    return precision, recall


def _silent(*_: object) -> None:
    """Print nothing."""


def _object_entries(annotations: Annotations, iou_type: IoUType) -> list[list[dict[str, Any]]]:
    """Return the objects as COCO's annotations, by class."""
    by_class: list[list[dict[str, Any]]] = [[] for _ in annotations.class_names]
    if iou_type == "segm" and annotations.masks is None:
        raise LongtailError("annotations: have no masks, which iou_type segm compares; use bbox")
    sizes = annotations.sizes.tolist()
    columns = zip(
        annotations.image_index.tolist(),
        annotations.labels.tolist(),
        _sides(annotations.boxes.numpy()),
        annotations.areas.tolist(),
        annotations.ignored.tolist(),
        annotations.crowds.tolist(),
        strict=True,
    )
    for index, (image, label, box, area, ignored, crowd) in enumerate(columns):
        entry = {"id": index + 1, "image_id": image + 1, "category_id": label + 1, "bbox": box, "iscrowd": int(crowd)}
        entry["area"] = _BEYOND_AREAS if ignored and not crowd else area
        if iou_type == "segm":
            assert annotations.masks is not None
            mask = annotations.masks[index]
            if isinstance(mask, Mapping):
                try:
                    check_runs(mask, sizes[image])
                except LongtailError as error:
                    raise LongtailError(f"annotations: object {index} of {annotations.files[image]}: {error}") from None
            entry["segmentation"] = encode_mask(mask, sizes[image])
        by_class[label].append(entry)
    return by_class


def _result_entries(table: DetectionTable) -> list[dict[str, Any]]:
    """Return the detections as COCO's."""
    columns = zip(
        table.images.tolist(),
        table.labels.tolist(),
        _sides(table.boxes),
        table.areas.tolist(),
        table.scores.tolist(),
        strict=True,
    )
    entries: list[dict[str, Any]] = [
        {
            "id": index + 1,
            "image_id": image + 1,
            "category_id": label + 1,
            "bbox": box,
            "area": area,
            "score": score,
            "iscrowd": 0,
        }
        for index, (image, label, box, area, score) in enumerate(columns)
    ]
    for entry, mask in zip(entries, table.masks or (), strict=False):
        entry["segmentation"] = mask
    return entries


def _sides(boxes: Array) -> list[list[float]]:
    """Return corners as left, top, width and height."""
    boxes = boxes.astype(np.float64)
    sides: list[list[float]] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    return sides
