"""Batches of augmented images. Legend: N images, B of them in a batch, V views, S side in pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from longtail.data.batch import Batch
from longtail.data.dataset import ImageSet
from longtail.data.evaluation_batches import take_ahead
from longtail.data.mixing import Mixer, mix_batch
from longtail.data.per_image_batches import PerImageBatches, ShownImages, ignore_signals
from longtail.data.samplers import REPEAT_THRESHOLD, epoch_order, occurrence_numbers
from longtail.data.transforms import AnyTransform, PerImageTransform
from longtail.data.transforms.batched import to_float
from longtail.errors import LongtailError
from longtail.randomness import Stream, draw_ids, mix

_VIEW = mix(Stream.VIEWS)
GROUPED_VALUES = 2**17
"""Small batches are augmented together, up to so many values of pixels."""


class CachedTeacherViews(Protocol):
    """The teacher's outputs for fixed views of every image.

    An image that an epoch shows again is given the fixed views of the next epoch, and so on.
    """

    num_fixed_views: int
    """How many of the student's views, the first, must be views that the teacher saw."""

    def rng_keys(self, epoch: int, number: int) -> tuple[int, ...]:
        """Return the random keys of one of these views in an epoch."""
        ...

    def lookup(self, indices: Tensor, epoch: int | Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (B, F) features of the images' key views and (B, D, C) scores of their distilled views, if any.

        Args:
            indices: (B,) int64 positions of the images.
            epoch: whose views are meant; (B,) int64 where these differ between the images.
        """
        ...


class TrainLoader:
    """Batches of one epoch after another, whose sizes differ by at most one.

    No image is dropped, and no batch is much smaller than the others, as BatchNorm needs. The order is a function of
    (seed, epoch), so that an epoch can be resumed at any step; a view is a function of (seed, epoch, view, image, how
    often the epoch has shown the image before), whichever process makes it.

    Args:
        images: the training set.
        batch_size: most images in a batch, of all processes together.
        views: V augmentations, all batched or all of one image at a time; one that returns labels of its own is alone.
        seed: of order and augmentation.
        epochs: of the training, for samplers that change along it.
        sampler: a name in :data:`longtail.registry.SAMPLERS`.
        deferred_from: see :mod:`longtail.data.samplers`.
        repeat_threshold: see :mod:`longtail.data.samplers`.
        workers: processes that decode and augment one image at a time; 0 does it in this one; one per core, at most 8,
            if not given.
        rank: of this process in the training.
        world: number of the training's processes; each has its part of every batch.
        cache: the teacher's outputs for fixed views.
        mixer: mixes the images of every batch of an epoch; a process makes views of partners that are another
            process's images itself.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        views: Sequence[AnyTransform],
        seed: int,
        *,
        epochs: int = 1,
        sampler: str = "instance",
        deferred_from: float = 0.8,
        repeat_threshold: float = REPEAT_THRESHOLD,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
        cache: CachedTeacherViews | None = None,
        mixer: Mixer | None = None,
    ) -> None:
        self.rank, self.world, self.cache, self.mixer = rank, world, cache, mixer
        self.images, self.views, self.seed, self.epochs = images, tuple(views), seed, epochs
        self.sampler, self.deferred_from, self.repeat_threshold = sampler, deferred_from, repeat_threshold
        self.steps = -(-len(images) // batch_size)
        """Batches of an epoch."""
        self.min_local_batch = len(images) // self.steps // world
        """Fewest images that a process has in a step."""
        self.per_image = any(isinstance(view, PerImageTransform) for view in self.views)
        assert not self.per_image or all(isinstance(view, PerImageTransform) for view in self.views)
        self.workers = min(8, os.cpu_count() or 1) if workers is None else workers

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from step ``start`` on."""
        splits = self.splits(epoch)
        occurrences = self.occurrences(splits)
        return self.batches(splits[start:], epoch, occurrences=None if occurrences is None else occurrences[start:])

    def splits(self, epoch: int) -> list[Tensor]:
        """Return the positions of the images of every batch of ``epoch``, int64, in all processes together."""
        labels = self.images.labels if self.images.classes is None else self.images.classes
        settings = (self.epochs, self.deferred_from, self.repeat_threshold)
        order = epoch_order(labels, self.sampler, self.seed, epoch, *settings)
        return list(order.tensor_split(self.steps))

    @staticmethod
    def occurrences(splits: Sequence[Tensor]) -> list[Tensor] | None:
        """Return how often an epoch has shown each image of its batches before; None if it repeats no image.

        Args:
            splits: of a whole epoch, see :meth:`splits`.
        """
        numbers = occurrence_numbers(torch.cat(list(splits)))
        return None if numbers is None else list(numbers.split([len(split) for split in splits]))

    def batches(
        self,
        splits: Sequence[Tensor],
        epoch: int,
        only: Sequence[int] | None = None,
        occurrences: Sequence[Tensor] | None = None,
    ) -> Iterator[Batch]:
        """Yield batches of given images, with the views of ``epoch``.

        Args:
            splits: positions of the images of each batch, int64.
            epoch: determines the views; a negative one is no epoch of a training.
            only: indices of the views that are wanted; all if not given.
            occurrences: see :meth:`occurrences`; not for a negative epoch.
        """
        numbers = range(len(self.views)) if only is None else only
        images, mixer = self.images, self.mixer if epoch >= 0 else None
        rows, partners = [self._rows(len(split)) for split in splits], []
        repeats = [None] * len(splits) if occurrences is None else occurrences
        if mixer is not None:
            ids = [draw_ids(images.ids[split], repeat) for split, repeat in zip(splits, repeats, strict=True)]
            needed = [self._with_partners(mixer, *each, epoch) for each in zip(rows, ids, strict=True)]
            rows, partners = [part for part, _ in needed], [places for _, places in needed]
        taken = [
            ShownImages(split[part], None if repeat is None else repeat[part])
            for split, part, repeat in zip(splits, rows, repeats, strict=True)
        ]
        batches = (self._per_image_views if self.per_image else self._batched_views)(taken, epoch, numbers)
        for step, ((views, pixel_labels), (indices, repeat), split) in enumerate(
            zip(batches, taken, splits, strict=True)
        ):
            features, scores = None, None
            if self.cache is not None and epoch >= 0:
                features, scores = self.cache.lookup(indices, epoch if repeat is None else epoch + repeat)
            labels = images.labels[indices] if pixel_labels is None else pixel_labels
            batch = Batch(
                views=views,
                labels=labels,
                ids=images.ids[indices],
                key_features=features,
                teacher_scores=scores,
                max_local_batch=-(-len(split) // self.world),
                global_batch=len(split),
                epoch_fraction=max(epoch, 0) / self.epochs,
            )
            if mixer is not None:
                batch = mix_batch(batch, mixer, partners[step], draw_ids(batch.ids, repeat), epoch)
            if self.rank >= len(split):
                batch.labels = torch.full_like(batch.labels, -1)
                batch.mixed_labels = None if batch.mixed_labels is None else batch.labels
            yield batch

    def _rows(self, size: int) -> Tensor:
        """Return which images of a batch are a process's; one that has none takes the first, without a label."""
        rows = torch.arange(size)
        return rows.tensor_split(self.world)[self.rank] if self.rank < size else rows[:1]

    @staticmethod
    def _with_partners(mixer: Mixer, rows: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return a process's images of a batch and, after them, partners that are not among them; and where among all
        these the partner of each of its images is.

        Args:
            mixer: mixes them.
            rows: which images of the batch are the process's, one after another.
            ids: of all images of the batch, in draws.
            epoch: from 0.
        """
        first, count = int(rows[0]), len(rows)
        wanted = mixer.partners(ids[None], epoch)[0][first : first + count]
        elsewhere = (wanted < first) | (wanted >= first + count)
        places = torch.where(elsewhere, count - 1 + elsewhere.cumsum(0), wanted - first)
        return torch.cat([rows, wanted[elsewhere]]), places

    def is_fixed(self, number: int, epoch: int) -> bool:
        """Return whether view ``number`` is one of those that the teacher's cache has."""
        return self.cache is not None and epoch >= 0 and number < self.cache.num_fixed_views

    def rng_keys(self, number: int, epoch: int) -> tuple[int, ...]:
        """Return the random keys of view ``number`` in an epoch."""
        if self.cache is not None and self.is_fixed(number, epoch):
            return self.cache.rng_keys(epoch, number)
        return (self.seed, _VIEW, epoch, number)

    def view(self, number: int, pixels: Tensor, ids: Tensor, epoch: int, occurrences: Tensor | None = None) -> Tensor:
        """Return view ``number`` of images in an epoch, augmented together.

        Args:
            number: of the view.
            pixels: (B, …) images.
            ids: (B,) int64.
            epoch: determines the view.
            occurrences: (B,) int64 on the CPU, see :meth:`occurrences`.
        """
        transform = self.views[number]
        assert not isinstance(transform, PerImageTransform)
        if occurrences is None:
            return transform(pixels, ids, self.rng_keys(number, epoch))
        if not self.is_fixed(number, epoch):
            return transform(pixels, draw_ids(ids, occurrences.to(ids.device)), self.rng_keys(number, epoch))
        parts, places = [], []
        for keys, shown in self.fixed_keys(number, epoch, occurrences).items():
            rows = torch.isin(occurrences, torch.tensor(shown)).nonzero().flatten().to(ids.device)
            if len(rows):
                parts.append(transform(pixels[rows], ids[rows], keys))
                places.append(rows)
        joined = torch.cat(parts)
        return torch.empty_like(joined).index_copy_(0, torch.cat(places), joined)

    def fixed_keys(self, number: int, epoch: int, occurrences: Tensor) -> dict[tuple[int, ...], list[int]]:
        """Return the occurrences of images that a fixed view is shown to, by the random keys of that view."""
        shown: dict[tuple[int, ...], list[int]] = {}
        for occurrence in range(int(occurrences.max()) + 1):
            shown.setdefault(self.rng_keys(number, epoch + occurrence), []).append(occurrence)
        return shown

    def _batched_views(self, taken: Sequence[ShownImages], epoch: int, numbers: Sequence[int]) -> Iterator[_Views]:
        together = self._augmented_together([images.positions for images in taken])
        groups = [taken[first : first + together] for first in range(0, len(taken), together)]
        joined = [_join([images.positions for images in group]) for group in groups]
        decoded = take_ahead(self.images, self.images.images.take, joined)
        for (indices, pixels), group in zip(decoded, groups, strict=True):
            ids, views = self.images.ids[indices], []
            repeats = [images.occurrences for images in group if images.occurrences is not None]
            for number in numbers:
                made = self.view(number, pixels, ids, epoch, _join(repeats) if repeats else None)
                views.append(made.split([len(images.positions) for images in group]))
            for position in range(len(group)):
                yield tuple(view[position] for view in views), None

    def _augmented_together(self, splits: Sequence[Tensor]) -> int:
        """Return of how many batches the views are made at once.

        Several where they are small: what an operation costs beyond its pixels is then paid once.
        """
        if self.images.images.lazy or len(splits) == 0:
            return 1
        values = self.images.images.take(splits[0][:1])[0].numel() * max(map(len, splits))
        return max(1, GROUPED_VALUES // max(1, values))

    def _per_image_views(self, taken: Sequence[ShownImages], epoch: int, numbers: Sequence[int]) -> Iterator[_Views]:
        for transform in self.views:
            assert isinstance(transform, PerImageTransform)
            transform.prepare()
        batches = DataLoader(
            PerImageBatches(self, taken, epoch, numbers),
            batch_size=None,
            num_workers=min(self.workers, len(taken)),
            worker_init_fn=ignore_signals,
        )
        for batch in batches:
            if isinstance(batch, str):  # an error raised in another process would come with its traceback
                raise LongtailError(batch)
            views, pixel_labels, unreadable = batch
            self.images.images.record_unreadable(unreadable)
            yield tuple(to_float(view) for view in views), pixel_labels


_Views = tuple[tuple[Tensor, ...], Tensor | None]
"""Float views of a batch's images, and labels of their pixels where they have some."""


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
