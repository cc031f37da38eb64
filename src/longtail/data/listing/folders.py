"""Folders of images: every folder that contains images is a class, named by its path."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from longtail.data.image_io import is_image_name
from longtail.data.listing.tables import UNLABELLED
from longtail.data.listing.types import SPLIT_ALIASES, SPLITS, Entries, Listing, split_of
from longtail.data.paths import nfc, printable
from longtail.errors import LongtailError, did_you_mean
from longtail.run_folder import is_written

_SHOWN = 3  # names in a message
_SUGGESTIONS = 10  # classes of a split for which similar training classes are looked for
_OF_SYSTEMS = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})  # the last is in archives that macOS made


def read_folder(root: Path, *, class_depth: int | None = None, skip_empty: bool = False) -> Listing:
    """Read a folder of class folders, below folders of splits (:data:`SPLIT_ALIASES`, in any case) or directly.

    Every folder that contains images is a class, whatever its depth; its name is its path, ``animals/cat``. The runs of
    a training that was started in the folder, whose pictures of errors are images too, are left out. So are folders
    beside those of splits, such as one of unlabelled images; but where these are more folders with more images, the
    folder called train is probably a class among others, and there is an error.

    Args:
        root: the folder.
        class_depth: number of folders in a class's name; what lies deeper belongs to it. None: no limit.
        skip_empty: leave out class folders without images; otherwise each of them is an error.

    Raises:
        LongtailError: a folder cannot be read, or contains no folder. Other problems are in the listing's ``errors``.
    """
    reader = _Reader(class_depth, skip_empty)
    splits = find_split_folders(root, reader.errors)
    if not splits:
        files = reader.class_files(root)
        return reader.listing(root, {"all": ("", files)})
    for entry in _scan(root):
        if split_of(entry.name) is None and not _is(entry, "dir") and not _is(entry, "file"):
            reader.errors.append(_not_a_folder(root, entry, "images"))
    reader.remark_on_parquet(root)
    contents = {split: (f"{folder}/", reader.class_files(root / folder)) for split, folder in splits.items()}
    used = sum(len(images) for _, files in contents.values() for images in files.values())
    beside = reader.report_beside(root, splits, used)
    if "test" not in contents and "val" in contents:
        # the only other split is what the model is evaluated on, so it cannot choose the epoch too
        contents["test"] = contents.pop("val")
        reader.remarks.append(validation_is_test(f"{printable(root / splits['val'])}"))
    listing = reader.listing(root, contents)
    listing.beside = beside
    return listing


def validation_is_test(where: str) -> str:
    """Return the remark that a set without a test split is tested on its validation images."""
    return (
        f"{where}: there is no test split, so these are the test images, and do not choose the epoch; "
        "--data.val_fraction 0.1 holds out training images for that"
    )


def find_split_folders(root: Path, errors: list[str], *, nested: bool = True) -> dict[str, str]:
    """Return the names of the folders of the splits below a folder; none unless there is one of training images.

    Args:
        root: the folder.
        errors: where to add what is wrong: two folders of one split, a split that is no folder.
        nested: whether a folder of training images is recognised by folders in it, since a class may be called train.
    """
    entries = [entry for entry in _scan(root) if split_of(entry.name) is not None]
    candidates = [entry for entry in entries if _is(entry, "dir")]
    if nested:
        with_folders = [entry for entry in candidates if any(_is(inner, "dir") for inner in _scan(root / entry.name))]
        if not any(split_of(entry.name) == "train" for entry in with_folders):
            others = [entry for entry in _scan(root) if _is(entry, "dir")]
            if others and len(with_folders) == len(others) and len(entries) == len(candidates):
                names = ", ".join(sorted(entry.name for entry in others))
                errors.append(
                    f"{printable(root)}: has folders of splits ({names}) but none of training images; "
                    f"expected one of {', '.join(SPLIT_ALIASES['train'])}"
                )
            return {}
    folders: dict[str, str] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        split = split_of(entry.name)
        assert split is not None
        if entry not in candidates:
            errors.append(_not_a_folder(root, entry, f"the {split} images"))
        elif split in folders:
            errors.append(
                f"{printable(root)}: has two folders of {split} images, '{folders[split]}' and '{entry.name}'; "
                "make them one, or rename one"
            )
        else:
            folders[split] = entry.name
    return {split: folders[split] for split in SPLITS if split in folders}


def _not_a_folder(root: Path, entry: os.DirEntry[str], what: str) -> str:
    place = printable(root / entry.name)
    if _is(entry, "file"):
        return f"{place}: is a file, expected a folder of {what}; rename it"
    return f"{place}: is a broken or circular link; repair or remove it"


_Files = dict[str, list[str]]
"""Paths of images by class, in order of path."""


@dataclass
class _Reader:
    """Reads class folders, and gathers what is wrong in them."""

    class_depth: int | None
    skip_empty: bool
    errors: list[str] = field(default_factory=list)
    not_images: list[str] = field(default_factory=list)
    """Errors on files in class folders that are no images by their names."""
    remarks: list[str] = field(default_factory=list)
    empty: dict[str, str] = field(default_factory=dict)
    """Class folders without images: by name, what they contain instead."""
    written: list[str] = field(default_factory=list)
    """Folders that longtail wrote, which are left out."""

    def class_files(self, root: Path) -> _Files:
        """Return the images of every class below a folder, as paths below it."""
        files: _Files = {}
        empty: dict[str, str] = {}
        entries = sorted(_scan(root), key=lambda entry: entry.name)
        folders = [entry for entry in entries if _is(entry, "dir")]
        loose = [entry.name for entry in entries if _is(entry, "file") and is_image_name(entry.name)]
        for entry in entries:
            if not _is(entry, "dir") and not _is(entry, "file"):
                self.errors.append(_not_a_folder(root, entry, "a class"))
        if not folders:
            instead = f"{len(loose)} images without one" if loose else "no images"
            unlabelled = f"; {UNLABELLED}" if loose and split_of(root.name) == "test" else ""
            raise LongtailError(
                f"{printable(root)}: expected a sub-folder with images for each class, found {instead}{unlabelled}"
            )
        if loose:
            self.remarks.append(
                f"{printable(root)}: "
                + _number(
                    len(loose),
                    "image beside the class folders belongs to no class, and is",
                    "images beside the class folders belong to no class, and are",
                )
                + f" left out ({_shown(loose)})"
            )
        self.remark_on_parquet(root)
        for entry in folders:
            self.walk(root, entry.name, files, empty, {_identity(root)})
        # a class may have several folders (two spellings, or class_depth), of which one has images
        self.empty |= {name: place for name, place in empty.items() if name not in files}
        return files

    def remark_on_parquet(self, folder: Path) -> None:
        """Say that a table in Parquet's format is not read, which would be a set if there were no class folders."""
        tables = sorted(entry.name for entry in _scan(folder) if entry.name.lower().endswith(".parquet"))
        if tables:
            self.remarks.append(
                f"{printable(folder)}: {_shown(tables)} beside class folders with images is not read; a set of Parquet "
                "files is read with --data.source hub"
            )

    def walk(self, root: Path, path: str, files: _Files, empty: dict[str, str], above: set[tuple[int, int]]) -> None:
        """Add the images of a class folder and of those below it; ``path`` leads to it from ``root``."""
        identity = _identity(root / path)
        if identity in above:
            self.errors.append(f"{printable(root / path)}: is a link to a folder that contains it; remove it")
            return
        if is_written(root / path):
            self.written.append(path)
            return
        images: list[str] = []
        other: list[str] = []
        folders: list[str] = []
        for entry in sorted(_scan(root / path), key=lambda entry: entry.name):
            if _is(entry, "dir"):
                folders.append(entry.name)
            elif not _is(entry, "file"):
                self.errors.append(_not_a_folder(root / path, entry, "a class"))
            else:
                (images if is_image_name(entry.name) else other).append(entry.name)
        name = "/".join(nfc(path).split("/")[: self.class_depth])
        if images:
            files.setdefault(name, []).extend(f"{path}/{image}" for image in images)
            self.not_images += [
                f"{printable(root / path / file)}: is not an image by its name; convert or remove it, or leave "
                f"such files out: longtail inspect SOURCE --fix FILE.csv (class '{printable(name)}')"
                for file in other
            ]
        elif not folders:
            empty[name] = f"{printable(root / path)}" + (f", only {_shown(other)}" if other else "")
        for folder in folders:
            self.walk(root, f"{path}/{folder}", files, empty, above | {identity})

    def report_beside(self, root: Path, splits: Mapping[str, str], used: int) -> str | None:
        """Add a remark, or an error, on folders with images that are beside those of the splits.

        Args:
            root: the folder of all of them.
            splits: names of the folders of the splits.
            used: number of images in them.

        Returns:
            The remark without the folder's name, if there is one.
        """
        names = sorted(entry.name for entry in _scan(root) if _is(entry, "dir") and split_of(entry.name) is None)
        counts = {name: count for name in names if (count := _count_images(root, name))}
        if not counts:
            return None
        shown, images = _shown(list(counts)), sum(counts.values())
        if len(counts) > len(splits) and images > used:
            folders = [printable(f"{folder}/") for folder in splits.values()]
            are, them = ("is a split", "it") if len(folders) == 1 else ("are splits", "them")
            self.errors.insert(
                0,
                f"{printable(root)}: {', '.join(folders)} {are}, and {len(counts):,} folders beside {them} ({shown}) "
                f"contain {images:,} images that would not be used: move them into {folders[0]} or out of "
                f"{printable(root)}, or rename {', '.join(folders)}",
            )
            return None
        left_out = (
            _number(len(counts), "folder beside the splits is", "folders beside the splits are")
            + f" not used ({shown}), with {_number(images, 'image', 'images')}"
        )
        self.remarks.append(f"{printable(root)}: {left_out}")
        return left_out

    def listing(self, root: Path, contents: Mapping[str, tuple[str, _Files]]) -> Listing:
        """Return what was read, by split: the prefix of the paths, and the images by class."""
        names = sorted(contents["train" if "train" in contents else "all"][1])
        splits = {}
        for split, (prefix, files) in contents.items():
            unseen = sorted(set(files) - set(names))
            self._report_unknown(root / prefix, [name for name in unseen if name not in self.empty], len(files), names)
            if self.skip_empty:
                self.remarks += [
                    f"{printable(root / prefix / name)}: {len(files[name])} images of a class without training images "
                    "are left out"
                    for name in unseen
                    if name in self.empty
                ]
            splits[split] = _entries(files, names, prefix)
        self._report_empty()
        if self.written:
            self.remarks.append(
                f"{printable(root)}: "
                + _number(
                    len(self.written), "folder of runs is no class, and is", "folders of runs are no classes, and are"
                )
                + f" left out ({_shown(sorted(self.written))})"
            )
        above = {name[:end] for name in names for end, letter in enumerate(name) if letter == "/"}
        inner = [name for name in names if name in above]
        if inner:
            self.remarks.append(
                _number(len(inner), "class has others below it", "classes have others below them")
                + f" ({_shown(inner)}); --data.class_depth 1 makes each of them one class"
            )
        if not names and not self.errors:
            raise LongtailError(f"{root}: expected a sub-folder with images for each class, found no images")
        return Listing(root, splits, names, [*self.errors, *self.not_images], self.remarks, not_images=self.not_images)

    def _report_unknown(self, folder: Path, unknown: Sequence[str], classes: int, names: Sequence[str]) -> None:
        """Add errors on classes of a split that are none of the training set.

        Args:
            folder: of the split.
            unknown: classes of the split without a class folder in the training set.
            classes: number of all classes of the split.
            names: training classes.
        """
        if len(unknown) == classes > 1:
            self.errors.append(
                f"{printable(folder)}: none of its {classes:,} classes is among the training classes; the first is "
                f"'{printable(unknown[0])}'{did_you_mean(unknown[0], names)}"
            )
            return
        for rank, name in enumerate(unknown):
            # the comparison with every training class takes a tenth of a second where there are thousands
            advice = did_you_mean(name, names) if rank < _SUGGESTIONS else ""
            self.errors.append(
                f"{printable(folder / name)}: the class '{printable(name)}' is not among the training classes{advice}"
            )

    def _report_empty(self) -> None:
        if self.skip_empty:
            if self.empty:
                self.remarks.append(
                    _number(
                        len(self.empty), "class folder has no images, and is", "class folders have no images, and are"
                    )
                    + f" left out ({_shown(sorted(self.empty))})"
                )
            return
        for name, place in self.empty.items():
            self.errors.append(
                f"{place}: the class '{printable(name)}' has no images; add some, remove the folder, or leave such "
                "folders out with --data.skip_empty"
            )


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
    parts = [nfc(folder or "").split("/") for folder in folders]
    names = [path[-1] for path in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        repeated = {name for name, count in collections.Counter(names).items() if count > 1}
        names = ["/".join(path[-depth:]) if name in repeated else name for path, name in zip(parts, names, strict=True)]
    if "" in names or len(set(names)) < classes:
        return [str(index) for index in range(classes)]
    return names


def _entries(files: Mapping[str, Sequence[str]], names: Sequence[str], prefix: str) -> Entries:
    """Return the files of every class as entries, in order of the class names."""
    paths = [f"{prefix}{file}" for name in names for file in files.get(name, [])]
    labels = [index for index, name in enumerate(names) for _ in files.get(name, [])]
    return Entries(paths, torch.tensor(labels, dtype=torch.int64))


def _count_images(root: Path, name: str) -> int:
    """Return the number of images below a folder, without those of runs; below one that cannot be read, what was found.

    Args:
        root: folder that contains the folder.
        name: of the folder.
    """
    files: _Files = {}
    with contextlib.suppress(LongtailError):  # it is not used, so that it need not be readable
        _Reader(None, skip_empty=True).walk(root, name, files, {}, {_identity(root)})
    return sum(map(len, files.values()))


def _shown(names: Sequence[str]) -> str:
    return printable(", ".join(names[:_SHOWN])) + ("…" if len(names) > _SHOWN else "")


def _number(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


def _identity(folder: Path) -> tuple[int, int]:
    """Return what tells a folder from all others, whatever links lead to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is(entry: os.DirEntry[str], kind: Literal["dir", "file"]) -> bool:
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:  # a circular link
        return False


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a folder, without hidden files and what operating systems add."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith(".") and entry.name not in _OF_SYSTEMS)
    except OSError as error:
        raise LongtailError(f"{printable(folder)}: cannot be read: {error.strerror}") from None
