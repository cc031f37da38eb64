"""Folders of images with one sub-folder per class."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from longtail.data.image_io import IMAGE_SUFFIXES
from longtail.data.listing.types import SPLIT_ALIASES, Entries, Listing
from longtail.errors import LongtailError, did_you_mean


def read_folder(root: Path) -> Listing:
    """Read a folder with one sub-folder per class, below ``train``, ``val`` and ``test`` or directly.

    Raises:
        LongtailError: a folder cannot be read, or has no sub-folders. Other problems are in the listing's ``errors``.
    """
    errors: list[str] = []
    if not any(_is(entry, "dir") for entry in (_scan(root / "train") if (root / "train").is_dir() else ())):
        # no splits; a class may be called train
        files = _class_files(root, errors)
        names = list(files)
        return Listing(root, {"all": _entries(files, names, "")}, names, errors)
    train = _class_files(root / "train", errors)
    names = list(train)
    listing = Listing(root, {"train": _entries(train, names, "train/")}, names, errors)
    folders = {split: name for name, split in SPLIT_ALIASES.items() if (root / name).is_dir()}
    for split, folder in folders.items():
        files = _class_files(root / folder, errors)
        for unseen in sorted(set(files) - set(names)):
            errors.append(
                f"{root / folder / unseen}: the class '{unseen}' is not among the training classes"
                f"{did_you_mean(unseen, names)}"
            )
        listing.splits[split] = _entries(files, names, f"{folder}/")
    if "test" not in folders and "val" in folders:
        # the only other split is what the model is evaluated on, so it cannot choose the epoch too
        listing.splits["test"] = listing.splits.pop("val")
    return listing


def names_by_folder(entries: Entries, classes: int) -> list[str]:
    """Name every class by the folder of its images, or all by their numbers where a class has several folders or none.

    Folders of one name are distinguished by their parents: ``gate/outdoor`` and ``market/outdoor``.
    """
    folders: list[str | None] = [None] * classes
    for folder, label in set(
        zip((name.rpartition("/")[0] for name in entries.names), entries.labels.tolist(), strict=True)
    ):
        if folders[label] not in {None, folder}:
            return [str(index) for index in range(classes)]
        folders[label] = folder
    parts = [(folder or "").split("/") for folder in folders]
    names = [path[-1] for path in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        repeated = {name for name, count in collections.Counter(names).items() if count > 1}
        names = ["/".join(path[-depth:]) if name in repeated else name for path, name in zip(parts, names, strict=True)]
    if "" in names or len(set(names)) < classes:
        return [str(index) for index in range(classes)]
    return names


def _entries(files: Mapping[str, Sequence[str]], names: Sequence[str], prefix: str) -> Entries:
    """Return the files of every class as entries, in order of the class names."""
    paths = [f"{prefix}{name}/{file}" for name in names for file in files.get(name, [])]
    labels = [index for index, name in enumerate(names) for _ in files.get(name, [])]
    return Entries(paths, torch.tensor(labels, dtype=torch.int64))


def _class_files(root: Path, errors: list[str]) -> dict[str, list[str]]:
    """Return the names of every class's images, classes and files in order of name; add what is wrong to ``errors``."""
    entries = sorted(_scan(root), key=lambda entry: entry.name)
    classes = [entry.name for entry in entries if _is(entry, "dir")]
    if not classes:
        loose = sum(1 for entry in entries if _suffix(entry.name) in IMAGE_SUFFIXES)
        instead = f"{loose} images without one" if loose else "no images"
        raise LongtailError(f"{root}: expected a sub-folder with images for each class, found {instead}")
    files_of = {}
    for name in classes:
        folder = root / name
        files = []
        for entry in sorted(_scan(folder), key=lambda entry: entry.name):
            if not _is(entry, "file"):
                if not _is(entry, "dir"):
                    errors.append(f"{folder / entry.name}: is a broken or circular link; remove it")
            elif _suffix(entry.name) not in IMAGE_SUFFIXES:
                errors.append(f"{folder / entry.name}: is not an image by its name; remove it from the class '{name}'")
            else:
                files.append(entry.name)
        if not files and not errors:
            errors.append(f"{folder}: the class '{name}' has no images; add some or remove the folder")
        files_of[name] = files
    return files_of


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


def _is(entry: os.DirEntry[str], kind: Literal["dir", "file"]) -> bool:
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:  # a circular link
        return False


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a folder, without hidden files and Windows' thumbnails."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith(".") and entry.name != "Thumbs.db")
    except OSError as error:
        raise LongtailError(f"{folder}: cannot be read: {error.strerror}") from None
