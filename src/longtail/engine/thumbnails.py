"""Small pictures of a run's mistakes, kept beside its figures, so that a report needs no test images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from longtail.data.dataset import ImageSet
from longtail.data.pictures import upright
from longtail.errors import LongtailError

SIDE = 96
"""Longest side in pixels."""
_LOSSLESS = 64


def keep_thumbnails(run: Path, images: ImageSet, mistakes: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the test images that a run is most surely wrong about to its folder ``mistakes``.

    Args:
        run: the folder of the run.
        images: the test set.
        mistakes: by kind, see :func:`longtail.evaluation.metrics.mistakes`.

    Raises:
        LongtailError: the folder cannot be written.
    """
    folder = run / "mistakes"
    shutil.rmtree(folder, ignore_errors=True)
    pictures = {
        entry["image"]: _small(images.images.open_or_another(entry["image"]))
        for entries in mistakes.values()
        for entry in entries
    }
    try:
        if pictures:
            folder.mkdir()
        for index, image in pictures.items():
            if max(image.size) <= _LOSSLESS:
                image.save(folder / f"{index}.png")
            else:
                image.save(folder / f"{index}.jpg", quality=80)
    except OSError as error:
        raise LongtailError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _small(image: Image.Image) -> Image.Image:
    small = upright(image)
    small.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    return small


def thumbnail(run: Path, index: int) -> Path | None:
    """Return the picture of a test image, if the run has one."""
    return next(iter(sorted((run / "mistakes").glob(f"{index}.*"))), None)
