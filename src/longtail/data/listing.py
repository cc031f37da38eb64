"""Image files and their labels, before any is opened: lists, tables, annotations and folders all become a Listing.

One function reads a format; :func:`check` then looks at what all of them can get wrong.
"""

from __future__ import annotations

import array
import collections
import csv
import io
import json
import math
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtail.data.pictures import SUFFIXES
from longtail.errors import LongtailError, nearest

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Entries:
    """One split: N files with their labels."""

    names: list[str]
    """Paths below the root."""
    labels: Tensor
    """(N,) int64."""

    def __len__(self) -> int:
        return len(self.names)

    def at(self, positions: Tensor) -> Entries:
        """Return the entries at ``positions``."""
        return Entries([self.names[position] for position in positions.tolist()], self.labels[positions])


@dataclass
class Listing:
    """Every image file of a set by split, and what is wrong with them."""

    root: Path
    splits: dict[str, Entries]
    class_names: list[str]
    errors: list[str] = field(default_factory=list)
    """What keeps it from being trained on; each names the file, class or field."""
    remarks: list[str] = field(default_factory=list)
    """What a user should know."""


def read_list(path: Path) -> tuple[list[str], list[int]]:
    """Read a list file: ``path label`` a line, the label an integer from 0.

    Raises:
        LongtailError: it cannot be read, is empty, or a line is not as above; the line is named.
    """
    names: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        name, _, label = line.rstrip("\r").rpartition(" ")
        if not name:
            if not line.strip():
                continue
            name, _, label = line.strip().rpartition("\t")
        if not name or not label.isdecimal():
            raise LongtailError(f"{path}, line {number}: expected 'path label' with a label from 0, got '{line[:80]}'")
        names.append(name.strip())
        labels.append(int(label))
    if not names:
        raise LongtailError(f"{path}: lists no images")
    return names, labels


def read_annotations(path: Path, known: list[int] | None = None) -> tuple[list[str], list[int], list[str], list[int]]:
    """Read a JSON file in iNaturalist's layout; returns paths, labels, class names and category ids, in their order.

    Args:
        path: the file.
        known: category ids of the training classes, by which another split's labels are numbered.

    Raises:
        LongtailError: it is not JSON, or lacks images, annotations or categories.
    """
    try:
        content = json.loads(_text(path))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        categories = sorted((entry["id"], str(entry["name"])) for entry in content["categories"])
        order = [identity for identity, _ in categories] if known is None else known
        index = {identity: position for position, identity in enumerate(order)}
        unknown = next((a["category_id"] for a in content["annotations"] if a["category_id"] not in index), None)
        if unknown is not None:
            raise LongtailError(f"{path}: category {unknown} is not among the training classes")
        pairs = [(files[entry["image_id"]], index[entry["category_id"]]) for entry in content["annotations"]]
    except json.JSONDecodeError as error:
        raise LongtailError(f"{path}: is not JSON: {error}") from None
    except (KeyError, TypeError) as error:
        raise LongtailError(
            f"{path}: expected images (id, file_name), annotations (image_id, category_id) and categories (id, name); "
            f"{error} is missing or not as there"
        ) from None
    if not pairs:
        raise LongtailError(f"{path}: lists no images")
    names = [name for _, name in categories]
    if len(set(names)) < len(names):  # iNaturalist 2018 was published with numbers for names, and without
        names = [f"{name} ({identity})" for identity, name in categories]
    return [name for name, _ in pairs], [label for _, label in pairs], names, order


def read_table(
    path: Path, image_column: str | None, label_column: str | None, split_column: str | None
) -> tuple[list[str], list[Any], list[str] | None]:
    """Read a CSV, TSV or Parquet table; returns paths, labels (integers or names) and, where there is one, splits.

    A column that is not named is looked for under its usual names.

    Raises:
        LongtailError: a column is missing (those there are, are named), or a label is a fraction, NaN or empty.
    """
    columns = _columns(path)
    image = _pick(
        columns, image_column, ("path", "image", "file", "file_name", "filename", "image_path"), path, "image"
    )
    label = _pick(columns, label_column, ("class_name", "label", "class", "target", "category"), path, "label")
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
        str(value).strip() if label == "class_name" and value else _label(value, row, path, label)
        for row, value in enumerate(columns[label], start=1)
    ]
    if not names:
        raise LongtailError(f"{path}: has no rows")
    if len({type(value) for value in labels}) > 1:
        raise LongtailError(f"{path}: column '{label}' mixes numbers and names; expected one of them")
    return names, labels, None if split is None else [str(value) for value in columns[split]]


def _columns(path: Path) -> Mapping[str, Sequence[Any]]:
    if path.suffix.lower() == ".parquet":
        try:
            from pyarrow import ArrowInvalid, parquet
        except ImportError:
            raise LongtailError(f"{path}: Parquet needs the extra hf: pip install 'longtail[hf]'") from None
        try:
            columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
        except (OSError, ArrowInvalid) as error:
            raise LongtailError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None
        return columns
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(rows, [])]
        if not any(header):
            raise LongtailError(f"{path}: is empty, expected a header with the names of the columns")
        twice = next((name for name, count in collections.Counter(header).items() if name and count > 1), None)
        if twice is not None:
            raise LongtailError(f"{path}: two columns are called '{twice}'; rename one")
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


def _pick(
    columns: Mapping[str, object],
    wanted: str | None,
    usual: Sequence[str],
    path: Path,
    what: str,
) -> str:
    there = ", ".join(columns)
    if wanted is not None:
        if wanted not in columns:
            raise LongtailError(f"{path}: has no column '{wanted}' (data.{what}_column); there are: {there}")
        return wanted
    found = next((name for name in usual if name in columns), None)
    if found is None:
        raise LongtailError(
            f"{path}: which column holds the {what}? Name it with data.{what}_column; there are: {there}"
        )
    return found


def _label(value: Any, row: int, path: Path, column: str) -> int | str:
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
    hint = "; integers, please" if math.isfinite(number) else ""
    raise LongtailError(
        f"{path}, row {row}: column '{column}' holds {shown}, expected an integer or a class name{hint}"
    )


def numbered(labels: Sequence[int | str], names: list[str] | None = None) -> tuple[Tensor, list[str]]:
    """Return labels as numbers, and the class names: given ones, or those in the labels in order of name."""
    if labels and isinstance(labels[0], str):
        names = sorted({str(label) for label in labels}) if names is None else names
        index = {name: position for position, name in enumerate(names)}
        unknown = next((label for label in labels if label not in index), None)
        if unknown is not None:
            raise LongtailError(f"class '{unknown}' is not among the training classes{nearest(str(unknown), names)}")
        return torch.tensor([index[str(label)] for label in labels], dtype=torch.int64), names
    return torch.frombuffer(array.array("q", [int(label) for label in labels]), dtype=torch.int64).clone(), names or []


def names_by_folder(entries: Entries, classes: int) -> list[str]:
    """Name every class by the folder that all of its images lie in, or all by their numbers where one has no such.

    Folders of one name are told apart by what they lie in: ``gate/outdoor`` and ``market/outdoor``.
    """
    folders: list[str | None] = [None] * classes
    for folder, label in set(
        zip((name.rpartition("/")[0] for name in entries.names), entries.labels.tolist(), strict=True)
    ):
        if folders[label] not in {None, folder}:
            return [str(index) for index in range(classes)]
        folders[label] = folder
    parts = [(folder or "").split("/") for folder in folders]
    named = [path[-1] for path in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        twice = {name for name, count in collections.Counter(named).items() if count > 1}
        named = ["/".join(path[-depth:]) if name in twice else name for path, name in zip(parts, named, strict=True)]
    if "" in named or len(set(named)) < classes:
        return [str(index) for index in range(classes)]
    return named


def read_folder(root: Path) -> Listing:
    """Read a tree with one sub-folder a class, below ``train``, ``val`` and ``test`` or without them."""
    errors: list[str] = []
    if not any(_is(entry, "dir") for entry in (_entries(root / "train") if (root / "train").is_dir() else ())):
        # no splits; a class may be called train
        found = _class_files(root, errors)
        names = list(found)
        return Listing(root, {"all": _of_classes(found, names, "")}, names, errors)
    train = _class_files(root / "train", errors)
    names = list(train)
    listing = Listing(root, {"train": _of_classes(train, names, "train/")}, names, errors)
    there = {split: name for name, split in _FOLDERS.items() if (root / name).is_dir()}
    for split, name in there.items():
        found = _class_files(root / name, errors)
        for unseen in sorted(set(found) - set(names)):
            errors.append(
                f"{root / name / unseen}: the class '{unseen}' is not among the training classes"
                f"{nearest(unseen, names)}"
            )
        listing.splits[split] = _of_classes(found, names, f"{name}/")
    if "test" not in there and "val" in there:
        # a folder with nothing but val/ beside train/ is judged on it, so it cannot pick the epoch too
        listing.splits["test"] = listing.splits.pop("val")
    return listing


_FOLDERS = {"validation": "val", "valid": "val", "val": "val", "test": "test"}


def _of_classes(found: Mapping[str, Sequence[str]], names: Sequence[str], prefix: str) -> Entries:
    files = [f"{prefix}{name}/{file}" for name in names for file in found.get(name, [])]
    labels = [index for index, name in enumerate(names) for _ in found.get(name, [])]
    return Entries(files, torch.tensor(labels, dtype=torch.int64))


def _class_files(root: Path, errors: list[str]) -> dict[str, list[str]]:
    """Return the names of every class's images, classes and files in order of name."""
    entries = sorted(_entries(root), key=lambda entry: entry.name)
    classes = [entry.name for entry in entries if _is(entry, "dir")]
    if not classes:
        loose = sum(1 for entry in entries if _ending(entry.name) in SUFFIXES)
        found = f"{loose} images without one" if loose else "no images"
        raise LongtailError(f"{root}: expected a sub-folder with images for each class, found {found}")
    files_of = {}
    for name in classes:
        folder = root / name
        files = []
        for entry in sorted(_entries(folder), key=lambda entry: entry.name):
            if not _is(entry, "file"):
                if not _is(entry, "dir"):
                    errors.append(f"{folder / entry.name}: is a link that leads nowhere, or in a circle; remove it")
            elif _ending(entry.name) not in SUFFIXES:
                errors.append(f"{folder / entry.name}: is not an image by its name; remove it from the class '{name}'")
            else:
                files.append(entry.name)
        if not files and not errors:
            errors.append(f"{folder}: the class '{name}' has no images; add some or remove the folder")
        files_of[name] = files
    return files_of


def _ending(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


def _is(entry: os.DirEntry[str], kind: str) -> bool:
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:  # a link in a circle
        return False


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a folder but hidden files and what desktops leave behind."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith(".") and entry.name != "Thumbs.db")
    except OSError as error:
        raise LongtailError(f"{folder}: cannot be read: {error.strerror}") from None


def check(listing: Listing) -> None:
    """Add to a listing's errors and remarks: missing files, gaps in the labels, names and files that come twice."""
    _check_names(listing.class_names, listing.errors)
    classes = len(listing.class_names)
    trained = listing.splits.get("train", listing.splits.get("all"))
    assert trained is not None
    counts = torch.bincount(trained.labels, minlength=classes)
    for split, entries in listing.splits.items():
        beyond = sorted(set(entries.labels[entries.labels >= classes].tolist()))
        if beyond:
            listing.errors.append(
                f"{split}: label {beyond[0]} is not among the {classes} training classes, 0 to {classes - 1}"
            )
    empty = torch.nonzero(counts[:classes] == 0).flatten().tolist()
    if empty:
        shown = ", ".join(str(label) for label in empty[:5]) + ("…" if len(empty) > 5 else "")
        listing.errors.append(
            f"train: {len(empty)} of {classes} labels have no training image ({shown}): number the classes without gaps"
        )
    _check_files(listing)
    _check_twice(listing)


def _check_names(names: Sequence[str], errors: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        plain = " ".join(name.casefold().split())
        if plain in seen:
            errors.append(
                f"the classes '{seen[plain]}' and '{name}' differ only in case or blanks: make them one, or rename one"
            )
        seen.setdefault(plain, name)


def _check_files(listing: Listing) -> None:
    """Look for every file, a folder at a time: asking a disk for each of a million files would take minutes."""
    folders: dict[str, set[str] | None] = {}
    for split, entries in listing.splits.items():
        missing = []
        for name in entries.names:
            folder, _, file = name.rpartition("/")
            if folder not in folders:
                try:
                    with os.scandir(listing.root / folder) as found:
                        folders[folder] = {entry.name for entry in found}
                except OSError:
                    folders[folder] = None
            there = folders[folder]
            if there is None or file not in there:
                missing.append(name)
        if missing:
            shown = ", ".join(missing[:3]) + ("…" if len(missing) > 3 else "")
            listing.errors.append(
                f"{split}: {len(missing):,} of {len(entries):,} files are missing below {listing.root} ({shown}): "
                f"{_first_failure(listing.root, missing[0])}"
            )


def _first_failure(root: Path, name: str) -> str:
    """Return which part of a path is not there, and what is in its place."""
    place = root
    for part in Path(name).parts:
        if not (place / part).exists():
            try:
                beside = sorted(entry.name for entry in os.scandir(place))[:100_000]
            except OSError:
                beside = []
            close = nearest(part, beside) if len(beside) <= 10_000 else ""
            return f"{place} has no '{part}'{close}"
        place = place / part
    return f"{place} cannot be read"


def _check_twice(listing: Listing) -> None:
    """Keep one entry of a file that a split lists twice; one under two labels, or in two splits, is an error."""
    owner: dict[str, tuple[str, int]] = {}
    across: dict[tuple[str, str], list[str]] = {}
    for split, entries in listing.splits.items():
        once = []
        for position, (name, label) in enumerate(zip(entries.names, entries.labels.tolist(), strict=True)):
            if name not in owner:
                owner[name] = (split, label)
                once.append(position)
            elif owner[name][0] != split:
                across.setdefault((owner[name][0], split), []).append(name)
                once.append(position)
            elif owner[name][1] != label:
                listing.errors.append(f"{split}: {name} is listed under the labels {owner[name][1]} and {label}")
        if len(once) < len(entries):
            twice = len(entries) - len(once)
            listing.remarks.append(f"{split}: {twice:,} entries name a file that is listed already, and are left out")
            listing.splits[split] = entries.at(torch.tensor(once, dtype=torch.int64))
    for (first, second), names in across.items():
        files = "file is" if len(names) == 1 else "files are"
        example = f"{names[0]}{'…' if len(names) > 1 else ''}"
        listing.errors.append(
            f"{len(names):,} {files} listed in {first} and again in {second} ({example}): "
            "what is tested must not be trained on"
        )


def _text(path: Path) -> str:
    try:
        # a file name need not be UTF-8
        return path.read_text(encoding="utf-8", errors="surrogateescape").removeprefix("\ufeff")
    except OSError as error:
        raise LongtailError(f"{path}: cannot be read: {error.strerror}") from None


def listed(
    sources: Mapping[str, Path],
    root: Path,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
) -> Listing:
    """Read a list, a table or annotations for every split given; the format follows from the file's ending.

    Args:
        sources: files by split; one table with a column of splits may stand for all.
        root: folder below which the images lie.
        image_column: see :func:`read_table`.
        label_column: see :func:`read_table`.
        split_column: see :func:`read_table`.
    """
    raw: dict[str, tuple[list[str], list[Any]]] = {}
    names: list[str] | None = None
    categories: list[int] | None = None
    for split in sorted(sources, key=lambda split: split != "train"):
        path = sources[split]
        if path.suffix.lower() in {".csv", ".tsv", ".parquet"}:
            files, labels, splits = read_table(path, image_column, label_column, split_column)
            if splits is None:
                raw[split] = (files, labels)
                continue
            for part in dict.fromkeys(splits):
                name = {"train": "train", "test": "test"}.get(part, _FOLDERS.get(part, ""))
                if not name:
                    raise LongtailError(f"{path}: split '{part}' is not known: expected train, val or test")
                chosen = [index for index, value in enumerate(splits) if value == part]
                raw[name] = ([files[index] for index in chosen], [labels[index] for index in chosen])
        elif path.suffix.lower() == ".json":
            files, labels, found, order = read_annotations(path, categories)
            if categories is None:
                names, categories = found, order
            raw[split] = (files, labels)
        else:
            raw[split] = read_list(path)
    if "train" not in raw:
        raise LongtailError(f"{', '.join(map(str, sources.values()))}: there is no training split")
    kinds = {
        split: "names" if labels and isinstance(labels[0], str) else "numbers" for split, (_, labels) in raw.items()
    }
    for split, kind in kinds.items():
        if kind != kinds["train"]:
            raise LongtailError(f"{split}: its labels are {kind}, those of train are {kinds['train']}; use one of them")
    splits_of: dict[str, Entries] = {}
    for split in sorted(raw, key=lambda split: split != "train"):
        files, labels = raw[split]
        numbers, names_found = numbered(labels, names if kinds["train"] == "names" else None)
        if kinds["train"] == "names":
            names = names_found
        splits_of[split] = Entries([_plain(file) for file in files], numbers)
    if names is None:
        classes = int(splits_of["train"].labels.max()) + 1
        names = names_by_folder(splits_of["train"], classes)
    if set(splits_of) == {"train"}:
        splits_of = {"all": splits_of["train"]}
    return Listing(root, {split: splits_of[split] for split in ("all", *SPLITS) if split in splits_of}, names)


def _plain(path: str) -> str:
    """Return a path in the one way of writing it, so that a file that is listed twice is seen to be."""
    return posixpath.normpath(path) if "//" in path or "./" in path else path


def in_other_style(listing: Listing, styles: Sequence[Callable[[str], str]]) -> Listing:
    """Return the listing with its names in the style, of several in circulation, in which its files are found."""
    first = {split: entries.names[:20] for split, entries in listing.splits.items()}
    for style in styles:
        found = [(listing.root / style(name)).exists() for names in first.values() for name in names]
        if any(found):
            for split, entries in listing.splits.items():
                listing.splits[split] = Entries([style(name) for name in entries.names], entries.labels)
            break
    return listing
