"""Tables of encoded images and labels, as the library datasets loads them: Parquet files, image folders, the Hub."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtail.data.image_io import open_header
from longtail.data.images import to_square
from longtail.data.listing import SPLITS, class_names_of_labels, encode_labels, split_of
from longtail.data.listing.tables import (
    LabelColumn,
    column_texts,
    parse_labels,
    parse_splits,
    pick_column,
    pick_split_column,
    unused_columns,
)
from longtail.data.paths import nfc, printable
from longtail.errors import LongtailError

_SAMPLE = 1000  # rows by which it is guessed what a column holds


def load_hf_dataset(name: str, where: str) -> dict[str, Any]:
    """Return the splits of a data set by name: train, val and test for those with a usual name for one of them.

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
    named: dict[str, Any] = {}
    for split in sorted(splits, key=lambda split: split not in SPLITS):  # two may stand for the same
        standard = split_of(split)
        named[split if standard is None or standard in named else standard] = splits[split]
    return named


def find_split_column(rows: Any, wanted: str | None, where: str) -> str | None:
    """Return the name of the column of splits of a ``datasets.Dataset``; None if it has none.

    Args:
        rows: the data set.
        wanted: the name asked for, if any; the usual ones are tried otherwise.
        where: the setting that names the set, for messages.

    Raises:
        LongtailError: there is no column ``wanted``.
    """
    return pick_split_column(_first_values(rows), wanted, where)


def split_by_column(rows: Any, column: str, where: str) -> dict[str, Any]:
    """Return the rows of a ``datasets.Dataset`` by what a column says: train, val or test.

    Raises:
        LongtailError: a value is missing, or is no split.
    """
    splits = parse_splits(column_texts(_values(rows, column), where, column, "train, val or test"), where)
    positions: dict[str, list[int]] = {}
    for position, split in enumerate(splits):
        positions.setdefault(split, []).append(position)
    return {split: rows.select(chosen) for split, chosen in positions.items()}


class DatasetRows:
    """One split: N rows of an encoded image and a label. Names of columns are found in any case.

    Args:
        split: a ``datasets.Dataset``.
        image_columns: usual names of the column of images, the first that exists; not needed if one alone holds images.
        label_columns: usual names of the column of labels, the first that exists.
        where: the setting that names the set, for messages.
        image_column: the name, instead of a usual one.
        label_column: the name, instead of a usual one.

    Raises:
        LongtailError: a column is missing, or a label is neither a number nor a name.
    """

    def __init__(
        self,
        split: Any,
        image_columns: Sequence[str],
        label_columns: Sequence[str],
        where: str,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        import datasets

        self.where = where
        columns, features = split.column_names, split.features
        images = [name for name in columns if _holds_images(features[name])]
        if image_column is None and len(images) == 1:
            self._image_column = images[0]
        else:
            self._image_column = pick_column(images or columns, image_column, image_columns, where, "image")
        others = [name for name in columns if name != self._image_column]
        self.label_column = pick_column(others, label_column, label_columns, where, "label")
        self.values: list[Any] = _values(split, self.label_column)
        """(N,) labels as they are stored: numbers or names, or None."""
        bad = next((value for value in self.values if not isinstance(value, int | float | str | None)), None)
        if bad is not None:
            raise LongtailError(f"{where}: column '{self.label_column}' holds {bad!r}, expected integers or names")
        declared = getattr(features[self.label_column], "names", None)
        self.declared_names: list[str] | None = [nfc(name) for name in declared] if declared else None
        """Class names, where the set has some for its integers."""
        self._split = split
        self._encoded = split.cast_column(self._image_column, datasets.Image(decode=False)).with_format("arrow")

    @property
    def unlabelled(self) -> bool:
        """Whether no row has a label, as in the test splits of competitions."""
        return bool(self.values) and all(value is None or value == -1 for value in self.values)

    def remarks(self, split_column: str | None = None) -> list[str]:
        """Return what a user should know about columns that are not used.

        Args:
            split_column: the column of splits that was used.
        """
        return unused_columns(
            _first_values(self._split), {"label": self.label_column, "split": split_column}, self.where
        )

    @property
    def label_texts(self) -> LabelColumn:
        """The labels as those of a table of files."""
        texts = column_texts(self.values, self.where, self.label_column, "a label")
        return LabelColumn(self.where, self.label_column, [nfc(text.strip()) for text in texts])

    @functools.cached_property
    def names(self) -> list[str] | None:
        """Class names, where the set has some."""
        if self.declared_names is None and self.values and isinstance(self.values[0], str):
            return sorted(set(self.label_texts.texts))
        return self.declared_names

    @functools.cached_property
    def labels(self) -> Tensor:
        """(N,) int64: the numbers as they are, or the positions of names; without regard to other splits."""
        if self.names is None or self.names is self.declared_names:
            return torch.tensor([-1 if value is None else int(value) for value in self.values], dtype=torch.int64)
        return encode_labels(self.label_texts.texts, self.names)[0]

    def class_names_of_rows(self) -> list[str]:
        """Return the class name of every row.

        Raises:
            LongtailError: a label is missing, or out of the range of the declared names.
        """
        if self.declared_names is None:
            return list(self.label_texts.texts)
        labels, classes = self.labels, len(self.declared_names)
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
            raise LongtailError(
                f"{self.where}: expected labels 0 to {classes - 1} in '{self.label_column}', got {int(labels.min())} "
                f"to {int(labels.max())}"
            )
        return [self.declared_names[label] for label in labels.tolist()]

    def encoded_images(self, positions: Sequence[int]) -> list[bytes]:
        """Return the encoded images of some rows; nothing for a row without one."""
        cells = self._encoded[list(positions)][self._image_column].to_pylist()
        return [_encoded_image(cell) for cell in cells]

    def pixels(self, positions: Tensor, size: int) -> Tensor:
        """Return the images of B rows as (B, 3, size, size) uint8."""
        encoded = self.encoded_images(positions.tolist())
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return torch.stack(list(pool.map(lambda cell: to_square(open_header(io.BytesIO(cell)), size), encoded)))


def _encoded_image(cell: Mapping[str, Any] | None) -> bytes:
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        return b""
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def number_labels(rows: Mapping[str, DatasetRows], remarks: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the labels of every split as class indices, (N,) int64, and the names of the classes.

    Labels are read as those of tables of files: all are whole numbers or all are names, and whole numbers that are not
    0 to C − 1, such as ids from a database, name the classes. Classes are those that training images have.

    Args:
        rows: by split, ``train`` among them.
        remarks: where to say what was decided.

    Raises:
        LongtailError: there is no training image, or a label is missing, out of range, or not among those of the
            training images.
    """
    train = rows["train"]
    if not train.values:
        raise LongtailError(f"{train.where}: has no rows")
    raw: dict[str, list[Any]]
    classes: list[Any] | None = None
    if train.declared_names is None:
        raw = dict(zip(rows, map(list, parse_labels([split.label_texts for split in rows.values()])), strict=True))
    else:
        raw = {name: split.class_names_of_rows() for name, split in rows.items()}
        used = set(raw["train"])
        declared = list(dict.fromkeys(train.declared_names))
        classes = [name for name in declared if name in used]
        unused = [name for name in declared if name not in used]
        if unused:
            shown = printable(", ".join(unused[:3])) + ("…" if len(unused) > 3 else "")
            remarks.append(
                f"{train.where}: {len(unused):,} of {len(declared):,} class names have no training image, and are no "
                f"classes ({shown})"
            )
    labels: dict[str, Tensor] = {}
    for name in sorted(rows, key=lambda name: name != "train"):
        try:
            labels[name], classes = encode_labels(raw[name], classes)
        except LongtailError as error:
            raise LongtailError(f"{rows[name].where}: {error}") from None
    assert classes is not None
    return labels, class_names_of_labels(classes, remarks) or [str(label) for label in classes]


def _holds_images(feature: Any) -> bool:
    """Return whether a column holds encoded images, rather than text or numbers."""
    import datasets

    if isinstance(feature, Mapping):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in {"binary", "large_binary"}


def _first_values(rows: Any) -> dict[str, list[Any]]:
    """Return values of every column that holds no images, lists or structs."""
    import datasets

    names = [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, datasets.Value | datasets.ClassLabel) and not _holds_images(feature)
    ]
    table = rows.select_columns(names).with_format("arrow")[:_SAMPLE] if names else {}
    return {name: table[name].to_pylist() for name in names}


def _values(rows: Any, column: str) -> list[Any]:
    values: list[Any] = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    return values
