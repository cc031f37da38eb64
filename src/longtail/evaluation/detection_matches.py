"""Which detection is matched with which object: what average precision and its intervals are computed from.

The rule is COCO's: in an image and class, detections in order of score take the object of highest IoU that is not
taken yet; ignored objects are taken only where there is no other, crowds any number of times, and what took them counts
neither way.

Legend: N images, C classes, G objects, D detections of all images, T IoU thresholds, B resampled sets of images.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import sparse

from longtail.data.detection import Annotations, Detections
from longtail.errors import LongtailError

Array = np.ndarray[Any, Any]
IoUType = Literal["bbox", "segm"]

IOU_THRESHOLDS: Array = np.linspace(0.5, 0.95, 10)
RECALL_LEVELS: Array = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100
"""Of an image and class, as for COCO."""
MAX_DETECTIONS_FEDERATED = 300
"""Of an image, over all classes, as for LVIS."""
SCORE_THRESHOLD = 0.001
"""Lowest score of a detection that is evaluated: average precision asks for all, and rare classes have low scores."""
_CHUNK = 2_000_000  # values of resampled sets that are held at a time
_MISSING = "average precision: needs the extra det: pip install 'longtail[det]'"


def coco_library() -> Any:
    """Return the library that computes average precision, faster-coco-eval.

    Raises:
        LongtailError: the extra is missing, or its version is too old.
    """
    try:
        import faster_coco_eval
    except ImportError:
        raise LongtailError(_MISSING) from None
    # before 1.7 it knows no areas but COCO's
    if "ranges" not in inspect.signature(faster_coco_eval.COCOeval_faster).parameters:
        raise LongtailError(
            f"average precision: faster-coco-eval {faster_coco_eval.__version__} is installed, expected 1.7 or later; "
            "pip install -U faster-coco-eval"
        )
    return faster_coco_eval


def coco_masks() -> Any:
    """Return the module that codes and compares masks.

    Raises:
        LongtailError: the extra is missing.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise LongtailError(_MISSING) from None
    return mask


def encode_mask(mask: Any, size: Sequence[int]) -> dict[str, Any]:
    """Return a mask with its runs compressed, as COCO's tools take it.

    Args:
        mask: ``size`` and ``counts``, a list of runs or compressed; or polygons, each x and y in turn.
        size: height and width of the image.

    Raises:
        LongtailError: the extra is missing.
    """
    if isinstance(mask, Mapping):
        if isinstance(mask["counts"], str | bytes):
            return dict(mask)
        encoded: dict[str, Any] = coco_masks().frPyObjects({"size": mask["size"], "counts": list(mask["counts"])}, 0, 0)
        return encoded
    masks = coco_masks()
    merged: dict[str, Any] = masks.merge(masks.frPyObjects([list(polygon) for polygon in mask], *map(int, size)))
    return merged


@dataclass(frozen=True)
class DetectionTable:
    """The detections of N images that are evaluated, in order of image, class and descending score."""

    images: Array
    """(D,) int64 position of the image."""
    positions: Array
    """(D,) int64 position in the :class:`Detections` of the image."""
    labels: Array
    """(D,) int64."""
    scores: Array
    """(D,) float64."""
    boxes: Array
    """(D, 4) float64 x1, y1, x2, y2."""
    masks: tuple[Any, ...] | None
    """D encoded masks, for masks alone."""
    incomplete: Array
    """(D,) bool: not every object of this class is annotated in this image, so that an unmatched one is not false."""

    @property
    def areas(self) -> Array:
        """(D,) float64, of the masks where there are masks."""
        if self.masks is not None:
            areas = coco_masks().area(list(self.masks)) if self.masks else []
            return np.asarray(areas, dtype=np.float64)
        areas = (self.boxes[:, 2] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 1])
        return np.asarray(areas)


def detection_table(
    detections: Sequence[Detections],
    annotations: Annotations,
    iou_type: IoUType = "bbox",
    max_detections: int | None = None,
) -> DetectionTable:
    """Return the detections that are evaluated.

    Args:
        detections: N, in the order of the images.
        annotations: of the N images. If federated (LVIS), detections of a class that is neither annotated in an image
            nor among its negatives are left out.
        iou_type: whether boxes or masks are compared.
        max_detections: the most of an image and class, those of highest score; of an image over all classes if
            federated. 100 and 300 if not given.

    Raises:
        LongtailError: there are not N of them, a label is not one of the C classes, a score is not a number, or masks
            are asked for and missing.
    """
    images, classes = len(annotations), len(annotations.class_names)
    if len(detections) != images:
        raise LongtailError(f"detections: expected those of {images} images, got {len(detections)}")
    federated = annotations.negatives is not None
    if iou_type == "segm" and any(each.masks is None and len(each.labels) for each in detections):
        raise LongtailError("detections: have no masks, which iou_type segm compares; use bbox")
    lengths = np.array([len(each.labels) for each in detections], dtype=np.int64)
    image = np.repeat(np.arange(images), lengths)
    position = np.arange(len(image)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    labels = _joined([each.labels for each in detections], (0,), np.int64)
    scores = _joined([each.scores for each in detections], (0,), np.float64)
    boxes = _joined([each.boxes for each in detections], (0, 4), np.float64)
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        raise LongtailError(
            f"detections: expected labels from 0 to {classes - 1}, got {labels.min()} to {labels.max()}"
        )
    if not np.isfinite(scores).all():
        raise LongtailError(f"detections: image {image[~np.isfinite(scores)][0]} has a score that is not a number")
    limit = max_detections or (MAX_DETECTIONS_FEDERATED if federated else MAX_DETECTIONS)
    kept = np.lexsort((-scores, image)) if federated else np.lexsort((-scores, labels, image))
    kept = kept[_rank(image[kept] if federated else image[kept] * classes + labels[kept]) < limit]
    kept = kept[np.lexsort((-scores[kept], labels[kept], image[kept]))]
    if federated:
        kept = kept[np.isin(image[kept] * classes + labels[kept], _known_pairs(annotations))]
    pairs = _pairs(annotations.incomplete if federated else None, classes)
    masks, sizes = None, annotations.sizes.tolist()
    if iou_type == "segm":
        masks = tuple(
            encode_mask(detections[i].masks[p], sizes[i])
            for i, p in zip(image[kept].tolist(), position[kept].tolist(), strict=True)
        )
    return DetectionTable(
        images=image[kept],
        positions=position[kept],
        labels=labels[kept],
        scores=scores[kept],
        boxes=boxes[kept],
        masks=masks,
        incomplete=np.isin(image[kept] * classes + labels[kept], pairs),
    )


def _joined(tensors: Sequence[Any], empty: tuple[int, ...], kind: type) -> Array:
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors if len(tensor)]
    return np.concatenate(arrays).astype(kind) if arrays else np.zeros(empty, dtype=kind)


def _rank(keys: Array) -> Array:
    """Return the position of each entry among the neighbours that have the same key."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, dtype=np.int64)
    lengths = np.diff(np.r_[starts, len(keys)])
    ranks: Array = np.arange(len(keys)) - np.repeat(starts, lengths)
    return ranks


def _pairs(classes_of: tuple[frozenset[int], ...] | None, classes: int) -> Array:
    """Return image · C + class of sets of classes by image."""
    listed = [image * classes + label for image, labels in enumerate(classes_of or ()) for label in labels]
    return np.array(listed, dtype=np.int64)


def _known_pairs(annotations: Annotations) -> Array:
    """Return image · C + class where it is known whether the class is there."""
    classes = len(annotations.class_names)
    present = annotations.image_index.numpy() * classes + annotations.labels.numpy()
    return np.concatenate([present, _pairs(annotations.negatives, classes)])


@dataclass(frozen=True)
class MatchTable:
    """Which detection has found which object, at every IoU threshold; in order of class and descending score."""

    images: Array
    """(D,) int64 position of the image."""
    positions: Array
    """(D,) int64 position in the :class:`Detections` of the image."""
    labels: Array
    """(D,) int64."""
    scores: Array
    """(D,) float64."""
    matched: Array
    """(T, D) int64, the object's position in the annotations; −1 for none."""
    ignored: Array
    """(T, D) bool: counts neither as right nor as false."""
    objects: Array
    """(G,) int64, positions in the annotations of the objects that are to be found."""
    object_counts: sparse.csr_array
    """(N, C), how many of them every image has."""

    def average_precision(self, weights: Array) -> Array:
        """Return (B, T, C) average precision in [0, 1], COCO's with 101 recall levels; NaN for a class without objects.

        Vectorised over resampled sets and classes: a class's precision matters only where it finds another object, and
        the detections up to there are one cumulative sum for all thresholds.

        Args:
            weights: (B, N) int, how often every image is in each set.
        """
        classes = self.object_counts.shape[1]
        objects = weights @ self.object_counts
        precision = np.where(objects > 0, 0.0, np.nan)[:, None].repeat(len(self.matched), axis=1)
        by_detection = weights[:, self.images]
        counted = np.cumsum(by_detection, axis=1)
        for threshold, (matched, ignored) in enumerate(zip(self.matched, self.ignored, strict=True)):
            right = np.flatnonzero((matched >= 0) & ~ignored)
            if len(right) == 0:
                continue
            total = counted - np.cumsum(by_detection * ignored, axis=1) if ignored.any() else counted
            labels = self.labels[right]
            present, starts = np.unique(labels, return_index=True)
            place = np.repeat(np.arange(len(present)), np.diff(np.r_[starts, len(right)]))
            first = np.searchsorted(self.labels, present)  # detection of each class
            before = np.where(first > 0, total[:, first - 1], 0)
            detected = total[:, right] - before[:, place]
            hits = np.cumsum(by_detection[:, right], axis=1)
            hits -= (hits[:, starts] - by_detection[:, right[starts]])[:, place]
            ratio = hits / np.maximum(detected, 1)
            # the largest precision at this or a higher recall: one pass from the end, an offset divides the classes
            offset = 2.0 * (len(present) - place)
            envelope = np.maximum.accumulate((ratio + offset)[:, ::-1], axis=1)[:, ::-1] - offset
            levels = _levels_up_to(hits / np.maximum(objects[:, labels], 1))
            gained = np.diff(levels, axis=1, prepend=0)
            gained[:, starts] = levels[:, starts]
            mean = np.add.reduceat(envelope * gained, starts, axis=1) / len(RECALL_LEVELS)
            precision[:, threshold, present] = np.where(objects[:, present] > 0, mean, np.nan)
        assert precision.shape[2] == classes
        return precision

    def resampled_precision(self, resamples: int, seed: int = 0) -> Iterator[Array]:
        """Yield :meth:`average_precision` of sets of N images that are drawn with replacement, some sets at a time.

        Args:
            resamples: sets in all.
            seed: of the draws.
        """
        images = self.object_counts.shape[0]
        rng = np.random.default_rng(seed)
        step = max(1, _CHUNK // (len(self.labels) + images + 1))
        for start in range(0, resamples, step):
            sets = min(step, resamples - start)
            drawn = rng.integers(images, size=(sets, images)) + np.arange(sets)[:, None] * images
            yield self.average_precision(np.bincount(drawn.ravel(), minlength=sets * images).reshape(sets, images))

    def precision_recall(self, label: int, threshold: int = 0) -> tuple[Array, Array, Array]:
        """Return scores, descending, with the precision and recall of the detections of a class from that score up.

        Args:
            label: the class.
            threshold: position of the IoU threshold; 0 is 0.5.
        """
        mine = np.arange(*np.searchsorted(self.labels, (label, label + 1)))
        mine = mine[~self.ignored[threshold, mine]]
        right = np.cumsum(self.matched[threshold, mine] >= 0)
        objects = int(self.object_counts[:, [label]].sum())
        return self.scores[mine], right / np.arange(1, len(right) + 1), right / max(objects, 1)


def _levels_up_to(recall: Array) -> Array:
    """Return how many of the recall levels a recall reaches, as NumPy's searchsorted would tell, but faster."""
    nearest = (recall * (len(RECALL_LEVELS) - 1) + 0.5).astype(np.int64)
    levels: Array = nearest + (RECALL_LEVELS[nearest] <= recall)
    return levels


def match_table(table: DetectionTable, annotations: Annotations, area: tuple[float, float] = (0.0, 1e10)) -> MatchTable:
    """Return which detection is matched with which object.

    Args:
        table: the detections.
        annotations: of the images.
        area: smallest and largest area in pixels of the objects that are to be found; others are ignored.
    """
    classes = len(annotations.class_names)
    areas, crowd = annotations.areas.numpy().astype(np.float64), annotations.crowds.numpy()
    outside = annotations.ignored.numpy() | (areas < area[0]) | (areas > area[1])
    object_keys = annotations.image_index.numpy() * classes + annotations.labels.numpy()
    by_key = np.argsort(object_keys, kind="stable")
    keys = table.images * classes + table.labels
    first, last = (np.searchsorted(object_keys[by_key], keys, side) for side in ("left", "right"))
    counts = last - first
    detection = np.repeat(np.arange(len(keys)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    target = by_key[np.repeat(first, counts) + within]
    overlap = _box_overlap(table, annotations, detection, target) if table.masks is None else None
    if overlap is None:
        overlap = _mask_overlap(table, annotations, first, last, by_key)
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    near = overlap >= thresholds[0]
    detection, target, overlap = detection[near], target[near], overlap[near]
    rank = _rank(keys)[detection]
    # of the pairs of a detection the last one that is free is taken
    order = np.lexsort((target, overlap, ~outside[target], detection, rank))
    detection, target, overlap, rank = detection[order], target[order], overlap[order], rank[order]
    matched = np.full((len(thresholds), len(keys)), -1, dtype=np.int64)
    taken = np.zeros((len(thresholds), len(areas)), dtype=bool)
    bounds = np.searchsorted(rank, np.arange(int(rank.max(initial=-1)) + 2))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if begin == end:
            continue
        pairs = np.arange(begin, end)
        objects = target[pairs]
        free = (~taken[:, objects] | crowd[objects]) & (overlap[pairs] >= thresholds[:, None])
        starts = np.flatnonzero(np.r_[True, detection[begin + 1 : end] != detection[begin : end - 1]])
        best = np.maximum.reduceat(np.where(free, pairs, -1), starts, axis=1)
        row, column = np.nonzero(best >= 0)
        pair = best[row, column]
        matched[row, detection[pair]] = target[pair]
        taken[row, target[pair]] = True
    sizes = table.areas
    unmatched_ignored = table.incomplete | (sizes < area[0]) | (sizes > area[1])
    ignored = np.where(matched >= 0, outside[matched] if len(outside) else False, unmatched_ignored)
    final = np.lexsort((np.arange(len(keys)), -table.scores, table.labels))
    objects = np.flatnonzero(~outside)
    where = (annotations.image_index.numpy()[objects], annotations.labels.numpy()[objects])
    shape = (len(annotations), classes)
    return MatchTable(
        images=table.images[final],
        positions=table.positions[final],
        labels=table.labels[final],
        scores=table.scores[final],
        matched=matched[:, final],
        ignored=ignored[:, final],
        objects=objects,
        object_counts=sparse.csr_array((np.ones(len(objects), dtype=np.int64), where), shape=shape),
    )


def _box_overlap(table: DetectionTable, annotations: Annotations, detection: Array, target: Array) -> Array:
    """Return the IoU of pairs of boxes; with a crowd the intersection over the detection's own area."""
    boxes, others = table.boxes[detection], annotations.boxes.numpy().astype(np.float64)[target]
    sides = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    shared = np.maximum(sides, 0).prod(axis=1)
    own, other = ((each[:, 2:] - each[:, :2]).prod(axis=1) for each in (boxes, others))
    union = np.where(annotations.crowds.numpy()[target], own, own + other - shared)
    overlap: Array = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlap


def _mask_overlap(table: DetectionTable, annotations: Annotations, first: Array, last: Array, by_key: Array) -> Array:
    """Return the same of masks, image and class by image and class: run-length codes are compared in groups."""
    masks = coco_masks()
    if annotations.masks is None:
        raise LongtailError("annotations: have no masks, which iou_type segm compares; use bbox")
    assert table.masks is not None
    parts, sizes = [np.zeros(0)], annotations.sizes.tolist()
    changes = (first[1:] != first[:-1]) | (last[1:] != last[:-1])
    starts = np.flatnonzero(np.r_[True, changes]) if len(first) else np.zeros(0, dtype=np.int64)
    for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(first)], strict=True):
        objects = by_key[first[begin] : last[begin]].tolist()
        if objects:
            size = sizes[int(table.images[begin])]
            encoded = [encode_mask(annotations.masks[index], size) for index in objects]
            crowd = annotations.crowds[objects].long().tolist()
            parts.append(np.asarray(masks.iou(list(table.masks[begin:end]), encoded, crowd)).ravel())
    return np.concatenate(parts)
