"""Tables of encoded images and labels, as the library datasets loads them: Parquet files, image folders, the Hub."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from longtail.data.images import to_square
from longtail.errors import LongtailError


def load_hf_dataset(name: str, where: str) -> dict[str, Any]:
    """Return the splits of a data set by name.

    Args:
        name: of a set on the Hub, or the path of a local folder.
        where: the setting that names it, for messages.

    Raises:
        LongtailError: the library is not installed, or the set cannot be downloaded or read.
    """
    try:
        import datasets
    except ImportError:
        raise LongtailError(
            f"{where}: Parquet files and the Hub's sets need the extra hf: pip install 'longtail[hf]'"
        ) from None
    datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the library raises its own errors, pyarrow's, the network's and Python's
        reason = " ".join(str(error).split())[:300]
        if not Path(name).exists():
            raise LongtailError(
                f"{where}: could not be loaded from the Hub ({reason}); check the name and the network, or give a "
                "local copy with --data.root FOLDER"
            ) from None
        raise LongtailError(f"{where}: cannot be read as a set of images: {reason}") from None
    return dict(splits)


class DatasetRows:
    """One split: N rows of an encoded image and a label.

    Args:
        split: a ``datasets.Dataset``.
        image_columns: names of the column of images, the first that exists.
        label_columns: names of the column of labels, the first that exists.
        where: the setting that names the set, for messages.
        class_names: of the training split, by which labels that are names are numbered; this split's if not given.

    Raises:
        LongtailError: a column is missing, or a label is no integer or name, or not among ``class_names``.
    """

    def __init__(
        self,
        split: Any,
        image_columns: Sequence[str],
        label_columns: Sequence[str],
        where: str,
        class_names: list[str] | None = None,
    ) -> None:
        import datasets

        self.where = where
        self._image_column = _column(split.column_names, image_columns, where)
        self.label_column = _column(split.column_names, label_columns, where)
        values = split.with_format("arrow")[:][self.label_column].to_pylist()
        bad = next((value for value in values if not isinstance(value, int | str)), 0)
        if bad != 0:
            raise LongtailError(f"{where}: column '{self.label_column}' holds {bad!r}, expected integers or names")
        feature = split.features[self.label_column]
        self.names: list[str] | None = list(getattr(feature, "names", None) or []) or None
        """Class names, where the set has some."""
        if values and isinstance(values[0], str):
            self.names = sorted(set(values)) if class_names is None else class_names
            index = {name: position for position, name in enumerate(self.names)}
            unseen = next((value for value in values if value not in index), None)
            if unseen is not None:
                raise LongtailError(f"{where}: the class '{unseen}' is not among the training classes")
            values = [index[value] for value in values]
        self.labels = torch.tensor(values, dtype=torch.int64)
        """(N,) int64."""
        self._encoded = split.cast_column(self._image_column, datasets.Image(decode=False)).with_format("arrow")

    def encoded_images(self, positions: Sequence[int]) -> list[bytes]:
        """Return the encoded images of some rows."""
        cells = self._encoded[list(positions)][self._image_column].to_pylist()
        return [cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes() for cell in cells]

    def pixels(self, positions: Tensor, size: int) -> Tensor:
        """Return the images of B rows as (B, 3, size, size) uint8."""
        encoded = self.encoded_images(positions.tolist())
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return torch.stack(list(pool.map(lambda cell: to_square(Image.open(io.BytesIO(cell)), size), encoded)))


def _column(existing: Sequence[str], wanted: Sequence[str], where: str) -> str:
    for name in wanted:
        if name in existing:
            return name
    raise LongtailError(f"{where}: expected a column {' or '.join(wanted)}, there are {', '.join(existing)}")
