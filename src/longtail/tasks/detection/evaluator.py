"""Evaluation of a detector on a split: detections of every image, gathered from all processes. Legend: B images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtail.data.dataset import ImageSet
from longtail.data.detection import Detections, PostProcessing
from longtail.data.detection.data import annotations_of, images_of
from longtail.distributed import gather_objects, rank, world_size
from longtail.evaluation.detection import RESAMPLES, detection_metrics
from longtail.evaluation.detection_matches import MAX_DETECTIONS, MAX_DETECTIONS_FEDERATED, SCORE_THRESHOLD
from longtail.inference.model import Prior
from longtail.tasks.base import Evaluator, Metrics
from longtail.tasks.detection.detector import Detector, RegionScores
from longtail.tasks.detection.examples import error_examples, precision_recall_curves

_BATCH = 8


class FoundRegions(NamedTuple):
    """What a network has found in B images, before a prior is assumed."""

    regions: RegionScores
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each image."""


def predict_split(model: Detector, images: ImageSet) -> Iterator[tuple[Tensor, FoundRegions, Tensor]]:
    """Yield positions and regions of this process's images; no labels, as the evaluator has the annotations."""
    model.encoder.eval()
    positions = range(rank(), len(images), world_size())
    opened = images_of(images).open_each(positions)
    for start in range(0, len(positions), _BATCH):
        group = list(itertools.islice(opened, _BATCH))
        regions = model.regions(torch.cat([model.preprocess(image) for image in group]))
        sizes = tuple((image.width, image.height) for image in group)
        yield torch.tensor(positions[start : start + _BATCH]), FoundRegions(regions, sizes), torch.zeros(len(group), 0)


class DetectionEvaluator(Evaluator):
    """Average precision under several priors, with intervals and the errors that a report shows.

    Args:
        model: what is evaluated.
        images: the split.
        priors: (C,) log priors of the objects by name; None is the uniform one.
        accuracy_only: of the prior that the model predicts under alone, without intervals, curves and examples.
    """

    def __init__(
        self, model: Detector, images: ImageSet, priors: Mapping[str, Tensor | None], accuracy_only: bool
    ) -> None:
        self.model, self.annotations, self.accuracy_only = model, annotations_of(images), accuracy_only
        self.image_counts = model.config.image_counts or model.config.class_counts
        main = model.config.predicts_under
        self.priors: dict[str, Prior] = {
            name: name if name in {"uniform", "train"} or log_prior is None else log_prior.exp()
            for name, log_prior in priors.items()
            if not accuracy_only or name == main
        }
        federated = self.annotations.negatives is not None
        most = MAX_DETECTIONS_FEDERATED if federated else MAX_DETECTIONS
        self.post_processing = PostProcessing(score_threshold=SCORE_THRESHOLD, max_detections=most)
        self.found: dict[str, dict[int, Detections]] = {name: {} for name in self.priors}
        """What was found by this process, by prior and position of the image."""

    def update(self, positions: Tensor, scores: FoundRegions, labels: Tensor) -> None:  # noqa: ARG002
        """Add what was found in B images; ``labels`` is not looked at."""
        for name, prior in self.priors.items():
            found = self.model.select(scores.regions, self.post_processing, prior=prior, sizes=scores.sizes)
            for position, detections, size in zip(positions.tolist(), found, scores.sizes, strict=True):
                self.found[name][position] = self.model.to_stored(detections, size)

    def compute(self) -> dict[str, Metrics]:
        """Return the metrics over all processes, by prior."""
        gathered = gather_objects(self.found)
        metrics = {}
        for name in self.priors:
            found: dict[int, Detections] = {}
            for part in gathered:
                found |= part[name]
            metrics[name] = self._metrics([found[position] for position in range(len(self.annotations))], name)
        return metrics

    def _metrics(self, detections: Sequence[Detections], prior: str) -> dict[str, Any]:
        counts, main = self.image_counts, prior == self.model.config.predicts_under
        resamples = 0 if self.accuracy_only else RESAMPLES
        metrics = detection_metrics(detections, self.annotations, image_counts=counts, resamples=resamples)
        if main and not self.accuracy_only:
            metrics["curves"] = precision_recall_curves(detections, self.annotations, counts)
            metrics["examples"] = error_examples(detections, self.annotations, counts)
        return metrics
