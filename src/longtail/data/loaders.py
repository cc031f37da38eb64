"""Batches: which images, in which order, seen how. Legend: B images, V views."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from longtail.data.dataset import ImageSet
from longtail.data.per_image import PerImageView, undisturbed
from longtail.data.samplers import epoch_order
from longtail.data.views import View, center, to_float
from longtail.errors import LongtailError
from longtail.randomness import mix

_VIEW = mix(2)  # a stream of draws of its own


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
    """An epoch of images in batches whose sizes differ by at most one.

    No image is dropped, and no batch is so small that BatchNorm fails. The order is a function of (seed, epoch), so
    that an epoch can be entered at any step; a view is one of (seed, epoch, view, image), whoever draws it.

    Args:
        images: the training set.
        batch_size: most images a batch.
        views: V augmentations, all batched or all an image at a time.
        seed: of order and augmentation.
        epochs: of the training, for samplers that change along it.
        sampler: see :mod:`longtail.data.samplers`.
        deferred_from: see :mod:`longtail.data.samplers`.
        workers: processes that decode and augment an image at a time; 0 does it in this one.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        views: Sequence[View | PerImageView],
        seed: int,
        *,
        epochs: int = 1,
        sampler: str = "instance",
        deferred_from: float = 0.8,
        workers: int | None = None,
    ) -> None:
        self.images, self.views, self.seed, self.epochs = images, tuple(views), seed, epochs
        self.sampler, self.deferred_from = sampler, deferred_from
        self.steps = -(-len(images) // batch_size)
        self.per_image = any(isinstance(view, PerImageView) for view in self.views)
        assert not self.per_image or all(isinstance(view, PerImageView) for view in self.views)
        self.workers = min(8, os.cpu_count() or 1) if workers is None else workers

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from step ``start`` on."""
        order = epoch_order(self.images.labels, self.sampler, self.seed, epoch, self.epochs, self.deferred_from)
        return self.batches(list(order.tensor_split(self.steps))[start:], epoch)

    def batches(self, splits: Sequence[Tensor], epoch: int, only: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield the views of ``epoch`` of given images.

        Args:
            splits: the images of each batch, by position.
            epoch: names the draw; a negative one is no epoch of a training.
            only: numbers of the views that are wanted; all if not given.
        """
        numbers = range(len(self.views)) if only is None else only
        images = self.images
        for indices, views in (self._one_by_one if self.per_image else self._batched)(splits, epoch, numbers):
            yield Batch(views, images.labels[indices], images.ids[indices])

    def _batched(self, splits: Sequence[Tensor], epoch: int, numbers: Sequence[int]) -> Iterator[_Views]:
        for indices, pixels in _ahead(self.images, splits):
            ids = self.images.ids[indices]
            yield (
                indices,
                tuple(self._view(number)(pixels, ids, (self.seed, _VIEW, epoch, number)) for number in numbers),
            )

    def _view(self, number: int) -> View:
        view = self.views[number]
        assert not isinstance(view, PerImageView)
        return view

    def _one_by_one(self, splits: Sequence[Tensor], epoch: int, numbers: Sequence[int]) -> Iterator[_Views]:
        images = self.images.images
        for view in self.views:
            assert isinstance(view, PerImageView)
            view.prepare()
        workers = min(self.workers, len(splits))
        for made in DataLoader(_Splits(self, splits, epoch, numbers), batch_size=None, num_workers=workers):
            if isinstance(made, str):  # an error in another process would come with its traceback
                raise LongtailError(made)
            views, indices, broken = made
            images.note(broken)
            yield indices, tuple(to_float(view) for view in views)


_Views = tuple[Tensor, tuple[Tensor, ...]]
"""Positions of a batch's images, and their views."""


class _Splits(Dataset[Any]):
    """Batches as a dataset, so that other processes can make them."""

    def __init__(self, loader: TrainLoader, splits: Sequence[Tensor], epoch: int, numbers: Sequence[int]) -> None:
        self.loader, self.splits, self.epoch, self.numbers = loader, splits, epoch, numbers

    def __len__(self) -> int:
        return len(self.splits)

    def __getitem__(self, step: int) -> tuple[tuple[Tensor, ...], Tensor, dict[int, str]] | str:
        """Return uint8 views, positions, and the images that could not be read; or what is wrong."""
        loader, indices = self.loader, self.splits[step]
        images = loader.images.images
        views: list[list[Tensor]] = [[] for _ in self.numbers]
        try:
            with undisturbed():
                for index, image_id in zip(indices.tolist(), loader.images.ids[indices].tolist(), strict=True):
                    image = images.open_or_another(index)
                    for made, number in zip(views, self.numbers, strict=True):
                        view = loader.views[number]
                        assert isinstance(view, PerImageView)
                        made.append(view(image, image_id, (loader.seed, _VIEW, self.epoch, number)))
        except LongtailError as error:
            return str(error)
        # channels last in memory, as the images came and as the networks want them
        stacked = [torch.stack([image.permute(1, 2, 0) for image in view]).permute(0, 3, 1, 2) for view in views]
        return tuple(stacked), indices, images.broken


def evaluation_batches(images: ImageSet, size: int, batch_size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (B, channels, size, size) centre views and (B,) labels, every image once, in order."""
    splits = torch.arange(len(images)).split(batch_size)
    for indices, pixels in _ahead(images, splits):
        yield to_float(center(pixels, size)), images.labels[indices]


def _ahead(images: ImageSet, splits: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
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
