"""Label-distribution-aware margins, with re-weighting late in the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from longtail.config import Config, Fraction, Settings, first_stage_epochs
from longtail.data.batch import Batch
from longtail.data.samplers import last_phase_start
from longtail.losses.margin import ldam_loss, ldam_margins
from longtail.losses.reweighting import effective_number_weights, scale_to_images
from longtail.methods.classifier import ReweightedLoss


@dataclass(frozen=True, kw_only=True)
class LDAMSettings(Settings):
    """Label-distribution-aware margins."""

    section: ClassVar[str] = "ldam"

    max_margin: Annotated[float, Field(ge=0, lt=2)] = 0.5
    """Margin of the smallest class, in cosines."""
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Overlap of the samples of a class in the late re-weighting [β]."""
    reweight_from: Fraction = 0.8
    """Fraction of the training after which classes are re-weighted; below 1, at least in its last epoch."""


class LDAM(ReweightedLoss):
    """LDAM-DRW: Cao et al., NeurIPS 2019, arXiv 1906.07413.

    A class without training images has no margin, and its samples are left out of the mean, as under the other losses.
    """

    settings_class = LDAMSettings
    settings: LDAMSettings
    margins: Tensor
    weights: Tensor
    equal_weights: Tensor

    def build(self) -> None:
        """Add the margins and the weights of the classes."""
        settings = self.settings
        self.reweight_from = last_phase_start(settings.reweight_from, first_stage_epochs(self.config))
        self.register_buffer("margins", ldam_margins(self.prior.class_counts, settings.max_margin), persistent=False)
        counts = self.prior.class_counts
        weights = effective_number_weights(counts, settings.beta)
        # the authors divide by the sum of a batch's weights
        self.register_buffer("weights", scale_to_images(weights, counts), persistent=False)
        self.register_buffer("equal_weights", (weights > 0).to(weights), persistent=False)

    @classmethod
    def reason_against_mixing(cls, config: Config) -> str:  # noqa: ARG003
        """Return that the margin is one of the true class."""
        return "has a margin for the one true class; use la, ce, focal or cb"

    def loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Return cross-entropy with margins, re-weighted by class late in the training."""
        late = batch.epoch_fraction >= self.reweight_from
        if isinstance(late, Tensor):
            weights = torch.where(late, self.weights, self.equal_weights)
        else:
            weights = self.weights if late else self.equal_weights
        return ldam_loss(scores, labels, self.margins, self.config.classifier.scale, weights)
