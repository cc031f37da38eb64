"""Cross-entropy with a loss over regions, of segmentation-models-pytorch: Dice and Lovász."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.evaluation.class_frequencies import PriorName
from longtail.losses import posterior_cross_entropy
from longtail.methods.base import LabelKind
from longtail.methods.classifier import ReweightedLoss


class RegionLoss(ReweightedLoss):
    """Cross-entropy plus a loss over the class probabilities of regions."""

    label_kinds: ClassVar[frozenset[LabelKind]] = frozenset({"pixels"})
    loss_name: ClassVar[str]

    def build(self) -> None:
        """Add the loss over regions."""
        from segmentation_models_pytorch import losses

        self.region_loss = getattr(losses, self.loss_name)(mode="multiclass", ignore_index=-1)

    @classmethod
    def predicts_under(cls, config: Config) -> PriorName:  # noqa: ARG003
        """Return the training prior, which cross-entropy leaves in the scores."""
        return "train"

    def loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return the sum of both."""
        # a sum, since Lovász of segmentation-models-pytorch is empty, (0, C), where no pixel has a label
        region: Tensor = self.region_loss(scores, labels).sum()
        return posterior_cross_entropy(scores, labels) + region


class Dice(RegionLoss):
    """Milletari et al., 3DV 2016, arXiv 1606.04797."""

    loss_name = "DiceLoss"


class Lovasz(RegionLoss):
    """Berman et al., CVPR 2018, arXiv 1705.08790."""

    loss_name = "LovaszLoss"
