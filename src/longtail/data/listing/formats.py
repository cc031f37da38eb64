"""Lists, annotations and tables of image files, a file for each split or one for all."""

from __future__ import annotations

import array
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from longtail.data.listing.folders import names_by_folder
from longtail.data.listing.tables import (
    MOST_DIGITS,
    Table,
    parse_labels,
    parse_splits,
    read_table,
)
from longtail.data.listing.types import SPLITS, Entries, Listing
from longtail.data.paths import Folders, nfc, printable, shortest_paths
from longtail.data.text import from_latin1, is_undecoded, read_text
from longtail.errors import LongtailError, did_you_mean

Label = TypeVar("Label", int, str)


def read_list(path: Path) -> tuple[list[str], list[int]]:
    """Read a list file of lines ``path label``, the label an integer from 0; returns paths and labels.

    Raises:
        LongtailError: it cannot be read, is empty, or a line is not as above; the message names the line.
    """
    names: list[str] = []
    labels: list[int] = []
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        line = text.strip()
        if not line:
            continue
        name, _, label = line.rpartition("\t")  # blanks before it are of the path
        if not label.isdecimal():
            name, _, label = line.rpartition(" ")
        if not name or not label.isdecimal() or len(label) > MOST_DIGITS:
            raise LongtailError(
                f"{printable(path)}, line {number}: expected 'path label' with a label from 0, got "
                f"'{printable(line[:80])}'"
            )
        names.append(name.strip())
        labels.append(int(label))
    if not names:
        raise LongtailError(f"{printable(path)}: lists no images")
    return names, labels


def read_annotations(
    path: Path, category_ids: list[int] | None = None, remarks: list[str] | None = None
) -> tuple[list[str], list[int], list[str], list[int]]:
    """Read a JSON file in iNaturalist's layout; returns paths, labels, class names and category ids, in their order.

    Categories without an image are no classes.

    Args:
        path: the file.
        category_ids: of the training classes, by which the labels of another split are numbered.
        remarks: where to say which categories are left out.

    Raises:
        LongtailError: it is not JSON, or lacks images, annotations or categories.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or thousands of brackets
        raise LongtailError(f"{printable(path)}: is not JSON: {error}") from None
    try:
        files = {image["id"]: _file_name(image) for image in content["images"]}
        categories = sorted((entry["id"], nfc(str(entry["name"]))) for entry in content["categories"])
        if category_ids is None:
            used = {entry["category_id"] for entry in content["annotations"]}
            unused = [name for identity, name in categories if identity not in used]
            if used and unused and remarks is not None:
                shown = printable(", ".join(unused[:3])) + ("…" if len(unused) > 3 else "")
                remarks.append(
                    f"{printable(path)}: {len(unused):,} of {len(categories):,} categories have no image, and are no "
                    f"classes ({shown})"
                )
            categories = [category for category in categories if category[0] in used]
        order = [identity for identity, _ in categories] if category_ids is None else category_ids
        index = {identity: position for position, identity in enumerate(order)}
        unknown = next((a["category_id"] for a in content["annotations"] if a["category_id"] not in index), None)
        if unknown is not None:
            raise LongtailError(f"{printable(path)}: category {unknown} is not among the training classes")
        pairs = [(files[entry["image_id"]], index[entry["category_id"]]) for entry in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise LongtailError(
            f"{printable(path)}: expected images (id, file_name), annotations (image_id, category_id) and categories "
            f"(id, name); {error} is missing or of the wrong type"
        ) from None
    if not pairs:
        raise LongtailError(f"{printable(path)}: lists no images")
    if len(set(pairs)) > len({name for name, _ in pairs}) and any("bbox" in each for each in content["annotations"]):
        raise LongtailError(
            f"{printable(path)}: annotations have boxes of several classes in one image; to train on these, expected "
            f"--data.source boxes --data.train {printable(path)}"
        )
    names = [name for _, name in categories]
    if len(set(names)) < len(names):  # iNaturalist 2018 was published with numbers for names, and without
        names = [f"{name} ({identity})" for identity, name in categories]
    return [name for name, _ in pairs], [label for _, label in pairs], names, order


def _file_name(image: Mapping[str, Any]) -> str:
    if not isinstance(image["file_name"], str):
        raise TypeError("'file_name'")
    return image["file_name"]


def encode_labels(labels: Sequence[Label], classes: Sequence[Label] | None = None) -> tuple[Tensor, list[Label]]:
    """Return labels as (N,) int64 positions in ``classes``, and these. Nothing is allocated by the largest label.

    Args:
        labels: N integers or N names.
        classes: of the training images; the labels themselves, sorted, if not given.

    Raises:
        LongtailError: a label is not among ``classes``.
    """
    classes = sorted(set(labels)) if classes is None else list(classes)
    index = {label: position for position, label in enumerate(classes)}
    try:
        positions = array.array("q", [index[label] for label in labels])
    except KeyError as error:
        unknown = error.args[0]
        if isinstance(unknown, str):
            close = did_you_mean(unknown, map(str, classes))
            raise LongtailError(
                f"class '{printable(unknown)}' is not among the training classes{printable(close)}"
            ) from None
        raise LongtailError(
            f"label {unknown} is not among the {len(classes):,} training classes, {classes[0]} to {classes[-1]}"
        ) from None
    return torch.frombuffer(positions, dtype=torch.int64).clone(), list(classes)


def read_splits(
    sources: Mapping[str, Path],
    root: Path,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
) -> Listing:
    """Read a list, a table or annotations for every split; the suffix of a file tells its format.

    Integer labels that are not 0 to C − 1 name the classes, as ids from a database do. Folders in a path may be
    separated as on Windows.

    Args:
        sources: files by split; one table with a column of splits may stand for all.
        root: folder that the paths in them are relative to.
        image_column: see :func:`~longtail.data.listing.tables.read_table`.
        label_column: see :func:`~longtail.data.listing.tables.read_table`.
        split_column: see :func:`~longtail.data.listing.tables.read_table`.

    Raises:
        LongtailError: a file cannot be read, there is no training split, or labels are names here and numbers there.
    """
    remarks: list[str] = []
    raw: dict[str, tuple[list[str], list[Any]]] = {}
    tables: dict[str, Table] = {}
    names: list[str] | None = None
    category_ids: list[int] | None = None
    for split in sorted(sources, key=lambda split: split != "train"):
        path = sources[split]
        if path.suffix.lower() in {".csv", ".tsv", ".parquet"}:
            table = read_table(path, image_column, label_column, split_column, split)
            tables[split] = _decode_table(table, root, remarks)
        elif path.suffix.lower() == ".json":
            files, labels, category_names, order = read_annotations(path, category_ids, remarks)
            if category_ids is None:
                names, category_ids = category_names, order
            raw[split] = (_decode_paths(path, root, files, remarks), labels)
        else:
            files, labels = read_list(path)
            raw[split] = (_decode_paths(path, root, files, remarks), labels)
    parsed = parse_labels([table.label_texts for table in tables.values()])
    for (split, table), labels_of in zip(tables.items(), parsed, strict=True):
        remarks += table.remarks
        rows = {split: (table.files, list(labels_of))} if table.splits is None else _by_split(table, labels_of)
        if split != "train" and set(rows) != {split}:
            raise LongtailError(
                f"{table.path}: is given as data.{split}, but its column of splits has rows of "
                f"{', '.join(each for each in rows if each != split)}; expected {split} alone"
            )
        for twice in [each for each in rows if each in raw]:
            raise LongtailError(
                f"{table.path}: has rows of {twice}, which data.{twice} gives too; leave one of them out"
            )
        raw |= rows
    if "train" not in raw:
        raise LongtailError(f"{', '.join(map(str, sources.values()))}: there is no training split")
    _check_kinds(raw)
    entries: dict[str, Entries] = {}
    classes: list[Any] | None = None if names is None else list(range(len(names)))
    for split in sorted(raw, key=lambda split: split != "train"):
        files, labels = raw[split]
        try:
            numbers, classes = encode_labels(labels, classes)
        except LongtailError as error:
            raise LongtailError(f"{split}: {error}") from None
        entries[split] = Entries(shortest_paths(files, root), numbers)
    assert classes is not None
    if names is None:
        names = class_names_of_labels(classes, remarks) or names_by_folder(entries["train"], len(classes))
    if set(entries) == {"train"}:
        remarks += [
            f"{printable(table.path)}: column '{printable(table.split_column or '')}' has train alone: there are no "
            "test images of its own; training holds some out (data.test_fraction), or name others: --data.test TABLE"
            for table in tables.values()
            if table.splits is not None
        ]
        entries = {"all": entries["train"]}
    splits = {split: entries[split] for split in ("all", *SPLITS) if split in entries}
    return Listing(root, splits, names, remarks=remarks)


def class_names_of_labels(classes: Sequence[int | str], remarks: list[str]) -> list[str] | None:
    """Return the names of the classes that have these labels; None if they are the numbers 0 to C − 1.

    Args:
        classes: (C,) different labels, sorted: all names, or all whole numbers of at least 0.
        remarks: where to say that numbers, such as ids from a database, are taken for names.
    """
    if isinstance(classes[0], str):
        return [str(name) for name in classes]
    if classes[-1] == len(classes) - 1:
        return None
    remarks.append(
        f"the labels of the training images are {len(classes):,} different numbers from {classes[0]} to {classes[-1]}: "
        "they name the classes"
    )
    return [str(identity) for identity in classes]


def _decode_table(table: Table, root: Path, remarks: list[str]) -> Table:
    """Return a table whose texts are decoded; which encoding it has is guessed by the files that exist."""
    texts = _decode(table.path, root, [*table.files, *table.labels], remarks, paths=len(table.files))
    count = len(table.files)
    labels = [nfc(label) for label in texts[count:]]
    return dataclasses.replace(table, files=_with_slashes(table.path, root, texts[:count], remarks), labels=labels)


def _decode_paths(path: Path, root: Path, names: list[str], remarks: list[str]) -> list[str]:
    return _with_slashes(path, root, _decode(path, root, names, remarks), remarks)


def _decode(path: Path, root: Path, texts: list[str], remarks: list[str], paths: int | None = None) -> list[str]:
    """Read texts that are not UTF-8 as Latin-1, unless they name files that exist by these bytes.

    Args:
        path: the file that they are from.
        root: folder of the images.
        texts: paths, and what else is to be decoded.
        remarks: where to say that the encoding was guessed.
        paths: how many of the texts are paths; all if not given.
    """
    if not any(map(is_undecoded, texts)):
        return texts
    names = [text for text in texts[:paths] if is_undecoded(text)][:20]
    if any((root / name).exists() for name in names):
        return texts
    remarks.append(f"{printable(path)}: is not UTF-8; it is read as Latin-1 (a guess)")
    return [from_latin1(text) if is_undecoded(text) else text for text in texts]


def _with_slashes(path: Path, root: Path, names: list[str], remarks: list[str]) -> list[str]:
    r"""Return paths in which folders are separated by ``\``, as on Windows, with ``/`` if files exist by these alone.

    Args:
        path: the file that they are from.
        root: folder of the images.
        names: the paths.
        remarks: where to say so.
    """
    if not any("\\" in name for name in names):
        return names
    folders = Folders(root)
    changed = [name if folders.find(name) is not None else name.replace("\\", "/") for name in names]
    of_windows = [(old, new) for old, new in zip(names, changed, strict=True) if old != new]
    if not any(folders.find(new) is not None for _, new in of_windows):
        return names
    remarks.append(
        f"{printable(path)}: {len(of_windows):,} path{'s have' if len(of_windows) > 1 else ' has'} \\ between folders, "
        f"read as / ({printable(of_windows[0][0])})"
    )
    return changed


def _by_split(table: Table, labels: Sequence[Any]) -> dict[str, tuple[list[str], list[Any]]]:
    """Return the rows of a table by the values in its column of splits."""
    rows: dict[str, tuple[list[str], list[Any]]] = {}
    assert table.splits is not None
    splits = parse_splits(table.splits, printable(table.path), table.lines)
    for split, file, label in zip(splits, table.files, labels, strict=True):
        files, chosen = rows.setdefault(split, ([], []))
        files.append(file)
        chosen.append(label)
    return rows


def _check_kinds(raw: Mapping[str, tuple[list[str], list[Any]]]) -> None:
    """Raise LongtailError if the labels of a split are names and those of another numbers."""
    kinds = {
        split: "names" if labels and isinstance(labels[0], str) else "numbers" for split, (_, labels) in raw.items()
    }
    for split, kind in kinds.items():
        if kind != kinds["train"]:
            raise LongtailError(f"{split}: its labels are {kind}, those of train are {kinds['train']}; use one of them")
