"""Small pictures of a run's mistakes, kept beside its figures, so that a report needs no test images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from longtail.data.dataset import ImageSet
from longtail.data.pictures import upright

SIDE = 96
"""Longest side in pixels."""
_LOSSLESS = 64


def keep_thumbnails(run: Path, images: ImageSet, mistakes: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the test images that a run is most surely wrong about to its folder ``mistakes``.

    Args:
        run: the folder of the run.
        images: the test set.
        mistakes: by kind, see :func:`longtail.evaluation.metrics.mistakes`.
    """
    folder = run / "mistakes"
    shutil.rmtree(folder, ignore_errors=True)
    chosen = {entry["image"] for entries in mistakes.values() for entry in entries}
    if chosen:
        folder.mkdir()
    for index in chosen:
        image = upright(images.images.open_or_another(index))
        image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        if max(image.size) <= _LOSSLESS:
            image.save(folder / f"{index}.png")
        else:
            image.save(folder / f"{index}.jpg", quality=80)


def thumbnail(run: Path, index: int) -> Path | None:
    """Return the picture of a test image, if the run has one."""
    return next(iter(sorted((run / "mistakes").glob(f"{index}.*"))), None)
