"""Batches of images that are decoded and augmented one at a time, in worker processes."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from longtail.data.transforms import PerImageTransform
from longtail.data.transforms.per_image import preserve_rng_state
from longtail.errors import LongtailError
from longtail.randomness import draw_ids
from longtail.registry import load_plugins, plugins

if TYPE_CHECKING:
    from longtail.data.loader import TrainLoader


class ShownImages(NamedTuple):
    """Images of a batch."""

    positions: Tensor
    """(B,) int64."""
    occurrences: Tensor | None
    """(B,) int64 how often the epoch has shown each before; None if it repeats no image."""


class PerImageBatches(Dataset[Any]):
    """The batches of a loader as a data set of torch, so that worker processes can make them.

    Args:
        loader: whose images and augmentations these are.
        taken: the images of each batch.
        epoch: determines the views.
        numbers: of the views.
    """

    def __init__(self, loader: TrainLoader, taken: Sequence[ShownImages], epoch: int, numbers: Sequence[int]) -> None:
        self.loader, self.taken, self.epoch, self.numbers = loader, taken, epoch, numbers

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes, and before them the plugins, which augmentations may be of."""
        return {"plugins": _Plugins(), **vars(self)}

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.taken)

    def __getitem__(self, step: int) -> tuple[tuple[Tensor, ...], Tensor | None, dict[int, str]] | str:
        """Return uint8 views, labels of pixels, and unreadable images; or the message of an error."""
        loader, (indices, occurrences) = self.loader, self.taken[step]
        images, ids = loader.images.images, loader.images.ids[indices]
        repeats = torch.zeros_like(ids) if occurrences is None else occurrences
        rows = zip(*(part.tolist() for part in (indices, ids, draw_ids(ids, occurrences), repeats)), strict=True)
        views: list[list[Tensor]] = [[] for _ in self.numbers]
        pixel_labels: list[Tensor] = []
        try:
            with preserve_rng_state():
                for index, image_id, draw_id, repeat in rows:
                    sample = images.open_sample(index)
                    for view, number in zip(views, self.numbers, strict=True):
                        transform = loader.views[number]
                        assert isinstance(transform, PerImageTransform)
                        if loader.is_fixed(number, self.epoch):
                            draw = image_id, loader.rng_keys(number, self.epoch + repeat)
                        else:
                            draw = draw_id, loader.rng_keys(number, self.epoch)
                        pixels, labels = transform(sample, *draw)
                        view.append(pixels)
                        if labels is not None:
                            assert len(views) == 1  # labels of another view would be others
                            pixel_labels.append(labels)
        except LongtailError as error:
            return str(error)
        labels_of_pixels = torch.stack(pixel_labels) if pixel_labels else None
        return tuple(map(_stack, views)), labels_of_pixels, images.unreadable


class _Plugins:
    """The plugins of this process; where workers do not begin as copies of it, reading this runs them there."""

    def __reduce__(self) -> tuple[Any, ...]:
        return load_plugins, (plugins(),)


def _stack(images: Sequence[Tensor]) -> Tensor:
    """Return a batch, channels last in memory, as the images are and as the networks need it."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def ignore_signals(_worker: int) -> None:
    """Ignore SIGTERM and SIGINT, which schedulers and terminals send to all processes of a job.

    The training's own process ends its workers after it has saved.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
