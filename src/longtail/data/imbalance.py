"""How a balanced set is made long-tailed, and how a set without a test split gets one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtail.randomness import generator


def exponential_counts(largest: int, classes: int, factor: float) -> list[int]:
    """Return n_c = int(n_max · f^(c/(C−1))) with f = 1/factor, the profile of CIFAR-LT (Cui et al., CVPR 2019).

    Args:
        largest: n_max, images of class 0.
        classes: C.
        factor: imbalance factor, at least 1.
    """
    return [int(largest * (1 / factor) ** (index / max(classes - 1, 1))) for index in range(classes)]


def permuted_by_class(labels: Tensor, classes: int, seed: int) -> list[Tensor]:
    """Return, for every class, the positions of its images in an order that the seed alone decides."""
    order = []
    for index in range(classes):
        positions = torch.nonzero(labels == index).flatten()
        order.append(positions[torch.randperm(len(positions), generator=generator(seed, index))])
    return order


def subsample(order: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Return the positions of the first ``counts[c]`` images of every class, ascending.

    A smaller imbalance factor keeps all the images of a larger one, since both read the same order.
    """
    return torch.cat([positions[:count] for positions, count in zip(order, counts, strict=True)]).sort().values
