"""Seesaw loss: what a sample of one class takes from the score of another depends on both frequencies.

Legend: B samples, C classes. Scores may have one entry for every pixel: (B, C, H, W).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses.checks import Counts, as_counts, beside_counts, valid_targets
from longtail.losses.reduction import to_full_precision
from longtail.losses.score_loss import (
    ScoreLoss,
    broadcast_to_classes,
    negative_log_likelihood,
    reduce_over_labels,
    without_classes,
)


def seesaw_loss(
    scores: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    mitigation: float = 0.8,
    compensation: float = 2.0,
    *,
    smallest_probability: float = 0.01,
    ignore_index: int = -1,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """Return the mean of −log [ e^{s_y} / (e^{s_y} + Σ_{c≠y} M_yc C_yc e^{s_c}) ], a scalar.

        M_yc = min(1, n_c / n_y)^p          mitigates the negative gradients on rarer classes
        C_yc = max(1, σ_c / σ_y)^q          compensates for those on classes that are mistaken for y

    with σ = softmax(s), held constant. Scores may have a column more than there are class counts: the background, for
    which and on which both factors are 1. The counts are those of the training set, known from the beginning, where
    the paper accumulates them along the training; the paper's separate score for object or background, and its
    normalised features, are no part of this.

    Source: Wang et al., *Seesaw Loss for Long-Tailed Instance Segmentation*, CVPR 2021, arXiv 2008.10032. The bound of
    σ_y is that of the authors' code.

    Args:
        scores: (B, C, …), or (B, C + 1, …) with the background as the last class.
        labels: (B, …) int64 in [0, C), or C for the background.
        class_counts: (C,) training samples n_c of each class. The samples of a class without any are left out; to
            those of others it is a class with one.
        mitigation: p ≥ 0; 0 leaves the first factor out.
        compensation: q ≥ 0; 0 leaves the second factor out.
        smallest_probability: lower bound of σ_y in C_yc.
        ignore_index: see :func:`longtail.losses.posterior_cross_entropy`.
        reduction: ``mean``, ``sum`` or ``none``, (B, …).
        validate: see :func:`longtail.losses.posterior_cross_entropy`.

    Raises:
        ValueError: the labels' shape, type or values are not as above; probabilities instead of class indices.
    """
    scores = to_full_precision(scores)
    if labels.is_floating_point():
        raise ValueError("labels: expected class indices; the factors of a sample are those of its one class")
    labels = valid_targets(scores, labels, ignore_index=ignore_index, validate=validate)
    background = scores.shape[1] - len(class_counts)
    labels = without_classes(labels, F.pad(class_counts == 0, (0, background)))
    own = labels.clamp(min=0).unsqueeze(1)
    log_counts = class_counts.to(scores).clamp(min=1).log()
    is_class = F.pad(torch.ones_like(log_counts), (0, background))
    log_counts = F.pad(log_counts, (0, background))
    log_mitigation = mitigation * (broadcast_to_classes(log_counts, scores) - log_counts[own]).clamp(max=0)
    log_probability = F.log_softmax(scores.detach(), dim=1)
    log_own = log_probability.gather(1, own).clamp(min=math.log(smallest_probability))
    log_compensation = compensation * (log_probability - log_own).clamp(min=0)
    both = broadcast_to_classes(is_class, scores) * is_class[own]
    factors = ((log_mitigation + log_compensation) * both).scatter(1, own, 0.0)
    return reduce_over_labels(negative_log_likelihood(scores + factors, labels), labels, None, reduction)


class SeesawLoss(ScoreLoss):
    """Cross-entropy in which rarer classes, and classes that are told apart already, are pushed down less.

    See :func:`seesaw_loss`. Labels are class indices: probabilities are refused.

    Args:
        class_counts: (C,) training samples of each class: a sequence, array or tensor.
        mitigation: p ≥ 0.
        compensation: q ≥ 0.
        ignore_index: see :class:`~longtail.losses.score_loss.ScoreLoss`.
        reduction: ``mean``, ``sum`` or ``none``.
        validate: check labels on an accelerator too.

    Raises:
        ValueError: counts that are negative, not whole, not one-dimensional, or all zero; a negative exponent; another
            reduction.

    Example:
        >>> loss = SeesawLoss([4, 1], compensation=0.0, mitigation=1.0)
        >>> round(loss(torch.zeros(1, 2), torch.tensor([0])).item(), 4)  # log 1.25
        0.2231
    """

    class_counts: Tensor

    per_class = "class_counts"

    def __init__(
        self,
        class_counts: Counts,
        mitigation: float = 0.8,
        compensation: float = 2.0,
        *,
        ignore_index: int = -1,
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction, validate=validate)
        for name, exponent in (("mitigation", mitigation), ("compensation", compensation)):
            if not 0 <= exponent < math.inf:
                raise ValueError(f"{name}: expected an exponent of at least 0, got {exponent}")
        self.mitigation, self.compensation = mitigation, compensation
        counts = as_counts(class_counts)
        if not bool((counts == counts.round()).all()):
            raise ValueError("class_counts: expected whole numbers, got fractions; frequencies do not say how many")
        # whole numbers keep their type where the module is converted to half precision, which ends at 65,504
        self.register_buffer("class_counts", beside_counts(counts.long(), class_counts))

    def loss(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return the loss."""
        return seesaw_loss(scores, labels, self.class_counts, self.mitigation, self.compensation, **options)
