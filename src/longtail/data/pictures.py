"""Image files, as Pillow reads them. Imports no torch, so that a deployed model need not either."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from longtail.errors import LongtailError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
"""Endings of the files that are taken for images."""


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return the files named, and the images in the folders named, in order of name.

    Raises:
        LongtailError: a path does not exist, or a folder has no images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
            if not inside:
                raise LongtailError(f"{path}: holds no images")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise LongtailError(f"{path}: there is no such file or folder")
    return found


def open_image(path: Path) -> Image.Image:
    """Open and decode an image file.

    Raises:
        LongtailError: the file is missing, empty, broken, too large to be an honest image, or none at all.
    """
    with explained(path), Image.open(path) as image:
        image.load()
    return image


def sides(path: Path) -> tuple[int, int]:
    """Return an image file's width and height from its header; raises as :func:`open_image` does."""
    with explained(path), Image.open(path) as image:
        return image.size


@contextlib.contextmanager
def explained(path: Path | str) -> Iterator[None]:
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


def squared(image: Image.Image, size: int, channels: int = 3) -> Image.Image:
    """Return any Pillow image as a square: the short side resized (bicubic), the centre cut out."""
    image = upright(image, channels)
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


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
