"""Balanced contrastive learning."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.methods.contrastive import Contrastive, themselves
from longtail.nn import Encoder
from longtail.objectives.contrastive import balanced_contrastive_loss


class BCL(Contrastive):
    """Zhu et al., CVPR 2022, arXiv 2207.09052: classes averaged, and a centre of every class in every batch."""

    def __init__(self, config: Config, encoder: Encoder, class_counts: list[int], *teacher: Any) -> None:
        super().__init__(config, encoder, class_counts, *teacher)
        width = encoder.num_features
        # the centres are made of the classifier's weights, as in the paper
        self.centres = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, config.contrast.embedding_dim)
        )

    def compare(self, embeddings: Tensor, labels: Tensor, _scores: Tensor, _batch: Batch) -> Tensor:
        """Return the balanced contrastive loss against the batch and the centres."""
        centres = F.normalize(self.centres(F.normalize(self.classifier.weight)))
        classes = torch.arange(len(centres), device=labels.device)
        # a class that the training set does not have takes no part
        classes = torch.where(self.prior.counts > 0, classes, -1)
        keys = torch.cat([embeddings, centres])
        return balanced_contrastive_loss(
            embeddings,
            labels,
            keys,
            torch.cat([labels, classes]),
            len(centres),
            self.config.contrast.temperature,
            themselves(embeddings, len(keys)),
        )
