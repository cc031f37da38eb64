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
    unevenly the batch is split.

    Args:
        losses: (B,) or (B, H, W); 0 where ``mask`` is False.
        mask: bool of the same shape.
    """
    losses = to_full_precision(losses)
    total = mask.sum().to(losses.dtype)
    if is_distributed():
        total = all_reduce_sum(total) / world_size()
    return losses.sum() / (total + (total == 0))
