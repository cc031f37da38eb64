"""Class-wise first-in-first-out queues of teacher features.

Legend: K slots in all, K_c of class c, D width, B samples of a push. A shared queue is one for all classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Slots(NamedTuple):
    """Every slot, filled or not."""

    features: Tensor
    """(K, D); zeros where never filled."""
    labels: Tensor
    """(K,) int64; −1 where never filled."""
    ids: Tensor
    """(K,) int64 image ids; −1 where never filled."""


def queue_sizes(class_counts: Sequence[int], size: int, minimum: int) -> list[int]:
    """Share ``size`` slots out: K_c ≈ k_m + p(c) · (K − C · k_m), exactly ``size`` in all.

    Args:
        class_counts: (C,) training images a class.
        size: K.
        minimum: k_m, the least a class gets.

    Raises:
        ValueError: fewer than C · k_m slots, or no images at all.
    """
    classes, total = len(class_counts), sum(class_counts)
    rest = size - classes * minimum
    if minimum < 1 or rest < 0:
        raise ValueError(f"size: expected at least {classes} classes × {max(minimum, 1)} slots, got {size}")
    if total <= 0 or min(class_counts) < 0:
        raise ValueError("class_counts: expected counts of at least 0, one of them positive")
    boundaries, seen = [0], 0
    for index, count in enumerate(class_counts, start=1):
        seen += count
        boundaries.append(minimum * index - (-rest * seen // total))  # the cumulative share, rounded up
    return [above - below for below, above in itertools.pairwise(boundaries)]


class ClassQueues:
    """A first-in-first-out queue a class, in one block of memory.

    It is not a module, on purpose: DistributedDataParallel overwrites a module's buffers with rank 0's at every
    forward, where every rank must keep the queue that it filled. Under several processes a push gathers the samples
    of all ranks first, so that all hold the same queue, equal to one process with the whole batch.

    Args:
        class_counts: (C,) training images a class; decides how the slots are shared out.
        size: K, slots in all.
        minimum: k_m, slots that every class gets.
        dim: D, width of the features.
        device: where the queue lies.
        dtype: type of the features.
        shared: one queue for all classes, as MoCo's, of which no class has a sure share; ``minimum`` does not count.

    Source: Suh & Seo, ICML 2023, arXiv 2305.01160, section 4.
    """

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        size: int = 4096,
        minimum: int = 2,
        dim: int = 64,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        shared: bool = False,
    ) -> None:
        counts = [int(count) for count in torch.as_tensor(class_counts).tolist()]
        self.class_counts, self.size, self.minimum, self.dim, self.shared = counts, size, minimum, dim, shared
        self.sizes = torch.tensor([size] if shared else queue_sizes(counts, size, minimum), device=device)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self._pushed = torch.zeros(len(self.sizes), dtype=torch.int64, device=device)
        # one row more than there are slots: samples that a push itself makes too old are written there, since
        # leaving them out would give the tensors a size that the host must wait for
        self._features = torch.zeros(size + 1, dim, device=device, dtype=dtype)
        self._labels = torch.full((size + 1,), -1, dtype=torch.int64, device=device)
        self._ids = torch.full((size + 1,), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor, ids: Tensor, room: int | None = None) -> None:
        """Append samples; within a class the oldest make room, and a later sample of a push is the newer one.

        Args:
            features: (B, dim).
            labels: (B,) int64 in [0, C); a sample of label −1 is left out.
            ids: (B,) int64 image ids.
            room: under several processes, the most samples that any of them pushes now; B on all if not given.

        Raises:
            ValueError: a shape or type is not as above.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features: expected shape (B, {self.dim}), got {tuple(features.shape)}")
        for name, tensor in (("labels", labels), ("ids", ids)):
            if tensor.shape != features.shape[:1] or tensor.dtype != torch.int64:
                raise ValueError(
                    f"{name}: expected shape ({len(features)},) of int64, got {tuple(tensor.shape)} of {tensor.dtype}"
                )
        self._append(*(_gather(*pair, room) for pair in ((features, 0), (labels, -1), (ids, -1))))

    def _append(self, features: Tensor, labels: Tensor, ids: Tensor) -> None:
        queues = len(self.sizes)
        # one queue more than there are takes the samples that are left out, last in order
        index = torch.where(labels < 0, queues, 0 if self.shared else labels)
        order = torch.argsort(index, stable=True)
        labels, index = labels[order], index[order]
        new = self._pushed.new_zeros(queues + 1).scatter_add_(0, index, torch.ones_like(index))
        rank = torch.arange(len(labels), device=labels.device) - (new.cumsum(0) - new)[index]
        queue = index.clamp(max=queues - 1)
        slots = self.starts[queue] + (self._pushed[queue] + rank) % self.sizes[queue]
        too_old = rank < new[index] - self.sizes[queue]
        slots = torch.where(too_old | (labels < 0), self.size, slots)
        self._features[slots] = features[order].to(self._features.dtype)
        self._labels[slots] = labels
        self._ids[slots] = ids[order]
        self._pushed += new[:queues]

    def rebuilt(
        self, class_counts: Tensor | Sequence[int] | None = None, size: int | None = None, minimum: int | None = None
    ) -> ClassQueues:
        """Return queues for other counts, more or fewer classes, or another size; what is not given stays.

        Every class keeps the newest of its samples that its new share of the slots has room for.
        """
        other = ClassQueues(
            self.class_counts if class_counts is None else class_counts,
            self.size if size is None else size,
            self.minimum if minimum is None else minimum,
            self.dim,
            device=self._features.device,
            dtype=self._features.dtype,
            shared=self.shared,
        )
        features, labels, ids = self.slots()
        queue = torch.repeat_interleave(torch.arange(len(self.sizes), device=self.sizes.device), self.sizes)
        # a queue's oldest sample lies where the next one will go
        age = (torch.arange(self.size, device=self.sizes.device) - self.starts[queue] - self._pushed[queue]) % (
            self.sizes[queue]
        )
        order = torch.argsort(age, stable=True)
        kept = torch.where(labels < len(other.class_counts), labels, -1)
        other._append(features[order], kept[order], ids[order])
        return other

    def slots(self) -> Slots:
        """Return every slot; label −1 marks those never filled. No copy, and no wait for an accelerator."""
        return Slots(self._features[: self.size], self._labels[: self.size], self._ids[: self.size])

    @property
    def _filled(self) -> Tensor:
        return self._labels[: self.size] >= 0

    @property
    def features(self) -> Tensor:
        """(filled, dim) features of the filled slots."""
        return self._features[: self.size][self._filled]

    @property
    def labels(self) -> Tensor:
        """(filled,) their labels."""
        return self._labels[: self.size][self._filled]

    @property
    def ids(self) -> Tensor:
        """(filled,) their image ids."""
        return self._ids[: self.size][self._filled]

    @property
    def fill(self) -> Tensor:
        """The share of the slots that is filled, a scalar."""
        return self._filled.float().mean()

    @property
    def turnovers(self) -> Tensor:
        """How often, on average over the classes, a whole queue was pushed since the start, a scalar."""
        return (self._pushed / self.sizes).mean()

    def __len__(self) -> int:
        """Return the number of filled slots."""
        return int(self._filled.sum())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the contents; :meth:`load_state_dict` restores them exactly."""
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
            ValueError: they come from queues of other sizes or another width.
        """
        if state["sizes"].tolist() != self.sizes.tolist() or state["features"].shape[1] != self.dim:
            raise ValueError(
                f"state: expected queues of {self.size} slots × {self.dim} shared out as here, "
                f"got {tuple(state['features'].shape)}"
            )
        self._features[: self.size].copy_(state["features"])
        self._labels[: self.size].copy_(state["labels"])
        self._ids[: self.size].copy_(state["ids"])
        self._pushed.copy_(state["pushed"])

    def apply(self, function: Callable[[Tensor], Tensor]) -> ClassQueues:
        """Replace every tensor by ``function`` of it, as ``nn.Module`` does when it moves."""
        for name in ("sizes", "starts", "_pushed", "_features", "_labels", "_ids"):
            setattr(self, name, function(getattr(self, name)))
        return self

    def to(self, device: torch.device | str) -> ClassQueues:
        """Move to ``device``."""
        return self.apply(lambda tensor: tensor.to(device))


def _gather(tensor: Tensor, filler: int, room: int | None) -> Tensor:
    """Return the samples of all ranks, in the order of the ranks; a rank that is short fills up."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensor
    if room is not None and room > len(tensor):
        tensor = torch.cat([tensor, tensor.new_full((room - len(tensor), *tensor.shape[1:]), filler)])
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)
