"""Pixels: decoded once and held as uint8, or decoded batch by batch. Legend: B images, channels, S side in pixels."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from longtail.errors import LongtailError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
"""Endings of the files that are taken for images."""


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
        with _explained(f"{self.name}, row {index}"), Image.open(io.BytesIO(self.cells(index))) as image:
            image.load()
        return image


Item = TypeVar("Item")


def _decoded(function: Callable[[Item], Tensor], items: Sequence[Item]) -> Tensor:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return torch.stack(list(pool.map(function, items)))


def open_image(path: Path) -> Image.Image:
    """Open and decode an image file.

    Raises:
        LongtailError: the file is missing, empty, broken, too large to be an honest image, or none at all.
    """
    with _explained(path), Image.open(path) as image:
        image.load()
    return image


def sides(path: Path) -> tuple[int, int]:
    """Return an image file's width and height from its header; raises as :func:`open_image` does."""
    with _explained(path), Image.open(path) as image:
        return image.size


@contextlib.contextmanager
def _explained(path: Path | str) -> Iterator[None]:
    """Turn what Pillow and the system raise over a file into one line about it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise LongtailError(f"{path}: cannot be read: {error.strerror}") from None
    except UnidentifiedImageError:
        empty = isinstance(path, Path) and path.stat().st_size == 0
        what = "is empty" if empty else "is not an image that Pillow can read"
        raise LongtailError(f"{path}: {what}; remove or replace it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LongtailError(f"{path}: is larger than Pillow takes for safe ({error}); shrink it") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise LongtailError(f"{path}: is damaged ({' '.join(str(error).split())}); remove or replace it") from None


def decode(path: Path, size: int, channels: int = 3) -> Tensor:
    """Return an image file as (channels, size, size) uint8: see :func:`to_square`."""
    return to_square(open_image(path), size, channels)


def to_square(image: Image.Image, size: int, channels: int = 3) -> Tensor:
    """Return any Pillow image as (channels, size, size) uint8: the short side resized (bicubic), the centre cut out."""
    image = upright(image, channels)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if channels == 3 else pixels[None]


def upright(image: Image.Image, channels: int = 3) -> Image.Image:
    """Return any Pillow image in colour or grey: upright by its EXIF tag, over white, 16 bits down to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips 16-bit values to white
        values = np.asarray(image, dtype=np.float64)
        values = values / 257 if image.mode != "F" or values.max(initial=0) > 1 else values * 255
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)
