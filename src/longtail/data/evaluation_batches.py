"""Batches for an evaluation: every image of a split once, without augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longtail.data.dataset import ImageSet
from longtail.data.prefetch import prefetch

_PIXELS = 2**22  # of a batch, whose activations must fit into the memory of a laptop


def evaluation_batch_size(side: int) -> int:
    """Return how many images of ``side`` × ``side`` pixels pass a network at once: the fewer, the larger they are."""
    return min(512, max(1, _PIXELS // side**2))


def evaluation_batches(
    images: ImageSet, size: int, batch_size: int = 512, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a network is given without augmentation, and (B,) labels, of a process's images, each image once.

    These are (B, channels, size, size) float32 centre crops, or features where a set holds these.

    Args:
        images: the split.
        size: side of the crops in pixels.
        batch_size: B, the last batch may be smaller.
        rank: of this process.
        world: number of processes; process r has the images r, r + world, ….
    """
    own = torch.arange(len(images))[rank::world]  # of a process beyond the last image none, which split makes a batch
    splits = own.split(batch_size) if len(own) else ()
    for indices, views in zip(splits, plain_batches(images, splits, size), strict=True):
        yield views, images.labels[indices]


def plain_batches(images: ImageSet, splits: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Yield what a network is given without augmentation for the images at each of ``splits``."""
    for _, views in take_ahead(images, lambda part: images.images.plain(part, size), splits):
        yield views


def take_ahead(
    images: ImageSet, take: Callable[[Tensor], Tensor], splits: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positions and what ``take`` returns for each batch; files are decoded one batch ahead of their use."""
    if images.images.lazy:
        yield from prefetch(take, splits)
    else:
        for indices in splits:
            yield indices, take(indices)
