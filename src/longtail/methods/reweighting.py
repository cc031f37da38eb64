"""Focal and class-balanced cross-entropy: samples weighed by how hard they are, or by how rare their class is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.methods.base import Prior
from longtail.methods.classifier import Weighted
from longtail.nn import Encoder
from longtail.objectives.reweighting import effective_number_weights, focal_loss, weighted_cross_entropy


class Focal(Weighted):
    """Lin et al., ICCV 2017, arXiv 1708.02002."""

    @classmethod
    def predicts_under(cls, _config: Config) -> Prior:
        """Return the training prior, which hard samples of the head leave in the scores."""
        return "train"

    def loss(self, scores: Tensor, labels: Tensor, _batch: Batch) -> Tensor:
        """Return the focal loss."""
        return focal_loss(scores, labels, self.config.classifier.focal_gamma)


class ClassBalanced(Weighted):
    """Cui et al., CVPR 2019, arXiv 1901.05555."""

    weights: Tensor

    def __init__(self, config: Config, encoder: Encoder, class_counts: list[int], *teacher: Any) -> None:
        super().__init__(config, encoder, class_counts, *teacher)
        weights = effective_number_weights(self.prior.counts, config.classifier.effective_number_beta)
        self.register_buffer("weights", weights, persistent=False)

    def loss(self, scores: Tensor, labels: Tensor, _batch: Batch) -> Tensor:
        """Return cross-entropy under the weights of the effective number of samples."""
        return weighted_cross_entropy(scores, labels, self.weights)
