"""The class posterior that all methods share: log-likelihood scores and a log prior, and its cross-entropy.

Legend: B samples, C classes. Scores may have one entry for every pixel: (B, C, H, W) with labels (B, H, W). A label of
−1 is ignored, and so is a sample of a class without training images, whose prior is 0: it is left out of the mean.
Scores in half precision are converted to float32 first.

    log p(y|x) = score_y + log p(y) − log Σ_c exp(score_c + log p(c))

Training adds the log prior of the training set; prediction adds that of the data it is used on. This is logit
adjustment (Menon et al., ICLR 2021), and equal to Balanced Softmax (Ren et al., NeurIPS 2020).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.losses.checks import Counts, as_counts, ignore_classes, valid_labels
from longtail.losses.reduction import batch_mean, to_full_precision


def compute_log_prior(class_counts: Counts) -> Tensor:
    """Return log p(c) = log(n_c / Σ n), shape (C,) float32; −inf for a class without images.

    Args:
        class_counts: (C,) n_c, the training images of each class: a sequence, array or tensor.

    Raises:
        ValueError: counts that are negative, not finite, not one-dimensional, or all zero.
    """
    counts = as_counts(class_counts)
    return (counts / counts.sum()).log().float()


class ClassPrior(nn.Module):
    """Class counts of a training set, and the logarithm of the class frequencies, as buffers.

    Args:
        class_counts: (C,) training images of each class, whole numbers: a sequence, array or tensor.

    Attributes:
        class_counts: (C,) int64 buffer.
        log_prior: (C,) float32 buffer, log p(c); −inf for a class without images.

    Raises:
        ValueError: counts that are negative, not whole, not one-dimensional, or all zero.
    """

    class_counts: Tensor
    log_prior: Tensor

    def __init__(self, class_counts: Counts) -> None:
        super().__init__()
        counts = as_counts(class_counts)
        if not bool((counts == counts.round()).all()):
            raise ValueError("class_counts: expected whole numbers; for frequencies use compute_log_prior")
        self.register_buffer("log_prior", compute_log_prior(counts))
        self.register_buffer("class_counts", counts.long())


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


def broadcast_to_classes(values: Tensor, scores: Tensor) -> Tensor:
    """Return (C,) ``values`` in a shape that broadcasts along the class dimension of (B, C, …) ``scores``."""
    return values.view(-1, *(1,) * (scores.ndim - 2))


def posterior_cross_entropy(
    log_likelihood: Tensor,
    labels: Tensor,
    log_prior: Tensor | None = None,
    strength: float = 1.0,
    *,
    validate: bool = False,
) -> Tensor:
    """Return the mean of −log p(y|x), a scalar.

    A class without training images has a log prior of −inf: it has no part in the softmax, and its own samples are left
    out of the mean.

    Args:
        log_likelihood: (B, C) or (B, C, H, W) scores.
        labels: (B,) or (B, H, W) int64 in [0, C); −1 is ignored.
        log_prior: (C,) log class frequencies of the training set; None is plain cross-entropy.
        strength: factor of the log prior; 1 is Bayes' rule.
        validate: check the labels on an accelerator too, which has to be waited for; without, samples with a label out
            of range are ignored there.

    Raises:
        ValueError: a label is out of range, or not an int64.
    """
    scores = to_full_precision(log_likelihood)
    labels = valid_labels(labels, scores.shape[1], validate=validate)
    if log_prior is not None:
        absent = log_prior == -math.inf
        labels = ignore_classes(labels, absent)
        # 0 · −inf would be NaN
        scaled = (strength * log_prior.masked_fill(absent, 0.0)).masked_fill(absent, -math.inf)
        scores = scores + broadcast_to_classes(scaled, scores)
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
    target = F.log_softmax(to_full_precision(teacher.detach()) / temperature, dim=1)
    log_probability = F.log_softmax(to_full_precision(student) / temperature, dim=1)
    divergences = F.kl_div(log_probability, target, reduction="none", log_target=True).sum(dim=1)
    if mask is None:
        mask = torch.ones_like(divergences, dtype=torch.bool)
    return batch_mean(divergences.where(mask, 0.0), mask) * temperature**2
