"""Losses of regions, which may be background: the prior of the classes given an object, and a yes or no for each class.

Legend: B regions, C classes. A label is in [0, C), C for the background, or −1 where a region is ignored.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses.reduction import batch_mean, to_full_precision


def relative_log_prior(log_prior: Tensor) -> Tensor:
    """Return log(C π_c), the class frequencies by the uniform ones, (C,); −inf for a class without frequency.

    Which part of the regions is background is a matter of how they are drawn, not of the classes. With a part φ of
    objects, class c has the prior φ π_c in training, and φ / C where all classes are equally frequent; the background
    has 1 − φ in both. Bayes' rule thus adds log(φ π_c) − log(φ / C) = log(C π_c) to the score of a class, and nothing
    to the background's. C counts the classes with a frequency.

    Args:
        log_prior: (C,) log π_c, −inf for a class without training objects.
    """
    return log_prior + (log_prior > -math.inf).sum().to(log_prior.dtype).log()


def relative_log_odds(log_prior: Tensor, objects: float) -> Tensor:
    """Return logit(φ π_c) − logit(φ / C), (C,): the same as :func:`relative_log_prior` for a yes or no of each class.

    The second part of log(C π_c) + log[(1 − φ / C) / (1 − φ π_c)] is small where objects are.

    Args:
        log_prior: (C,) log π_c, −inf for a class without training objects.
        objects: φ in (0, 1), the part of the regions that are objects.
    """
    classes = (log_prior > -math.inf).sum().to(log_prior.dtype)
    rest = torch.log1p(-objects / classes) - torch.log1p(-objects * log_prior.exp())
    return relative_log_prior(log_prior) + rest


def sigmoid_focal_loss(
    scores: Tensor,
    labels: Tensor,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    *,
    shift: Tensor | None = None,
    classes: Tensor | None = None,
) -> Tensor:
    """Return the sum of −α_t (1 − p_t)^γ log p_t over regions and classes, divided by the number of objects.

    p_t is the probability of the right answer, to whether the region is of class c: σ(s_c) if it is, else 1 − σ(s_c).
    α_t is α if it is, else 1 − α.

    Source: Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017, arXiv 1708.02002.

    Args:
        scores: (B, C).
        labels: (B,) int64 in [0, C), C for the background, −1 to ignore a region.
        gamma: γ ≥ 0; 0 with ``alpha`` None is binary cross-entropy.
        alpha: α in (0, 1); None has no weights.
        shift: (C,) finite, added to the scores: the log odds of the prior.
        classes: (C,) bool, the classes that count, see :func:`federated_classes`; all if not given.
    """
    scores = to_full_precision(scores)
    if shift is not None:
        scores = scores + shift
    target = labels[:, None] == torch.arange(scores.shape[1], device=labels.device)
    signed = torch.where(target, scores, -scores)  # p_t = σ(signed)
    # (1 − p_t)^γ by its logarithm: the derivative of a power below 1 is infinite at 0, where a sigmoid ends
    losses = -(gamma * F.logsigmoid(-signed)).exp() * F.logsigmoid(signed)
    if alpha is not None:
        losses = ((2 * alpha - 1) * target.to(losses.dtype) + (1 - alpha)) * losses
    counted = labels[:, None] >= 0
    losses = torch.where(counted if classes is None else counted & classes, losses, 0.0).sum(dim=1)
    return batch_mean(losses, (labels >= 0) & (labels < scores.shape[1]))


def federated_classes(labels: Tensor, class_counts: Tensor, number: int) -> Tensor:
    """Return the classes that a batch is evidence of, (C,) bool: those of its objects, and drawn ones.

    Of a class without an object in the batch the regions are negatives in nearly all batches, and many more than its
    positives if it is rare; where annotations are federated, objects of it may be there that nobody looked for. So
    classes are drawn until there are ``number``, without replacement and with probabilities ∝ √n_c. No wait for an
    accelerator.

    Source: the federated loss of Zhou et al. (CenterNet2), 2021, arXiv 2103.07461.

    Args:
        labels: (B,) int64 in [0, C), C for the background, −1 where a region is ignored.
        class_counts: (C,) training images or objects of each class.
        number: of classes; a batch with objects of more has all of these, and one where fewer have images these alone.
    """
    num_classes = len(class_counts)
    objects = torch.where(labels < 0, num_classes, labels)
    present = torch.zeros(num_classes + 1, dtype=torch.bool, device=labels.device)
    present = present.scatter(0, objects, True)[:num_classes]
    # the largest of log w + Gumbel noise are a draw without replacement with probabilities ∝ w
    noise = -torch.empty(num_classes, device=labels.device).exponential_().log()
    keys = 0.5 * class_counts.to(noise).log() + noise
    chosen = keys.masked_fill(present, math.inf).topk(min(number, num_classes)).indices
    # where fewer classes have images, the others are among them
    return present | (present.scatter(0, chosen, True) & (class_counts > 0))
