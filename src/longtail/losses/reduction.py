"""Means over a batch that is split over several processes."""

from __future__ import annotations

from torch import Tensor

from longtail.distributed import all_reduce_sum, is_distributed, world_size


def batch_mean(losses: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the losses where ``mask`` is True, a scalar; 0 with zero gradients where it is nowhere True.

    Under several processes it is this process's share of the mean over the whole batch, times the number of processes:
    DistributedDataParallel averages the gradients, which gives the gradient of the mean over the whole batch, however
    unevenly the batch is split.

    Args:
        losses: (B,) or (B, H, W); 0 where ``mask`` is False.
        mask: bool of the same shape.
    """
    total = mask.sum().to(losses.dtype)
    if is_distributed():
        total = all_reduce_sum(total) / world_size()
    return losses.sum() / (total + (total == 0))
