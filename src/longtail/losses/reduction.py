"""Means over a batch that is split over several processes."""

from __future__ import annotations

import torch
from torch import Tensor

from longtail.distributed import all_reduce_sum, is_distributed, world_size


def to_full_precision(tensor: Tensor) -> Tensor:
    """Return the tensor as float32 if it is in half precision, where a count ends at 65,504; otherwise itself."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def batch_mean(losses: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the losses where ``mask`` is True, a scalar; 0 with zero gradients where it is nowhere True.

    Sum and count are in float32 (float64 for float64), whatever the losses are in.

    Under several processes it is this process's share of the mean over the whole batch, times the number of processes:
    DistributedDataParallel averages the gradients, which gives the gradient of the mean over the whole batch, however
    unevenly the batch is split. Without gradients it is the mean of this process's losses, and no process waits for
    another: one may validate alone.

    Args:
        losses: (B,) or (B, H, W); 0 where ``mask`` is False.
        mask: bool of the same shape; or floats, the part of a sample that counts.
    """
    losses = to_full_precision(losses)
    total = mask.sum().to(losses.dtype)
    if is_distributed() and torch.is_grad_enabled():
        total = all_reduce_sum(total) / world_size()
    return losses.sum() / (total + (total == 0))


def check_reduction(reduction: str) -> None:
    """Raise ValueError where a reduction is not ``mean``, ``sum`` or ``none``."""
    if reduction not in {"mean", "sum", "none"}:
        raise ValueError(f"reduction: expected mean, sum or none, got '{reduction}'")


def reduce_losses(losses: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """Return the losses of the samples, their sum, or their mean.

    Args:
        losses: (B,) or (B, H, W); 0 where ``mask`` is False.
        mask: see :func:`batch_mean`.
        reduction: ``mean`` as :func:`batch_mean`; ``sum``, of this process alone; ``none``.

    Raises:
        ValueError: another reduction.
    """
    check_reduction(reduction)
    if reduction == "none":
        return losses
    return batch_mean(losses, mask) if reduction == "mean" else to_full_precision(losses).sum()
