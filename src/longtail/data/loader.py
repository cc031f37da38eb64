"""Batches of augmented images. Legend: N images, B of them in a batch, V views, S side in pixels."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from longtail.data.dataset import ImageSet
from longtail.data.mixing import Mixer
from longtail.data.prefetch import prefetch
from longtail.data.samplers import REPEAT_THRESHOLD, epoch_order
from longtail.data.transforms import AnyTransform, PerImageTransform
from longtail.data.transforms.batched import to_float
from longtail.data.transforms.per_image import preserve_rng_state
from longtail.errors import LongtailError
from longtail.randomness import mix

_EVALUATION_PIXELS = 2**22  # of a batch, whose activations must fit into the memory of a laptop
_VIEW = mix(2)  # a random stream of its own
GROUPED_VALUES = 2**17
"""Small batches are augmented together, up to so many values of pixels."""


@dataclass
class Batch:
    """What a method trains on."""  # not frozen: Fabric inspects the arguments of a module, and refuses frozen ones

    views: tuple[Tensor, ...]
    """V views, each (B, channels, S, S) float32 in [0, 1]."""
    labels: Tensor
    """(B,) int64, or (B, S, S) where every pixel has a label; −1 where there is none. Or (B, T, 5) float32 boxes with
    their classes, where these are what an image has."""
    ids: Tensor
    """(B,) int64 ids of the images, so that a query can leave its own image out of the keys."""
    key_features: Tensor | None = None
    """(B, F) the teacher's features of the key view, where they are cached."""
    teacher_scores: Tensor | None = None
    """(B, D, C) the teacher's scores of the D distilled views, where they are cached or computed ahead of the step."""
    max_local_batch: int | None = None
    """Most images that any process has of this batch; B if None."""
    global_batch: int | None = None
    """Images that all processes together have of it."""
    epoch_fraction: float | Tensor = 0.0
    """Fraction of the training's epochs before this one, in [0, 1); a scalar of the device where batches are made
    there, since a recorded step cannot contain a number that changes."""
    mixed_labels: Tensor | None = None
    """(B,) int64 labels of the images that the classified views are mixed with, see :mod:`longtail.data.mixing`; None
    where no images are mixed."""
    label_weights: Tensor | None = None
    """(B,) the weight of an image's own label in [0, 1], where images are mixed."""
    gradient_weights: Tensor | None = None
    """(B,) factors of the gradient of each image's loss with respect to its scores; the loss itself stays as it is."""
    images: Batch | None = None
    """The batch of images, where this is one of parts of them; None where a sample is an image."""

    def __len__(self) -> int:
        return len(self.labels)

    def targets(self, num_classes: int) -> Tensor:
        """Return the labels of the classified views: ``labels``, or (B, C) probabilities where images are mixed.

        An image without a label has a row of zeros.
        """
        if self.mixed_labels is None or self.label_weights is None:
            return self.labels
        classes = torch.arange(num_classes, device=self.labels.device)
        own, other = (labels[:, None] == classes for labels in (self.labels, self.mixed_labels))
        weights = self.label_weights[:, None]
        return weights * own + (1 - weights) * other

    def _map(self, function: Callable[[Tensor], Tensor], max_local_batch: int | None) -> Batch:
        changes: dict[str, Any] = {"max_local_batch": max_local_batch, "views": tuple(map(function, self.views))}
        for name in BY_IMAGE:
            tensor = getattr(self, name)
            changes[name] = None if tensor is None else function(tensor)
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device) -> Batch:
        """Copy to ``device``, asynchronously to CUDA; itself where it is there."""
        if self.labels.device.type == device.type:
            return self
        pinned = device.type == "cuda"
        return self._map(
            lambda tensor: (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True),
            self.max_local_batch,
        )

    def split(self, parts: int) -> list[Batch]:
        """Return the batch in ``parts`` parts whose sizes differ by at most one."""
        if parts == 1:
            return [self]
        edges = [len(self) * part // parts for part in range(parts + 1)]
        max_local_batch = None if self.max_local_batch is None else -(-self.max_local_batch // parts)
        return [
            self._map(lambda tensor, a=a, b=b: tensor[a:b], max_local_batch)  # type: ignore[misc]
            for a, b in itertools.pairwise(edges)
        ]


BY_IMAGE = (
    *("labels", "ids", "key_features", "teacher_scores"),
    *("mixed_labels", "label_weights", "gradient_weights"),
)
"""Tensors of a batch, beside its views, that have a row for every image."""


class CachedTeacherViews(Protocol):
    """The teacher's outputs for fixed views of every image."""

    num_fixed_views: int
    """How many of the student's views, the first, must be views that the teacher saw."""

    def rng_keys(self, epoch: int, number: int) -> tuple[int, ...]:
        """Return the random keys of one of these views in an epoch."""
        ...

    def lookup(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Return (B, F) features of the images' key views and (B, D, C) scores of their distilled views, if any."""
        ...


class TrainLoader:
    """Batches of one epoch after another, whose sizes differ by at most one.

    No image is dropped, and no batch is much smaller than the others, as BatchNorm needs. The order is a function of
    (seed, epoch), so that an epoch can be resumed at any step; a view is a function of (seed, epoch, view, image),
    whichever process makes it.

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
        return self.batches(self.splits(epoch)[start:], epoch)

    def splits(self, epoch: int) -> list[Tensor]:
        """Return the positions of the images of every batch of ``epoch``, int64, in all processes together."""
        labels = self.images.labels if self.images.classes is None else self.images.classes
        settings = (self.epochs, self.deferred_from, self.repeat_threshold)
        order = epoch_order(labels, self.sampler, self.seed, epoch, *settings)
        return list(order.tensor_split(self.steps))

    def batches(self, splits: Sequence[Tensor], epoch: int, only: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield batches of given images, with the views of ``epoch``.

        Args:
            splits: positions of the images of each batch, int64.
            epoch: determines the views; a negative one is no epoch of a training.
            only: indices of the views that are wanted; all if not given.
        """
        numbers = range(len(self.views)) if only is None else only
        images, mixer = self.images, self.mixer if epoch >= 0 else None
        local = [split.tensor_split(self.world)[self.rank] for split in splits]
        # a process without an image of a small batch takes one that gets no label
        taken = [part if len(part) else split[:1] for part, split in zip(local, splits, strict=True)]
        partners: list[Tensor] = []
        if mixer is not None:
            needed = [self._with_partners(mixer, split, epoch) for split in splits]
            taken, partners = [indices for indices, _ in needed], [places for _, places in needed]
        batches = (self._per_image_views if self.per_image else self._batched_views)(taken, epoch, numbers)
        for step, ((indices, views, pixel_labels), part, split) in enumerate(zip(batches, local, splits, strict=True)):
            features, scores = (None, None) if self.cache is None or epoch < 0 else self.cache.lookup(indices, epoch)
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
                batch = mix_batch(batch, mixer, partners[step], epoch)
            if not len(part):
                batch.labels = torch.full_like(batch.labels, -1)
                batch.mixed_labels = None if batch.mixed_labels is None else batch.labels
            yield batch

    def _with_partners(self, mixer: Mixer, split: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the positions of a process's images of a batch and, after them, of partners that are not among them;
        and where among all these the partner of each of its images is.
        """
        parts = split.tensor_split(self.world)
        first = sum(map(len, parts[: self.rank])) if len(parts[self.rank]) else 0
        count = max(1, len(parts[self.rank]))
        wanted = mixer.partners(self.images.ids[split][None], epoch)[0][first : first + count]
        elsewhere = (wanted < first) | (wanted >= first + count)
        places = torch.where(elsewhere, count - 1 + elsewhere.cumsum(0), wanted - first)
        return torch.cat([split[first : first + count], split[wanted[elsewhere]]]), places

    def rng_keys(self, number: int, epoch: int) -> tuple[int, ...]:
        """Return the random keys of view ``number`` in an epoch."""
        if self.cache is not None and epoch >= 0 and number < self.cache.num_fixed_views:
            return self.cache.rng_keys(epoch, number)
        return (self.seed, _VIEW, epoch, number)

    def _batched_views(self, splits: Sequence[Tensor], epoch: int, numbers: Sequence[int]) -> Iterator[_Views]:
        together = self._augmented_together(splits)
        groups = [splits[first : first + together] for first in range(0, len(splits), together)]
        joined = [group[0] if len(group) == 1 else torch.cat(list(group)) for group in groups]
        taken = _ahead(self.images, self.images.images.take, joined)
        for (indices, pixels), group in zip(taken, groups, strict=True):
            ids, views = self.images.ids[indices], []
            for number in numbers:
                transform = self.views[number]
                assert not isinstance(transform, PerImageTransform)
                made = transform(pixels, ids, self.rng_keys(number, epoch))
                views.append(made.split([len(split) for split in group]))
            for position, split in enumerate(group):
                yield split, tuple(view[position] for view in views), None

    def _augmented_together(self, splits: Sequence[Tensor]) -> int:
        """Return of how many batches the views are made at once.

        Several where they are small: what an operation costs beyond its pixels is then paid once.
        """
        if self.images.images.lazy or len(splits) == 0:
            return 1
        values = self.images.images.take(splits[0][:1])[0].numel() * max(map(len, splits))
        return max(1, GROUPED_VALUES // max(1, values))

    def _per_image_views(self, splits: Sequence[Tensor], epoch: int, numbers: Sequence[int]) -> Iterator[_Views]:
        for transform in self.views:
            assert isinstance(transform, PerImageTransform)
            transform.prepare()
        batches = DataLoader(
            _PerImageBatches(self, splits, epoch, numbers),
            batch_size=None,
            num_workers=min(self.workers, len(splits)),
            worker_init_fn=ignore_signals,
        )
        for batch in batches:
            if isinstance(batch, str):  # an error raised in another process would come with its traceback
                raise LongtailError(batch)
            views, indices, pixel_labels, unreadable = batch
            self.images.images.record_unreadable(unreadable)
            yield indices, tuple(to_float(view) for view in views), pixel_labels


def mix_batch(batch: Batch, mixer: Mixer, partners: Tensor, epoch: int) -> Batch:
    """Return a batch of the first B images, each mixed with its partner.

    Args:
        batch: of these images and, after them, of partners that are not among them; its teacher's scores, if there are
            any, are of views that are not mixed.
        mixer: mixes them.
        partners: (B,) where in the batch the partner of each is.
        epoch: from 0.
    """
    own = batch._map(lambda tensor: tensor[: len(partners)], batch.max_local_batch)
    height, width = own.views[0].shape[-2:]
    other_labels = batch.labels[partners]
    mixture = mixer.draw(own.ids, own.labels, other_labels, epoch, (height, width))
    views = [
        mixture.views(view, batch.views[number][partners]) if number < mixer.num_views else view
        for number, view in enumerate(own.views)
    ]
    scores = own.teacher_scores
    if scores is not None and batch.teacher_scores is not None:
        scores = mixture.scores(scores, batch.teacher_scores[partners], mixer.temperature)
    return dataclasses.replace(
        own,
        views=tuple(views),
        teacher_scores=scores,
        mixed_labels=other_labels,
        label_weights=mixture.label_weights,
    )


def ignore_signals(_worker: int) -> None:
    """Ignore SIGTERM and SIGINT, which schedulers and terminals send to all processes of a job.

    The training's own process ends its workers after it has saved.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


_Views = tuple[Tensor, tuple[Tensor, ...], Tensor | None]
"""Positions of a batch's images, their float views, and labels of their pixels where they have some."""


class _PerImageBatches(Dataset[Any]):
    """Batches as a data set of torch, so that worker processes can make them."""

    def __init__(self, loader: TrainLoader, splits: Sequence[Tensor], epoch: int, numbers: Sequence[int]) -> None:
        self.loader, self.splits, self.epoch, self.numbers = loader, splits, epoch, numbers

    def __len__(self) -> int:
        return len(self.splits)

    def __getitem__(self, step: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None, dict[int, str]] | str:
        """Return uint8 views, positions, labels of pixels, and unreadable images; or the message of an error."""
        loader, indices = self.loader, self.splits[step]
        images = loader.images.images
        views: list[list[Tensor]] = [[] for _ in self.numbers]
        pixel_labels: list[Tensor] = []
        try:
            with preserve_rng_state():
                for index, image_id in zip(indices.tolist(), loader.images.ids[indices].tolist(), strict=True):
                    sample = images.open_sample(index)
                    for view, number in zip(views, self.numbers, strict=True):
                        transform = loader.views[number]
                        assert isinstance(transform, PerImageTransform)
                        pixels, labels = transform(sample, image_id, loader.rng_keys(number, self.epoch))
                        view.append(pixels)
                        if labels is not None:
                            assert len(views) == 1  # labels of another view would be others
                            pixel_labels.append(labels)
        except LongtailError as error:
            return str(error)
        labels_of_pixels = torch.stack(pixel_labels) if pixel_labels else None
        return tuple(map(_stack, views)), indices, labels_of_pixels, images.unreadable


def _stack(images: Sequence[Tensor]) -> Tensor:
    """Return a batch, channels last in memory, as the images are and as the networks need it."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def evaluation_batch_size(side: int) -> int:
    """Return how many images of ``side`` × ``side`` pixels pass a network at once: the fewer, the larger they are."""
    return min(512, max(1, _EVALUATION_PIXELS // side**2))


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
    splits = torch.arange(rank, len(images), world).split(batch_size)
    for indices, views in zip(splits, plain_batches(images, splits, size), strict=True):
        yield views, images.labels[indices]


def plain_batches(images: ImageSet, splits: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Yield what a network is given without augmentation for the images at each of ``splits``."""
    for _, views in _ahead(images, lambda part: images.images.plain(part, size), splits):
        yield views


def _ahead(
    images: ImageSet, take: Callable[[Tensor], Tensor], splits: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positions and what ``take`` returns for each batch; files are decoded one batch ahead of their use."""
    if images.images.lazy:
        yield from prefetch(take, splits)
    else:
        for indices in splits:
            yield indices, take(indices)
