"""Small copies of the test images that a run is most confidently wrong about, so that a report needs no test images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from longtail.data.dataset import ImageSet
from longtail.data.image_io import to_rgb
from longtail.errors import LongtailError

SIDE = 96
"""Longest side in pixels."""
_LOSSLESS = 64
FOLDER = "errors"
"""Name of the folder in that of the run."""


def save_error_images(run: Path, images: ImageSet, errors: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the images of a run's most confident errors to its folder.

    Args:
        run: the folder of the run.
        images: the test set.
        errors: by kind, see :func:`longtail.evaluation.metrics.most_confident_errors`.

    Raises:
        LongtailError: the folder cannot be written.
    """
    folder = run / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    thumbnails = {
        entry["image"]: _thumbnail(images.images.open_with_fallback(entry["image"]))
        for entries in errors.values()
        for entry in entries
    }
    try:
        if thumbnails:
            folder.mkdir()
        for index, image in thumbnails.items():
            if max(image.size) <= _LOSSLESS:
                image.save(folder / f"{index}.png")
            else:
                image.save(folder / f"{index}.jpg", quality=80)
    except OSError as error:
        raise LongtailError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _thumbnail(image: Image.Image) -> Image.Image:
    small = to_rgb(image)
    small.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    return small


def error_image(run: Path, index: int) -> Path | None:
    """Return the file of a test image in the run's folder, if it has one."""
    return next(iter(sorted((run / FOLDER).glob(f"{index}.*"))), None)
