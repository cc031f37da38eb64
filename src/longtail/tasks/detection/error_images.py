"""Parts of the test images around a detector's errors, kept in the run's folder, so that a report needs no images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtail.data.dataset import ImageSet
from longtail.data.detection.data import images_of
from longtail.errors import LongtailError
from longtail.tasks.detection.drawing import Box, Color, crop_with_boxes

SIDE = 240
"""Of a picture in pixels."""
FOLDER = "errors"
"""Name of the folder in that of the run."""
OBJECT, WRONG = (68, 170, 255), (255, 96, 64)
"""Colours of the objects, in dashes, and of a false detection or a missed object."""


def save_error_images(run: Path, images: ImageSet, examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a picture of every example, see :func:`longtail.tasks.detection.examples.error_examples`.

    Args:
        run: the folder of the run.
        images: the test set.
        examples: by kind.

    Raises:
        LongtailError: the folder cannot be written.
    """
    folder, files = run / FOLDER, images_of(images)
    shutil.rmtree(folder, ignore_errors=True)
    listed = [(kind, number, entry) for kind, entries in examples.items() for number, entry in enumerate(entries)]
    try:
        if listed:
            folder.mkdir()
        opened = files.open_each([entry["image"] for _, _, entry in listed])
        for (kind, number, entry), image in zip(listed, opened, strict=True):
            objects = files.annotations.boxes[files.annotations.objects_of(entry["image"])].tolist()
            boxes: list[tuple[Box, Color, bool]] = [(box, OBJECT, True) for box in objects if box != entry["box"]]
            picture = crop_with_boxes(image, entry["box"], [*boxes, (entry["box"], WRONG, False)], SIDE)
            picture.save(error_image(run, kind, number), quality=85)
    except OSError as error:
        raise LongtailError(f"{folder}: cannot be written: {error.strerror or error}") from None


def error_image(run: Path, kind: str, number: int) -> Path:
    """Return the file of an example in the run's folder."""
    return run / FOLDER / f"{kind}-{number}.jpg"
