"""Losses, samplers and metrics for the ``Trainer`` of transformers, which is not imported here.

Legend: B samples, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longtail.class_counts import in_class_order
from longtail.config import Shots
from longtail.errors import LongtailError
from longtail.evaluation.metrics import classification_metrics, count_correct

IGNORED = -100
"""The label that transformers ignores."""


def compute_loss_func(loss: nn.Module) -> Callable[..., Tensor]:
    """Return a loss as the argument ``compute_loss_func`` of ``Trainer``.

    With accumulated gradients and several processes the loss is the mean over all samples of an optimiser's step, as
    ``Trainer`` expects it: the sum over a batch, divided by ``num_items_in_batch``. ``Trainer`` counts every label but
    −100, so that is the label of a sample to leave out: on a CPU the loss's own ``ignore_index`` raises. Samples of a
    class of weight 0 are counted too, and so make the loss smaller.

    Args:
        loss: a module of (scores, labels) with a ``reduction``, such as those of :mod:`longtail.losses` on scores.

    Raises:
        LongtailError: the loss has no ``reduction``.
        ValueError: (by the function) a label is the loss's ``ignore_index``.
    """
    if not hasattr(loss, "reduction"):
        raise LongtailError(
            f"loss: expected a module with the attribute reduction, such as longtail.losses.LogitAdjustedLoss, got "
            f"{type(loss).__name__}"
        )
    total: Any = copy.copy(loss)
    total.reduction = "sum"

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        scores = outputs["logits"] if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
        if isinstance(scores, tuple):
            scores = scores[0]
        for module in (loss, total):
            module.to(scores.device)
        if not labels.is_floating_point():
            own = getattr(loss, "ignore_index", -1)
            if own != IGNORED and labels.device.type == "cpu" and bool((labels == own).any()):
                raise ValueError(
                    f"labels: expected {IGNORED} for a sample to leave out, as Trainer counts it, got {own}"
                )
            labels = labels.masked_fill(labels == IGNORED, own)
        if num_items_in_batch is None:
            mean: Tensor = loss(scores, labels)
            return mean
        # of labels for every class, each entry is counted as an item
        entries = labels.shape[1] if labels.shape == scores.shape else 1
        summed: Tensor = total(scores, labels)
        return summed * entries / num_items_in_batch

    return compute


def compute_metrics(class_counts: Sequence[int], shots: Shots | None = None) -> Callable[[Any], dict[str, float]]:
    """Return a function as the argument ``compute_metrics`` of ``Trainer``.

    It returns ``balanced_accuracy``, ``top1``, ``many``, ``medium``, ``few``, ``worst_class`` and ``harmonic_mean``, in
    percent, as far as the test set has the classes; see :func:`longtail.evaluation.metrics.classification_metrics`.

    Args:
        class_counts: (C,) training images of each class, which determine the shot groups.
        shots: thresholds of the shot groups; more than 100 and fewer than 20 images, if not given.

    Raises:
        LongtailError: (by the function) the predictions are not (N, C) scores.
    """
    counts = [int(count) for count in in_class_order(class_counts)]

    def compute(prediction: Any) -> dict[str, float]:
        scores, labels = prediction.predictions, torch.as_tensor(prediction.label_ids).long()
        if isinstance(scores, tuple):
            scores = scores[0]
        if np.shape(scores)[1:] != (len(counts),):
            raise LongtailError(
                f"predictions: expected scores of shape (N, {len(counts)}), one for each of class_counts, got "
                f"{np.shape(scores)}"
            )
        correct = count_correct(torch.as_tensor(scores).float(), labels.masked_fill(labels == IGNORED, -1))
        metrics = classification_metrics(correct, counts, shots or Shots())
        names = ("balanced_accuracy", "top1", "many", "medium", "few", "worst_class", "harmonic_mean")
        return {name: float(metrics[name]) for name in names if metrics[name] is not None}

    return compute


class TrainSamplerMixin:
    """``Trainer`` with the further argument ``train_sampler``, such as a class-aware sampler.

    Use::

        class LongTailTrainer(TrainSamplerMixin, transformers.Trainer): ...

    ``Trainer`` distributes the batches of one sampler over the processes itself and tells it the epoch, so the sampler
    is that of a single process, with the same seed in all:
    :class:`ClassAwareSampler(labels, num_replicas=1, rank=0) <longtail.data.samplers.ClassAwareSampler>`.

    Args:
        train_sampler: sampler of the training set; that of ``Trainer`` if not given.
        *args: of ``Trainer``.
        **kwargs: of ``Trainer``.

    Raises:
        LongtailError: at the start of the training, the sampler has a share of the samples only.
    """

    def __init__(self, *args: Any, train_sampler: Any = None, **kwargs: Any) -> None:
        self.train_sampler = train_sampler
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self.train_sampler is None:
            return super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        if hasattr(self.train_sampler, "num_replicas"):
            len(self.train_sampler)  # for which a class-aware sampler asks the process group, which exists by now
            if self.train_sampler.num_replicas != 1:
                raise LongtailError(
                    "train_sampler: expected num_replicas=1 and rank=0, since Trainer distributes the batches, got "
                    f"num_replicas {self.train_sampler.num_replicas}"
                )
        return self.train_sampler
