"""Collective operations over the processes of a distributed training; each is the identity in a single process.

Nothing here starts a process group: :func:`longtail.training.fabric.build_fabric` does, or the caller.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longtail.errors import LongtailError

Value = TypeVar("Value")


def is_distributed() -> bool:
    """Return whether a process group of more than one process is initialised."""
    return world_size() > 1


def world_size() -> int:
    """Return the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process in [0, world size); process 0 writes files and prints."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over all processes; ``tensor`` itself is not changed."""
    if not is_distributed():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum of ``tensor`` over all processes; ``tensor`` itself is not changed."""
    if not is_distributed():
        return tensor
    maximum = tensor.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    return maximum


def gather_padded(tensor: Tensor, fill_value: float, max_local_batch: int | None) -> Tensor:
    """Concatenate the rows of all processes, in the order of their ranks.

    Args:
        tensor: (B, …), the rows of this process.
        fill_value: value of the rows that pad a process with fewer than ``max_local_batch`` rows.
        max_local_batch: largest B of any process; None if B is the same on all.

    Returns:
        (world size · max_local_batch, …), padding included; ``tensor`` itself in a single process.
    """
    if not is_distributed():
        return tensor
    if max_local_batch is not None and max_local_batch > len(tensor):
        tensor = torch.cat([tensor, tensor.new_full((max_local_batch - len(tensor), *tensor.shape[1:]), fill_value)])
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def gather_objects(value: Value) -> list[Value]:
    """Return what every process gives, in the order of their ranks; of any type that can be pickled."""
    if not is_distributed():
        return [value]
    gathered: list[Value] = [value] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def sum_batch_sizes(sizes: list[int], device: torch.device) -> list[int]:
    """Return the number of images that all processes have together in each micro-batch of a step.

    Args:
        sizes: images of this process in each micro-batch. A single entry is returned as it is, without communication:
            the callers need the proportions of the micro-batches only.
        device: device that the process group communicates through.
    """
    if len(sizes) == 1 or not is_distributed():
        return sizes
    total: list[int] = all_reduce_sum(torch.tensor(sizes, device=device)).tolist()
    return total


def broadcast_buffers(module: nn.Module) -> None:
    """Overwrite the buffers of ``module`` by those of process 0, in place.

    On a CPU every process keeps BatchNorm statistics of its own; after this call all processes evaluate the very model
    that process 0 writes.
    """
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if is_distributed():
        dist.barrier()


def shutdown() -> None:
    """Wait for all processes, then destroy the process group.

    A process that exits with open connections may be aborted by one of the communication threads.
    """
    if is_distributed():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def wrap_peer_failure() -> Iterator[None]:
    """Turn the error of a collective operation whose peer has exited into one line.

    Raises:
        LongtailError: another process has exited; its own message gives the reason.
    """
    try:
        yield
    except RuntimeError as error:
        if is_distributed() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise LongtailError("another process has exited; see its own message for the reason") from None
        raise
