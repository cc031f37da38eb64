"""CSV, TSV and Parquet tables of image paths and labels, as people's programs write them."""

from __future__ import annotations

import collections
import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longtail.data.image_io import is_image_name
from longtail.data.listing.types import SPLIT_ALIASES, split_of
from longtail.data.paths import nfc, printable
from longtail.data.text import from_latin1, is_undecoded, read_text
from longtail.errors import LongtailError

IMAGE_COLUMNS = (
    *("path", "image", "file", "file_name", "filename", "image_path", "img_path", "file_path", "filepath"),
    *("imagepath", "image_file", "image_name", "img"),
)
LABEL_COLUMNS = (
    *("class_name", "label", "class", "target", "category", "labels", "classname", "category_name", "label_name"),
    *("class_label", "class_id", "label_id", "category_id", "species", "scientific_name", "scientificname"),
)
"""Usual names of columns, as :func:`pick_column` compares them; the first that a table has is used."""
_SPLIT_COLUMNS = ("split", "set", "subset", "partition", "phase", "data_split", "dataset_split", "usage")
_GROUP_COLUMNS = re.compile(
    r"(group|patient|subject|person|individual|animal|site|location|camera|session|sequence|video|burst)(_?(id|name))?"
)
_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "'|'"}
_ROWS_LOOKED_AT = 1000  # to guess what a column contains
MOST_DIGITS = 100
"""Of a label, which may be an id; Python reads no number of thousands of digits."""
_WHOLE = re.compile(rf"(0|[1-9]\d{{,{MOST_DIGITS - 1}}})(\.0*|,0{{0,2}})?", re.ASCII)  # 1,000 is a thousand
_NUMBER = re.compile(r"[+-]?\d+([.,]\d*)?|[+-]?[.,]\d+|[+-]?inf(inity)?", re.ASCII | re.IGNORECASE)


UNLABELLED = "images without labels cannot be tested on: move them out, and use longtail predict RUN FOLDER"
"""What to do about test images that a competition publishes without labels."""


class LabelColumn(NamedTuple):
    """A column of labels."""

    where: str
    """The table, for messages."""
    name: str
    texts: Sequence[str]
    """(N,) labels as text."""
    lines: Sequence[int] | None = None
    """(N,) line of each row, see :func:`row_name`."""


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
    split_column: str | None = None
    lines: Sequence[int] | None = None
    """(N,) line of each row, see :func:`row_name`."""

    @property
    def label_texts(self) -> LabelColumn:
        """The labels with their place."""
        return LabelColumn(printable(self.path), self.label_column, self.labels, self.lines)


def read_table(
    path: Path,
    image_column: str | None,
    label_column: str | None,
    split_column: str | None,
    split_name: str = "train",
) -> Table:
    """Read a CSV, TSV or Parquet table of one row per image.

    The separator of a text table is found out. Columns are found by name without regard to case.

    Args:
        path: the table.
        image_column: column of paths; looked for under its usual names if not given.
        label_column: column of labels or class names; looked for under its usual names if not given.
        split_column: column of splits; looked for under its usual names if not given.
        split_name: of what the table is, where it has no such column.

    Raises:
        LongtailError: a column is missing (the message lists those there are), or a path, label or split is empty.
    """
    remarks: list[str] = []
    columns, lines = read_columns(path, remarks)
    where = printable(path)
    image = pick_column(columns, image_column, IMAGE_COLUMNS, where, "image")
    label = pick_column(columns, label_column, LABEL_COLUMNS, where, "label")
    split = pick_split_column(columns, split_column, where)
    remarks += unused_columns(columns, {"image": image, "label": label, "split": split}, where)
    if any(not isinstance(value, str) for value in columns[image][:1]):
        raise LongtailError(
            f"{printable(path)}: column '{image}' holds no paths but {type(columns[image][0]).__name__}; Parquet files "
            "with images inside are read as a folder: --data FOLDER"
        )
    if not columns[image]:
        raise LongtailError(f"{printable(path)}: has no rows")
    files = column_texts(columns[image], where, image, "a path", lines)
    splits = None if split is None else column_texts(columns[split], where, split, "train, val or test", lines)
    try:
        labels = column_texts(columns[label], where, label, "a label", lines)
    except LongtailError as error:
        names = [split_name] * len(files) if splits is None else [split_of(value) for value in splits]
        tested = [_is_missing(value) for value, name in zip(columns[label], names, strict=True) if name == "test"]
        if tested and all(tested):
            raise LongtailError(f"{error}; {UNLABELLED}") from None
        raise
    return Table(path, files, [nfc(text.strip()) for text in labels], label, splits, remarks, split, lines)


def parse_labels(columns: Sequence[LabelColumn]) -> list[list[int] | list[str]]:
    """Return the labels of the columns of a set, all as whole numbers or all as names.

    They are numbers if each of them is a whole number as programs write it: ``7``, or ``7.0`` where a column had gaps.
    One other label, or a leading zero, makes all of them names. A column called ``class_name``, as ``longtail split``
    writes it, contains names.

    Raises:
        LongtailError: all are numbers, but one has a fraction, or is negative.
    """
    if all(_key(column.name) != "class_name" for column in columns):
        distinct = {text for column in columns for text in column.texts}
        numbers = {text: int(match[1]) for text in distinct if (match := _WHOLE.fullmatch(text)) is not None}
        if len(numbers) == len(distinct):
            return [[numbers[text] for text in column.texts] for column in columns]
        if all(text in numbers or (_NUMBER.fullmatch(text) and not re.match(r"[+-]?0\d", text)) for text in distinct):
            column, index, text = next(
                (column, index, text)
                for column in columns
                for index, text in enumerate(column.texts)
                if text not in numbers
            )
            raise LongtailError(
                f"{column.where}, {row_name(index, column.lines)}: column '{column.name}' holds '{text:.80}', expected "
                "a whole number of at least 0 or a class name; correct it, or remove the row"
            )
    return [list(column.texts) for column in columns]


def row_name(index: int, lines: Sequence[int] | None) -> str:
    """Return how a message names a row of a table: by its line in the file, as an editor shows it, where it has one.

    >>> row_name(0, [2, 4]), row_name(0, None)
    ('line 2', 'row 1')

    Args:
        index: of the row, from 0.
        lines: (N,) line of each row, from 1; None for a table that is no text.
    """
    return f"row {index + 1}" if lines is None else f"line {lines[index]}"


def parse_splits(values: Sequence[str], where: str, lines: Sequence[int] | None = None) -> list[str]:
    """Return which of train, val and test each value of a column of splits stands for.

    Args:
        values: (N,) values.
        where: the table, for messages.
        lines: (N,) see :func:`row_name`.

    Raises:
        LongtailError: none of them; the message names the row.
    """
    splits = {value: split_of(value) for value in values}
    parsed = []
    for index, value in enumerate(values):
        split = splits[value]
        if split is None:
            known = ", ".join(name for aliases in SPLIT_ALIASES.values() for name in aliases)
            raise LongtailError(
                f"{where}, {row_name(index, lines)}: split '{printable(value)}' is not known: expected train, val or "
                f"test (in any case; understood are {known})"
            )
        parsed.append(split)
    return parsed


def column_texts(
    values: Sequence[Any], where: str, column: str, expected: str, lines: Sequence[int] | None = None
) -> list[str]:
    """Return the values of a column as text; a whole number is written as such, whatever its type.

    Args:
        values: (N,) values.
        where: the table, for messages.
        column: its name.
        expected: what it holds, for messages.
        lines: (N,) see :func:`row_name`.

    Raises:
        LongtailError: a value is missing.
    """
    texts = []
    for index, value in enumerate(values):
        missing = _is_missing(value)
        if isinstance(value, bool):
            value = int(value)
        text = str(int(value)) if isinstance(value, float) and not missing and value.is_integer() else str(value)
        # what longtail split writes are names, and one may be nan
        is_nan = text.strip().casefold() == "nan" and _key(column) != "class_name"
        if missing or is_nan:
            shown = "nothing" if missing else f"'{text}'"
            raise LongtailError(
                f"{where}, {row_name(index, lines)}: column '{column}' holds {shown}, expected {expected}; add "
                "it, or remove the row"
            )
        texts.append(text)
    return texts


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def read_columns(path: Path, remarks: list[str]) -> tuple[Mapping[str, Sequence[Any]], list[int] | None]:
    """Return the values of a table by column, and the line of each row, None for a table that is no text.

    What was guessed is added to ``remarks``.

    Raises:
        LongtailError: it cannot be read, is empty, or its rows differ in length.
    """
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path), None
    text = read_text(path)
    declared = re.match(r"sep=(.)\r?\n", text, re.IGNORECASE)  # as Excel writes it
    if declared is not None:
        text, delimiter, above = text[declared.end() :], declared[1], 1
    else:
        delimiter, above = _find_separator(text, path, remarks), 0
    # strict: a quotation mark that is never closed would make one value of all the rows after it
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = above + 1  # line where the row that is read begins
    try:
        header = [name.strip() for name in next(rows, [])]
        header = [from_latin1(name) if is_undecoded(name) else name for name in header]
        if not any(header):
            raise LongtailError(f"{printable(path)}: is empty, expected a header with the names of the columns")
        repeated = next((name for name, count in collections.Counter(header).items() if name and count > 1), None)
        if repeated is not None:
            raise LongtailError(f"{printable(path)}: two columns are called '{repeated}'; rename one")
        table: dict[str, list[Any]] = {name: [] for name in header if name}
        lines: list[int] = []
        start = above + rows.line_num + 1
        for row in rows:
            line, start = start, above + rows.line_num + 1
            if not any(row):
                continue
            if len(row) != len(header):
                raise LongtailError(f"{printable(path)}, line {line}: expected {len(header)} columns, got {len(row)}")
            lines.append(line)
            for name, value in zip(header, row, strict=True):
                if name:
                    table[name].append(value)
    except csv.Error as error:
        raise LongtailError(
            f"{printable(path)}, line {start}: cannot be read as a table: {error}; a quotation mark within a value is "
            "doubled, and the value quoted"
        ) from None
    return table, lines


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


def pick_column(columns: Iterable[str], wanted: str | None, usual: Sequence[str], where: str, what: str) -> str:
    """Return the name of a column, found without regard to case and to what separates its words.

    Args:
        columns: the names that there are.
        wanted: the one asked for by ``data.<what>_column``, if any.
        usual: otherwise, the names to look for, in this order.
        where: the table, for messages.
        what: image, label or split.

    Raises:
        LongtailError: there is no such column; the message lists those there are.
    """
    columns = list(columns)
    existing = printable(", ".join(columns))
    if wanted is not None:
        if wanted in columns:
            return wanted
        name = next((name for name in columns if _key(name) == _key(wanted)), None)
        if name is None:
            raise LongtailError(f"{where}: has no column '{wanted}' (data.{what}_column); there are: {existing}")
        return name
    name = next((name for key in usual for name in columns if _key(name) == key), None)
    if name is None:
        raise LongtailError(
            f"{where}: which column holds the {what}? Name it with --data.{what}_column NAME; there are: {existing}"
        )
    return name


def pick_split_column(columns: Mapping[str, Sequence[Any]], wanted: str | None, where: str) -> str | None:
    """Return the name of the column of splits: the one asked for, else a usual one; None if there is none.

    Args:
        columns: values by column, the first thousand at least.
        wanted: the one asked for by ``data.split_column``, if any.
        where: the table, for messages.

    Raises:
        LongtailError: there is no column ``wanted``.
    """
    if wanted is not None:
        return pick_column(columns, wanted, (), where, "split")
    usual = (name for key in _SPLIT_COLUMNS for name in columns if _key(name) == key)
    return next((name for name in usual if _key(name) == "split" or _has_splits(columns[name])), None)


def _has_splits(values: Sequence[Any]) -> bool:
    """Return whether a column contains names of splits only, training images among them."""
    splits = {split_of(str(value)) for value in values[:_ROWS_LOOKED_AT]}
    return None not in splits and len(splits) > 1


def unused_columns(columns: Mapping[str, Sequence[Any]], used: Mapping[str, str | None], where: str) -> list[str]:
    """Return a remark on every column that is not used, but looks like one that should be.

    Args:
        columns: values by column, the first thousand at least.
        used: the columns that are used for ``label``, ``split`` and, where images are files, ``image``.
        where: the table, for messages.
    """
    remarks = []
    for name, values in columns.items():
        if name in used.values():
            continue
        key, hint = _key(name), ""
        if key in _SPLIT_COLUMNS or key in {"is_train", "is_test", "is_val", "fold"} or _has_splits(values):
            hint = "looks like a split; --data.split_column names it"
        elif key in LABEL_COLUMNS:
            hint = f"labels are read from '{used['label']}'; --data.label_column names another column"
        elif "image" in used and (key in IMAGE_COLUMNS or _has_paths(values)):
            hint = f"paths are read from '{used['image']}'; --data.image_column names another column"
        elif _GROUP_COLUMNS.fullmatch(key):
            hint = _group_hint(name, values, None if used["split"] is None else columns[used["split"]])
        if hint:
            remarks.append(f"{where}: column '{printable(name)}' is not used: {hint}")
    return remarks


def _group_hint(name: str, groups: Sequence[Any], splits: Sequence[Any] | None) -> str:
    """Return what to know about a column of groups; nothing if each is in one split."""
    if splits is None:
        keep = f"longtail split --groups '{printable(name)}' keeps them together"
        return f"images of one group may be in several splits; {keep}"
    pairs = {(group, split) for group, split in zip(groups, splits, strict=True) if group not in {None, ""}}
    divided = sum(count > 1 for count in collections.Counter(group for group, _ in pairs).values())
    return f"groups in several splits: {divided:,}" if divided else ""


def _has_paths(values: Sequence[Any]) -> bool:
    sample = values[:20]
    return bool(sample) and all(isinstance(value, str) and is_image_name(value) for value in sample)
