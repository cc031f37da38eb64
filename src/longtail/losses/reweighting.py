"""Class weights, and reweighted cross-entropies: by class frequency or by difficulty. Legend: B samples, C classes.

Scores may have one entry for every pixel, (B, C, H, W) with labels (B, H, W); a label of −1 is ignored, and so is a
sample of a class without training images, whose weight is 0: it is left out of the mean. Labels may be probabilities of
the classes, as :class:`~longtail.losses.score_loss.ScoreLoss` says. Scores in half precision are converted to float32
first.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longtail.losses.checks import Counts, as_counts, beside_counts, valid_targets
from longtail.losses.reduction import to_full_precision
from longtail.losses.score_loss import (
    ScoreLoss,
    negative_log_likelihood,
    reduce_over_labels,
    without_classes,
)

ClassWeights = str | Mapping[int, float] | Counts
"""``auto``, ``effective_number``, ``root`` or ``inverse``; weights by class index; or (C,) weights."""


def effective_number_weights(class_counts: Counts, beta: float = 0.9999) -> Tensor:
    """Return (1 − β) / (1 − β^n_c) of every class, scaled to a mean of 1; shape (C,), 0 for a class without images.

    Source: Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, CVPR 2019, arXiv 1901.05555.

    Args:
        class_counts: (C,) training images of each class: a sequence, array or tensor. Counts of pixels would all be
            far above 1/(1 − β), and the weights equal: divide them by the pixels of an image.
        beta: in [0, 1); 0 gives all classes the same weight, the limit 1 the inverse frequency.

    Raises:
        ValueError: counts that are negative, not finite, not one-dimensional, or all zero; β outside [0, 1).
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta: expected a value in [0, 1), got {beta}")
    counts = as_counts(class_counts)
    effective_numbers = 1 - beta**counts
    weights = torch.where(counts > 0, (1 - beta) / effective_numbers.clamp(min=1e-300), 0.0)
    return beside_counts((weights * len(counts) / weights.sum()).float(), class_counts)


def optional_class_weights(
    class_weights: ClassWeights | None, class_counts: Counts | None, beta: float
) -> Tensor | None:
    """Return :func:`compute_class_weights`, or None without class weights; class counts alone are a ValueError."""
    if class_weights is not None:
        return compute_class_weights(class_weights, class_counts, beta)
    if class_counts is not None:
        raise ValueError(
            "class_counts: have no effect without class_weights; expected class_weights such as 'effective_number' too"
        )
    return None


def frequency_weights(class_counts: Counts, power: float = 1.0) -> Tensor:
    """Return n_c^(−power) of every class, scaled to a mean of 1; shape (C,), 0 for a class without images.

    Args:
        class_counts: (C,) training images of each class: a sequence, array or tensor.
        power: at least 0; 1 is the inverse frequency, ½ its root.

    Raises:
        ValueError: counts that are negative, not finite, not one-dimensional, or all zero.
    """
    counts = as_counts(class_counts)
    weights = torch.where(counts > 0, counts.clamp(min=1e-300) ** -power, 0.0)
    return beside_counts((weights * len(counts) / weights.sum()).float(), class_counts)


def scale_to_images(weights: Tensor, class_counts: Tensor) -> Tensor:
    """Return the weights scaled to a mean of 1 over the training images, Σ_c n_c w_c = Σ_c n_c.

    A loss that is divided by the number of samples, rather than by the sum of their weights, then has gradients of the
    size that it has without weights. With a mean of 1 over the classes they are several times smaller where classes are
    long-tailed, since most images are of classes of small weight.

    Args:
        weights: (C,), positive for some class that has images.
        class_counts: (C,) training images of each class.
    """
    return weights * (class_counts.sum() / (class_counts * weights).sum())


def compute_class_weights(
    class_weights: ClassWeights, class_counts: Counts | None = None, beta: float = 0.9999
) -> Tensor:
    """Return the weight of every class, shape (C,) float32: what ``class_weights`` means wherever weights are.

    | class_weights | weight of class c |
    | --- | --- |
    | ``auto``, ``effective_number`` | (1 − β) / (1 − β^n_c): nearly 1/n_c up to 1/(1 − β) images, then constant |
    | ``root`` | n_c^(−½): between no weights and the inverse frequency |
    | ``inverse`` | 1/n_c: every class has the same part in the mean |
    | mapping | the value for the class index c; 1 for a class that it does not name and that has images |
    | sequence, array, tensor | entry c |

    The named ones are scaled to a mean of 1 over the C classes (by :class:`~longtail.losses.LDAMLoss` over the images
    instead). The others are taken as they are. Where the counts are given, the weight of a class without images is 0.
    Samples of a class of weight 0 are left out of the mean.

    Args:
        class_weights: see the table.
        class_counts: (C,) training images of each class; needed by a name or a mapping.
        beta: β in [0, 1) of the effective number.

    Raises:
        ValueError: an unknown name; no class counts where they are needed; a class index outside [0, C); weights that
            are negative, not finite, all zero, or not as many as classes; counts that are not counts.

    Example:
        >>> compute_class_weights("inverse", [30, 10]).tolist()
        [0.5, 1.5]
        >>> compute_class_weights({1: 5.0}, [30, 10]).tolist()
        [1.0, 5.0]
    """
    named = isinstance(class_weights, str)
    if named and class_weights not in {"auto", "effective_number", "root", "inverse"}:
        raise ValueError(f"class_weights: expected auto, effective_number, root or inverse, got '{class_weights}'")
    if class_counts is None:
        if named or isinstance(class_weights, Mapping):
            kind = f"'{class_weights}'" if named else "a mapping"
            raise ValueError(f"class_weights: {kind} needs class_counts; give them, or one weight for each class")
        return beside_counts(as_counts(class_weights, "class_weights", "weight").float(), class_weights)
    if named:
        if class_weights in {"root", "inverse"}:
            return frequency_weights(class_counts, 0.5 if class_weights == "root" else 1.0)
        return effective_number_weights(class_counts, beta)
    counts = as_counts(class_counts)
    if isinstance(class_weights, Mapping):
        values = (counts > 0).double().tolist()
        for key, weight in class_weights.items():
            index = operator.index(key)
            if not 0 <= index < len(values):
                raise ValueError(f"class_weights: expected class indices in [0, {len(values)}), got {index}")
            values[index] = float(weight)
        class_weights = values
    weights = as_counts(class_weights, "class_weights", "weight").float().to(counts.device)
    if len(weights) != len(counts):
        raise ValueError(f"class_weights: expected {len(counts)} weights, one for each class, got {len(weights)}")
    return beside_counts(weights * (counts > 0), class_counts)


def weighted_cross_entropy(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """Return the mean of w_y · −log softmax(scores)_y, a scalar.

    Args:
        scores: (B, C, …).
        labels: (B, …) int64 in [0, C); or probabilities of the shape of the scores.
        weights: (C,) weights of the classes; samples of a class of weight 0, one without training images, are left out
            of the mean.
        ignore_index: see :func:`longtail.losses.posterior_cross_entropy`.
        reduction: ``mean``, ``sum`` or ``none``, (B, …).
        validate: see :func:`longtail.losses.posterior_cross_entropy`.

    Raises:
        ValueError: the labels' shape, type or values are not as above.
    """
    scores = to_full_precision(scores)
    labels = valid_targets(scores, labels, ignore_index=ignore_index, validate=validate)
    labels = without_classes(labels, weights == 0)
    return reduce_over_labels(negative_log_likelihood(scores, labels), labels, weights, reduction)


def focal_loss(
    scores: Tensor,
    labels: Tensor,
    gamma: float = 2.0,
    weights: Tensor | None = None,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """Return the mean of −w_y (1 − p_y)^γ log p_y with p = softmax(scores), a scalar.

    Source: Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017, arXiv 1708.02002, for softmax scores.

    Args:
        scores: (B, C, …).
        labels: (B, …) int64 in [0, C); or probabilities of the shape of the scores.
        gamma: focusing parameter γ, at least 0; 0 is cross-entropy.
        weights: (C,) weights of the classes, see :func:`weighted_cross_entropy`; None weighs them alike.
        ignore_index: see :func:`longtail.losses.posterior_cross_entropy`.
        reduction: ``mean``, ``sum`` or ``none``, (B, …).
        validate: see :func:`longtail.losses.posterior_cross_entropy`.

    Raises:
        ValueError: the labels' shape, type or values are not as above.
    """
    scores = to_full_precision(scores)
    labels = valid_targets(scores, labels, ignore_index=ignore_index, validate=validate)
    if weights is not None:
        labels = without_classes(labels, weights == 0)
    log_p = -negative_log_likelihood(scores, labels)
    # never 0, where the power with γ below 1 has no derivative
    error = (-torch.expm1(log_p)).clamp(min=1e-12)
    return reduce_over_labels(-(error**gamma) * log_p, labels, weights, reduction)


class FocalLoss(ScoreLoss):
    """The focal loss of softmax scores, −w_y (1 − p_y)^γ log p_y: easy samples count less.

    Scores, labels, what is left out, and errors: :class:`~longtail.losses.score_loss.ScoreLoss`. Weights are by class
    (the α of the paper).

    Source: Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017, arXiv 1708.02002.

    Args:
        gamma: γ ≥ 0; 0 is cross-entropy.
        class_weights: see :func:`compute_class_weights`; None weighs all classes alike.
        class_counts: (C,) training images of each class, which a named or mapped ``class_weights`` needs.
        beta: of the effective number.
        ignore_index: see :class:`~longtail.losses.score_loss.ScoreLoss`.
        reduction: ``mean``, ``sum`` or ``none``.
        validate: check labels on an accelerator too.

    Raises:
        ValueError: a negative γ, impossible class weights, or another reduction.

    Example:
        >>> loss = FocalLoss(gamma=2.0)
        >>> round(loss(torch.zeros(1, 2), torch.tensor([1])).item(), 4)  # ¼ log 2
        0.1733
    """

    weights: Tensor | None

    def __init__(
        self,
        gamma: float = 2.0,
        class_weights: ClassWeights | None = None,
        class_counts: Counts | None = None,
        *,
        beta: float = 0.9999,
        ignore_index: int = -1,
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction, validate=validate)
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma: expected an exponent of at least 0, got {gamma}")
        self.gamma = gamma
        weights = optional_class_weights(class_weights, class_counts, beta)
        self.register_buffer("weights", weights)

    def loss(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return the loss."""
        return focal_loss(scores, labels, self.gamma, self.weights, **options)


class ClassBalancedLoss(ScoreLoss):
    """Cross-entropy weighted by class, w_y · −log softmax(scores)_y; by default by the effective number of samples.

    Scores, labels, what is left out, and errors: :class:`~longtail.losses.score_loss.ScoreLoss`.

    Source: Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, CVPR 2019, arXiv 1901.05555.

    Args:
        class_counts: (C,) training images of each class; None where ``class_weights`` has one weight for each class.
        class_weights: see :func:`compute_class_weights`.
        beta: β in [0, 1) of the effective number.
        ignore_index: see :class:`~longtail.losses.score_loss.ScoreLoss`.
        reduction: ``mean``, ``sum`` or ``none``.
        validate: check labels on an accelerator too.

    Raises:
        ValueError: impossible class weights, or another reduction.

    Example:
        >>> loss = ClassBalancedLoss([30, 10], "inverse")
        >>> round(loss(torch.zeros(1, 2), torch.tensor([1])).item(), 4)  # 1.5 log 2
        1.0397
    """

    weights: Tensor

    def __init__(
        self,
        class_counts: Counts | None = None,
        class_weights: ClassWeights = "auto",
        *,
        beta: float = 0.9999,
        ignore_index: int = -1,
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction, validate=validate)
        self.register_buffer("weights", compute_class_weights(class_weights, class_counts, beta))

    def loss(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return the loss."""
        return weighted_cross_entropy(scores, labels, self.weights, **options)
