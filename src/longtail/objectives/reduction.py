"""Means over a batch that several processes share out among themselves."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def batch_mean(losses: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of the losses that count, a scalar.

    Under several processes it is this process's part of the mean over the whole batch, times the number of processes:
    what DistributedDataParallel averages then is the mean over the whole batch, however unevenly it was shared out.

    Args:
        losses: (B,); 0 where one does not count.
        counts: (B,) bool.
    """
    total = counts.sum().to(losses.dtype)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    # where nothing counts: 0, with zero gradients
    return losses.sum() / (total + (total == 0))
