"""Label-distribution-aware margins, with re-weighting late in the training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.errors import LongtailError
from longtail.methods.classifier import Weighted
from longtail.nn import Encoder
from longtail.objectives.margin import ldam_margins, with_margin
from longtail.objectives.reweighting import effective_number_weights, weighted_cross_entropy


class LDAM(Weighted):
    """LDAM-DRW: Cao et al., NeurIPS 2019, arXiv 1906.07413; it weighs classes from ``data.deferred_from`` on."""

    margins: Tensor
    weights: Tensor

    def __init__(self, config: Config, encoder: Encoder, class_counts: list[int], *teacher: Any) -> None:
        super().__init__(config, encoder, class_counts, *teacher)
        settings = config.classifier
        self.register_buffer("margins", ldam_margins(self.prior.counts, settings.largest_margin), persistent=False)
        weights = effective_number_weights(self.prior.counts, settings.effective_number_beta)
        self.register_buffer("weights", weights, persistent=False)

    @classmethod
    def check(cls, _config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where a class has no image."""
        if min(class_counts) < 1:
            index = class_counts.index(min(class_counts))
            raise LongtailError(f"method ldam: class {index} has no training image, and so no margin; remove it")

    def loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Return cross-entropy with margins, weighed by class late in the training."""
        late = batch.done >= self.config.data.deferred_from
        weights = self.weights if late else torch.ones_like(self.weights)
        return weighted_cross_entropy(with_margin(scores, labels, self.margins, self.classifier.scale), labels, weights)
