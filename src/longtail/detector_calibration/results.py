"""Detections as a COCO result file, whose scores can be divided by the counts of their classes.

Legend: D detections, K categories of the annotations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtail.data.detection import Annotations
from longtail.detector_calibration.calibrate import PowerSearch, box_metrics
from longtail.errors import LongtailError
from longtail.evaluation.detection_results import load_results, match_classes, read_results
from longtail.evaluation.detector_scores import scale_scores

LIMITS = (
    "a result file holds the score of one class for each box, so scores were divided by the counts alone: no "
    "renormalisation over classes and background, and detections that the detector suppressed or left out stay away; "
    "correct the detector itself for the whole of NorCal"
)
"""What cannot be done with a result file."""


class ResultFile:
    """A list of detections with image_id, category_id and score; other fields are kept as they are.

    Args:
        path: the file.
        annotations: whose categories the detections are of.

    Raises:
        LongtailError: the file cannot be read, is no result file, or has a category that the annotations lack.
    """

    def __init__(self, path: Path, annotations: Annotations) -> None:
        self.path = path
        self.entries = load_results(path)
        if not self.entries:
            raise LongtailError(f"{path}: is empty; expected a list of detections, as COCO's result files hold it")
        self.labels = torch.tensor(match_classes(path, self.entries, annotations))
        """(D,) int64 in [0, K)."""
        self.scores = torch.tensor([float(entry["score"]) for entry in self.entries], dtype=torch.float64)

    def scaled(self, counts: Tensor, power: float) -> list[dict[str, Any]]:
        """Return the detections with scores divided by (count / smallest count)^power, in the same order."""
        scores = scale_scores(self.scores, self.labels, counts, power).tolist()
        return [{**entry, "score": score} for entry, score in zip(self.entries, scores, strict=True)]

    def choose_power(
        self, counts: Tensor, image_counts: Tensor, validation: Annotations, powers: tuple[float, ...]
    ) -> PowerSearch:
        """Return the power with the highest AP of boxes on the images that were detected in.

        Args:
            counts: (K,) what scores are divided by.
            image_counts: (K,) training images, for the groups.
            validation: annotations of these images, with the same categories in the same order.
            powers: those to try.

        Raises:
            LongtailError: an image is not in the annotations, detections have no boxes, or nothing can be evaluated.
        """
        found = read_results(self.path, validation)
        lengths = [len(detections.labels) for detections in found]
        labels = torch.cat([detections.labels for detections in found])
        scores = torch.cat([detections.scores for detections in found])
        metrics = {}
        for power in powers:
            parts = scale_scores(scores, labels, counts, power).split(lengths)
            scaled = [each._replace(scores=part) for each, part in zip(found, parts, strict=True)]
            metrics[power] = box_metrics(scaled, validation, image_counts)
        return PowerSearch.of(metrics)
