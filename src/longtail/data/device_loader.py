"""Batches made on an accelerator: the training images are kept in its memory, and augmented there.

The views of the next steps are prepared beside the running ones, on a stream of their own. A batch is what
:class:`~longtail.data.loader.TrainLoader` makes: its images, their order and their views are functions of (seed, epoch,
view, image, how often it was shown before) and do not depend on where they are computed, but for rounding.

A batch is read from buffers that stay where they are, at a row that a counter on the device points at. A step can
therefore be recorded as a CUDA graph, which knows addresses and not values.

Legend: N images, S side in pixels, R steps that are prepared at a time, B images of the largest batch, V views that are
kept, F feature width, C classes, D distilled views.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtail.data.batch import BY_IMAGE, Batch
from longtail.data.loader import TrainLoader
from longtail.data.mixing import mix_batch
from longtail.randomness import draw_ids

PIXELS_AT_ONCE = 2**24  # that are augmented at once, at most: a hundred operations are launched for any number
_PIXEL_BYTES = 128  # of intermediate results for each of them
BLOCK_BYTES = 2**30  # of the views that are prepared at a time, and as much again for those that are read

TeacherPass = Callable[[Batch], tuple[Tensor | None, Tensor | None]]
"""A frozen teacher's (B, F) features of the key views and (D · B, C) scores, see
:class:`longtail.methods.base.TeacherOutput`."""


class SharedViews:
    """Views that several trainings on one device have in common: those of one seed show the same views of an epoch.

    A training that is ahead makes them, and one that follows takes them, unless it follows so far behind that they are
    gone.

    Args:
        capacity: bytes that are kept; the views that were asked for the longest time ago go first.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.misses, self.hits = 0, 0
        """How many views had to be made, and how many were there."""
        self._views: collections.OrderedDict[Hashable, tuple[Tensor, Any]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the views of a key, made now or found; they are ready for the current stream."""
        with self._lock:
            if key in self._views:
                self.hits += 1
                self._views.move_to_end(key)
                tensor, event = self._views[key]
            else:
                self.misses += 1
                tensor, event = make(), None
                if tensor.is_cuda:
                    event = torch.cuda.Event()
                    event.record()
                self._views[key] = tensor, event
                while len(self._views) > 1 and sum(_bytes(kept) for kept, _ in self._views.values()) > self.capacity:
                    self._views.popitem(last=False)
        if event is not None:
            event.wait()
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Block(NamedTuple):
    """Consecutive steps of an epoch."""

    epoch: int
    start: int
    splits: Sequence[Tensor]
    occurrences: Sequence[Tensor] | None
    """See :meth:`TrainLoader.occurrences`."""


class DeviceLoader:
    """The batches of a :class:`~longtail.data.loader.TrainLoader`, made on the device.

    Args:
        loader: whose batches these are, of a single process.
        device: where the images are kept.
        memory: bytes for images and views together.
        learning_rate: the learning rate of a step, counted from the start of the training.
        teacher_pass: what a frozen teacher computes of a batch, prepared with its views; None leaves that to the step.
        kept_views: V, the first views of a batch, which the step needs; the others are for the teacher alone.
        shared: views that other trainings beside this one have made.
        view_names: what tells the views of a batch from those of other trainings: data, size and augmentation.
        stream: on which views are prepared beside the steps; a new one on CUDA if not given.
    """

    def __init__(
        self,
        loader: TrainLoader,
        device: torch.device,
        memory: float,
        learning_rate: Callable[[int], float],
        teacher_pass: TeacherPass | None = None,
        kept_views: int | None = None,
        shared: SharedViews | None = None,
        view_names: Sequence[Hashable] = (),
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.loader, self.device = loader, device
        self.learning_rate, self.teacher_pass = learning_rate, teacher_pass
        self.shared, self.view_names = shared, tuple(view_names)
        self.kept_views = len(loader.views) if kept_views is None else kept_views
        images, positions = loader.images, torch.arange(len(loader.images))
        taken = [images.images.take(part).to(device) for part in positions.split(1024)]
        self.pixels = torch.cat(taken)  # (N, channels, side, side) uint8
        self.labels, self.ids = images.labels.to(device), images.ids.to(device)
        self.largest = -(-len(images) // loader.steps)
        self.memory = memory - self.pixels.numel()
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        """The row of the current step, on the device."""
        self.learning_rates = torch.zeros(0, device=device)
        self.epoch_fraction = torch.zeros((), device=device)
        self._current: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}
        self._beside = stream or torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self.rows = 0
        """R, known after the first views are made."""
        self._prepared: tuple[int, int] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Make the batches of ``epoch`` from step ``start`` on current, one after another.

        The caller runs the step that :meth:`batch` is the input of, and then :meth:`advance`.

        Yields:
            The row of the current batch in the buffers, and its number of images.
        """
        blocks = self._blocks(epoch, start)
        block = next(blocks)
        following: _Block | None
        while block is not None:
            if self._prepared != (block.epoch, block.start):
                for _ in self._prepare(block):
                    pass
            self._swap(block)
            following = next(blocks, None) or self._first_of(epoch + 1)
            work = iter(()) if following is None else self._prepare(following)
            parts = 0 if following is None else -(-len(following.splits) // self._rows_at_once)
            done = 0
            for row, split in enumerate(block.splits):
                yield row, len(split)
                # spread over the steps, so that the device has some to go on with while the host is away
                while done < parts and (done + 1) * len(block.splits) <= (row + 1) * (parts + 1):
                    next(work, None)
                    done += 1
            for _ in work:
                pass
            block = following if following is not None and following.epoch == epoch else None  # type: ignore[assignment]

    @property
    def _rows_at_once(self) -> int:
        pixels = min(PIXELS_AT_ONCE, self.memory / 4 / _PIXEL_BYTES)
        return max(1, int(pixels // (self.largest * self.pixels[0, 0].numel())))

    def _blocks(self, epoch: int, start: int) -> Iterator[_Block]:
        splits = self.loader.splits(epoch)
        occurrences = self.loader.occurrences(splits)
        if not self.rows:
            self.rows = self._fitting_rows(splits[start : start + 1])
        for first in range(start, len(splits), self.rows):
            steps = slice(first, first + self.rows)
            yield _Block(epoch, first, splits[steps], None if occurrences is None else occurrences[steps])

    def _first_of(self, epoch: int) -> _Block | None:
        return next(self._blocks(epoch, 0)) if epoch < self.loader.epochs else None

    def _fitting_rows(self, one: Sequence[Tensor]) -> int:
        """Return R, from the size of one step's views, and make the buffers."""
        made = self._make(_Block(0, 0, one, None), slice(0, 1), share=False)  # the views of another step than it says
        step_bytes = sum(map(_bytes, made.values()))
        rows = int(min(BLOCK_BYTES, self.memory / 2) // step_bytes)
        rows = max(1, min(rows, self.loader.steps))
        for buffers in (self._current, self._next):
            for name, tensor in made.items():
                buffers[name] = torch.zeros((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=self.device)
        self.learning_rates = torch.zeros(rows, device=self.device)
        return rows

    def _stream(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._beside is None else torch.cuda.stream(self._beside)

    def _prepare(self, block: _Block) -> Iterator[None]:
        """Make the inputs of a block's steps, some at a time, beside what is launched meanwhile."""
        if self._beside is not None and self._copied is not None:
            self._beside.wait_event(self._copied)
        elif self._beside is not None:
            self._beside.wait_stream(torch.cuda.current_stream(self.device))
        for first in range(0, len(block.splits), self._rows_at_once):
            rows = slice(first, min(first + self._rows_at_once, len(block.splits)))
            with self._stream(), torch.no_grad():
                for name, tensor in self._make(block, rows).items():
                    self._next[name][rows] = tensor
            yield
        self._prepared = (block.epoch, block.start)

    def _make(self, block: _Block, rows: slice, share: bool = True) -> dict[str, Tensor]:
        """Return views, labels, ids and the teacher's outputs of some steps, each (steps, B, …)."""
        loader, splits = self.loader, block.splits[rows]
        padded = self._pad(splits)
        shape, indices = tuple(padded.shape), padded.flatten()
        repeats = None if block.occurrences is None else self._pad(block.occurrences[rows]).flatten()
        there = indices.to(self.device)
        pixels, ids = self.pixels[there], self.ids[there]
        views: list[Tensor] = []
        for number in range(len(loader.views)):
            keys: Hashable = loader.rng_keys(number, block.epoch)
            if repeats is not None and loader.is_fixed(number, block.epoch):
                keys = tuple(loader.fixed_keys(number, block.epoch, repeats))
            make = functools.partial(loader.view, number, pixels, ids, block.epoch, repeats)
            if self.shared is None or not share:
                views.append(make())
            else:
                first = block.start + rows.start
                settings = (loader.sampler, loader.deferred_from, loader.repeat_threshold, loader.epochs)
                order = (*settings, self.largest, first, len(splits))
                views.append(self.shared.get((self.view_names[number], keys, block.epoch, order), make))
        batch = Batch(tuple(views), self.labels[there], ids)
        if loader.cache is not None:
            features, scores = loader.cache.lookup(indices, block.epoch if repeats is None else block.epoch + repeats)
            batch.key_features = None if features is None else features.to(self.device)
            batch.teacher_scores = None if scores is None else scores.to(self.device)
        if loader.mixer is not None:
            sizes = torch.tensor([len(split) for split in splits]).to(self.device)
            drawn = draw_ids(ids, None if repeats is None else repeats.to(self.device))
            partners = loader.mixer.partners(drawn.view(shape), block.epoch, sizes)
            partners += self.largest * torch.arange(len(splits), device=self.device)[:, None]
            batch = mix_batch(batch, loader.mixer, partners.flatten(), drawn, block.epoch)
        if loader.cache is None and self.teacher_pass is not None:
            batch.key_features, scores = self.teacher_pass(batch)
            if scores is not None:  # (D · B, C), one view after another
                batch.teacher_scores = scores.view(-1, len(indices), scores.shape[1]).transpose(0, 1)
        # channels last in memory, as the networks need it
        made = {
            f"view{number}": view.permute(0, 2, 3, 1).reshape(*shape, *view.shape[2:], view.shape[1])
            for number, view in enumerate(batch.views[: self.kept_views])
        }
        for name in BY_IMAGE:
            tensor = getattr(batch, name)
            if tensor is not None:
                made[name] = tensor.reshape(*shape, *tensor.shape[1:])
        return made

    def _pad(self, parts: Sequence[Tensor]) -> Tensor:
        """Return values of the images of some steps, (steps, B).

        A batch may be smaller by one image than the largest; its last row is never read.
        """
        return torch.stack([torch.cat([part, part[: self.largest - len(part)]]) for part in parts])

    def _swap(self, block: _Block) -> None:
        """Make the prepared block the current one."""
        if self._beside is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._beside)
        count = len(block.splits)
        for name, tensor in self._current.items():
            tensor[:count].copy_(self._next[name][:count])
        if self._beside is not None:  # from here on the next ones may be written
            self._copied = torch.cuda.current_stream(self.device).record_event()
        first = block.epoch * self.loader.steps + block.start
        rates = torch.tensor([self.learning_rate(first + row) for row in range(count)])
        self.learning_rates[:count].copy_(rates.pin_memory() if self._beside is not None else rates, non_blocking=True)
        self.epoch_fraction.fill_(block.epoch / self.loader.epochs)
        self.counter.zero_()
        self._prepared = None

    def batch(self, size: int) -> Batch:
        """Return the first ``size`` images of the row that the counter points at."""

        def row(name: str) -> Tensor:
            return self._current[name].index_select(0, self.counter)[0, :size]

        by_image: dict[str, Any] = {name: row(name) for name in BY_IMAGE if name in self._current}
        return Batch(
            views=tuple(row(f"view{number}").permute(0, 3, 1, 2) for number in range(self.kept_views)),
            **by_image,
            global_batch=size,
            epoch_fraction=self.epoch_fraction,
        )

    def rate(self) -> Tensor:
        """Return the learning rate of the current step, (1,)."""
        return self.learning_rates.index_select(0, self.counter)

    def advance(self) -> None:
        """Point at the next step."""
        self.counter += 1


def reason_against_device(loader: TrainLoader, memory: float) -> str:
    """Return why batches cannot be made on the device; empty if they can.

    Args:
        loader: see :class:`DeviceLoader`.
        memory: bytes for images and views together.
    """
    if loader.world > 1:
        return "several processes share every batch"
    if loader.per_image:
        return "images are augmented one at a time as they are decoded"
    first = loader.images.images.take(torch.zeros(1, dtype=torch.int64))
    if first.dtype != torch.uint8 or first.ndim != 4:
        return "features are kept, not images"
    needed = first.numel() * len(loader.images)
    if needed > memory:
        return f"they take {needed / 2**30:.1f} GiB, more than accelerator.memory allows ({memory / 2**30:.1f} GiB)"
    return ""
