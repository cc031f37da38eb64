"""Heads on top of an encoder: classifiers and projections.

Legend: B samples, F feature width, C classes, D embedding width, E experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.losses import class_log_likelihood
from longtail.losses.reduction import to_full_precision

FOREGROUND_PROBABILITY = 0.01
"""Probability of each class that a :class:`RegionClassifier` without background begins with."""


def full_precision(features: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context without autocast: in bfloat16, scores up to 30 would be rounded to steps of 1/8."""
    kind = features.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


class CosineClassifier(nn.Module):
    """Linear classifier on the unit sphere, with scores scale · cos(h, w_c).

    The scores are log-likelihoods, up to a constant for each sample, of one mean direction w_c for each class.

    Args:
        in_features: F.
        num_classes: C.
        scale: factor of the cosine; scores lie in [−scale, scale].
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C) scores of (B, F) features, or (B, C, H, W) of (B, F, H, W); at least float32.

        Raises:
            ValueError: features of another number of dimensions.
        """
        if features.ndim not in {2, 4}:
            raise ValueError(
                f"features: expected shape (B, F) or (B, F, H, W), got {tuple(features.shape)}; flatten a sequence to "
                "(B · L, F)"
            )
        with full_precision(features):
            directions = F.normalize(to_full_precision(features))
            weight = F.normalize(self.weight.to(directions.dtype))
            if features.ndim == 4:
                return self.scale * F.conv2d(directions, weight[:, :, None, None])
            return self.scale * F.linear(directions, weight)


class ExpertClassifier(CosineClassifier):
    """A cosine classifier for each expert, and the product of the experts as the prediction.

    Its scores are the mean over the experts of their scores, from each of which the part of the log prior that it
    contains is subtracted: up to a constant for each sample, the mean of their log posteriors under the uniform prior.

    Args:
        in_features: E · F, the features of the experts side by side.
        num_classes: C.
        scale: factor of the cosine.
        num_experts: E.

    Attributes:
        contained_log_prior: (E, C) buffer, what of the log prior the scores of each expert contain; 0 at first.

    Source: Hinton, *Products of Experts*, ICANN 1999; with experts of several priors Sanchez Aimar et al., *Balanced
    Product of Calibrated Experts for Long-Tailed Recognition* (BalPoE), CVPR 2023, arXiv 2206.05260.
    """

    contained_log_prior: Tensor

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0, num_experts: int = 2) -> None:
        super().__init__(in_features, num_classes, scale)
        self.num_experts = num_experts
        self.register_buffer("contained_log_prior", torch.zeros(num_experts, num_classes))

    def expert_scores(self, features: Tensor) -> Tensor:
        """Return (B, E, C) scores of each expert, of (B, E · F) features, with the prior that they contain."""
        width = (self.num_experts, -1)
        with full_precision(features):
            experts = F.normalize(to_full_precision(features).unflatten(1, width), dim=2).transpose(0, 1)  # (E, B, F)
            weight = F.normalize(self.weight.to(experts.dtype).unflatten(1, width), dim=2).permute(1, 2, 0)  # (E, F, C)
            return self.scale * torch.matmul(experts, weight).transpose(0, 1)

    def without_prior(self, scores: Tensor) -> Tensor:
        """Return (B, E, C) scores of each expert free of the prior."""
        return scores - self.contained_log_prior

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C) scores of (B, E · F) features."""
        return self.without_prior(self.expert_scores(features)).mean(dim=1)


class LinearClassifier(nn.Module):
    """Linear classifier without bias, with scores h·w_c, as decoupled second-stage training makes it.

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


class RegionClassifier(nn.Module):
    """Linear classifier with biases of regions of an image, which may be background.

    The scores are h·w_c + b_c. With a background class its row is the last one. Without, every class has a yes or no of
    its own, whose bias begins at the log odds of :data:`FOREGROUND_PROBABILITY`.

    Args:
        in_features: F.
        num_classes: C, without the background.
        background: whether the background is a class of its own, the last row.
        regions_per_feature: A, the regions that share a feature vector, each with rows of its own: rows A · C, region
            by region.

    Source of the initial bias: Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017, arXiv 1708.02002.
    """

    def __init__(
        self, in_features: int, num_classes: int, background: bool = True, regions_per_feature: int = 1
    ) -> None:
        super().__init__()
        self.num_classes, self.background, self.regions_per_feature = num_classes, background, regions_per_feature
        rows = regions_per_feature * (num_classes + background)
        self.weight = nn.Parameter(torch.empty(rows, in_features))
        self.bias = nn.Parameter(torch.zeros(rows))
        nn.init.normal_(self.weight, std=0.01)
        if not background:
            nn.init.constant_(self.bias, math.log(FOREGROUND_PROBABILITY / (1 - FOREGROUND_PROBABILITY)))

    def forward(self, features: Tensor) -> Tensor:
        """Return (N · A, C) scores of (N, F) features; (N · A, C + 1) with a background class."""
        return F.linear(features, self.weight, self.bias).view(-1, self.num_classes + self.background)


class MixtureEnsembleHead(nn.Module):
    """Ensemble of a classifier and a mixture likelihood with constant keys, by a weighted sum of their scores.

    The features are those of both, or those of the classifier and after them those of the mixture.

    Args:
        classifier: maps its features to scores.
        query_mlp: maps its features to unit-norm embeddings (B, D).
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 marks a key to ignore.
        temperature: τ of the mixture, a scalar.
        ensemble_weight: weight of the mixture's log-likelihood; the classifier's scores have weight 1.
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
        ensemble_weight: float,
    ) -> None:
        super().__init__()
        self.classifier, self.query_mlp, self.ensemble_weight = classifier, query_mlp, ensemble_weight
        for name, tensor in (("keys", keys), ("key_labels", key_labels), ("temperature", temperature)):
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:
        """The classifier's weights, (C, F)."""
        return self.classifier.weight

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C) scores of (B, F) features."""
        scores = self.classifier(features[:, : self.classifier.weight.shape[1]])
        likelihood = class_log_likelihood(
            self.query_mlp(features[:, -self.query_mlp.in_features :]),
            self.keys,
            self.key_labels,
            scores.shape[1],
            self.temperature,
        )
        # a class without keys gets the likelihood of the least likely class that has keys
        smallest = likelihood.masked_fill(likelihood.isinf(), math.inf).amin(dim=1, keepdim=True)
        ensemble: Tensor = scores + self.ensemble_weight * torch.where(likelihood.isinf(), smallest, likelihood)
        return ensemble


class ClassifierEnsemble(nn.Module):
    """Several classifiers of the same classes, each on features of its own, by the mean of their probabilities.

    With scores s_m of the members, p̄ = mean_m softmax(s_m / T), and the scores of the ensemble are T log p̄. At the
    temperature T its distillation then has the gradient of the mean of the distillations of its members:

        mean_m KL(p_m ‖ q) = KL(p̄ ‖ q) + H(p̄) − mean_m H(p_m)

    The mean of the scores, the geometric mean of the probabilities, does not: a class that one member rules out would
    be ruled out by the ensemble, and it is in the tail that members differ.

    Args:
        members: each maps (B, F_m) features to (B, C) scores; or maps of pixels.
        widths: F_m.
        temperature: T > 0.
    """

    def __init__(self, members: Sequence[nn.Module], widths: Sequence[int], temperature: float) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.widths, self.temperature = list(widths), temperature

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C) float32 scores of (B, ΣF) features, or (B, C, H, W) of (B, ΣF, H, W)."""
        parts = features.split(self.widths, dim=1)
        log_probabilities = [
            F.log_softmax(to_full_precision(member(part)) / self.temperature, dim=1)
            for member, part in zip(self.members, parts, strict=True)
        ]
        mean = torch.logsumexp(torch.stack(log_probabilities), dim=0) - math.log(len(log_probabilities))
        return self.temperature * mean


class ProjectionMLP(nn.Module):
    """Projection head Linear-BN-ReLU-Linear with normalised output: features (B, F) to unit-norm embeddings (B, D).

    Args:
        in_features: F, also the hidden width.
        out_features: D.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.layers = nn.Sequential(
            nn.Linear(in_features, in_features, bias=False),
            nn.BatchNorm1d(in_features),
            nn.ReLU(inplace=True),
            nn.Linear(in_features, out_features),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, D) embeddings of norm 1."""
        return F.normalize(self.layers(features))
