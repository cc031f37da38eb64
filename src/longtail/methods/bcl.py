"""Balanced contrastive learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.data.batch import Batch
from longtail.losses.contrastive import balanced_contrastive_loss
from longtail.methods.contrastive import Contrastive, ContrastiveSettings, self_mask


@dataclass(frozen=True, kw_only=True)
class BCLSettings(ContrastiveSettings):
    """Balanced contrastive learning."""

    section: ClassVar[str] = "bcl"


class BCL(Contrastive):
    """Zhu et al., CVPR 2022, arXiv 2207.09052: averages over classes, and a centre of every class in every batch.

    The authors' network of the centres has BatchNorm too, over the classes, and takes weights that are not normalised.
    """

    settings_class = BCLSettings

    def build(self) -> None:
        """Add the embedding of the class centres."""
        super().build()
        width = self.encoder.num_features
        # of the classifier's weights
        self.centres = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, self.settings.embedding_dim)
        )

    def contrastive_loss(self, embeddings: Tensor, labels: Tensor, scores: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return the balanced contrastive loss against the batch and the centres."""
        centres = F.normalize(self.centres(F.normalize(self.classifier.weight)))
        classes = torch.arange(len(centres), device=labels.device)
        # a class without training images takes no part
        classes = torch.where(self.prior.class_counts > 0, classes, -1)
        keys = torch.cat([embeddings, centres])
        return balanced_contrastive_loss(
            embeddings,
            labels,
            keys,
            torch.cat([labels, classes]),
            len(centres),
            self.settings.temperature,
            self_mask(embeddings, len(keys)),
        )
