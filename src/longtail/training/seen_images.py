"""The training images of a run, by which a later run recognises them among its test images.

A random split of a folder depends on every file in it: after a class or an image is added, other images are for testing
than before, and a network that starts from the earlier run may have been trained on them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from longtail.config import Config, Data, read_config
from longtail.data.dataset import LongTailedData
from longtail.data.paths import find_path
from longtail.data.run_tables import write_tables
from longtail.errors import LongtailError
from longtail.files import atomic_write, write_text
from longtail.registry import SOURCES

FILE = "train_images.npy"
"""In the folder of a run: (N,) int64 ids of its training images."""
ROOT_FILE = "images_root.txt"
"""In the folder of a run: the absolute path of the folder that the names of its images begin in."""


def write_train_images(folder: Path, config: Config, data: LongTailedData) -> None:
    """Write the ids of the training images, where they are those of files, and copies of the tables that name them.

    A run that is resumed has the same ones.
    """
    write_tables(folder, config.data)
    if SOURCES[config.data.source].listing is not None:
        atomic_write(folder / FILE, lambda partial: _save(partial, data.train.ids.numpy()))
        if (root := _root(config.data)) is not None:
            write_text(folder / ROOT_FILE, str(root), errors="surrogateescape")


def seen_test_images(run: str, config: Config, data: LongTailedData) -> str | None:
    """Return how many test images another run was trained on, as a sentence; None if none, or if it is not known.

    Args:
        run: folder of the other run.
        config: settings of this run.
        data: its data set.
    """
    folder = Path(run)
    try:
        there = read_config(folder / "config.yaml").data
        root = _read_root(folder) or _root(there)
        seen = torch.from_numpy(np.load(folder / FILE))
    except (OSError, ValueError, LongtailError):  # a model without its run, or of an earlier version
        return None
    if (_kind(there), root) != (_kind(config.data), _root(config.data)):
        return None
    count = int(torch.isin(data.test.ids, seen).sum())
    if count == 0:
        return None
    return (
        f"{count:,} of {len(data.test):,} test images were training images of {run}, so the accuracy will be too high; "
        "keep test images apart by a table for all runs: longtail split"
    )


def _save(path: Path, ids: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to a name
        np.save(file, ids)


def _kind(data: Data) -> str:
    """Return the source; of image files the ids are those of their paths, whether a folder is read or a list of it."""
    return "files" if data.source in {"folder", "list"} else data.source


def _root(data: Data) -> Path | None:
    """Return the folder in which the names of the images begin."""
    given = data.root or (None if data.train is None else str(Path(data.train).parent))
    return None if given is None else find_path(Path(given)).resolve()


def _read_root(run: Path) -> Path | None:
    """Return the folder that a run wrote; None of an earlier version."""
    path = run / ROOT_FILE
    return Path(path.read_text(encoding="utf-8", errors="surrogateescape")) if path.is_file() else None
