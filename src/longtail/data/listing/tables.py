"""CSV, TSV and Parquet tables of image paths and labels, as people's programs write them."""

from __future__ import annotations

import collections
import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtail.data.image_io import is_image_name
from longtail.data.listing.types import split_of
from longtail.data.paths import nfc, printable
from longtail.errors import LongtailError

_IMAGE_COLUMNS = (
    *("path", "image", "file", "file_name", "filename", "image_path", "img_path", "file_path", "filepath"),
    *("imagepath", "image_file", "image_name", "img"),
)
_LABEL_COLUMNS = (
    *("class_name", "label", "class", "target", "category", "labels", "classname", "category_name", "label_name"),
    *("class_label", "class_id", "label_id", "category_id"),
)
_SPLIT_COLUMNS = ("split", "set", "subset", "partition", "phase", "data_split", "dataset_split", "usage")
_GROUP_COLUMNS = re.compile(
    r"(group|patient|subject|person|individual|animal|site|location|camera|session|sequence|video|burst)(_?(id|name))?"
)
_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "'|'"}
_ROWS_LOOKED_AT = 1000  # to guess what a column contains
_WHOLE = re.compile(r"(0|[1-9]\d*)([.,]0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d+([.,]\d*)?|[+-]?[.,]\d+|[+-]?inf(inity)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """The columns of a table that are used."""

    path: Path
    files: list[str]
    """(N,) paths of images."""
    labels: list[str]
    """(N,) as text; see :func:`parse_labels`."""
    label_column: str
    splits: list[str] | None
    """(N,) values of the column of splits, where there is one."""
    remarks: list[str]
    """What was guessed, and which columns are not used although they look as if they should be."""


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or with a byte-order mark in UTF-16; bytes that are no UTF-8 become
    surrogates, as in the names of files.

    Raises:
        LongtailError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LongtailError(f"{printable(path)}: cannot be read: {error.strerror}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    return content.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def from_latin1(text: str) -> str:
    """Return a text that :func:`read_text` took for UTF-8, read as Latin-1 (in Windows' superset, code page 1252)."""
    content = text.encode("utf-8", "surrogateescape")
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def is_undecoded(text: str) -> bool:
    """Return whether a text contains bytes that are not UTF-8."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)


def read_table(path: Path, image_column: str | None, label_column: str | None, split_column: str | None) -> Table:
    """Read a CSV, TSV or Parquet table of one row per image.

    The separator of a text table is found out. Columns are found by name without regard to case.

    Args:
        path: the table.
        image_column: column of paths; looked for under its usual names if not given.
        label_column: column of labels or class names; looked for under its usual names if not given.
        split_column: column of splits; looked for under its usual names if not given.

    Raises:
        LongtailError: a column is missing (the message lists those there are), or a path, label or split is empty.
    """
    remarks: list[str] = []
    columns = _read_columns(path, remarks)
    image = _pick(columns, image_column, _IMAGE_COLUMNS, path, "image")
    label = _pick(columns, label_column, _LABEL_COLUMNS, path, "label")
    if split_column is not None:
        split: str | None = _pick(columns, split_column, (), path, "split")
    else:
        usual = (name for wanted in _SPLIT_COLUMNS for name in columns if _key(name) == wanted)
        split = next((name for name in usual if _key(name) == "split" or _has_splits(columns[name])), None)
    remarks += _look_alikes(columns, {"image": image, "label": label, "split": split}, path)
    if any(not isinstance(value, str) for value in columns[image][:1]):
        raise LongtailError(
            f"{printable(path)}: column '{image}' holds no paths but {type(columns[image][0]).__name__}; Parquet files "
            "with images inside are read as a folder: --data FOLDER"
        )
    if not columns[image]:
        raise LongtailError(f"{printable(path)}: has no rows")
    files, labels = _texts(columns[image], path, image, "a path"), _texts(columns[label], path, label, "a label")
    splits = None if split is None else _texts(columns[split], path, split, "train, val or test")
    return Table(path, files, [nfc(text.strip()) for text in labels], label, splits, remarks)


def parse_labels(tables: Sequence[Table]) -> list[list[int] | list[str]]:
    """Return the labels of the tables of a set, all as whole numbers or all as names.

    They are numbers if each of them is a whole number as programs write it: ``7``, or ``7.0`` where a column had gaps.
    One other label, or a leading zero, makes all of them names. A column called ``class_name``, as ``longtail split``
    writes it, contains names.

    Raises:
        LongtailError: all are numbers, but one has a fraction, or is negative.
    """
    if all(_key(table.label_column) != "class_name" for table in tables):
        distinct = {text for table in tables for text in table.labels}
        numbers = {text: int(match[1]) for text in distinct if (match := _WHOLE.fullmatch(text)) is not None}
        if len(numbers) == len(distinct):
            return [[numbers[text] for text in table.labels] for table in tables]
        if all(text in numbers or (_NUMBER.fullmatch(text) and not re.match(r"[+-]?0\d", text)) for text in distinct):
            table, row, text = next(
                (table, row, text)
                for table in tables
                for row, text in enumerate(table.labels, start=1)
                if text not in numbers
            )
            raise LongtailError(
                f"{printable(table.path)}, row {row}: column '{table.label_column}' holds '{text}', expected a whole "
                "number of at least 0 or a class name; correct it, or remove the row"
            )
    return [table.labels for table in tables]


def _texts(values: Sequence[Any], path: Path, column: str, expected: str) -> list[str]:
    """Return the values of a column as text; a whole number is written as such, whatever its type."""
    texts = []
    for row, value in enumerate(values, start=1):
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        if isinstance(value, bool):
            value = int(value)
        text = str(int(value)) if isinstance(value, float) and not missing and value.is_integer() else str(value)
        if missing or not text.strip() or text.strip().casefold() == "nan":
            shown = "nothing" if missing or not text.strip() else f"'{text}'"
            raise LongtailError(
                f"{printable(path)}, row {row}: column '{column}' holds {shown}, expected {expected}; add it, or "
                "remove the row"
            )
        texts.append(text)
    return texts


def _read_columns(path: Path, remarks: list[str]) -> Mapping[str, Sequence[Any]]:
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    text = read_text(path)
    declared = re.match(r"sep=(.)\r?\n", text, re.IGNORECASE)  # as Excel writes it
    if declared is not None:
        text, delimiter = text[declared.end() :], declared[1]
    else:
        delimiter = _find_separator(text, path, remarks)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(rows, [])]
        header = [from_latin1(name) if is_undecoded(name) else name for name in header]
        if not any(header):
            raise LongtailError(f"{printable(path)}: is empty, expected a header with the names of the columns")
        repeated = next((name for name, count in collections.Counter(header).items() if name and count > 1), None)
        if repeated is not None:
            raise LongtailError(f"{printable(path)}: two columns are called '{repeated}'; rename one")
        table: dict[str, list[Any]] = {name: [] for name in header if name}
        for row in rows:
            if not any(row):
                continue
            if len(row) != len(header):
                raise LongtailError(
                    f"{printable(path)}, line {rows.line_num}: expected {len(header)} columns, got {len(row)}"
                )
            for name, value in zip(header, row, strict=True):
                if name:
                    table[name].append(value)
    except csv.Error as error:
        raise LongtailError(f"{printable(path)}, line {rows.line_num}: cannot be read as a table: {error}") from None
    return table


def _find_separator(text: str, path: Path, remarks: list[str]) -> str:
    """Return the character between the columns: the one that the suffix promises, unless only others divide the rows
    evenly.
    """
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    widths = {separator: _width(text, separator) for separator in _SEPARATORS}
    if widths[usual] > 1:
        return usual
    others = [separator for separator, width in widths.items() if width > 1]
    if not others:
        return usual
    chosen = max(others, key=lambda separator: widths[separator])
    guess = "" if len(others) == 1 else " (a guess)"
    remarks.append(f"{printable(path)}: {_SEPARATORS[chosen]} separates its columns{guess}")
    return chosen


def _width(text: str, separator: str) -> int:
    """Return the number of columns if the first rows all have as many; else 0."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    widths = set()
    try:
        for row, _ in zip(reader, range(20), strict=False):
            if any(row):
                widths.add(len(row))
    except csv.Error:
        return 0
    return widths.pop() if len(widths) == 1 else 0


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


def _key(column: str) -> str:
    """Return how the name of a column is compared: in one case, with one character between words."""
    return re.sub(r"[\s\-.]+", "_", nfc(column).strip().casefold())


def _pick(columns: Mapping[str, object], wanted: str | None, usual: Sequence[str], path: Path, what: str) -> str:
    """Return the name of a column: the one asked for, else the first of the usual ones."""
    existing = printable(", ".join(columns))
    if wanted is not None:
        if wanted in columns:
            return wanted
        name = next((name for name in columns if _key(name) == _key(wanted)), None)
        if name is None:
            raise LongtailError(
                f"{printable(path)}: has no column '{wanted}' (data.{what}_column); there are: {existing}"
            )
        return name
    name = next((name for key in usual for name in columns if _key(name) == key), None)
    if name is None:
        raise LongtailError(
            f"{printable(path)}: which column holds the {what}? Name it with data.{what}_column; there are: {existing}"
        )
    return name


def _has_splits(values: Sequence[Any]) -> bool:
    """Return whether a column contains names of splits only, training images among them."""
    splits = {split_of(str(value)) for value in values[:_ROWS_LOOKED_AT]}
    return None not in splits and len(splits) > 1


def _look_alikes(columns: Mapping[str, Sequence[Any]], used: Mapping[str, str | None], path: Path) -> list[str]:
    """Return a remark on every column that is not used, but looks like one that should be."""
    remarks = []
    for name, values in columns.items():
        if name in used.values():
            continue
        key, hint = _key(name), ""
        if key in _SPLIT_COLUMNS or key in {"is_train", "is_test", "is_val", "fold"} or _has_splits(values):
            hint = "looks like a split; --data.split_column names it"
        elif key in _LABEL_COLUMNS:
            hint = f"labels are read from '{used['label']}'; --data.label_column names another column"
        elif key in _IMAGE_COLUMNS or _has_paths(values):
            hint = f"paths are read from '{used['image']}'; --data.image_column names another column"
        elif _GROUP_COLUMNS.fullmatch(key):
            hint = "images of one group may be in several splits"
        if hint:
            remarks.append(f"{printable(path)}: column '{printable(name)}' is not used: {hint}")
    return remarks


def _has_paths(values: Sequence[Any]) -> bool:
    sample = values[:20]
    return bool(sample) and all(isinstance(value, str) and is_image_name(value) for value in sample)
