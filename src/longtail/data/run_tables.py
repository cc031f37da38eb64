"""Copies of the lists and tables that a run was trained from, in its folder.

The paths in a run's settings are those of the command that trained it: from another folder they lead nowhere, and a
table that was edited since would split the images in another way.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longtail.config import Data
from longtail.data.paths import find_path, printable
from longtail.errors import LongtailError
from longtail.files import atomic_write, make_folder
from longtail.registry import SOURCES

logger = logging.getLogger(__name__)

FOLDER = "tables"
"""In the folder of a run: ``train``, ``val`` and ``test``, each with the ending of its original."""
_MOST_BYTES = 2**28  # of a file that is copied; annotations of millions of images have more


def write_tables(run: Path, data: Data) -> None:
    """Copy the lists and tables that name the images of a run into its folder, atomically.

    Args:
        run: its folder.
        data: its settings. Of a set that is no listing of image files nothing is copied.
    """
    if SOURCES[data.source].listing is None:
        return
    for split, original in _tables(data):
        copy = _copy_of(run, split, original)
        if original.stat().st_size <= _MOST_BYTES and original.resolve() != copy.resolve():
            make_folder(copy.parent)
            atomic_write(copy, lambda partial, source=original: shutil.copyfile(source, partial))  # type: ignore[misc]


def with_tables(run: Path, data: Data) -> Data:
    """Return the settings of a run's data with the copies of its tables where the originals are missing or changed.

    Which of them are used is logged.

    Args:
        run: its folder.
        data: its settings; ``root`` is where the images are now.

    Raises:
        LongtailError: a table is missing and has no copy, or it is not known where the images are.
    """
    for split, original in _tables(data):
        copy, exists = _copy_of(run, split, original), original.is_file()
        if not copy.is_file():
            if not exists:
                raise LongtailError(
                    f"{printable(original)}: there is no such file, which names the images of {printable(run)} "
                    f"(data.{split}); restore it, or repeat the command in the folder where the run was started"
                )
            continue
        if exists and original.read_bytes() == copy.read_bytes():
            continue
        changes: dict[str, Any] = {split: str(copy)}
        if data.root is None:
            if not exists:
                raise LongtailError(
                    f"{printable(original)}: there is no such file, in whose folder the images were; say where they "
                    "are: --root FOLDER"
                )
            changes["root"] = str(original.parent)
        reason = "has changed since the training" if exists else "is not there"
        logger.info("%s %s: its copy %s is used", original, reason, copy)
        data = dataclasses.replace(data, **changes)
    return data


def _tables(data: Data) -> Iterator[tuple[str, Path]]:
    for split, path in (("train", data.train), ("val", data.val), ("test", data.test)):
        if path is not None:
            yield split, find_path(Path(path))


def _copy_of(run: Path, split: str, original: Path) -> Path:
    return run / FOLDER / f"{split}{original.suffix}"
