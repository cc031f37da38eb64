"""Batches: which images, in which order, seen how. Legend: B images, V views."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from longtail.data.sources import ImageSet
from longtail.data.views import View, center, to_float
from longtail.randomness import generator, mix

_ORDER, _VIEW = mix(1), mix(2)  # streams of draws that never meet


@dataclass(frozen=True)
class Batch:
    """What a method trains on."""

    views: tuple[Tensor, ...]
    """V views, each (B, channels, S, S) float32 in [0, 1]."""
    labels: Tensor
    """(B,) int64."""
    ids: Tensor
    """(B,) int64; they name the images, so that a query never meets itself among the keys."""

    def to(self, device: torch.device) -> Batch:
        """Copy to ``device``, without waiting where the memory is pinned."""
        if device.type == "cpu":
            return self
        moved = [
            (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
            for tensor in (*self.views, self.labels, self.ids)
        ]
        return Batch(tuple(moved[:-2]), moved[-2], moved[-1])


class TrainLoader:
    """Every image once an epoch, in batches whose sizes differ by at most one.

    No image is dropped, and no batch is so small that BatchNorm fails. The order is a function of (seed, epoch), so
    that an epoch can be entered at any step.

    Args:
        images: the training set.
        batch_size: most images a batch.
        view: the augmentation.
        views: V.
        seed: of order and augmentation.
    """

    def __init__(self, images: ImageSet, batch_size: int, view: View, views: int, seed: int) -> None:
        self.images, self.view, self.views, self.seed = images, view, views, seed
        self.steps = -(-len(images) // batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from step ``start`` on."""
        order = torch.randperm(len(self.images), generator=generator(self.seed, _ORDER, epoch))
        for indices, pixels in _ahead(self.images, list(order.tensor_split(self.steps))[start:]):
            yield self.batch(indices, pixels, epoch)

    def batch(self, indices: Tensor, pixels: Tensor, epoch: int) -> Batch:
        """Return the views of ``epoch`` of given images."""
        ids = self.images.ids[indices]
        views = tuple(self.view(pixels, ids, (self.seed, _VIEW, epoch, view)) for view in range(self.views))
        return Batch(views, self.images.labels[indices], ids)


def evaluation_batches(images: ImageSet, size: int, batch_size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (B, channels, size, size) centre views and (B,) labels, every image once, in order."""
    splits = torch.arange(len(images)).split(batch_size)
    for indices, pixels in _ahead(images, list(splits)):
        yield to_float(center(pixels, size)), images.labels[indices]


def _ahead(images: ImageSet, splits: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices and pixels; files are decoded one batch ahead of their use."""
    if not images.images.lazy:
        for indices in splits:
            yield indices, images.images.take(indices)
        return
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(images.images.take, splits[0]) if splits else None
        for position, indices in enumerate(splits):
            assert pending is not None
            pixels = pending.result()
            if position + 1 < len(splits):
                pending = pool.submit(images.images.take, splits[position + 1])
            yield indices, pixels
