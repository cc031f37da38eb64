"""Class-wise first-in-first-out queues of teacher features.

Legend: C classes, K slots in total, K_c of class c, D feature width, B samples of a push.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtail.class_counts import in_class_order
from longtail.distributed import gather_padded


class Slots(NamedTuple):
    """All slots of a queue, filled or not."""

    features: Tensor
    """(K, D); those of filled slots where unfilled, see :func:`repeat_filled`."""
    labels: Tensor
    """(K,) int64; −1 where unfilled."""
    ids: Tensor
    """(K,) int64 image ids; −1 where unfilled."""


def repeat_filled(slots: Slots) -> Slots:
    """Return the slots with features of filled ones in place of those of unfilled ones, whatever these are.

    Labels and ids stay as they are. What averages over all rows, as BatchNorm does, then averages over filled slots:
    each is repeated equally often, or once more, and those that are repeated once more are evenly spread. Where no slot
    is filled, all have the features of the first. Needs no synchronisation with an accelerator, and has fixed shapes.

    Returns:
        A copy of the features; the labels and ids themselves.
    """
    filled = slots.labels >= 0
    place = torch.arange(len(filled), device=filled.device)
    seen = filled.cumsum(0)  # filled slots up to and including this one
    num_filled = filled.sum()
    # the g-th of G unfilled slots repeats the ⌊g · N / G⌋-th of N filled ones
    number = (place - seen) * num_filled // (len(filled) - num_filled).clamp(min=1)
    repeated = torch.searchsorted(seen, (number + 1).clamp(max=num_filled))
    return slots._replace(features=slots.features.index_select(0, torch.where(filled, place, repeated)))


def queue_sizes(class_counts: Tensor | Sequence[int] | Any, size: int, minimum: int) -> list[int]:
    """Return the number of slots of each class, K_c ≈ k_m + p(c) · (K − C · k_m), exactly ``size`` in total.

    Args:
        class_counts: (C,) training images of each class: a sequence, array or tensor. A class without any has the
            smallest number of slots.
        size: K.
        minimum: k_m, the smallest number of slots of a class, at least 1.

    Raises:
        ValueError: fewer than C · k_m slots, no images at all, or counts that are negative or not whole.
    """
    counts = _whole_counts(class_counts)
    classes, total = len(counts), sum(counts)
    rest = size - classes * minimum
    if minimum < 1 or rest < 0:
        raise ValueError(f"size: expected at least {classes} classes × {max(minimum, 1)} slots, got {size}")
    if total <= 0:
        raise ValueError("class_counts: expected counts of at least 0, one of them positive")
    boundaries, seen = [0], 0
    for index, count in enumerate(counts, start=1):
        seen += count
        boundaries.append(minimum * index - (-rest * seen // total))  # the cumulative share, rounded up
    return [above - below for below, above in itertools.pairwise(boundaries)]


def _whole_counts(class_counts: Tensor | Sequence[int] | Any) -> list[int]:
    """Return class counts as integers.

    Raises:
        ValueError: a count is negative or not whole, or there is not one for each class.
    """
    counts = in_class_order(class_counts)
    for index, count in enumerate(counts):
        if isinstance(count, Sequence) or not count >= 0 or count == math.inf or count != int(count):
            raise ValueError(
                f"class_counts: expected one count for each class, whole and at least 0, got {count} for class {index}"
            )
    return [int(count) for count in counts]


class ClassQueues:
    """One first-in-first-out queue of features for each class, in a single block of memory.

    It is not an ``nn.Module``, so that DistributedDataParallel does not overwrite its tensors by those of rank 0 in
    every forward pass. Under several processes a push gathers the samples of all processes first: all hold the same
    queues, equal to those of one process with the whole batch.

    Args:
        class_counts: (C,) training images of each class: a sequence, array or tensor. They determine the slots of each
            class, see :func:`queue_sizes`.
        size: K, slots in total.
        minimum: k_m, the smallest number of slots of a class.
        dim: D, feature width.
        device: device of the tensors.
        dtype: type of the features.
        shared: keep one queue for all classes, as MoCo does, without a guaranteed number of slots for any class;
            ``minimum`` is ignored.

    Raises:
        ValueError: fewer than C · k_m slots, no images at all, or counts that are negative or not whole.

    Source: Suh & Seo, ICML 2023, arXiv 2305.01160, section 4.
    """

    def __init__(
        self,
        class_counts: Tensor | Sequence[int] | Any,
        size: int = 4096,
        minimum: int = 2,
        dim: int = 64,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        shared: bool = False,
    ) -> None:
        counts = _whole_counts(class_counts)
        self.class_counts, self.size, self.minimum, self.dim, self.shared = counts, size, minimum, dim, shared
        self.sizes = torch.tensor([size] if shared else queue_sizes(counts, size, minimum), device=device)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self._pushed = torch.zeros(len(self.sizes), dtype=torch.int64, device=device)
        # an extra row receives the samples that are not kept: selecting those to keep would give tensors of a size
        # that depends on values, for which the host would have to wait
        self._features = torch.zeros(size + 1, dim, device=device, dtype=dtype)
        self._labels = torch.full((size + 1,), -1, dtype=torch.int64, device=device)
        self._ids = torch.full((size + 1,), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def push(
        self,
        features: Tensor,
        labels: Tensor,
        ids: Tensor,
        max_local_batch: int | None = None,
        *,
        validate: bool = False,
    ) -> None:
        """Append samples; those of a class replace its oldest ones. Later samples of a push count as newer.

        A label out of range raises on a CPU. An accelerator's values would have to be waited for, so there its sample
        is ignored.

        Args:
            features: (B, dim).
            labels: (B,) int64 in [0, C); a sample with label −1 is ignored.
            ids: (B,) int64 image ids.
            max_local_batch: under several processes, the largest B of any of them; None if B is the same on all.
            validate: check the labels on an accelerator too.

        Raises:
            ValueError: a shape, a type or, where it is checked, a label is not as above.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features: expected shape (B, {self.dim}), got {tuple(features.shape)}")
        for name, tensor in (("labels", labels), ("ids", ids)):
            if tensor.shape != features.shape[:1] or tensor.dtype != torch.int64:
                raise ValueError(
                    f"{name}: expected shape ({len(features)},) of int64, got {tuple(tensor.shape)} of {tensor.dtype}"
                )
        classes = len(self.class_counts)
        readable = len(labels) > 0 and not labels.is_meta and not torch.compiler.is_compiling()
        if readable and (labels.device.type == "cpu" or validate):
            low, high = (int(bound) for bound in torch.aminmax(labels))
            if low < -1 or high >= classes:
                raise ValueError(f"labels: expected values in [0, {classes}), or −1 to ignore it, got {low} to {high}")
        else:
            labels = torch.where(labels < classes, labels, -1)
        features, labels, ids = (
            gather_padded(tensor, fill_value, max_local_batch)
            for tensor, fill_value in ((features, 0), (labels, -1), (ids, -1))
        )
        num_queues = len(self.sizes)
        # ignored samples get an index after the last queue, and so come last in the order
        index = torch.where(labels < 0, num_queues, 0 if self.shared else labels)
        order = torch.argsort(index, stable=True)
        labels, index = labels[order], index[order]
        new = self._pushed.new_zeros(num_queues + 1).scatter_add_(0, index, torch.ones_like(index))
        position = torch.arange(len(labels), device=labels.device) - (new.cumsum(0) - new)[index]  # within its queue
        queue = index.clamp(max=num_queues - 1)
        slots = self.starts[queue] + (self._pushed[queue] + position) % self.sizes[queue]
        too_old = position < new[index] - self.sizes[queue]
        slots = torch.where(too_old | (labels < 0), self.size, slots)
        self._features[slots] = features[order].to(self._features.dtype)
        self._labels[slots] = labels
        self._ids[slots] = ids[order]
        self._pushed += new[:num_queues]

    @torch.no_grad()
    def clear(self) -> None:
        """Forget all samples; :attr:`turnovers` still counts them. Needs no synchronisation with an accelerator."""
        self._features.zero_()
        self._labels.fill_(-1)
        self._ids.fill_(-1)

    @torch.no_grad()
    def map_features(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the features of the filled slots, as where what they were computed with has changed.

        Args:
            function: maps (size, dim) features to new ones of that shape, row by row.
        """
        features = self._features[: self.size]
        features.copy_(torch.where(self._filled[:, None], function(features), features))

    def slots(self) -> Slots:
        """Return all slots as copies; unfilled ones have label −1 and the features of filled ones.

        So a network with BatchNorm has the statistics of the filled slots, and a later push changes nothing that a
        backward pass still needs. Needs no synchronisation with an accelerator.
        """
        labels, ids = self._labels[: self.size].clone(), self._ids[: self.size].clone()
        return repeat_filled(Slots(self._features[: self.size], labels, ids))

    @property
    def _filled(self) -> Tensor:
        return self._labels[: self.size] >= 0

    @property
    def features(self) -> Tensor:
        """(filled, dim) features of the filled slots."""
        return self._features[: self.size][self._filled]

    @property
    def labels(self) -> Tensor:
        """(filled,) labels of the filled slots."""
        return self._labels[: self.size][self._filled]

    @property
    def ids(self) -> Tensor:
        """(filled,) image ids of the filled slots."""
        return self._ids[: self.size][self._filled]

    @property
    def fill(self) -> Tensor:
        """The fraction of the slots that is filled, a scalar in [0, 1]."""
        return self._filled.float().mean()

    @property
    def turnovers(self) -> Tensor:
        """Samples pushed since the start per slot, averaged over the queues, a scalar."""
        return (self._pushed / self.sizes).mean()

    def __len__(self) -> int:
        """Return the number of filled slots."""
        return int(self._filled.sum())

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the contents; :meth:`load_state_dict` restores them exactly."""
        return {
            "features": self._features[: self.size].clone(),
            "labels": self._labels[: self.size].clone(),
            "ids": self._ids[: self.size].clone(),
            "sizes": self.sizes.clone(),
            "pushed": self._pushed.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the contents.

        Raises:
            ValueError: the state lacks an entry, or is of queues of other sizes or another feature width.
        """
        missing = [name for name in ("features", "labels", "ids", "sizes", "pushed") if name not in state]
        if missing:
            raise ValueError(f"state: expected the entries of state_dict(), {', '.join(missing)} is missing")
        if state["sizes"].tolist() != self.sizes.tolist() or state["features"].shape[1] != self.dim:
            raise ValueError(
                f"state: expected queues of {self.size} slots × {self.dim} with as many slots per class as here, "
                f"got {tuple(state['features'].shape)}"
            )
        self._features[: self.size].copy_(state["features"])
        self._labels[: self.size].copy_(state["labels"])
        self._ids[: self.size].copy_(state["ids"])
        self._pushed.copy_(state["pushed"])

    def apply(self, function: Callable[[Tensor], Tensor]) -> ClassQueues:
        """Replace every tensor by ``function`` of it, as ``nn.Module`` does when it is moved."""
        for name in ("sizes", "starts", "_pushed", "_features", "_labels", "_ids"):
            setattr(self, name, function(getattr(self, name)))
        return self

    def to(self, device: torch.device | str) -> ClassQueues:
        """Move the tensors to ``device``, and return the queues themselves."""
        return self.apply(lambda tensor: tensor.to(device))
