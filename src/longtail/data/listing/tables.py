"""CSV, TSV and Parquet tables of image paths and labels."""

from __future__ import annotations

import collections
import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtail.errors import LongtailError

_IMAGE_COLUMNS = ("path", "image", "file", "file_name", "filename", "image_path")
_LABEL_COLUMNS = ("class_name", "label", "class", "target", "category")


def read_text(path: Path) -> str:
    """Return the text of a file; a file name in it need not be valid UTF-8.

    Raises:
        LongtailError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").removeprefix("\ufeff")
    except OSError as error:
        raise LongtailError(f"{path}: cannot be read: {error.strerror}") from None


def read_table(
    path: Path, image_column: str | None, label_column: str | None, split_column: str | None
) -> tuple[list[str], list[Any], list[str] | None]:
    """Read a CSV, TSV or Parquet table of one row per image.

    Args:
        path: the table.
        image_column: column of paths; looked for under its usual names if not given.
        label_column: column of labels or class names; looked for under its usual names if not given.
        split_column: column of splits; ``split``, if there is one, if not given.

    Returns:
        N paths, N labels (all integers or all names) and, where there is such a column, N splits.

    Raises:
        LongtailError: a column is missing (the message lists those there are), or a label is a fraction, NaN or empty.
    """
    columns = _read_columns(path)
    image = _pick(columns, image_column, _IMAGE_COLUMNS, path, "image")
    label = _pick(columns, label_column, _LABEL_COLUMNS, path, "label")
    split = "split" if split_column is None and "split" in columns else split_column
    if split is not None:
        split = _pick(columns, split, (), path, "split")
    if any(not isinstance(value, str) for value in columns[image][:1]):
        raise LongtailError(
            f"{path}: column '{image}' holds no paths but {type(columns[image][0]).__name__}; Parquet files with "
            "images inside are read as a folder: --data FOLDER"
        )
    names = [str(value) for value in columns[image]]
    # a column of this name, as longtail split writes it, holds names even where they look like numbers
    labels = [
        str(value).strip() if label == "class_name" and value else _parse_label(value, row, path, label)
        for row, value in enumerate(columns[label], start=1)
    ]
    if not names:
        raise LongtailError(f"{path}: has no rows")
    if len({type(value) for value in labels}) > 1:
        raise LongtailError(f"{path}: column '{label}' mixes numbers and names; expected one of them")
    return names, labels, None if split is None else [str(value) for value in columns[split]]


def _read_columns(path: Path) -> Mapping[str, Sequence[Any]]:
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(rows, [])]
        if not any(header):
            raise LongtailError(f"{path}: is empty, expected a header with the names of the columns")
        repeated = next((name for name, count in collections.Counter(header).items() if name and count > 1), None)
        if repeated is not None:
            raise LongtailError(f"{path}: two columns are called '{repeated}'; rename one")
        table: dict[str, list[Any]] = {name: [] for name in header if name}
        for row in rows:
            if not any(row):
                continue
            if len(row) != len(header):
                raise LongtailError(f"{path}, line {rows.line_num}: expected {len(header)} columns, got {len(row)}")
            for name, value in zip(header, row, strict=True):
                if name:
                    table[name].append(value)
    except csv.Error as error:
        raise LongtailError(f"{path}, line {rows.line_num}: cannot be read as a table: {error}") from None
    return table


def _read_parquet(path: Path) -> Mapping[str, Sequence[Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise LongtailError(f"{path}: Parquet needs the extra hf: pip install 'longtail[hf]'") from None
    try:
        columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    except (OSError, ArrowInvalid) as error:
        raise LongtailError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None
    return columns


def _pick(columns: Mapping[str, object], wanted: str | None, usual: Sequence[str], path: Path, what: str) -> str:
    """Return the name of a column: the one asked for, else the first of the usual ones."""
    existing = ", ".join(columns)
    if wanted is not None:
        if wanted not in columns:
            raise LongtailError(f"{path}: has no column '{wanted}' (data.{what}_column); there are: {existing}")
        return wanted
    name = next((name for name in usual if name in columns), None)
    if name is None:
        raise LongtailError(
            f"{path}: which column holds the {what}? Name it with data.{what}_column; there are: {existing}"
        )
    return name


def _parse_label(value: Any, row: int, path: Path, column: str) -> int | str:
    if isinstance(value, str):
        text = value.strip()
        if text.isdecimal():
            return int(text)
        try:
            number = float(text) if text else math.nan
        except ValueError:
            return text
    elif isinstance(value, int) and value >= 0:
        return int(value)
    else:
        number = math.nan if value is None else float(value)
    shown = "nothing" if value is None or value == "" else repr(value)
    hint = "; use integers" if math.isfinite(number) else ""
    raise LongtailError(
        f"{path}, row {row}: column '{column}' holds {shown}, expected an integer or a class name{hint}"
    )
