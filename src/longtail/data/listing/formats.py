"""Lists, annotations and tables of image files, a file for each split or one for all."""

from __future__ import annotations

import array
import json
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtail.data.listing.folders import names_by_folder
from longtail.data.listing.tables import read_table, read_text
from longtail.data.listing.types import SPLIT_ALIASES, SPLITS, Entries, Listing
from longtail.errors import LongtailError, did_you_mean


def read_list(path: Path) -> tuple[list[str], list[int]]:
    """Read a list file of lines ``path label``, the label an integer from 0; returns paths and labels.

    Raises:
        LongtailError: it cannot be read, is empty, or a line is not as above; the message names the line.
    """
    names: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
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


def read_annotations(
    path: Path, category_ids: list[int] | None = None
) -> tuple[list[str], list[int], list[str], list[int]]:
    """Read a JSON file in iNaturalist's layout; returns paths, labels, class names and category ids, in their order.

    Args:
        path: the file.
        category_ids: of the training classes, by which the labels of another split are numbered.

    Raises:
        LongtailError: it is not JSON, or lacks images, annotations or categories.
    """
    try:
        content = json.loads(read_text(path))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        categories = sorted((entry["id"], str(entry["name"])) for entry in content["categories"])
        order = [identity for identity, _ in categories] if category_ids is None else category_ids
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
            f"{error} is missing or of the wrong type"
        ) from None
    if not pairs:
        raise LongtailError(f"{path}: lists no images")
    names = [name for _, name in categories]
    if len(set(names)) < len(names):  # iNaturalist 2018 was published with numbers for names, and without
        names = [f"{name} ({identity})" for identity, name in categories]
    return [name for name, _ in pairs], [label for _, label in pairs], names, order


def encode_labels(labels: Sequence[int | str], names: list[str] | None = None) -> tuple[Tensor, list[str]]:
    """Return labels as (N,) int64, and the class names.

    Args:
        labels: N integers, which stay as they are, or N names, which are numbered.
        names: of the training classes; the names in ``labels``, sorted, if not given.

    Raises:
        LongtailError: a name is not among ``names``.
    """
    if labels and isinstance(labels[0], str):
        names = sorted({str(label) for label in labels}) if names is None else names
        index = {name: position for position, name in enumerate(names)}
        unknown = next((label for label in labels if label not in index), None)
        if unknown is not None:
            raise LongtailError(
                f"class '{unknown}' is not among the training classes{did_you_mean(str(unknown), names)}"
            )
        return torch.tensor([index[str(label)] for label in labels], dtype=torch.int64), names
    return torch.frombuffer(array.array("q", [int(label) for label in labels]), dtype=torch.int64).clone(), names or []


def read_splits(
    sources: Mapping[str, Path],
    root: Path,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
) -> Listing:
    """Read a list, a table or annotations for every split; the suffix of a file tells its format.

    Args:
        sources: files by split; one table with a column of splits may stand for all.
        root: folder that the paths in them are relative to.
        image_column: see :func:`~longtail.data.listing.tables.read_table`.
        label_column: see :func:`~longtail.data.listing.tables.read_table`.
        split_column: see :func:`~longtail.data.listing.tables.read_table`.

    Raises:
        LongtailError: a file cannot be read, there is no training split, or labels are names here and numbers there.
    """
    raw: dict[str, tuple[list[str], list[Any]]] = {}
    names: list[str] | None = None
    category_ids: list[int] | None = None
    for split in sorted(sources, key=lambda split: split != "train"):
        path = sources[split]
        if path.suffix.lower() in {".csv", ".tsv", ".parquet"}:
            files, labels, splits = read_table(path, image_column, label_column, split_column)
            raw |= {split: (files, labels)} if splits is None else _by_split(path, files, labels, splits)
        elif path.suffix.lower() == ".json":
            files, labels, category_names, order = read_annotations(path, category_ids)
            if category_ids is None:
                names, category_ids = category_names, order
            raw[split] = (files, labels)
        else:
            raw[split] = read_list(path)
    if "train" not in raw:
        raise LongtailError(f"{', '.join(map(str, sources.values()))}: there is no training split")
    named = _labels_are_names(raw)
    entries: dict[str, Entries] = {}
    for split in sorted(raw, key=lambda split: split != "train"):
        files, labels = raw[split]
        numbers, label_names = encode_labels(labels, names if named else None)
        if named:
            names = label_names
        entries[split] = Entries([_normalize(file) for file in files], numbers)
    if names is None:
        classes = int(entries["train"].labels.max()) + 1
        names = names_by_folder(entries["train"], classes)
    if set(entries) == {"train"}:
        entries = {"all": entries["train"]}
    return Listing(root, {split: entries[split] for split in ("all", *SPLITS) if split in entries}, names)


def _by_split(
    path: Path, files: Sequence[str], labels: Sequence[Any], splits: Sequence[str]
) -> dict[str, tuple[list[str], list[Any]]]:
    """Return the rows of a table by the values in its column of splits."""
    rows: dict[str, tuple[list[str], list[Any]]] = {}
    for value in dict.fromkeys(splits):
        split = "train" if value == "train" else SPLIT_ALIASES.get(value)
        if split is None:
            raise LongtailError(f"{path}: split '{value}' is not known: expected train, val or test")
        chosen = [index for index, other in enumerate(splits) if other == value]
        rows[split] = ([files[index] for index in chosen], [labels[index] for index in chosen])
    return rows


def _labels_are_names(raw: Mapping[str, tuple[list[str], list[Any]]]) -> bool:
    kinds = {
        split: "names" if labels and isinstance(labels[0], str) else "numbers" for split, (_, labels) in raw.items()
    }
    for split, kind in kinds.items():
        if kind != kinds["train"]:
            raise LongtailError(f"{split}: its labels are {kind}, those of train are {kinds['train']}; use one of them")
    return kinds["train"] == "names"


def _normalize(path: str) -> str:
    """Return a path in its shortest spelling, so that a file listed twice is recognised."""
    return posixpath.normpath(path) if "//" in path or "./" in path else path
