"""Reweighted cross-entropies: by class frequency or by difficulty. Legend: B samples, C classes.

Scores may have one entry for every pixel, (B, C, H, W) with labels (B, H, W); a label of −1 is ignored, and so is a
sample of a class without training images, whose weight is 0: it is left out of the mean. Scores in half precision are
converted to float32 first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses.checks import Counts, as_counts, ignore_classes, valid_labels
from longtail.losses.reduction import batch_mean, to_full_precision


def effective_number_weights(class_counts: Counts, beta: float = 0.9999) -> Tensor:
    """Return (1 − β) / (1 − β^n_c) of every class, scaled to a mean of 1; shape (C,), 0 for a class without images.

    Source: Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, CVPR 2019, arXiv 1901.05555.

    Args:
        class_counts: (C,) training images of each class: a sequence, array or tensor.
        beta: in [0, 1); 0 gives all classes the same weight, the limit 1 the inverse frequency.

    Raises:
        ValueError: counts that are negative, not finite, not one-dimensional, or all zero.
    """
    counts = as_counts(class_counts)
    effective_numbers = 1 - torch.tensor(beta, dtype=torch.float64) ** counts
    weights = torch.where(counts > 0, (1 - beta) / effective_numbers.clamp(min=1e-300), 0.0)
    return (weights * len(counts) / weights.sum()).float()


def weighted_cross_entropy(scores: Tensor, labels: Tensor, weights: Tensor, *, validate: bool = False) -> Tensor:
    """Return the mean of w_y · −log softmax(scores)_y, a scalar.

    Args:
        scores: (B, C, …).
        labels: (B, …) int64 in [0, C), or −1.
        weights: (C,) weights of the classes; samples of a class of weight 0, one without training images, are left out
            of the mean.
        validate: see :func:`longtail.losses.posterior_cross_entropy`.

    Raises:
        ValueError: a label is out of range, or not an int64.
    """
    scores = to_full_precision(scores)
    labels = ignore_classes(valid_labels(labels, scores.shape[1], validate=validate), weights == 0)
    losses = weights[labels.clamp(min=0)] * F.cross_entropy(scores, labels, reduction="none", ignore_index=-1)
    return batch_mean(losses, labels >= 0)


def focal_loss(scores: Tensor, labels: Tensor, gamma: float = 2.0, *, validate: bool = False) -> Tensor:
    """Return the mean of −(1 − p_y)^γ log p_y with p = softmax(scores), a scalar.

    Source: Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017, arXiv 1708.02002, for softmax scores.

    Args:
        scores: (B, C, …).
        labels: (B, …) int64 in [0, C), or −1.
        gamma: focusing parameter γ, at least 0; 0 is cross-entropy.
        validate: see :func:`longtail.losses.posterior_cross_entropy`.

    Raises:
        ValueError: a label is out of range, or not an int64.
    """
    scores = to_full_precision(scores)
    labels = valid_labels(labels, scores.shape[1], validate=validate)
    log_p = -F.cross_entropy(scores, labels, reduction="none", ignore_index=-1)
    # never 0, where the power with γ below 1 has no derivative
    error = (-torch.expm1(log_p)).clamp(min=1e-12)
    losses = -(error**gamma) * log_p
    return batch_mean(losses, labels >= 0)
