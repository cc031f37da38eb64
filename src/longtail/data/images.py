"""Pixels: decoded once and held as uint8, or decoded batch by batch. Legend: B images, channels, S side in pixels."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

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

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def take(self, indices: Tensor) -> Tensor:
        """Return (B, channels, S, S) uint8 for (B,) int64 indices."""
        ...


class ArrayImages:
    """Images in memory: (N, channels, S, S) uint8."""

    lazy = False

    def __init__(self, pixels: Tensor) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.ndim == 4
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``."""
        return self.pixels[indices]


class FileImages:
    """Image files, decoded when they are taken, by a few threads (Pillow decodes outside the interpreter's lock)."""

    lazy = True

    def __init__(self, paths: Sequence[Path], size: int, channels: int = 3) -> None:
        self.paths, self.size, self.channels = list(paths), size, channels

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``."""
        wanted = [self.paths[index] for index in indices.tolist()]
        return decode_files(wanted, self.size, self.channels)


def decode_files(paths: Sequence[Path], size: int, channels: int = 3) -> Tensor:
    """Return (B, channels, size, size) uint8.

    Raises:
        LongtailError: a file cannot be read as an image; it is named.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        decoded = list(pool.map(lambda path: decode(path, size, channels), paths))
    return torch.stack(decoded)


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
def _explained(path: Path) -> Iterator[None]:
    """Turn what Pillow and the system raise over a file into one line about it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise LongtailError(f"{path}: cannot be read: {error.strerror}") from None
    except UnidentifiedImageError:
        what = "is empty" if path.stat().st_size == 0 else "is not an image that Pillow can read"
        raise LongtailError(f"{path}: {what}; remove or replace it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LongtailError(f"{path}: is larger than Pillow takes for safe ({error}); shrink it") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise LongtailError(f"{path}: is damaged ({' '.join(str(error).split())}); remove or replace it") from None


def decode(path: Path, size: int, channels: int = 3) -> Tensor:
    """Return an image file as (channels, size, size) uint8: see :func:`to_square`."""
    return to_square(open_image(path), size, channels)


def to_square(image: Image.Image, size: int, channels: int = 3) -> Tensor:
    """Return any Pillow image as (channels, size, size) uint8.

    Upright by its EXIF tag, transparency over white, 16 bits down to 8, the short side resized to ``size`` (bicubic)
    and the centre cut out.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips 16-bit values to white
        values = np.asarray(image, dtype=np.float64)
        values = values / 257 if image.mode != "F" or values.max(initial=0) > 1 else values * 255
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if channels == 3 else pixels[None]
