"""The asymmetric loss: one binary problem for each class, in which negatives count less than positives.

Legend: B samples, C classes, p = σ(score), y the label of a class, 1 where it is in the image. Scores may have one
entry for every pixel: (B, C, H, W).

    −y (1 − p)^γ₊ log p  −  (1 − y) q^γ₋ log(1 − q),    q = max(p − m, 0)

Source: Ridnik et al., *Asymmetric Loss For Multi-Label Classification*, ICCV 2021, arXiv 2009.14119.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses.checks import Counts, valid_labels, values_are_known
from longtail.losses.reduction import reduce_losses, to_full_precision
from longtail.losses.reweighting import ClassWeights, optional_class_weights
from longtail.losses.score_loss import ScoreLoss, broadcast_to_classes


def asymmetric_loss(
    scores: Tensor,
    labels: Tensor,
    gamma_negative: float = 4.0,
    gamma_positive: float = 0.0,
    clip: float = 0.05,
    weights: Tensor | None = None,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """Return the mean over the samples of the sum of the classes' asymmetric losses, a scalar.

    Args:
        scores: (B, C, …).
        labels: (B, …) int64 in [0, C), one class for each sample; or of the shape of the scores, floats in [0, 1],
            bools or integers: which classes are in the image.
        gamma_negative: γ₋ ≥ 0.
        gamma_positive: γ₊ ≥ 0.
        clip: m in [0, 1): negatives with a probability below it have no loss.
        weights: (C,) factors of the classes' losses; None weighs them alike.
        ignore_index: class index of a sample that is ignored; where the labels have the shape of the scores, entry of a
            class of which it is not known whether it is in the image.
        reduction: ``mean``, ``sum`` or ``none``, (B, …).
        validate: see :func:`longtail.losses.posterior_cross_entropy`.

    Raises:
        ValueError: the labels' shape, type or values are not as above.
    """
    scores = to_full_precision(scores)
    targets, known = _one_against_rest(scores, labels, ignore_index, validate)
    log_p, log_not_p = F.logsigmoid(scores), F.logsigmoid(-scores)
    # log(1 − q) = min(log(1 − p + m), 0), which is exact for p near 1 too
    log_not_q = log_not_p
    if clip > 0:
        log_not_q = torch.logaddexp(log_not_p, scores.new_full((), math.log(clip))).clamp(max=0)
    # never 0, where the power with γ below 1 has no derivative
    q = (-torch.expm1(log_not_q)).clamp(min=1e-12)
    # a negative whose score is −inf, of a masked class, has no loss and no gradient: 0 · log p would be NaN
    log_p, log_not_q = log_p.where(targets > 0, 0.0), log_not_q.where(targets < 1, 0.0)
    losses = -targets * (gamma_positive * log_not_p).exp() * log_p - (1 - targets) * q**gamma_negative * log_not_q
    if weights is not None:
        losses = losses * broadcast_to_classes(weights, losses)
    return reduce_losses(losses.where(known, 0.0).sum(dim=1), known.any(dim=1), reduction)


def _one_against_rest(scores: Tensor, labels: Tensor, ignore_index: int, validate: bool) -> tuple[Tensor, Tensor]:
    """Return (B, C, …) labels of every class, in the type of the scores, and whether they are known."""
    if labels.shape == scores.shape:
        targets = labels.to(scores.dtype)
        known = targets != ignore_index
        targets = targets.where(known, 0.0)
        checked = values_are_known(labels) and (labels.device.type == "cpu" or validate)
        if checked and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(
                f"labels: expected values in [0, 1] for every class, or {ignore_index} where it is not known, got "
                f"{float(targets.min()):.3g} to {float(targets.max()):.3g}"
            )
        return targets, known
    expected = (scores.shape[0], *scores.shape[2:])
    if tuple(labels.shape) != expected or labels.is_floating_point():
        raise ValueError(
            f"labels: expected class indices of shape {expected}, or one value for each class of shape "
            f"{tuple(scores.shape)}, got {tuple(labels.shape)} of {labels.dtype}"
        )
    indices = valid_labels(labels, scores.shape[1], ignore_index=ignore_index, validate=validate)[:, None]
    targets = torch.zeros_like(scores).scatter(1, indices.clamp(min=0), 1.0)
    return targets, (indices >= 0).expand_as(scores)


class AsymmetricLoss(ScoreLoss):
    """The asymmetric loss of sigmoid scores, for images with several classes; with one, it is one against the rest.

    Labels are class indices, or of the shape of the scores: 1 for every class in the image, 0 for the others, and any
    value between for mixup and label smoothing, since the loss is linear in the label. They need not sum to 1. An entry
    of ``ignore_index`` says that it is not known whether the class is in the image, and is left out. A class of weight
    0 is left out of the sum over the classes; its samples stay negatives of the other classes.

    The loss is summed over the classes; the mean is over the samples. Scores and errors:
    :class:`~longtail.losses.score_loss.ScoreLoss`.

    Source: Ridnik et al., *Asymmetric Loss For Multi-Label Classification*, ICCV 2021, arXiv 2009.14119.

    Args:
        gamma_negative: γ₋ ≥ 0, exponent of the probability of a negative.
        gamma_positive: γ₊ ≥ 0, exponent of the error of a positive; the paper recommends less than γ₋.
        clip: m in [0, 1): negatives with a probability below it have no loss. With both exponents and the clip 0 it is
            binary cross-entropy.
        class_weights: see :func:`longtail.losses.compute_class_weights`; None weighs all classes alike.
        class_counts: (C,) training images of each class, which a named or mapped ``class_weights`` needs.
        beta: of the effective number.
        ignore_index: see above.
        reduction: ``mean``, ``sum`` or ``none``.
        validate: check labels on an accelerator too.

    Raises:
        ValueError: an exponent, clip or class weight out of its range, or another reduction.

    Example:
        >>> loss = AsymmetricLoss(gamma_negative=0.0, clip=0.0)
        >>> round(loss(torch.zeros(1, 2), torch.tensor([[True, True]])).item(), 4)  # 2 log 2
        1.3863
    """

    weights: Tensor | None

    def __init__(
        self,
        gamma_negative: float = 4.0,
        gamma_positive: float = 0.0,
        clip: float = 0.05,
        class_weights: ClassWeights | None = None,
        class_counts: Counts | None = None,
        *,
        beta: float = 0.9999,
        ignore_index: int = -1,
        reduction: str = "mean",
        validate: bool = False,
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction, validate=validate)
        for name, gamma in (("gamma_negative", gamma_negative), ("gamma_positive", gamma_positive)):
            if not 0 <= gamma < math.inf:
                raise ValueError(f"{name}: expected an exponent of at least 0, got {gamma}")
        if not 0 <= clip < 1:
            raise ValueError(f"clip: expected a probability in [0, 1), got {clip}")
        self.gamma_negative, self.gamma_positive, self.clip = gamma_negative, gamma_positive, clip
        weights = optional_class_weights(class_weights, class_counts, beta)
        self.register_buffer("weights", weights)

    def loss(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return the loss."""
        return asymmetric_loss(
            scores, labels, self.gamma_negative, self.gamma_positive, self.clip, self.weights, **options
        )
