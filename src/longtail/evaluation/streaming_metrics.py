"""Metrics that a training loop updates batch by batch, and the same as functions on arrays.

The classes have the interface of torchmetrics (``update``, ``compute``, ``reset``; a call returns the value of the
batch) without needing it; ``compute`` sums over the processes of a ``torch.distributed`` group. As in torchmetrics and
scikit-learn, accuracies and calibration errors are fractions in [0, 1], where :mod:`longtail.evaluation.metrics` and
the reports use percent; the formulas are the same.

Legend: N samples, C classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.config import Shots
from longtail.distributed import all_reduce_sum
from longtail.errors import LongtailError
from longtail.evaluation.calibration import GROUPS, Reliability, calibration_metrics, group_numbers, reliability
from longtail.evaluation.metrics import classification_metrics, count_correct
from longtail.losses.checks import Counts, as_counts, valid_labels

Array = Tensor | np.ndarray[Any, Any] | Sequence[Any]
"""What the functions take: tensors, NumPy arrays or sequences."""
Self = TypeVar("Self", bound="SummedMetric")


class SummedMetric(nn.Module, ABC):
    """A metric that is computed from sums over samples.

    The sums are no buffers: ``DistributedDataParallel`` would overwrite those of one process by another's, and
    ``half()`` would round them. They follow the module to another device; with the backend ``nccl``, move a metric to
    the process's device, as its model. They are not in the ``state_dict``.

    Args:
        sums: over no samples, zeros.
        settings: what the sums depend on; only those of metrics with the same settings can be added.
    """

    def __init__(self, *sums: Tensor, settings: tuple[Any, ...]) -> None:
        super().__init__()
        self.sums, self.settings = sums, settings

    @abstractmethod
    def batch_sums(self, predictions: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the sums over a batch."""

    @abstractmethod
    def values(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the metrics that sums give."""

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch; see the class for the arguments."""
        self._add(self.batch_sums(predictions, labels))

    def _add(self, sums: Sequence[Tensor]) -> None:
        self.sums = tuple(total.to(part.device) + part for total, part in zip(self.sums, sums, strict=True))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of all samples since :meth:`reset`, of all processes: scalars by name, on the CPU.

        All processes have to call it, also those that had no sample.
        """
        return self.values([all_reduce_sum(total).cpu() for total in self.sums])

    def reset(self) -> None:
        """Forget all samples."""
        self.sums = tuple(torch.zeros_like(total) for total in self.sums)

    def forward(self, predictions: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Add a batch, and return the metrics of this batch in this process."""
        sums = self.batch_sums(predictions, labels)
        self._add(sums)
        return self.values([part.cpu() for part in sums])

    def merge_state(self: Self, other: Self) -> None:
        """Add the samples of another metric of the same kind, for the same classes.

        Raises:
            LongtailError: it is of another kind, or has other class counts or shot groups.
        """
        if type(other) is not type(self):
            raise LongtailError(f"merge_state: expected another {type(self).__name__}, got {type(other).__name__}")
        if other.settings != self.settings:
            raise LongtailError(
                f"merge_state: expected a {type(self).__name__} of the same classes, got one of other class counts or "
                "shot groups"
            )
        self._add([total.to(own.device) for total, own in zip(other.sums, self.sums, strict=True)])

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.sums = tuple(total.to(fn(total).device) for total in self.sums)  # the device alone, never the type
        return self


class BalancedAccuracy(SummedMetric):
    """The mean over classes of their accuracies, and its 95 % interval.

    Classes without test samples are left out of the mean. The interval is for the sampling of the test samples; see
    :func:`longtail.evaluation.metrics.classification_metrics`.

    ``update(predictions, labels)`` takes (N, C) scores, logits or probabilities, or (N,) int64 predicted classes; and
    (N,) int64 labels in [0, C), −1 to leave a sample out. ``compute()`` returns ``balanced_accuracy``,
    ``balanced_accuracy_low`` and ``balanced_accuracy_high``, in [0, 1]; NaN without samples.

    Args:
        num_classes: C.

    Raises:
        ValueError: (by ``update``) shapes that do not fit, or a label or class out of range.

    Example:
        >>> metric = BalancedAccuracy(2)
        >>> metric.update(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
        >>> round(metric.compute()["balanced_accuracy"].item(), 3)
        0.5
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise LongtailError(f"num_classes: expected at least 1, got {num_classes}")
        super().__init__(torch.zeros(3, num_classes, dtype=torch.int64), settings=(num_classes,))
        self.num_classes = num_classes

    def batch_sums(self, predictions: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return (3, C) int64: samples of each class, those predicted correctly, those with the class in the top 5."""
        return (_count(predictions, labels, self.num_classes),)

    def values(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the mean and its interval."""
        metrics = classification_metrics(sums[0], [1] * self.num_classes, Shots())
        return _with_interval(metrics, "balanced_accuracy")


class ShotAccuracy(SummedMetric):
    """Accuracy of the classes with many, medium and few training samples, and of all, with 95 % intervals.

    Each is a mean over classes, so that ``balanced_accuracy`` is that over all; see :class:`BalancedAccuracy` for the
    arguments of ``update`` and for the interval. ``compute()`` returns ``many``, ``medium``, ``few``,
    ``balanced_accuracy`` and of each ``…_low`` and ``…_high``, ``top1`` over samples, ``worst_class`` and
    ``harmonic_mean`` (of the classes' accuracies), in [0, 1]; NaN where a group has no test samples.

    Args:
        class_counts: (C,) training samples of each class, which determine the groups.
        many_above: classes with more training samples are in the group many.
        few_below: classes with fewer are in the group few, the others in medium.

    Raises:
        ValueError: counts that are negative or no numbers; (by ``update``) as of :class:`BalancedAccuracy`.

    Example:
        >>> metric = ShotAccuracy([500, 50, 5])
        >>> scores = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
        >>> batch = metric(scores, torch.tensor([0, 1, 1]))
        >>> {name: round(batch[name].item(), 2) for name in ("many", "medium", "few", "balanced_accuracy")}
        {'many': 1.0, 'medium': 0.5, 'few': nan, 'balanced_accuracy': 0.75}
    """

    def __init__(self, class_counts: Counts, *, many_above: int = 100, few_below: int = 20) -> None:
        counts, shots = _shot_groups(class_counts, many_above, few_below)
        super().__init__(torch.zeros(3, len(counts), dtype=torch.int64), settings=(counts, shots))
        self.class_counts, self.shots = counts, shots

    def batch_sums(self, predictions: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return (3, C) int64: samples of each class, those predicted correctly, those with the class in the top 5."""
        return (_count(predictions, labels, len(self.class_counts)),)

    def values(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the accuracies and their intervals."""
        metrics = classification_metrics(sums[0], self.class_counts, self.shots)
        values: dict[str, Tensor] = {}
        for name in (*GROUPS, "balanced_accuracy"):
            values |= _with_interval(metrics, name)
        top1 = metrics["top1"] if metrics["images"] else None
        values["top1"] = _fraction(top1)
        return values | {name: _fraction(metrics[name]) for name in ("worst_class", "harmonic_mean")}


class ShotCalibrationError(SummedMetric):
    """Expected calibration error of all samples, and of those whose class has many, medium and few training samples.

    Tail classes are usually less confident and more wrong than the average shows; see
    :func:`longtail.evaluation.calibration.calibration_metrics` for the bins.

    ``update(predictions, labels)`` takes (N, C) logits or, with ``probabilities``, probabilities; and (N,) int64 labels
    in [0, C), −1 to leave a sample out. ``compute()`` returns ``ece``, ``many_ece``, ``medium_ece``, ``few_ece`` and
    ``class_ece`` (mean over the classes of the error of each class's probability), in [0, 1]; and ``nll`` (nats) and
    ``brier``, in [0, 2], of all. NaN where there are no samples.

    Args:
        class_counts: (C,) training samples of each class, which determine the groups.
        many_above: classes with more training samples are in the group many.
        few_below: classes with fewer are in the group few, the others in medium.
        probabilities: whether ``update`` takes probabilities.

    Raises:
        ValueError: counts that are negative or no numbers; (by ``update``) shapes that do not fit, a label out of
            range, or rows that are no probabilities although ``probabilities`` is set.

    Example:
        >>> metric = ShotCalibrationError([500, 5], probabilities=True)
        >>> metric.update(torch.tensor([[0.8, 0.2]] * 4), torch.tensor([0, 0, 0, 1]))
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items() if name.endswith("ece")}
        {'ece': 0.05, 'many_ece': 0.2, 'medium_ece': nan, 'few_ece': 0.8, 'class_ece': 0.05}
    """

    def __init__(
        self, class_counts: Counts, *, many_above: int = 100, few_below: int = 20, probabilities: bool = False
    ) -> None:
        counts, shots = _shot_groups(class_counts, many_above, few_below)
        group_of = group_numbers(shots.groups(counts))
        empty = reliability(torch.zeros(0, len(counts)), torch.zeros(0, dtype=torch.int64), group_of)
        super().__init__(*empty, settings=(counts, shots))
        self.class_counts, self.group_of, self.probabilities = counts, group_of, probabilities

    def batch_sums(self, predictions: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the sums of :class:`~longtail.evaluation.calibration.Reliability`."""
        _check_tensors(predictions, labels)
        classes = len(self.class_counts)
        if predictions.ndim != 2 or not predictions.is_floating_point():
            raise LongtailError(
                f"predictions: expected shape (N, {classes}) of floats, got {tuple(predictions.shape)} of "
                f"{predictions.dtype}"
            )
        labels = _checked(predictions, labels, classes)
        predictions, labels = predictions.detach()[labels >= 0], labels[labels >= 0]
        if self.probabilities:
            _check_probabilities(predictions)
            log_probabilities = predictions.to(_full(predictions)).log()
        else:
            log_probabilities = F.log_softmax(predictions.to(_full(predictions)), dim=1)
        return tuple(reliability(log_probabilities, labels, self.group_of.to(predictions.device)))

    def values(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the calibration errors."""
        metrics = calibration_metrics(Reliability(*sums))
        empty = not bool(sums[0].any())
        values = {"ece": _fraction(None if empty else metrics["ece"])}
        values |= {f"{name}_ece": _fraction(metrics["groups"].get(name, {}).get("ece")) for name in GROUPS}
        values["class_ece"] = _fraction(None if empty else metrics["class_ece"])
        return values | {
            name: torch.tensor(math.nan if empty else metrics[name], dtype=torch.float64) for name in ("nll", "brier")
        }


def balanced_accuracy(predictions: Array, labels: Array, num_classes: int | None = None) -> dict[str, float]:
    """Return :class:`BalancedAccuracy` of arrays.

    Args:
        predictions: (N, C) scores or probabilities, or (N,) predicted classes.
        labels: (N,) whole numbers in [0, C); −1 leaves a sample out.
        num_classes: C; taken from (N, C) predictions, or one more than the largest class, if not given.

    Raises:
        ValueError: shapes that do not fit, or a label or class out of range.

    Example:
        >>> round(balanced_accuracy([0, 0, 0, 1], [0, 0, 1, 1])["balanced_accuracy"], 3)
        0.75
    """
    scores, classes = _tensors(predictions, labels)
    if num_classes is None:
        if scores.ndim == 2:
            num_classes = scores.shape[1]
        else:
            num_classes = 1 + max((int(part.max()) for part in (scores, classes) if part.numel()), default=0)
            num_classes = max(num_classes, 1)
    return _floats(BalancedAccuracy(num_classes), scores, classes)


def shot_accuracy(
    predictions: Array, labels: Array, class_counts: Counts, *, many_above: int = 100, few_below: int = 20
) -> dict[str, float]:
    """Return :class:`ShotAccuracy` of arrays.

    Args:
        predictions: (N, C) scores or probabilities, or (N,) predicted classes.
        labels: (N,) whole numbers in [0, C); −1 leaves a sample out.
        class_counts: (C,) training samples of each class.
        many_above: see :class:`ShotAccuracy`.
        few_below: see :class:`ShotAccuracy`.

    Raises:
        ValueError: as of :class:`ShotAccuracy`.

    Example:
        >>> accuracy = shot_accuracy([0, 0, 2], [0, 1, 2], class_counts=[500, 50, 5])
        >>> accuracy["many"], accuracy["medium"], accuracy["few"]
        (1.0, 0.0, 1.0)
    """
    return _floats(
        ShotAccuracy(class_counts, many_above=many_above, few_below=few_below), *_tensors(predictions, labels)
    )


def shot_calibration_error(
    predictions: Array,
    labels: Array,
    class_counts: Counts,
    *,
    many_above: int = 100,
    few_below: int = 20,
    probabilities: bool = True,
) -> dict[str, float]:
    """Return :class:`ShotCalibrationError` of arrays.

    Args:
        predictions: (N, C) probabilities, or logits if ``probabilities`` is False.
        labels: (N,) whole numbers in [0, C); −1 leaves a sample out.
        class_counts: (C,) training samples of each class.
        many_above: see :class:`ShotCalibrationError`.
        few_below: see :class:`ShotCalibrationError`.
        probabilities: whether the predictions are probabilities, as ``predict_proba`` returns them.

    Raises:
        ValueError: as of :class:`ShotCalibrationError`.

    Example:
        >>> error = shot_calibration_error([[0.9, 0.1], [0.9, 0.1]], [0, 1], class_counts=[500, 5])
        >>> round(error["ece"], 3), round(error["few_ece"], 3)
        (0.4, 0.9)
    """
    metric = ShotCalibrationError(class_counts, many_above=many_above, few_below=few_below, probabilities=probabilities)
    return _floats(metric, *_tensors(predictions, labels))


def _shot_groups(class_counts: Counts, many_above: int, few_below: int) -> tuple[list[int], Shots]:
    counts: list[int] = as_counts(class_counts).tolist()
    if not 1 <= few_below <= many_above + 1:
        raise LongtailError(
            f"few_below: expected at least 1 and at most many_above + 1, got {few_below} and many_above {many_above}"
        )
    return counts, Shots(many_above=many_above, few_below=few_below)


def _check_tensors(predictions: Any, labels: Any) -> None:
    for name, value in (("predictions", predictions), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise LongtailError(
                f"{name}: expected a tensor, got {type(value).__name__}; use torch.as_tensor, or the function on arrays"
            )


def _checked(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    if labels.shape != predictions.shape[:1]:
        raise LongtailError(f"labels: expected shape ({len(predictions)},), got {tuple(labels.shape)}")
    if predictions.ndim == 2 and predictions.shape[1] != classes:
        raise LongtailError(f"predictions: expected {classes} columns, got {predictions.shape[1]}")
    return valid_labels(labels, classes)


def _count(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return (3, C) int64, as :func:`count_correct`; without scores the last row is 0."""
    _check_tensors(predictions, labels)
    if predictions.ndim not in {1, 2}:
        raise LongtailError(f"predictions: expected shape (N,) or (N, {classes}), got {tuple(predictions.shape)}")
    labels = _checked(predictions, labels, classes)
    if predictions.ndim == 2:
        return count_correct(predictions.detach(), labels)
    predictions = valid_labels(predictions, classes, "predictions")
    columns = torch.where(labels < 0, classes, labels)
    present, hits = (
        torch.bincount(part, minlength=classes + 1)[:classes] for part in (columns, columns[predictions == labels])
    )
    return torch.stack([present, hits, torch.zeros_like(hits)])


def _check_probabilities(predictions: Tensor) -> None:
    if predictions.device.type != "cpu" or predictions.numel() == 0:
        return  # an accelerator's values would have to be waited for
    off = (predictions.double().sum(dim=1) - 1).abs().max()
    if not bool((predictions >= 0).all()) or not float(off) < 1e-2:
        raise LongtailError(
            "predictions: expected probabilities, rows of at least 0 that sum to 1; for logits, probabilities=False"
        )


def _full(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


def _fraction(percent: float | None) -> Tensor:
    return torch.tensor(math.nan if percent is None else percent / 100, dtype=torch.float64)


def _with_interval(metrics: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    low, high = metrics["intervals"][name] or (None, None)
    return {
        name: _fraction(metrics[name]),
        f"{name}_low": _fraction(low),
        f"{name}_high": _fraction(high),
    }


def _tensors(predictions: Array, labels: Array) -> tuple[Tensor, Tensor]:
    scores, classes = _as_tensor(predictions, "predictions"), _as_tensor(labels, "labels")
    if classes.is_floating_point():
        raise LongtailError(f"labels: expected whole numbers, got {classes.dtype}")
    return (scores if scores.is_floating_point() else scores.long()), classes.long()


def _as_tensor(values: Array, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        return torch.tensor(np.asarray(values))  # a copy, since arrays of pandas are not writable
    except (TypeError, ValueError):
        raise LongtailError(
            f"{name}: expected numbers, got {np.asarray(values, dtype=object).flat[0]!r}; "
            "numpy.unique(names, return_inverse=True)[1] numbers names"
        ) from None


def _floats(metric: SummedMetric, predictions: Tensor, labels: Tensor) -> dict[str, float]:
    sums = metric.batch_sums(predictions, labels)
    return {name: value.item() for name, value in metric.values([part.cpu() for part in sums]).items()}
