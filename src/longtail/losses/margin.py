"""Label-distribution-aware margins. Legend: B samples, C classes, n_c training images of class c.

Scores may have one entry for every pixel, (B, C, H, W) with labels (B, H, W).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longtail.losses.checks import Counts, as_counts, beside_counts, valid_targets
from longtail.losses.reduction import to_full_precision
from longtail.losses.reweighting import (
    ClassWeights,
    compute_class_weights,
    scale_to_images,
    weighted_cross_entropy,
)
from longtail.losses.score_loss import ScoreLoss


def ldam_margins(class_counts: Counts, max_margin: float = 0.5) -> Tensor:
    """Return margins Δ_c ∝ n_c^(−1/4), scaled to a maximum of ``max_margin``; shape (C,), 0 for a class without images.

    A class without images has no margin. Its samples are left out by the weight 0 that
    :func:`~longtail.losses.reweighting.effective_number_weights` gives it.

    Source: Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, NeurIPS 2019,
    arXiv 1906.07413.

    Args:
        class_counts: (C,) training images of each class: a sequence, array or tensor.
        max_margin: margin of the smallest class that has images, in units of the cosine.

    Raises:
        ValueError: counts that are negative, not finite, not one-dimensional, or all zero.
    """
    counts = as_counts(class_counts)
    margins = torch.where(counts > 0, counts, torch.inf) ** -0.25
    return beside_counts((margins * (max_margin / margins.max())).float(), class_counts)


def with_margin(
    scores: Tensor, labels: Tensor, margins: Tensor, scale: float, *, ignore_index: int = -1, validate: bool = False
) -> Tensor:
    """Return the scores with the margin subtracted from the cosine of the true class, (B, C, …).

    Args:
        scores: (B, C, …), scale · cos(h, w_c); converted to float32 if they are in half precision.
        labels: (B, …) int64 in [0, C), or ``ignore_index``, whose scores stay as they are.
        margins: (C,) in units of the cosine.
        scale: factor of the cosine classifier.
        ignore_index: see :func:`longtail.losses.posterior_cross_entropy`.
        validate: see :func:`longtail.losses.posterior_cross_entropy`.

    Raises:
        ValueError: a label is out of range, or not an int64; labels are probabilities, which have no true class.
    """
    if labels.is_floating_point():
        raise ValueError(
            "labels: expected int64 class indices, got probabilities, which have no true class to have a margin; "
            "for mixup, mix the losses: lam * loss(scores, labels_a) + (1 - lam) * loss(scores, labels_b)"
        )
    scores = to_full_precision(scores)
    labels = valid_targets(scores, labels, ignore_index=ignore_index, validate=validate)
    column = labels.clamp(min=0)
    shift = torch.where(labels >= 0, -scale * margins[column].to(scores.dtype), 0.0)
    return scores.scatter_add(1, column[:, None], shift[:, None])


def ldam_loss(
    scores: Tensor,
    labels: Tensor,
    margins: Tensor,
    scale: float,
    weights: Tensor,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """Return the mean of w_y · −log softmax(scores with the margin of class y)_y, a scalar.

    Args:
        scores: (B, C, …), scale · cos(h, w_c).
        labels: (B, …) int64 in [0, C).
        margins: (C,) in units of the cosine.
        scale: factor of the cosine classifier.
        weights: (C,) weights of the classes; samples of a class of weight 0 are left out of the mean.
        ignore_index: see :func:`longtail.losses.posterior_cross_entropy`.
        reduction: ``mean``, ``sum`` or ``none``, (B, …).
        validate: see :func:`longtail.losses.posterior_cross_entropy`.

    Raises:
        ValueError: the labels' shape, type or values are not as above; labels are probabilities.
    """
    shifted = with_margin(scores, labels, margins, scale, ignore_index=ignore_index, validate=validate)
    return weighted_cross_entropy(
        shifted, labels, weights, ignore_index=ignore_index, reduction=reduction, validate=validate
    )


class LDAMLoss(ScoreLoss):
    """Cross-entropy with a margin: the cosine of the true class is taken Δ_y ∝ n_y^(−1/4) smaller than it is.

    Scores are those of a cosine classifier, scale · cos(h, w_c), such as :class:`longtail.CosineClassifier` computes.
    For the paper's deferred re-weighting (DRW), use a second loss with ``class_weights="auto"`` for the last fifth of
    the training. Weights given by name have a mean of 1 over the training images here, not over the classes: the
    authors divide by the sum of a batch's weights, where this loss divides by the number of samples, and the gradient
    is to keep its size.

    Labels are class indices. Probabilities raise a ValueError: the margin is one of the true class, and they have none.
    Scores, what is left out, and errors: :class:`~longtail.losses.score_loss.ScoreLoss`. A class without training
    images has no margin, and its samples are left out whatever their weight.

    Source: Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, NeurIPS 2019,
    arXiv 1906.07413.

    Args:
        class_counts: (C,) training images of each class: a sequence, array or tensor.
        max_margin: margin of the smallest class, in [0, 2), in units of the cosine.
        scale: factor of the cosine classifier, positive.
        class_weights: see :func:`longtail.losses.compute_class_weights`; those given by name are scaled to a mean of 1
            over the training images. None weighs all classes alike.
        beta: of the effective number.
        ignore_index: see :class:`~longtail.losses.score_loss.ScoreLoss`.
        reduction: ``mean``, ``sum`` or ``none``.
        validate: check labels on an accelerator too.

    Raises:
        ValueError: impossible counts or weights, a margin or scale out of its range, or another reduction.

    Example:
        >>> loss = LDAMLoss([16, 1], max_margin=0.5, scale=10.0)
        >>> loss.margins.tolist()
        [0.25, 0.5]
    """

    margins: Tensor
    weights: Tensor

    def __init__(
        self,
        class_counts: Counts,
        max_margin: float = 0.5,
        scale: float = 30.0,
        class_weights: ClassWeights | None = None,
        *,
        beta: float = 0.9999,
        ignore_index: int = -1,
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction, validate=validate)
        if not 0 <= max_margin < 2:
            raise ValueError(f"max_margin: expected a value in [0, 2), got {max_margin}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale: expected a positive factor, got {scale}")
        self.scale = scale
        counts = as_counts(class_counts)
        present = (counts > 0).float()
        weights = present if class_weights is None else compute_class_weights(class_weights, counts, beta)
        if isinstance(class_weights, str):
            weights = scale_to_images(weights, counts)
        margins = beside_counts(ldam_margins(counts, max_margin), class_counts)
        self.register_buffer("margins", margins)
        self.register_buffer("weights", beside_counts(weights, class_counts))

    def loss(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return the loss."""
        return ldam_loss(scores, labels, self.margins, self.scale, self.weights, **options)
