"""Seesaw loss as a training method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longtail.config import Settings, Weight
from longtail.data.batch import Batch
from longtail.losses.seesaw import seesaw_loss
from longtail.methods.base import LabelKind
from longtail.methods.classifier import ReweightedLoss


@dataclass(frozen=True, kw_only=True)
class SeesawSettings(Settings):
    """Seesaw loss."""

    section: ClassVar[str] = "seesaw"

    mitigation: Weight = 0.8
    """Exponent of the ratio of the counts [p]: rarer classes are pushed down less."""
    compensation: Weight = 2.0
    """Exponent of the ratio of the probabilities [q]: classes that a region is mistaken for are pushed down more."""


class Seesaw(ReweightedLoss):
    """Wang et al., CVPR 2021, arXiv 2008.10032; the background has no factors."""

    settings_class = SeesawSettings
    settings: SeesawSettings
    label_kinds: ClassVar[frozenset[LabelKind]] = frozenset({"boxes"})

    def loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return the seesaw loss."""
        mitigation, compensation = self.settings.mitigation, self.settings.compensation
        return seesaw_loss(scores, labels, self.prior.class_counts, mitigation, compensation)
