"""What sits on an encoder. Legend: B samples, F feature width, C classes, D embedding width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineClassifier(nn.Module):
    """Scores scale · cos(h, w_c): the log-likelihood, up to a constant, of one direction a class.

    Args:
        in_features: F.
        num_classes: C.
        scale: factor of the cosine; the score lies in [−scale, scale].
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C) scores of (B, F) features."""
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


class LinearClassifier(nn.Module):
    """Scores h·w_c: what the second-stage heads are, whose norms say something.

    Args:
        in_features: F.
        num_classes: C.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, in_features))

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C) scores of (B, F) features."""
        return F.linear(features, self.weight)


class ProjectionMLP(nn.Module):
    """Linear-BN-ReLU-Linear, normalised: features (B, F) to unit-norm embeddings (B, D)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features, in_features, bias=False),
            nn.BatchNorm1d(in_features),
            nn.ReLU(inplace=True),
            nn.Linear(in_features, out_features),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, D) embeddings of norm 1."""
        return F.normalize(self.layers(features))
