"""Evaluation of a classifier on a split. Legend: N images, C classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import ImageSet
from longtail.data.evaluation_batches import evaluation_batch_size, evaluation_batches
from longtail.distributed import all_reduce_sum, rank, world_size
from longtail.evaluation.calibration import (
    Reliability,
    add_reliability,
    calibration_metrics,
    group_numbers,
    rejection_curve,
    reliability,
)
from longtail.evaluation.metrics import classification_metrics, confused_pairs, count_correct, most_confident_errors
from longtail.inference.options import TTA
from longtail.inference.recognizer import Recognizer
from longtail.losses import posterior
from longtail.tasks.base import Evaluator, ImageResults, Metrics


def predict_split(model: Recognizer, images: ImageSet, tta: TTA = "none") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield positions, prior-free scores and labels of this process's part of a split."""
    model.encoder.eval()
    positions, done = torch.arange(len(images))[rank() :: world_size()], 0
    side = model.input_size(tta)
    batch_size = evaluation_batch_size(max(side, model.encoder.resize or 0))
    batches = evaluation_batches(images, side, batch_size, rank(), world_size())
    for views, labels in batches:
        yield positions[done : done + len(labels)], model.scores(views.to(model.device), tta), labels.to(model.device)
        done += len(labels)


def collect_logits(model: Recognizer, images: ImageSet, tta: TTA = "none") -> tuple[Tensor, Tensor]:
    """Return (N, C) prior-free scores and (N,) labels of a whole split, in its order, in every process."""
    scores = torch.zeros(len(images), len(model.config.class_names), device=model.device)
    for positions, part, _ in predict_split(model, images, tta):
        scores[positions.to(model.device)] = part
    return all_reduce_sum(scores), images.labels.to(model.device)


class ClassificationEvaluator(Evaluator):
    """Accuracy by class and shot group, calibration, confused classes and the most confident errors.

    Args:
        model: what is evaluated.
        images: the split.
        config: settings of the run.
        priors: (C,) log priors by name; None is the uniform one.
        accuracy_only: leave out everything but accuracy.
    """

    def __init__(
        self,
        model: Recognizer,
        images: ImageSet,
        config: Config,
        priors: Mapping[str, Tensor | None],
        accuracy_only: bool,
    ) -> None:
        self.images, self.shots, self.priors, self.accuracy_only = images, config.shots, priors, accuracy_only
        self.class_counts = model.config.class_counts
        self.groups = group_numbers(config.shots.groups(self.class_counts))
        self.device = model.device
        self.counts: dict[str, Tensor] = {}
        self.reliability: dict[str, Reliability] = {}
        # of every image: the confidence, whether it is right, and the predicted class
        self.predictions = {name: torch.zeros(3, len(images), dtype=torch.float64) for name in priors}

    def update(self, positions: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Add (B, C) scores and (B,) labels of the images at (B,) positions."""
        self.device = scores.device
        for name, prior in self.priors.items():
            log_prior = None if prior is None else prior.to(scores.device)
            self._add_counts(name, count_correct(scores, labels, log_prior))
            if self.accuracy_only:
                continue
            log_p = posterior(scores, log_prior)
            self._add_reliability(name, reliability(log_p, labels, self.groups.to(scores.device)))
            best = log_p.max(dim=1)
            predicted = best.indices.masked_fill(best.values.isnan(), -1)  # which is wrong, not the first class
            values = torch.stack([best.values.exp(), predicted == labels, predicted])
            self.predictions[name][:, positions] = values.cpu().double()

    def _add_counts(self, name: str, counts: Tensor) -> None:
        self.counts[name] = self.counts[name] + counts if name in self.counts else counts

    def _add_reliability(self, name: str, sums: Reliability) -> None:
        self.reliability[name] = add_reliability(self.reliability[name], sums) if name in self.reliability else sums

    def compute(self) -> dict[str, Metrics]:
        """Return the metrics over all processes, by prior."""
        if not self.counts:  # a process may have no image at all
            none = torch.zeros(0, dtype=torch.int64, device=self.device)
            self.update(none, torch.zeros(0, len(self.class_counts), device=self.device), none)
        metrics = {
            name: classification_metrics(all_reduce_sum(counts).cpu(), self.class_counts, self.shots)
            for name, counts in self.counts.items()
        }
        if self.accuracy_only:
            return metrics
        for name, values in metrics.items():
            sums = Reliability(*(all_reduce_sum(part).cpu() for part in self.reliability[name]))
            confidence, correct, predicted = self._gathered(self.predictions[name])
            labels, predicted = self.images.labels, predicted.long()
            values["calibration"] = {**calibration_metrics(sums), "rejection": rejection_curve(confidence, correct)}
            values["confusions"] = confused_pairs(labels, predicted, self.class_counts)
            errors = most_confident_errors(labels, predicted, confidence, self.class_counts)
            values["errors"] = {kind: [self._with_path(entry) for entry in entries] for kind, entries in errors.items()}
        return metrics

    def image_results(self) -> ImageResults:
        """Return ``labels``, and the predicted class numbers under every prior by its name; −1 where scores are NaN."""
        predicted = {name: self._gathered(values)[2] for name, values in self.predictions.items()}
        return {name: values.int().numpy() for name, values in {"labels": self.images.labels, **predicted}.items()}

    def _with_path(self, error: dict[str, Any]) -> dict[str, Any]:
        path = self.images.images.name(error["image"])
        return error if path is None else {**error, "path": path}

    def _gathered(self, values: Tensor) -> Tensor:
        return all_reduce_sum(values.to(self.device)).cpu() if world_size() > 1 else values
