"""Reading image files with Pillow. Imports no torch, so that a deployed model need not either."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from longtail.errors import LongtailError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
"""File name suffixes, in lower case, of files that are treated as images."""


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return the given files, and the images below the given folders in order of name.

    Raises:
        LongtailError: a path does not exist, or a folder contains no images.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise LongtailError(f"{path}: holds no images")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise LongtailError(f"{path}: there is no such file or folder")
    return files


def open_image(path: Path) -> Image.Image:
    """Open and decode an image file.

    Raises:
        LongtailError: the file is missing, empty, damaged, no image, or larger than Pillow decodes safely.
    """
    with image_errors(path), Image.open(path) as image:
        image.load()
    return image


def read_size(path: Path) -> tuple[int, int]:
    """Return an image file's width and height in pixels from its header; raises as :func:`open_image` does."""
    with image_errors(path), Image.open(path) as image:
        return image.size


@contextlib.contextmanager
def image_errors(path: Path | str) -> Iterator[None]:
    """Turn what Pillow and the operating system raise while an image is read into a LongtailError of one line.

    Args:
        path: the file, or a description of the image; the message begins with it.
    """
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
        raise LongtailError(f"{path}: is larger than Pillow decodes safely ({error}); shrink it") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise LongtailError(f"{path}: is damaged ({' '.join(str(error).split())}); remove or replace it") from None


def resize_center_crop(image: Image.Image, size: int, channels: int = 3) -> Image.Image:
    """Return the image as a square: its shorter side resized to ``size`` pixels (bicubic), then the centre cropped.

    Args:
        image: any Pillow image.
        size: side of the square in pixels.
        channels: see :func:`to_rgb`.
    """
    image = to_rgb(image, channels)
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def to_rgb(image: Image.Image, channels: int = 3) -> Image.Image:
    """Return a copy of the image as 8-bit RGB or grey: rotated by its EXIF tag, transparency over white.

    Args:
        image: any Pillow image; 16-bit and float images are scaled to 8 bits.
        channels: 3 for RGB, 1 for grey.
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
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)
