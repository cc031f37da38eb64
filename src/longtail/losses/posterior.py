"""The class posterior that all methods share: log-likelihood scores and a log prior, and its cross-entropy.

Legend: B samples, C classes. Scores may have one entry for every pixel: (B, C, H, W) with labels (B, H, W). A label of
−1 is ignored.

    log p(y|x) = score_y + log p(y) − log Σ_c exp(score_c + log p(c))

Training adds the log prior of the training set; prediction adds that of the data it is used on. This is logit
adjustment (Menon et al., ICLR 2021), and equal to Balanced Softmax (Ren et al., NeurIPS 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.losses.reduction import batch_mean


def compute_log_prior(class_counts: Tensor | Sequence[int]) -> Tensor:
    """Return log p(c) = log(n_c / Σ n), shape (C,) float32; −inf for a class without images.

    Args:
        class_counts: (C,) n_c, the training images of each class.

    Raises:
        ValueError: counts that are negative, not one-dimensional, or all zero.
    """
    counts = torch.as_tensor(class_counts)
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"class_counts: expected shape (C,), one count for each class, got {tuple(counts.shape)}")
    if bool((counts < 0).any()) or not bool((counts > 0).any()):
        raise ValueError("class_counts: expected counts of at least 0, one of them positive")
    return (counts.double() / counts.double().sum()).log().float()


class ClassPrior(nn.Module):
    """Class counts of a training set, and the logarithm of the class frequencies, as buffers.

    Args:
        class_counts: (C,) training images of each class.

    Attributes:
        class_counts: (C,) int64 buffer.
        log_prior: (C,) float32 buffer, log p(c); −inf for a class without images.

    Raises:
        ValueError: counts that are negative, not one-dimensional, or all zero.
    """

    class_counts: Tensor
    log_prior: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int]) -> None:
        super().__init__()
        counts = torch.as_tensor(class_counts)
        self.register_buffer("log_prior", compute_log_prior(counts))
        self.register_buffer("class_counts", counts.long())


def posterior(log_likelihood: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """Return log p(y|x), shape (B, C) or (B, C, H, W).

    Args:
        log_likelihood: (B, C) or (B, C, H, W) scores, log p(x|c) up to a constant for each sample or pixel.
        log_prior: (C,) log class frequencies; None is the uniform prior.
    """
    scores = log_likelihood if log_prior is None else log_likelihood + broadcast_to_classes(log_prior, log_likelihood)
    return F.log_softmax(scores, dim=1)


def broadcast_to_classes(values: Tensor, scores: Tensor) -> Tensor:
    """Return (C,) ``values`` in a shape that broadcasts along the class dimension of (B, C, …) ``scores``."""
    return values.view(-1, *(1,) * (scores.ndim - 2))


def posterior_cross_entropy(
    log_likelihood: Tensor, labels: Tensor, log_prior: Tensor | None = None, strength: float = 1.0
) -> Tensor:
    """Return the mean of −log p(y|x), a scalar.

    Args:
        log_likelihood: (B, C) or (B, C, H, W) scores.
        labels: (B,) or (B, H, W) int64 in [0, C); −1 is ignored.
        log_prior: (C,) log class frequencies of the training set; None is plain cross-entropy.
        strength: factor of the log prior; 1 is Bayes' rule.
    """
    if log_prior is None:
        scores = log_likelihood
    else:
        scores = log_likelihood + strength * broadcast_to_classes(log_prior, log_likelihood)
    return batch_mean(F.cross_entropy(scores, labels, reduction="none", ignore_index=-1), labels >= 0)


def distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0, mask: Tensor | None = None) -> Tensor:
    """Return the mean of T² · KL(teacher ‖ student) at temperature T, a scalar.

    Source: Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015, arXiv 1503.02531.

    Args:
        student: (B, C) or (B, C, H, W) scores.
        teacher: scores of the same shape, held constant.
        temperature: T > 0.
        mask: (B,) or (B, H, W) bool, the samples or pixels to include; None includes all.
    """
    target = F.log_softmax(teacher.detach() / temperature, dim=1)
    log_probability = F.log_softmax(student / temperature, dim=1)
    divergences = F.kl_div(log_probability, target, reduction="none", log_target=True).sum(dim=1)
    if mask is None:
        mask = torch.ones_like(divergences, dtype=torch.bool)
    return batch_mean(divergences.where(mask, 0.0), mask) * temperature**2
