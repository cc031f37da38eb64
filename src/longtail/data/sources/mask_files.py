"""Files of masks: the value of every pixel, and which way up. Legend: H and W height and width in pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from longtail.data.image_io import open_image, orientation, shown_size, transposed
from longtail.errors import LongtailError

_PNG_SIGNATURE, _PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # and where the bits of a value are, in the header

Labels = np.ndarray[Any, np.dtype[np.int32]]
DrawnOn = Literal["plain", "shown", "stored", "either"]
"""What a mask is drawn on: an image that no Exif tag turns (or one that a tag turns, as the mask's own turns the mask),
the image as its tag turns it, the image as it is stored, or one of these two, which have the same size."""


class Mask(NamedTuple):
    """What is in the file of a mask."""

    values: Labels
    """(H, W), as its own Exif tag turns it."""
    turned: bool
    """Whether it has such a tag."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        height, width = self.values.shape
        return width, height


def read_mask(path: Path, ignore_value: int | None = None) -> Labels:
    """Return the values of a mask, (H, W) int32, as its Exif tag turns it; of a palette image its indices.

    Args:
        path: the file.
        ignore_value: a value that is returned as 0, unlabelled.

    Raises:
        LongtailError: the file cannot be read, or has colours or fractions instead of one number for each pixel.
    """
    return without_value(mask_of(open_image(path), path).values, ignore_value)


def mask_of(image: Image.Image, path: Path) -> Mask:
    """Return the mask in an opened file; raises as :func:`read_mask` does."""
    if image.mode == "F":
        raise LongtailError(f"{path}: has floating-point values, expected integers: the number of each pixel's class")
    if image.mode not in {"1", "L", "P", "I", "I;16", "I;16B", "I;16L"}:
        raise LongtailError(
            f"{path}: has {len(image.getbands())} channels ({image.mode}), expected one: the number of its class"
        )
    turned = orientation(image) != 1
    values = np.array(transposed(image) if turned else image).astype(np.int32)
    if image.mode == "L":
        values //= _grey_step(path)
    return Mask(values, turned)


def without_value(values: Labels, ignore_value: int | None) -> Labels:
    """Set the pixels of a value to 0, unlabelled, and return them all."""
    if ignore_value is not None:
        values[values == ignore_value] = 0
    return values


def drawn_on(mask: Mask, size: tuple[int, int], image_orientation: int) -> DrawnOn | None:
    """Return what a mask is drawn on by its size; None if that is not its image's.

    Args:
        mask: the mask.
        size: width and height of the image as it is stored.
        image_orientation: of the image, see :func:`~longtail.data.image_io.orientation`.
    """
    shown = shown_size(size, image_orientation)
    if image_orientation == 1 or mask.turned:
        return "plain" if mask.size == shown else None
    if size == shown:
        return "either" if mask.size == size else None
    return "shown" if mask.size == shown else "stored" if mask.size == size else None


def _grey_step(path: Path) -> int:
    """Return what Pillow multiplies grey values of a PNG file of 2 or 4 bits by, so that they fill 8 bits; else 1."""
    with path.open("rb") as file:
        header = file.read(_PNG_DEPTH + 1)
    depth = header[_PNG_DEPTH] if header.startswith(_PNG_SIGNATURE) and len(header) > _PNG_DEPTH else 8
    return 255 // (2**depth - 1) if depth < 8 else 1
