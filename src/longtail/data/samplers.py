"""Which images an epoch shows and in which order: a function of (seed, epoch), so that a resumed run repeats it.

A sampler says what share of an epoch each class gets; :func:`epoch_order` draws the images. It is a function of the
class counts, the epoch (from 0), the epochs of the training, and the fraction of them after which a deferred sampler
changes. It returns (C,) float64 that sum to 1, or None where every image is shown once, without replacement.

Legend: N images, C classes, n_c images of class c.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from longtail.data.imbalance import check_labels
from longtail.randomness import generator, mix
from longtail.registry import SAMPLERS

_ORDER = mix(1)  # a random stream of its own

ClassShares = Callable[[Tensor, int, int, float], Tensor | None]
"""(class counts (C,), epoch, epochs, deferred_from) to the share of each class; see the module."""


def instance_shares(_class_counts: Tensor, _epoch: int, _epochs: int, _deferred_from: float) -> None:
    """Show every image once, so that class c gets n_c / N."""


def class_shares(class_counts: Tensor, _epoch: int, _epochs: int, _deferred_from: float) -> Tensor:
    """Show the classes that have images equally often: 1 / C."""
    present = (class_counts > 0).double()
    return present / present.sum()


def sqrt_shares(class_counts: Tensor, _epoch: int, _epochs: int, _deferred_from: float) -> Tensor:
    """Show class c in proportion to √n_c (Mahajan et al., ECCV 2018)."""
    roots = class_counts.double().sqrt()
    return roots / roots.sum()


def progressive_shares(class_counts: Tensor, epoch: int, epochs: int, deferred_from: float) -> Tensor:
    """Go linearly from :func:`instance_shares` to :func:`class_shares` along the training (Kang et al., ICLR 2020)."""
    natural = class_counts.double() / class_counts.sum()
    progress = epoch / max(epochs - 1, 1)
    return (1 - progress) * natural + progress * class_shares(class_counts, epoch, epochs, deferred_from)


def deferred_shares(class_counts: Tensor, epoch: int, epochs: int, deferred_from: float) -> Tensor | None:
    """Use :func:`instance_shares`, and :func:`class_shares` late in the training (Cao et al., NeurIPS 2019)."""
    if epoch < math.ceil(deferred_from * epochs):
        return None
    return class_shares(class_counts, epoch, epochs, deferred_from)


def epoch_order(
    labels: Tensor, sampler: str, seed: int, epoch: int, epochs: int = 1, deferred_from: float = 0.8
) -> Tensor:
    """Return the positions of the images that an epoch shows, (N,) int64, in their order.

    Args:
        labels: (N,) int64 of at least 0.
        sampler: a name in :data:`longtail.registry.SAMPLERS`.
        seed: of the training.
        epoch: from 0.
        epochs: of the training.
        deferred_from: fraction of the training after which the deferred sampler shows classes equally often.

    Raises:
        LongtailError: there is no such sampler, or a label is negative.
    """
    check_labels(labels)
    draws = generator(seed, _ORDER, epoch)
    counts = torch.bincount(labels)
    shares = SAMPLERS[sampler](counts, epoch, epochs, deferred_from)
    if shares is None or len(labels) == 0:
        return torch.randperm(len(labels), generator=draws)
    # the class first, then one of its images: weights of single images would lose digits where there are millions
    classes = torch.multinomial(shares, len(labels), replacement=True, generator=draws)
    starts = counts.cumsum(0) - counts
    within = (torch.rand(len(labels), generator=draws, dtype=torch.float64) * counts[classes]).long()
    return torch.argsort(labels, stable=True)[starts[classes] + within]
