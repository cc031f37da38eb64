"""What the losses on scores share: how labels choose, weigh or leave out losses, and the options of their modules.

Legend: B samples, C classes. Scores may have one entry for every pixel: (B, C, H, W).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.losses.checks import ignore_classes
from longtail.losses.reduction import check_reduction, reduce_losses


def broadcast_to_classes(values: Tensor, scores: Tensor) -> Tensor:
    """Return (C,) ``values`` in a shape that broadcasts along the class dimension of (B, C, …) ``scores``."""
    return values.view(-1, *(1,) * (scores.ndim - 2))


def without_classes(labels: Tensor, classes: Tensor) -> Tensor:
    """Return the labels without some classes: −1 in their place, or probabilities of 0.

    Args:
        labels: of :func:`longtail.losses.checks.valid_targets`.
        classes: (C,) bool, the classes to leave out.
    """
    if labels.is_floating_point():
        return labels.masked_fill(broadcast_to_classes(classes, labels), 0.0)
    return ignore_classes(labels, classes)


def negative_log_likelihood(scores: Tensor, labels: Tensor) -> Tensor:
    """Return −log softmax(scores) of the labels' classes, (B, …); of every class, (B, C, …), for probabilities.

    It is 0 where a label is −1, or a probability 0: there the score may be −inf.
    """
    if labels.is_floating_point():
        return torch.where(labels > 0, -F.log_softmax(scores, dim=1), 0.0)
    return F.cross_entropy(scores, labels, reduction="none", ignore_index=-1)


def reduce_over_labels(losses: Tensor, labels: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """Return the weighted losses of the samples, their sum, or their mean over the samples that count.

    Probabilities give the expectation of the loss of a class index drawn from them. A sample then counts by the sum of
    its probabilities, which is below 1 where some of its classes are left out.

    Args:
        losses: (B, …); (B, C, …) of every class for probabilities. 0 where a label is −1, or a probability 0.
        labels: of :func:`longtail.losses.checks.valid_targets`.
        weights: (C,) weights of the classes.
        reduction: ``mean``, ``sum`` or ``none``.
    """
    if labels.is_floating_point():
        losses = losses * labels if weights is None else losses * labels * broadcast_to_classes(weights, labels)
        return reduce_losses(losses.sum(dim=1), labels.sum(dim=1), reduction)
    if weights is not None:
        losses = weights[labels.clamp(min=0)] * losses
    return reduce_losses(losses, labels >= 0, reduction)


class ScoreLoss(nn.Module, ABC):
    """A loss of scores and labels: ``loss(scores, labels)``.

    - *Scores* are (B, C), or (B, C, H, W) for pixels, in any precision. Those in half precision are converted to
      float32 first, so the loss is float32, or float64 for float64.
    - *Labels* are class indices, (B,) or (B, H, W) int64 in [0, C); or probabilities of the shape of the scores, as
      mixup and label smoothing make them: at least 0, with the sum 1. They give the expectation of the loss of a class
      index drawn from them, which is what mixup asks for. Where this has no meaning, the class says so and raises.
    - *Left out* of sum and mean are a label of ``ignore_index``, a row of probabilities that are all 0, and a class
      without training images where the loss has class counts. Of probabilities the part on such a class is left out.
    - *The mean* is over what is not left out, and over all processes of a distributed training: each process returns
      its share times the number of processes, whose average over the processes is the mean over the whole batch. It
      is divided by the number of samples, not by the sum of their weights as in ``torch.nn.CrossEntropyLoss``. It is 0
      where all is left out. Without gradients it is that of this process, and no process waits for another.
    - *Saved*: what is computed from the class counts is a buffer in the ``state_dict``, as the weights of
      ``torch.nn.CrossEntropyLoss`` are, so that a network that contains the loss has it again where it is built without
      memory and then loaded, as ``from_pretrained`` of transformers does. Loading a state without it keeps the own one.
    - *Errors*: a ValueError names the argument. Shapes and types are always checked; values on a CPU, and on an
      accelerator, which has to be waited for, with ``validate``. Without, a class index out of range is ignored there,
      and probabilities are taken as they are.

    Args:
        ignore_index: class index that is ignored. Probabilities have none.
        reduction: ``mean``, ``sum`` (of this process), or ``none``: (B,) or (B, H, W), 0 where a sample is left out.
        validate: check labels on an accelerator too.

    Raises:
        ValueError: another reduction.
    """

    def __init__(self, *, ignore_index: int = -1, reduction: str = "mean", validate: bool = False) -> None:
        super().__init__()
        check_reduction(reduction)
        self.ignore_index, self.reduction, self.validate = ignore_index, reduction, validate

    per_class: ClassVar[str] = "weights"
    """The buffer with one entry for each class, (C,), or None, which says how many classes there are."""

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar, or one of every sample for the reduction ``none``.

        Args:
            scores: (B, C) or (B, C, H, W).
            labels: (B,) or (B, H, W) int64 in [0, C) or ``ignore_index``; or probabilities of the scores' shape.

        Raises:
            ValueError: shapes, types or, where they are checked, values are not as above.
        """
        check_scores(scores, getattr(self, self.per_class))
        return self.loss(
            scores, labels, ignore_index=self.ignore_index, reduction=self.reduction, validate=self.validate
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name, own in self.named_buffers(recurse=False):  # which earlier versions did not save
            state_dict.setdefault(f"{prefix}{name}", own)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @abstractmethod
    def loss(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return the loss of checked scores; ``options`` are ``ignore_index``, ``reduction`` and ``validate``."""

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"


def check_scores(scores: Tensor, per_class: Tensor | None) -> None:
    """Raise ValueError where scores are not (B, C, …) floats, of as many classes as a (C,) tensor has entries."""
    if scores.ndim < 2 or not scores.is_floating_point():
        raise ValueError(f"scores: expected floats of shape (B, C, …), got {tuple(scores.shape)} of {scores.dtype}")
    if per_class is not None and scores.shape[1] != len(per_class):
        raise ValueError(
            f"scores: expected {len(per_class)} classes in dimension 1, as the loss was made for, got shape "
            f"{tuple(scores.shape)}"
        )
