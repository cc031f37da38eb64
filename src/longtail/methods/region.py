"""Cross-entropy with a loss over whole regions, as segmentation has them: Dice and Lovász, from the library."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.methods.base import Prior
from longtail.methods.classifier import Weighted
from longtail.nn import Encoder
from longtail.objectives import posterior_cross_entropy


class Region(Weighted):
    """Cross-entropy plus a loss of the library over the class probabilities."""

    loss_name: str
    extra: Any

    def __init__(self, config: Config, encoder: Encoder, class_counts: list[int], *teacher: Any, **more: Any) -> None:
        super().__init__(config, encoder, class_counts, *teacher, **more)
        from segmentation_models_pytorch import losses

        self.extra = getattr(losses, self.loss_name)(mode="multiclass", ignore_index=-1)

    @classmethod
    def predicts_under(cls, _config: Config) -> Prior:
        """Return the training prior, which cross-entropy leaves in the scores."""
        return "train"

    def loss(self, scores: Tensor, labels: Tensor, _batch: Batch) -> Tensor:
        """Return the sum of both."""
        region: Tensor = self.extra(scores, labels)
        return posterior_cross_entropy(scores, labels) + region


class Dice(Region):
    """Milletari et al., 3DV 2016, arXiv 1606.04797."""

    loss_name = "DiceLoss"


class Lovasz(Region):
    """Berman et al., CVPR 2018, arXiv 1705.08790."""

    loss_name = "LovaszLoss"
