"""Batches: which images, in which order, seen how. Legend: B images, V views."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from longtail.data.dataset import ImageSet
from longtail.data.per_image import PerImageView, undisturbed
from longtail.data.samplers import epoch_order
from longtail.data.scenes import SceneImages, SceneView
from longtail.data.views import View, center, to_float
from longtail.errors import LongtailError
from longtail.randomness import mix

_VIEW = mix(2)  # a stream of draws of its own


@dataclass
class Batch:
    """What a method trains on."""  # not frozen: Fabric looks into what a module is given, and refuses to otherwise

    views: tuple[Tensor, ...]
    """V views, each (B, channels, S, S) float32 in [0, 1]."""
    labels: Tensor
    """(B,) int64, or (B, S, S) with a label for every pixel; −1 where there is none."""
    ids: Tensor
    """(B,) int64; they name the images, so that a query never meets itself among the keys."""
    key_features: Tensor | None = None
    """(B, F) what the teacher made of the key view, where it is known already."""
    teacher_scores: Tensor | None = None
    """(B, C) what its classifier made of the classification view, where it is known already."""
    room: int | None = None
    """The most images that any process has of this batch; B where there is one process."""
    total: int | None = None
    """The images that all processes have of it together."""
    done: float = 0.0
    """The share of the training's epochs that came before."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dense(self) -> bool:
        """Whether every pixel has a label."""
        return self.labels.ndim == 3

    def _map(self, function: Callable[[Tensor], Tensor], room: int | None) -> Batch:
        features, scores = (
            tensor if tensor is None else function(tensor) for tensor in (self.key_features, self.teacher_scores)
        )
        views = tuple(map(function, self.views))
        return Batch(views, function(self.labels), function(self.ids), features, scores, room, self.total, self.done)

    def to(self, device: torch.device) -> Batch:
        """Copy to ``device``, without waiting where the memory is pinned."""
        if device.type == "cpu":
            return self
        pinned = device.type == "cuda"
        return self._map(lambda t: (t.pin_memory() if pinned else t).to(device, non_blocking=True), self.room)

    def split(self, parts: int) -> list[Batch]:
        """Return the batch in parts whose sizes differ by at most one."""
        if parts == 1:
            return [self]
        edges = [len(self) * part // parts for part in range(parts + 1)]
        room = None if self.room is None else -(-self.room // parts)
        return [
            self._map(lambda tensor, a=a, b=b: tensor[a:b], room)  # type: ignore[misc]
            for a, b in itertools.pairwise(edges)
        ]


class KnownViews(Protocol):
    """What the teacher made of fixed views of every image."""

    fixes_classification: bool
    """Whether the student's classification view must be the very view that the teacher saw."""

    def keys(self, epoch: int) -> tuple[int, ...]:
        """Return what names the draw of the view that an epoch shows."""
        ...

    def known(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Return the features of the images' key views and the scores of their classification views."""
        ...


class TrainLoader:
    """An epoch of images in batches whose sizes differ by at most one.

    No image is dropped, and no batch is so small that BatchNorm fails. The order is a function of (seed, epoch), so
    that an epoch can be entered at any step; a view is one of (seed, epoch, view, image), whoever draws it.

    Args:
        images: the training set.
        batch_size: most images a batch.
        views: V augmentations, all batched, all an image at a time, or one of scenes.
        seed: of order and augmentation.
        epochs: of the training, for samplers that change along it.
        sampler: see :mod:`longtail.data.samplers`.
        deferred_from: see :mod:`longtail.data.samplers`.
        workers: processes that decode and augment an image at a time; 0 does it in this one.
        rank: which of the training's processes this is.
        world: how many there are; each has its part of every batch.
        cache: what the teacher made of fixed views; a view that it stands for is not drawn anew.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        views: Sequence[View | PerImageView | SceneView],
        seed: int,
        *,
        epochs: int = 1,
        sampler: str = "instance",
        deferred_from: float = 0.8,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
        cache: KnownViews | None = None,
    ) -> None:
        self.rank, self.world, self.cache = rank, world, cache
        self.images, self.views, self.seed, self.epochs = images, tuple(views), seed, epochs
        self.sampler, self.deferred_from = sampler, deferred_from
        self.steps = -(-len(images) // batch_size)
        self.least = len(images) // self.steps // world
        """The fewest images that a process has in a step."""
        self.per_image = any(isinstance(view, PerImageView | SceneView) for view in self.views)
        assert not self.per_image or all(isinstance(view, type(self.views[0])) for view in self.views)
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
        rooms = [-(-len(split) // self.world) for split in splits]
        mine = [split.tensor_split(self.world)[self.rank] for split in splits]
        # a process for which a small batch has no image brings one that does not count
        shown = [part if len(part) else split[:1] for part, split in zip(mine, splits, strict=True)]
        made = (self._one_by_one if self.per_image else self._batched)(shown, epoch, numbers)
        for (indices, views, masks), part, room, split in zip(made, mine, rooms, splits, strict=True):
            features, scores = (None, None) if self.cache is None or epoch < 0 else self.cache.known(indices, epoch)
            labels = images.labels[indices] if masks is None else masks
            labels = labels if len(part) else torch.full_like(labels, -1)
            yield Batch(
                views, labels, images.ids[indices], features, scores, room, len(split), max(epoch, 0) / self.epochs
            )

    def keys(self, number: int, epoch: int) -> tuple[int, ...]:
        """Return what names the draw of a view."""
        if self.cache is not None and number == 0 and epoch >= 0 and self.cache.fixes_classification:
            return self.cache.keys(epoch)
        return (self.seed, _VIEW, epoch, number)

    def _batched(self, splits: Sequence[Tensor], epoch: int, numbers: Sequence[int]) -> Iterator[_Views]:
        for indices, pixels in _ahead(self.images, splits):
            ids = self.images.ids[indices]
            yield (
                indices,
                tuple(self._view(number)(pixels, ids, self.keys(number, epoch)) for number in numbers),
                None,
            )

    def _view(self, number: int) -> View:
        view = self.views[number]
        assert not isinstance(view, PerImageView | SceneView)
        return view

    def _one_by_one(self, splits: Sequence[Tensor], epoch: int, numbers: Sequence[int]) -> Iterator[_Views]:
        images = self.images.images
        for view in self.views:
            if isinstance(view, PerImageView):
                view.prepare()
        workers = min(self.workers, len(splits))
        for made in DataLoader(
            (_Scenes if isinstance(images, SceneImages) else _Splits)(self, splits, epoch, numbers),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_deaf,
        ):
            if isinstance(made, str):  # an error in another process would come with its traceback
                raise LongtailError(made)
            views, indices, masks, broken = made
            images.note(broken)
            yield indices, tuple(to_float(view) for view in views), masks


def _deaf(_worker: int) -> None:
    # a scheduler signals all processes of a job, a terminal too: the training ends its workers when it has saved
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


_Views = tuple[Tensor, tuple[Tensor, ...], Tensor | None]
"""Positions of a batch's images, their views and, where every pixel has one, the labels."""
_Made = tuple[tuple[Tensor, ...], Tensor, Tensor | None, dict[int, str]]
"""The same from another process, with the images that could not be read."""


class _Splits(Dataset[Any]):
    """Batches as a dataset, so that other processes can make them."""

    def __init__(self, loader: TrainLoader, splits: Sequence[Tensor], epoch: int, numbers: Sequence[int]) -> None:
        self.loader, self.splits, self.epoch, self.numbers = loader, splits, epoch, numbers

    def __len__(self) -> int:
        return len(self.splits)

    def __getitem__(self, step: int) -> _Made | str:
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
                        made.append(view(image, image_id, loader.keys(number, self.epoch)))
        except LongtailError as error:
            return str(error)
        return tuple(map(_stacked, views)), indices, None, images.broken


class _Scenes(_Splits):
    """The same of images whose every pixel has a label."""

    def __getitem__(self, step: int) -> _Made | str:
        """Return the uint8 view, positions and labels; or what is wrong."""
        loader, indices = self.loader, self.splits[step]
        images, view = loader.images.images, loader.views[0]
        assert isinstance(images, SceneImages)
        assert isinstance(view, SceneView)
        keys = loader.keys(0, self.epoch)
        try:
            made = [
                view(images.scene(index), image_id, keys)
                for index, image_id in zip(indices.tolist(), loader.images.ids[indices].tolist(), strict=True)
            ]
        except LongtailError as error:
            return str(error)
        return (_stacked([image for image, _ in made]),), indices, torch.stack([labels for _, labels in made]), {}


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Return a batch, channels last in memory, as the images came and as the networks want them."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def evaluation_batches(
    images: ImageSet, size: int, batch_size: int = 512, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (B, channels, size, size) centre views and (B,) labels, every image once, in one of the processes."""
    splits = torch.arange(rank, len(images), world).split(batch_size)
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
