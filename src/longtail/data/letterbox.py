"""An image scaled to fit a square, and boxes back from there; imports no torch. Legend: S side, K boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

FILL = (124, 116, 104)
"""Colour of what is outside of an image: ImageNet's mean."""

Array = np.ndarray[Any, Any]


def letterbox(
    image: Image.Image, size: int, fill: tuple[int, int, int] = FILL
) -> tuple[Image.Image, tuple[float, float]]:
    """Return an image scaled to fit a square, in its upper left corner, and the scales of its width and height.

    Args:
        image: in RGB.
        size: S.
        fill: colour of the rest.
    """
    width, height = size_in_square(image.size, size)
    scales = (width / image.width, height / image.height)
    scaled = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
    if (width, height) == (size, size):
        return scaled, scales
    canvas = Image.new("RGB", (size, size), fill)
    canvas.paste(scaled, (0, 0))
    return canvas, scales


def size_in_square(image_size: tuple[int, int], size: int) -> tuple[int, int]:
    """Return the width and height, whole pixels, that an image of a width and height has in the square of side S."""
    factor = size / max(image_size)
    width, height = (max(1, round(side * factor)) for side in image_size)
    return width, height


def boxes_in_image(boxes: Array, image_size: tuple[int, int], size: int) -> tuple[Array, Array]:
    """Return boxes in pixels of the image, clipped to it, and which of them have an area there.

    Args:
        boxes: (K, 4) x1, y1, x2, y2 in pixels of the square of side S.
        image_size: width and height of the image.
        size: S.

    Returns:
        (K, 4) float32, and (K,) bool.
    """
    limits = np.array(image_size * 2, dtype=np.float32)
    scales = limits / np.array(size_in_square(image_size, size) * 2, dtype=np.float32)
    moved: Array = np.clip(boxes.astype(np.float32) * scales, 0, limits)
    kept = np.asarray((moved[:, 2:] > moved[:, :2]).all(axis=1))
    return moved, kept
