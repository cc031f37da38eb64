"""The class posterior that all methods share: log-likelihood scores and a log prior, and its cross-entropy.

Legend: B samples, C classes. Scores may have one entry for every pixel: (B, C, H, W) with labels (B, H, W). A label of
−1 is ignored, and so is a sample of a class without training images, whose prior is 0: it is left out of the mean.
Labels may be probabilities of the classes, as :class:`~longtail.losses.score_loss.ScoreLoss` says. Scores in half
precision are converted to float32 first.

    log p(y|x) = score_y + log p(y) − log Σ_c exp(score_c + log p(c))

Training adds the log prior of the training set; prediction adds that of the data it is used on. This is logit
adjustment (Menon et al., ICLR 2021), and equal to Balanced Softmax (Ren et al., NeurIPS 2020).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.losses.checks import Counts, as_counts, beside_counts, valid_targets
from longtail.losses.reduction import batch_mean, to_full_precision
from longtail.losses.score_loss import (
    ScoreLoss,
    broadcast_to_classes,
    negative_log_likelihood,
    reduce_over_labels,
    without_classes,
)

_LEAST_LOG = -1e4  # of a probability, also in half precision: its exponential is 0


def compute_log_prior(class_counts: Counts) -> Tensor:
    """Return log p(c) = log(n_c / Σ n), shape (C,) float32; −inf for a class without images.

    Args:
        class_counts: (C,) n_c, the training images of each class: a sequence, array or tensor.

    Raises:
        ValueError: counts that are negative, not finite, not one-dimensional, or all zero.
    """
    counts = as_counts(class_counts)
    return beside_counts((counts / counts.sum()).log().float(), class_counts)


def _to_finite(log_prior: Tensor) -> Tensor:
    """Return a log prior as a buffer keeps it: a weight average that includes buffers would make NaN of −inf."""
    return log_prior.clamp(min=_LEAST_LOG)


def _from_finite(buffer: Tensor) -> Tensor:
    """Return the log prior of a buffer, −inf for a class without images."""
    return buffer.masked_fill(buffer < _LEAST_LOG / 2, -math.inf)


class ClassPrior(nn.Module):
    """Class counts of a training set, and the logarithm of the class frequencies, as buffers.

    Args:
        class_counts: (C,) training images of each class, whole numbers: a sequence, array or tensor.

    Attributes:
        class_counts: (C,) int64 buffer.
        finite_log_prior: (C,) float32 buffer, log p(c); −10⁴ for a class without images.

    Raises:
        ValueError: counts that are negative, not whole, not one-dimensional, or all zero.
    """

    class_counts: Tensor
    finite_log_prior: Tensor

    def __init__(self, class_counts: Counts) -> None:
        super().__init__()
        counts = as_counts(class_counts)
        if not bool((counts == counts.round()).all()):
            raise ValueError("class_counts: expected whole numbers; for frequencies use compute_log_prior")
        self.register_buffer("finite_log_prior", beside_counts(_to_finite(compute_log_prior(counts)), class_counts))
        self.register_buffer("class_counts", beside_counts(counts.long(), class_counts))

    @property
    def log_prior(self) -> Tensor:
        """(C,) log p(c); −inf for a class without images."""
        return _from_finite(self.finite_log_prior)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        before = state_dict.pop(f"{prefix}log_prior", None)  # of an earlier version
        if before is not None:
            state_dict[f"{prefix}finite_log_prior"] = _to_finite(before)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def subtracted_from(self, scores: Tensor) -> Tensor:
        """Return (B, C) or (B, C, H, W) scores without the log prior; of a class without images they stay."""
        log_prior = self.log_prior
        log_prior = log_prior.masked_fill(log_prior == -math.inf, 0.0)
        return to_full_precision(scores) - broadcast_to_classes(log_prior, scores)


def posterior(log_likelihood: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """Return log p(y|x), shape (B, C) or (B, C, H, W).

    Args:
        log_likelihood: (B, C) or (B, C, H, W) scores, log p(x|c) up to a constant for each sample or pixel.
        log_prior: (C,) log class frequencies; None is the uniform prior.
    """
    scores = to_full_precision(log_likelihood)
    if log_prior is not None:
        scores = scores + broadcast_to_classes(log_prior, scores)
    return F.log_softmax(scores, dim=1)


def posterior_cross_entropy(
    log_likelihood: Tensor,
    labels: Tensor,
    log_prior: Tensor | None = None,
    strength: float = 1.0,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """Return the mean of −log p(y|x), a scalar.

    A class without training images has a log prior of −inf: it has no part in the softmax, and its own samples are left
    out of the mean.

    Args:
        log_likelihood: (B, C) or (B, C, H, W) scores.
        labels: (B,) or (B, H, W) int64 in [0, C); or probabilities of the shape of the scores.
        log_prior: (C,) log class frequencies of the training set; None is plain cross-entropy.
        strength: factor of the log prior; 1 is Bayes' rule.
        ignore_index: label that is ignored.
        reduction: ``mean``, ``sum`` or ``none``, (B,) or (B, H, W).
        validate: check the labels on an accelerator too, which has to be waited for; without, samples with a label out
            of range are ignored there.

    Raises:
        ValueError: the labels' shape, type or values are not as above.
    """
    scores = to_full_precision(log_likelihood)
    labels = valid_targets(scores, labels, ignore_index=ignore_index, validate=validate)
    if log_prior is not None:
        absent = log_prior == -math.inf
        labels = without_classes(labels, absent)
        # 0 · −inf would be NaN
        scaled = (strength * log_prior.masked_fill(absent, 0.0)).masked_fill(absent, -math.inf)
        scores = scores + broadcast_to_classes(scaled, scores)
    return reduce_over_labels(negative_log_likelihood(scores, labels), labels, None, reduction)


class LogitAdjustedLoss(ScoreLoss):
    """Cross-entropy of the scores plus the log prior: −log [ n_y^τ exp(s_y) / Σ_c n_c^τ exp(s_c) ].

    At τ = 1 it is Balanced Softmax. The trained scores are free of the training set's frequencies: predict with them as
    they are where all classes are equally frequent, and add the log prior of the data otherwise.

    Scores, labels, what is left out, and errors: :class:`~longtail.losses.score_loss.ScoreLoss`. A class without
    training images has no part in the softmax.

    Source: Menon et al., *Long-tail learning via logit adjustment*, ICLR 2021, arXiv 2007.07314; Ren et al., *Balanced
    Meta-Softmax for Long-Tailed Visual Recognition*, NeurIPS 2020, arXiv 2007.10740.

    Args:
        class_counts: (C,) training images, or frequencies, of each class: a sequence, array or tensor.
        strength: τ ≥ 0, factor of the log prior; 0 is cross-entropy over the classes that have images.
        ignore_index: see :class:`~longtail.losses.score_loss.ScoreLoss`.
        reduction: ``mean``, ``sum`` or ``none``.
        validate: check labels on an accelerator too.

    Raises:
        ValueError: counts that are negative, not finite, not one-dimensional, or all zero; a negative strength; another
            reduction.

    Example:
        >>> loss = LogitAdjustedLoss([3, 1])
        >>> round(loss(torch.zeros(1, 2), torch.tensor([1])).item(), 4)  # log 4
        1.3863
    """

    finite_log_prior: Tensor

    per_class = "finite_log_prior"

    def __init__(
        self,
        class_counts: Counts,
        strength: float = 1.0,
        *,
        ignore_index: int = -1,
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction, validate=validate)
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength: expected a factor of at least 0, got {strength}")
        self.strength = strength
        self.register_buffer("finite_log_prior", _to_finite(compute_log_prior(class_counts)))

    @property
    def log_prior(self) -> Tensor:
        """(C,) log class frequencies; −inf for a class without images."""
        return _from_finite(self.finite_log_prior)

    def loss(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return the loss."""
        return posterior_cross_entropy(scores, labels, self.log_prior, self.strength, **options)


BalancedSoftmaxLoss = LogitAdjustedLoss
"""The name in Ren et al., NeurIPS 2020; equal to logit adjustment at strength 1."""


def distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0, mask: Tensor | None = None) -> Tensor:
    """Return the mean of T² · KL(teacher ‖ student) at temperature T, a scalar.

    Source: Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015, arXiv 1503.02531.

    Args:
        student: (B, C) or (B, C, H, W) scores.
        teacher: scores of the same shape, held constant. A class to which the teacher gives −inf has no part, whatever
            the student gives it.
        temperature: T > 0.
        mask: (B,) or (B, H, W) bool, the samples or pixels to include; None includes all.
    """
    target = F.log_softmax(to_full_precision(teacher.detach()) / temperature, dim=1)
    log_probability = F.log_softmax(to_full_precision(student) / temperature, dim=1)
    # a class of probability 0 adds 0, where 0 · −inf would be NaN
    possible = target > -math.inf
    divergences = (target.exp() * (target - log_probability)).where(possible, 0.0).sum(dim=1)
    if mask is None:
        mask = torch.ones_like(divergences, dtype=torch.bool)
    return batch_mean(divergences.where(mask, 0.0), mask) * temperature**2


def agreement(scores: Tensor, log_prior: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Return the mean Jensen–Shannon divergence between the posteriors of V views of an image, in [0, log V].

        JS = 1/V Σ_v KL(p_v ‖ p̄),  p̄ = 1/V Σ_v p_v

    Source: of views as a training loss, Hendrycks et al., *AugMix*, ICLR 2020, arXiv 1912.02781; Lin, *Divergence
    Measures Based on the Shannon Entropy*, IEEE Transactions on Information Theory, 1991.

    Args:
        scores: (V, B, C) or (V, B, C, H, W).
        log_prior: (C,) log class frequencies, added to the scores; None is the uniform prior. A class without training
            images has no part in the divergence.
        mask: (B,) or (B, H, W) bool, the samples or pixels to include; None includes all.
    """
    flat = posterior(scores.flatten(0, 1), log_prior)
    # a class of probability 0 adds 0, where 0 · −inf would be NaN
    views = flat.clamp(min=_LEAST_LOG).unflatten(0, scores.shape[:2])
    mean = views.logsumexp(dim=0) - math.log(len(views))
    divergences = (views.exp() * (views - mean)).sum(dim=2).mean(dim=0)
    if mask is None:
        mask = torch.ones_like(divergences, dtype=torch.bool)
    return batch_mean(divergences.where(mask, 0.0), mask)
