"""What a report shows of a detector's errors: most confident false detections, missed objects of rare classes, curves.

All at IoU 0.5. Legend: C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from longtail.data.detection import Annotations, Detections
from longtail.evaluation.detection_matches import Array, MatchTable, detection_table, match_table

MOST_EXAMPLES = 12
"""Of a kind."""
_OF_A_CLASS = 3
_CURVES = 3  # of the rarest classes, and of the most frequent ones
_LEVELS = np.linspace(0, 1, 51)


def precision_recall_curves(
    detections: Sequence[Detections], annotations: Annotations, image_counts: Sequence[int]
) -> list[dict[str, Any]]:
    """Return precision at 51 levels of recall, both in percent, for the most frequent and the rarest tested classes.

    Precision is the largest at that recall or a higher one, as average precision takes it; a curve ends where the
    recall ends.
    """
    matches = match_table(detection_table(detections, annotations), annotations)
    tested = np.flatnonzero(matches.object_counts.sum(axis=0) > 0)
    order = tested[np.argsort(-np.asarray(image_counts)[tested], kind="stable")].tolist()
    chosen = order if len(order) <= 2 * _CURVES else [*order[:_CURVES], *order[-_CURVES:]]
    curves = []
    for label in chosen:
        _, precision, recall = matches.precision_recall(label)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        levels = (
            _LEVELS[: np.searchsorted(_LEVELS, recall.max(initial=0.0), side="right")] if len(recall) else _LEVELS[:0]
        )
        values = 100 * envelope[np.searchsorted(recall, levels)]
        curves.append({"class": label, "recall": (100 * levels).round(1).tolist(), "precision": values.tolist()})
    return curves


def error_examples(
    detections: Sequence[Detections], annotations: Annotations, image_counts: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """Return false detections and missed objects, each with ``image`` (position), ``class`` and ``box``.

    ``false`` are the detections of highest score that match no object, with ``score`` (percent) and ``kind``: of
    another class (``other``), a second one of an object (``double``), off an object of its class (``shifted``), or
    where there is nothing (``nothing``). ``missed`` are objects that no detection matches, of rare classes first. At
    most one of an image and three of a class.
    """
    table = detection_table(detections, annotations)
    matches = match_table(table, annotations)
    return {
        "false": _false_detections(detections, matches, annotations),
        "missed": _missed_objects(matches, annotations, image_counts),
    }


def _false_detections(
    detections: Sequence[Detections], matches: MatchTable, annotations: Annotations
) -> list[dict[str, Any]]:
    wrong = np.flatnonzero((matches.matched[0] < 0) & ~matches.ignored[0])
    wrong = wrong[np.argsort(-matches.scores[wrong], kind="stable")]
    chosen = _diverse(wrong, matches.images, matches.labels)
    examples = []
    for index in chosen:
        image, position, label = (int(each[index]) for each in (matches.images, matches.positions, matches.labels))
        box = detections[image].boxes[position]
        kind, other = _kind(box.numpy().astype(np.float64), label, image, annotations)
        score = 100 * float(matches.scores[index])
        entry: dict[str, Any] = {"image": image, "class": label, "box": box.tolist(), "score": score, "kind": kind}
        examples.append(entry if other is None else {**entry, "other": other})
    return examples


def _diverse(candidates: Array, images: Array, labels: Array) -> list[int]:
    """Return the first candidates, one of an image and few of a class."""
    chosen: list[int] = []
    seen, of_class = set[int](), Counter[int]()
    for index in candidates.tolist():
        image, label = int(images[index]), int(labels[index])
        if image in seen or of_class[label] == _OF_A_CLASS:
            continue
        seen.add(image)
        of_class[label] += 1
        chosen.append(index)
        if len(chosen) == MOST_EXAMPLES:
            break
    return chosen


def _kind(box: Array, label: int, image: int, annotations: Annotations) -> tuple[str, int | None]:
    """Return what is wrong with a false detection, and the class of the object that it lies on, if another."""
    objects = annotations.objects_of(image)
    objects = objects[~annotations.ignored[objects]]
    if len(objects) == 0:
        return "nothing", None
    boxes, labels = annotations.boxes[objects].numpy().astype(np.float64), annotations.labels[objects].numpy()
    shared = np.maximum(np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]), 0).prod(axis=1)
    own, areas = (box[2:] - box[:2]).prod(), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    overlap = shared / np.maximum(own + areas - shared, 1e-9)
    same = np.where(labels == label, overlap, 0).max()
    best = int(np.where(labels != label, overlap, 0).argmax())
    if same >= 0.5:
        return "double", None
    if labels[best] != label and overlap[best] >= 0.5:
        return "other", int(labels[best])
    return ("shifted" if same >= 0.1 else "nothing"), None


def _missed_objects(matches: MatchTable, annotations: Annotations, image_counts: Sequence[int]) -> list[dict[str, Any]]:
    missed = np.setdiff1d(matches.objects, matches.matched[0])
    images, labels = annotations.image_index.numpy(), annotations.labels.numpy()
    # of a class, large objects first: small ones are missed more often, and tell less
    order = np.lexsort((-annotations.areas.numpy()[missed], np.asarray(image_counts)[labels[missed]]))
    return [
        {"image": int(images[index]), "class": int(labels[index]), "box": annotations.boxes[index].tolist()}
        for index in _diverse(missed[order], images, labels)
    ]
