"""Focal and class-balanced cross-entropy: samples weighted by how hard they are, or by how rare their class is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from longtail.config import Config, Settings, Weight
from longtail.data.batch import Batch
from longtail.errors import LongtailError
from longtail.evaluation.class_frequencies import PriorName
from longtail.losses.reweighting import effective_number_weights, focal_loss, weighted_cross_entropy
from longtail.methods.base import LabelKind
from longtail.methods.classifier import ReweightedLoss, shown_prior
from longtail.nn.network_name import is_decoder_network

_PARTS_OF_AN_IMAGE = 1000
_FLAT = 1.01  # ratio of the largest weight to the smallest below which classes are weighed alike
_UNEQUAL = 1.1  # ratio of the largest count to the smallest above which they should not be


@dataclass(frozen=True, kw_only=True)
class FocalSettings(Settings):
    """Focal loss."""

    section: ClassVar[str] = "focal"

    gamma: Weight = 2.0
    """Exponent of the focal loss [γ]; 0 is cross-entropy."""


class Focal(ReweightedLoss):
    """Lin et al., ICCV 2017, arXiv 1708.02002."""

    settings_class = FocalSettings
    settings: FocalSettings
    label_kinds: ClassVar[frozenset[LabelKind]] = frozenset({"image", "pixels"})

    @classmethod
    def predicts_under(cls, config: Config) -> PriorName:
        """Return the prior of the images that are shown, which hard samples of the head leave in the scores."""
        return shown_prior(config)

    def loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return the focal loss."""
        return focal_loss(scores, labels, self.settings.gamma)


@dataclass(frozen=True, kw_only=True)
class ClassBalancedSettings(Settings):
    """Class-balanced loss."""

    section: ClassVar[str] = "cb"

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Overlap of the samples of a class [β]: towards 1 by inverse frequency; 0 is cross-entropy. A class counts as
    1/(1 − β) samples at most. For labels of pixels, a sample is an image's worth of pixels."""


class ClassBalanced(ReweightedLoss):
    """Cui et al., CVPR 2019, arXiv 1901.05555.

    The effective number of samples levels off at 1/(1 − β), which is 10,000 for the default. It is made for images.
    Labels of pixels are counted in images too, a class's fraction of the pixels times the number of training images:
    pixels of an image overlap much more than images do, and counts of them are above any such bound, so that the
    weights of all classes would be equal.
    """

    settings_class = ClassBalancedSettings
    settings: ClassBalancedSettings
    label_kinds: ClassVar[frozenset[LabelKind]] = frozenset({"image", "pixels"})
    weights: Tensor

    def build(self) -> None:
        """Add the weights of the classes."""
        counts = self.prior.class_counts.double()
        if not self.adapter.one_per_image:
            # of pixels, the counts of drawn samples are thousandths of images
            counts = counts * (sum(self.adapter.sample_counts(self.class_counts)) / _PARTS_OF_AN_IMAGE / counts.sum())
        weights = _class_balanced_weights(counts, self.settings.beta)
        self.register_buffer("weights", weights, persistent=False)

    @classmethod
    def predicts_under(cls, config: Config) -> PriorName:
        """Return uniform; for β = 0, which is plain cross-entropy, the prior of the images that are shown."""
        return "uniform" if config.section(ClassBalancedSettings).beta > 0 else shown_prior(config)

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where β weighs classes alike that are not equally frequent."""
        super().check(config, class_counts)
        if not is_decoder_network(config.network):  # pixels are counted in images, whose number is not known here
            _class_balanced_weights(torch.tensor(class_counts), config.section(ClassBalancedSettings).beta)

    def loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return cross-entropy weighted by the effective number of samples."""
        return weighted_cross_entropy(scores, labels, self.weights)


def _class_balanced_weights(class_counts: Tensor, beta: float) -> Tensor:
    """Return :func:`effective_number_weights`.

    Raises:
        LongtailError: they are all the same, although the counts are not, for a β above 0.
    """
    weights, counts = effective_number_weights(class_counts, beta), class_counts[class_counts > 0]
    used = weights[class_counts > 0]
    if beta > 0 and used.max() < _FLAT * used.min() and counts.max() > _UNEQUAL * counts.min():
        largest = 10.0 ** math.ceil(math.log10(max(float(counts.max()), 10.0)))
        raise LongtailError(
            f"cb.beta {beta:g}: weighs all classes alike, since the smallest has {float(counts.min()):,.0f} samples, "
            f"more than the {1 / (1 - beta):,.0f} at which their effective number levels off; use "
            f"{1 - 1 / largest:.12g}, or method la"
        )
    return weights
