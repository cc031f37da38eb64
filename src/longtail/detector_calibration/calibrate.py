"""Correcting a trained detector for rare classes, and choosing how strongly on validation images.

Legend: C classes of the detector, K categories of annotations, L outputs of the class layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from longtail.data.detection import Annotations, DetectionImages, Detections
from longtail.data.paths import Folders, printable
from longtail.detector_calibration.classes import ClassMap, ClassOrder, CountOf, aligned_counts, match_classes
from longtail.detector_calibration.heads import ClassHead, check_uncorrected, corrected_copy, find_class_head
from longtail.detector_calibration.running import DetectorRunner
from longtail.errors import LongtailError
from longtail.evaluation.detection import detection_metrics
from longtail.evaluation.detection_matches import MAX_DETECTIONS_FEDERATED, SCORE_THRESHOLD, coco_library
from longtail.evaluation.detector_scores import (
    LogitCorrection,
    LogitStatistics,
    Normalization,
    logn_correction,
    norcal_correction,
)

Model = TypeVar("Model")
Method = Literal["norcal", "logn"]
Counts = Annotations | Mapping[str, float] | Sequence[float] | Tensor | np.ndarray[Any, Any]
"""Training annotations, or numbers by class name, or one number for each class of the detector."""
POWERS = tuple(round(0.1 * step, 1) for step in range(11))
"""Powers that are tried."""
METRICS = ("ap", "ap50", "ap75", "rare", "common", "frequent")
"""What is told of detections, see :func:`~longtail.evaluation.detection.detection_metrics`."""


def calibrate_detector(
    model: Model,
    counts: Counts | None = None,
    *,
    method: Method = "norcal",
    power: float | None = None,
    statistics: LogitStatistics | None = None,
    count_of: CountOf = "images",
    normalization: Normalization = "foreground",
    class_order: ClassOrder = "auto",
) -> Model:
    """Return a copy of a trained detector whose class layer is corrected for the long tail of its training set.

    The correction is written into weights and biases: the copy has the same class, parameters and speed, is saved,
    loaded and exported like the original, and its scores are corrected before suppression. With ``norcal`` only biases
    change, and with a power of 0 nothing does. See :mod:`longtail.evaluation.detector_scores` for the formulas.

    >>> from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
    >>> detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3)
    >>> corrected = calibrate_detector(detector, [900, 100], power=0.5)
    >>> shift = corrected.roi_heads.box_predictor.cls_score.bias - detector.roi_heads.box_predictor.cls_score.bias
    >>> [round(value, 2) for value in shift.tolist()]  # background, 900 images, 100 images
    [0.0, -0.18, 0.92]

    Args:
        model: of torchvision (Faster, Mask and Keypoint R-CNN, RetinaNet, FCOS, SSD, SSDlite), of transformers (the
            DETR family), or longtail's own; the device does not matter.
        counts: NorCal: training annotations, or training images or objects of each class, by name or in the order of
            the detector's classes without the background. Classes with 0 count as the most frequent. LogN: annotations,
            if given, say which outputs have a category; others are left as they are.
        method: ``norcal`` or ``logn``.
        power: NorCal: exponent of the counts; :func:`choose_power` finds one on validation images.
        statistics: LogN: of the logits over training images, see :func:`logit_statistics`.
        count_of: what is counted in annotations.
        normalization: NorCal: ``foreground`` or ``paper``, what keeps its odds against the background.
        class_order: how annotations are matched, see :func:`~longtail.detector_calibration.classes.match_classes`.

    Raises:
        LongtailError: the detector is not supported or was corrected already, the counts are not those of its classes,
            or an argument of the method is missing.
    """
    check_uncorrected(model)
    head = find_class_head(model)
    correction = make_correction(head, counts, method, power, statistics, count_of, normalization, class_order)
    return corrected_copy(model, correction)


def make_correction(
    head: ClassHead,
    counts: Counts | None,
    method: Method = "norcal",
    power: float | None = None,
    statistics: LogitStatistics | None = None,
    count_of: CountOf = "images",
    normalization: Normalization = "foreground",
    class_order: ClassOrder = "auto",
) -> LogitCorrection:
    """Return the correction that :func:`calibrate_detector` writes into a class layer; the arguments are the same."""
    if method == "logn":
        if statistics is None:
            raise LongtailError("LogN: needs the statistics of the logits on training images; see logit_statistics")
        class_map = map_classes(head, counts, class_order) if isinstance(counts, Annotations) else None
        return logn_correction(statistics, head.background, None if class_map is None else class_map.categories >= 0)
    if counts is None or power is None:
        missing = "counts of the training images of each class" if counts is None else "power, for example 0.5"
        raise LongtailError(f"NorCal: needs {missing}")
    numbers = class_counts(head, counts, count_of, class_order)
    return norcal_correction(numbers, power, head.background, normalization)


def class_counts(
    head: ClassHead, counts: Counts, count_of: CountOf = "images", class_order: ClassOrder = "auto"
) -> Tensor:
    """Return (C,) float64 counts of the detector's classes; the arguments are those of :func:`calibrate_detector`."""
    if not isinstance(counts, Annotations):
        return aligned_counts(head, counts)
    return aligned_counts(head, category_counts(counts, count_of), map_classes(head, counts, class_order))


def category_counts(annotations: Annotations, count_of: CountOf) -> Tensor:
    """Return (K,) int64 images or objects of each category."""
    return annotations.object_counts if count_of == "objects" else annotations.image_counts


def map_classes(head: ClassHead, annotations: Annotations, class_order: ClassOrder = "auto") -> ClassMap:
    """Return which category of some annotations each class of a detector stands for."""
    used = (annotations.object_counts > 0).tolist()
    return match_classes(head, annotations.class_names, annotations.category_ids, class_order, used)


def map_further_classes(head: ClassHead, trained: ClassMap, train: Annotations, further: Annotations) -> ClassMap:
    """Return which category of further annotations each class of a detector stands for, matched as in training.

    Nothing is guessed again: which categories have objects there says nothing about the detector.

    Args:
        head: of the detector.
        trained: the match of the training annotations.
        train: the training annotations.
        further: those of other images.

    Raises:
        LongtailError: a category with objects has no output; the message names it.
    """
    order = trained.order
    if order == "index":  # every class has a category of the training annotations, which is known by its name
        names = tuple(train.class_names[category] for category in trained.categories.tolist())
        head, order = dataclasses.replace(head, label_names=names), "name"
    return map_classes(head, further, order)


def logit_statistics(
    runner: DetectorRunner,
    annotations: Annotations,
    images: Path,
    max_images: int | None = 1000,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> LogitStatistics:
    """Return the statistics that LogN needs, from the logits of training images; their boxes are not used.

    Args:
        runner: of the detector.
        annotations: name the images.
        images: folder of the images.
        max_images: number of images, drawn at random without replacement if there are more; None for all.
        seed: of the draw.
        progress: called with 1 after each image.

    Raises:
        LongtailError: an image is missing, or the detector's logits are more than its class layer's outputs.
    """
    order = torch.arange(len(annotations))
    if max_images is not None and max_images < len(order):
        drawn = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
        order = drawn[:max_images].sort().values
    chosen = find_images(annotations.select(order), images)
    return runner.statistics(chosen.open_each(range(len(chosen))), progress)


@dataclass(frozen=True)
class PowerSearch:
    """The metrics of NorCal with each power on validation images."""

    best: float
    """The power with the highest AP; of equals the smallest."""
    metrics: dict[float, dict[str, Any]]
    """By power, :data:`METRICS` in percent."""

    @classmethod
    def of(cls, metrics: dict[float, dict[str, Any]]) -> PowerSearch:
        """Choose among the metrics by power.

        Raises:
            LongtailError: there is no AP.
        """
        if any(row["ap"] is None for row in metrics.values()):
            raise LongtailError("validation: no category has an object, so no power can be chosen")
        return cls(min(metrics, key=lambda power: (-metrics[power]["ap"], power)), metrics)


def choose_power(
    runner: DetectorRunner,
    train: Annotations,
    validation: Annotations,
    images: Path,
    powers: Sequence[float] = POWERS,
    count_of: CountOf = "images",
    normalization: Normalization = "foreground",
    class_order: ClassOrder = "auto",
    progress: Callable[[int], object] | None = None,
) -> PowerSearch:
    """Return the power of NorCal with the highest AP of boxes on validation images.

    The network runs once for an image; each power corrects its logits before suppression, so the result is that of the
    corrected detector, up to rounding.

    Args:
        runner: of the detector as it is.
        train: annotations that the counts are taken from.
        validation: annotations of images that were not trained on.
        images: folder of the validation images.
        powers: those to try.
        count_of: what is counted.
        normalization: see :func:`calibrate_detector`.
        class_order: see :func:`calibrate_detector`.
        progress: called with 1 after each image.

    Raises:
        LongtailError: an image is missing, the categories do not fit, or no category of the validation images has an
            object.
    """
    if not powers:
        raise LongtailError("powers: expected at least one")
    corrections = [
        make_correction(
            runner.head,
            train,
            power=power,
            count_of=count_of,
            normalization=normalization,
            class_order=class_order,
        )
        for power in powers
    ]
    metrics = evaluate_corrections(runner, corrections, train, validation, images, class_order, progress)
    return PowerSearch.of(dict(zip(powers, metrics, strict=True)))


def evaluate_corrections(
    runner: DetectorRunner,
    corrections: Sequence[LogitCorrection | None],
    train: Annotations,
    validation: Annotations,
    images: Path,
    class_order: ClassOrder = "auto",
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """Return :data:`METRICS` of a detector on validation images under each correction, with None as it is.

    The arguments are those of :func:`choose_power`. Detections count from a score of 0.001 on, as ``evaluate`` has it,
    unless ``runner`` has another threshold. On federated annotations (LVIS) the detector finds up to 300 objects in an
    image, as their evaluation counts, unless ``runner`` has another number.
    """
    coco_library()  # so that a missing extra is not found after hours
    train_map = map_classes(runner.head, train, class_order)
    class_map = map_further_classes(runner.head, train_map, train, validation)
    found: list[list[Detections]] = [[] for _ in corrections]
    runner = runner.down_to(SCORE_THRESHOLD)
    if validation.negatives is not None:  # whose evaluation counts more of an image than detectors return by themselves
        runner = runner.up_to(MAX_DETECTIONS_FEDERATED)
    files = find_images(validation, images)
    for by_correction in runner.detect(files.open_each(range(len(files))), corrections):
        for detections, (boxes, classes, scores, _) in zip(found, by_correction, strict=True):
            labels = class_map.categories[classes]
            known = labels >= 0
            detections.append(Detections(boxes[known], labels[known], scores[known]))
        if progress is not None:
            progress(1)
    # the groups follow the training set, whose categories may have another order
    counts = train_map.counts(train.image_counts)
    image_counts = torch.zeros(len(validation.class_names), dtype=torch.int64)
    known = class_map.categories >= 0
    image_counts[class_map.categories[known]] = counts[known].long()
    return [box_metrics(detections, validation, image_counts) for detections in found]


def box_metrics(detections: Sequence[Detections], annotations: Annotations, image_counts: Tensor) -> dict[str, Any]:
    """Return :data:`METRICS` of detections, in the order of the images; with (K,) training images of each category."""
    metrics = detection_metrics(detections, annotations, image_counts=image_counts.tolist(), resamples=0)
    return {name: metrics[name] for name in METRICS}


def find_images(annotations: Annotations, folder: Path) -> DetectionImages:
    """Return the images of some annotations: all are FOLDER/NAME, or all are FOLDER/ and the last part of NAME.

    Names that differ from a file's in their Unicode form only are that file's.

    Raises:
        LongtailError: an image is missing, or two would be the same file.
    """
    folders = Folders(folder)
    last_parts = [name.rpartition("/")[2] for name in annotations.files]
    found = [[folders.find(name) for name in names] for names in (annotations.files, last_parts)]
    fewest_missing = min(found, key=lambda each: each.count(None))
    files: dict[str, str] = {}
    for name, last, file in zip(annotations.files, last_parts, fewest_missing, strict=True):
        if file is None:
            nor = "" if last == name or folders.find(last) else f", nor {printable(folder / last)}"
            raise LongtailError(
                f"{printable(folder / name)}: there is no such image{nor}; expected the images of the annotations in "
                f"the folder {printable(folder)}"
            )
        other = files.setdefault(file, name)
        if other != name:
            raise LongtailError(
                f"{printable(folder / file)}: may be {printable(other)} or {printable(name)} of the annotations; "
                "expected the folder in which both paths begin"
            )
    size = int(annotations.sizes.max())
    return DetectionImages(folder, dataclasses.replace(annotations, files=tuple(files)), size)
