"""Focal and class-balanced cross-entropy: samples weighted by how hard they are, or by how rare their class is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from longtail.config import Config, Settings, Weight
from longtail.data.loader import Batch
from longtail.evaluation.class_frequencies import PriorName
from longtail.losses.reweighting import effective_number_weights, focal_loss, weighted_cross_entropy
from longtail.methods.base import LabelKind
from longtail.methods.classifier import ReweightedLoss, shown_prior
from longtail.nn import Encoder


@dataclass(frozen=True, kw_only=True)
class FocalSettings(Settings):
    """Focal loss."""

    section: ClassVar[str] = "focal"

    gamma: Weight = 2.0
    """Exponent of the focal loss [γ]; 0 is cross-entropy."""


class Focal(ReweightedLoss):
    """Lin et al., ICCV 2017, arXiv 1708.02002."""

    settings_class = FocalSettings
    label_kinds: ClassVar[frozenset[LabelKind]] = frozenset({"image", "pixels"})

    @classmethod
    def predicts_under(cls, config: Config) -> PriorName:
        """Return the prior of the images that are shown, which hard samples of the head leave in the scores."""
        return shown_prior(config)

    def loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return the focal loss."""
        return focal_loss(scores, labels, self.config.section(FocalSettings).gamma)


@dataclass(frozen=True, kw_only=True)
class ClassBalancedSettings(Settings):
    """Class-balanced loss."""

    section: ClassVar[str] = "cb"

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Overlap of the samples of a class [β]: 0 weighs all classes alike, towards 1 by inverse frequency."""


class ClassBalanced(ReweightedLoss):
    """Cui et al., CVPR 2019, arXiv 1901.05555."""

    settings_class = ClassBalancedSettings
    label_kinds: ClassVar[frozenset[LabelKind]] = frozenset({"image", "pixels"})
    weights: Tensor

    def __init__(
        self, config: Config, encoder: Encoder, class_counts: list[int], *teacher: Any, **adapter: Any
    ) -> None:
        super().__init__(config, encoder, class_counts, *teacher, **adapter)
        weights = effective_number_weights(self.prior.class_counts, config.section(ClassBalancedSettings).beta)
        self.register_buffer("weights", weights, persistent=False)

    def loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return cross-entropy weighted by the effective number of samples."""
        return weighted_cross_entropy(scores, labels, self.weights)
