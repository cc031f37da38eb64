"""What sits on an encoder. Legend: B samples, F feature width, C classes, D embedding width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.objectives import class_log_likelihood


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
        """Return (B, C) scores of (B, F) features, or (B, C, H, W) of (B, F, H, W)."""
        weight = F.normalize(self.weight)
        if features.ndim == 4:
            return self.scale * F.conv2d(F.normalize(features), weight[:, :, None, None])
        return self.scale * F.linear(F.normalize(features), weight)


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


class JoinedClassifier(nn.Module):
    """A classifier's scores and, beside them, the log-likelihood under a mixture of keys that do not change any more.

    Args:
        classifier: features to scores.
        query_mlp: features to unit-norm embeddings (B, D).
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 marks a key that does not count.
        temperature: τ of the mixture, a scalar.
        weight: of the log-likelihood.
    """

    keys: Tensor
    key_labels: Tensor
    temperature: Tensor

    def __init__(
        self,
        classifier: CosineClassifier,
        query_mlp: ProjectionMLP,
        keys: Tensor,
        key_labels: Tensor,
        temperature: Tensor,
        weight: float,
    ) -> None:
        super().__init__()
        self.classifier, self.query_mlp, self.join_weight = classifier, query_mlp, weight
        for name, tensor in (("keys", keys), ("key_labels", key_labels), ("temperature", temperature)):
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:
        """The classifier's weights, (C, F)."""
        return self.classifier.weight

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C) scores of (B, F) features."""
        scores = self.classifier(features)
        likelihood = class_log_likelihood(
            self.query_mlp(features), self.keys, self.key_labels, scores.shape[1], self.temperature
        )
        # of a class without keys nothing is known but that it is no likelier than the least likely one
        least = likelihood.masked_fill(likelihood.isinf(), math.inf).amin(dim=1, keepdim=True)
        joined: Tensor = scores + self.join_weight * torch.where(likelihood.isinf(), least, likelihood)
        return joined


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
