"""Evaluation of a result file in COCO's format against annotations, whatever program made it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from longtail.data.detection import AnnotationProblems
from longtail.data.detection.coco import read_coco
from longtail.errors import LongtailError
from longtail.evaluation.detection import detection_metrics
from longtail.evaluation.detection_results import have_masks, load_results, read_results

_PRIOR = "as given"
logger = logging.getLogger(__name__)


def evaluate_results(results: Path, annotations: Path, train_annotations: Path | None) -> dict[str, Any]:
    """Return what ``evaluate --json`` holds, see :meth:`longtail.tasks.base.Task.evaluate_results`."""
    problems = AnnotationProblems()
    if results.is_dir():
        raise LongtailError(
            f"{results}: is a folder; expected a file of results (.json) of the images that --annotations names; a run "
            "is evaluated on its own test set, without --annotations"
        )
    entries = load_results(results)
    # masks that are not compared may be damaged
    ground_truth = read_coco(annotations, problems, masks=have_masks(entries), as_written=True)
    # COCO's tools take detections of equal score in the order of the images' ids
    if all(isinstance(image_id, int) for image_id in ground_truth.image_ids):
        ids = ground_truth.image_ids
        ground_truth = ground_truth.select(sorted(range(len(ids)), key=lambda index: ids[index]))
    names = ground_truth.class_names
    counts = trained = None
    if train_annotations is not None:
        train = read_coco(train_annotations, problems, masks=False)
        if set(names) - set(train.class_names):
            missing = sorted(set(names) - set(train.class_names))[0]
            raise LongtailError(f"{train_annotations}: has no category '{missing}', which {annotations} has")
        position = [train.class_names.index(name) for name in names]
        counts, trained = (values[position].tolist() for values in (train.image_counts, train.object_counts))
    for remark in problems.remarks():
        logger.info(remark)
    detections = read_results(results, ground_truth, entries)
    metrics = detection_metrics(detections, ground_truth, image_counts=counts)
    if ground_truth.masks is not None and any(each.masks is not None for each in detections):
        metrics["masks"] = detection_metrics(detections, ground_truth, image_counts=counts, iou_type="segm")
    classes = {"class_names": list(names)} | ({} if trained is None else {"class_counts": trained})
    return {**metrics, "prior": _PRIOR, **classes, "priors": {_PRIOR: metrics}}
