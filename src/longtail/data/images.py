"""Pixels: decoded once and held as uint8, or decoded batch by batch. Legend: B images, channels, S side in pixels."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longtail.data.pictures import explained, open_image, squared
from longtail.errors import LongtailError


class Images(Protocol):
    """A sequence of images of one size."""

    lazy: bool
    """Whether taking images costs time that is worth spending ahead."""
    broken: dict[int, str]
    """Images that could not be read, with the reason."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def take(self, indices: Tensor) -> Tensor:
        """Return (B, channels, S, S) uint8 for (B,) int64 indices."""
        ...

    def open_or_another(self, index: int) -> Image.Image:
        """Return one image as it is stored, or where it cannot be read another of its class."""
        ...

    def note(self, broken: dict[int, str]) -> None:
        """Remember images that cannot be read."""
        ...

    def glance(self, index: int) -> bytes:
        """Return something that tells an image from another: its size in bytes, or its pixels."""
        ...


class ArrayImages:
    """Images in memory: (N, channels, S, S) uint8."""

    lazy = False

    def __init__(self, pixels: Tensor) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.ndim == 4
        self.pixels = pixels
        self.broken: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``."""
        return self.pixels[indices]

    def open_or_another(self, index: int) -> Image.Image:
        """Return one image."""
        pixels = self.pixels[index].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    def note(self, broken: dict[int, str]) -> None:
        """Nothing in memory is broken."""
        assert not broken

    def glance(self, index: int) -> bytes:
        """Return an image's pixels."""
        return self.pixels[index].numpy().tobytes()


class LazyImages(ABC):
    """Images that are decoded when they are taken, by a few threads (Pillow decodes outside the interpreter's lock).

    Args:
        size: S.
        channels: 3 or 1.
        labels: (N,) classes, from which a replacement for an image that cannot be read is taken.
        broken_share: largest share of the images that may turn out unreadable and be replaced.
    """

    lazy = True

    def __init__(self, size: int, channels: int = 3, labels: Tensor | None = None, broken_share: float = 0.0) -> None:
        self.size, self.channels, self.labels, self.broken_share = size, channels, labels, broken_share
        self.broken: dict[int, str] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return one image as it is stored.

        Raises:
            LongtailError: it cannot be read; it is named.
        """

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``."""
        return _decoded(
            lambda index: to_square(self.open_or_another(index), self.size, self.channels), indices.tolist()
        )

    def open_or_another(self, index: int) -> Image.Image:
        """Return an image, or where it cannot be read the next of its class that can.

        Raises:
            LongtailError: more images than ``broken_share`` cannot be read, or none of the class can.
        """
        try:
            return self.open(index)
        except LongtailError as error:
            self.note({index: str(error)})
        assert self.labels is not None
        others = torch.nonzero(self.labels == self.labels[index]).flatten().tolist()
        place = others.index(index)
        for other in others[place + 1 :] + others[:place]:
            if other not in self.broken:
                try:
                    return self.open(other)
                except LongtailError as error:
                    self.note({other: str(error)})
        raise LongtailError(f"{self.broken[index]}; and no other image of its class can be read")

    def note(self, broken: dict[int, str]) -> None:
        """Remember images that cannot be read; raise LongtailError when there are too many."""
        self.broken |= broken
        if len(self.broken) > self.broken_share * len(self):
            first = next(iter(self.broken.values()))
            if self.broken_share == 0:
                raise LongtailError(first)
            raise LongtailError(
                f"{len(self.broken)} of {len(self)} images cannot be read, more than data.broken_share "
                f"{self.broken_share:g}; the first: {first}"
            )


class FileImages(LazyImages):
    """Image files below a folder.

    Args:
        root: the folder.
        names: N paths below it; as text, for a Path takes ten times the memory.
        size: see :class:`LazyImages`.
        channels: see :class:`LazyImages`.
        labels: see :class:`LazyImages`.
        broken_share: see :class:`LazyImages`.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        size: int,
        channels: int = 3,
        labels: Tensor | None = None,
        broken_share: float = 0.0,
    ) -> None:
        super().__init__(size, channels, labels, broken_share)
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> Image.Image:
        """Return the image at ``index``."""
        return open_image(self.root / self.names[index])

    def glance(self, index: int) -> bytes:
        """Return a file's size."""
        path = self.root / self.names[index]
        return str(path.stat().st_size if path.exists() else -1).encode()


class EncodedImages(LazyImages):
    """Encoded images in the rows of a table (parquet, the Hub's sets).

    Args:
        cells: gives the bytes of a row.
        count: N.
        name: of the table, for messages.
        size: see :class:`LazyImages`.
        channels: see :class:`LazyImages`.
        labels: see :class:`LazyImages`.
        broken_share: see :class:`LazyImages`.
    """

    def __init__(
        self,
        cells: Callable[[int], bytes],
        count: int,
        name: str,
        size: int,
        channels: int = 3,
        labels: Tensor | None = None,
        broken_share: float = 0.0,
    ) -> None:
        super().__init__(size, channels, labels, broken_share)
        self.cells, self.count, self.name = cells, count, name

    def __len__(self) -> int:
        return self.count

    def glance(self, index: int) -> bytes:
        """Return the size of a row's image."""
        return str(len(self.cells(index))).encode()

    def open(self, index: int) -> Image.Image:
        """Return the image of row ``index``."""
        with explained(f"{self.name}, row {index}"), Image.open(io.BytesIO(self.cells(index))) as image:
            image.load()
        return image


Item = TypeVar("Item")


def _decoded(function: Callable[[Item], Tensor], items: Sequence[Item]) -> Tensor:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return torch.stack(list(pool.map(function, items)))


def decode(path: Path, size: int, channels: int = 3) -> Tensor:
    """Return an image file as (channels, size, size) uint8: see :func:`to_square`."""
    return to_square(open_image(path), size, channels)


def to_square(image: Image.Image, size: int, channels: int = 3) -> Tensor:
    """Return any Pillow image as (channels, size, size) uint8: see :func:`~longtail.data.pictures.squared`."""
    pixels = torch.from_numpy(np.array(squared(image, size, channels)))
    return pixels.permute(2, 0, 1) if channels == 3 else pixels[None]
