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
from longtail.files import atomic_write
from longtail.registry import SOURCES

FILE = "train_images.npy"
"""In the folder of a run: (N,) int64 ids of its training images."""


def write_train_images(folder: Path, config: Config, data: LongTailedData) -> None:
    """Write the ids of the training images, where they are those of files, and copies of the tables that name them.

    A run that is resumed has the same ones.
    """
    write_tables(folder, config.data)
    if SOURCES[config.data.source].listing is not None:
        atomic_write(folder / FILE, lambda partial: _save(partial, data.train.ids.numpy()))


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
        seen = torch.from_numpy(np.load(folder / FILE))
    except (OSError, ValueError, LongtailError):  # a model without its run, or of an earlier version
        return None
    if _place(there) != _place(config.data):
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


def _place(data: Data) -> tuple[str, Path | None]:
    """Return the source, and the folder in which the names of its images begin.

    The ids of image files are those of their paths, whether a folder is read or a list of the files in it.
    """
    given = data.root or (None if data.train is None else str(Path(data.train).parent))
    source = "files" if data.source in {"folder", "list"} else data.source
    return source, None if given is None else find_path(Path(given)).resolve()
