"""Which layout a folder has (COCO or LVIS json, Pascal VOC, YOLO text files), and reading it with its images found."""

from __future__ import annotations

import dataclasses
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from longtail.config import Data
from longtail.data.detection.annotations import Annotations
from longtail.data.detection.assemble import AnnotationProblems, check_unique
from longtail.data.detection.coco import read_coco
from longtail.data.detection.voc import read_voc
from longtail.data.detection.yolo import find_yolo_folders, read_yolo
from longtail.data.listing import SPLITS, split_of
from longtail.data.paths import Folders, find_path, printable, shortest_paths
from longtail.errors import LongtailError, did_you_mean

_OTHER = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")
"""Beginnings of names of COCO's own files that hold no boxes of all classes."""
_OTHER_OF_LVIS = "_image_info"  # in the names of LVIS's, lvis_v1_image_info_test_dev.json for one
_TRIED_NAMES = 20  # images by which the folder of a file's images is found: some may be missing
_SPLIT_NAMES = {"train": "training", "val": "validation"}

Masks = Literal["none", "evaluation", "all"]


class AnnotatedImages(NamedTuple):
    """Annotated images by split, ``all`` where there are no splits."""

    root: Path
    """Folder of the images; their paths in the annotations are below it."""
    splits: dict[str, Annotations]
    """Of the same classes."""
    layout: str
    """What was found, in one line."""
    problems: AnnotationProblems
    json_files: tuple[Path, ...] = ()
    """What was read, of a layout of json files."""
    sizes_read: bool = False
    """The sizes are those that the images' headers have, so that all of these can be read."""


def read_annotated_images(config: Data, *, masks: Masks = "evaluation") -> AnnotatedImages:
    """Read the annotations of a set, and find its images.

    Args:
        config: its root, or json files as train, val and test.
        masks: which to keep. For evaluation these are not those of training images beside a test split, as training
            needs boxes alone, and masks of a large set take gigabytes; nor those of a file where an object has none.

    Raises:
        LongtailError: there is no such layout; a file is broken; an image is missing, is in two splits, or occurs twice
            in one.
    """
    problems = AnnotationProblems()
    named = {split: path for split in SPLITS if (path := getattr(config, split)) is not None}
    if named:
        files = {split: find_path(Path(path)) for split, path in named.items()}
        wrong = next((split for split, path in files.items() if path.suffix.lower() != ".json"), None)
        if wrong is not None:
            raise LongtailError(f"data.{wrong} {files[wrong]}: expected a .json file in COCO's or LVIS's format")
        if "train" not in files:
            raise LongtailError(
                "data.train is missing: which .json file holds the training images? (--data.train FILE)"
            )
        if len(files) == 1:
            files = {"all": files["train"]}
        root = next(iter(files.values())).parent if config.root is None else find_path(Path(config.root))
        found = _read_json(root, files, problems, masks)
    else:
        if config.root is None:
            raise LongtailError(
                f"data.root is missing: which folder holds the images with boxes of {config.source}? "
                "(--data.root FOLDER)"
            )
        found = _read_folder(find_path(Path(config.root)), problems, masks)
    _check_images(found)
    return found


def read_split(path: Path, split: Literal["train", "val"], problems: AnnotationProblems | None = None) -> Annotations:
    """Read the annotations of one split, without masks; their paths are below the folder, of a file as they are there.

    Args:
        path: a .json file, all of which is the split; or a folder in one of the layouts, which, if the split is train,
            may have no splits.
        split: which.
        problems: where to say which boxes were clipped or left out.

    Raises:
        LongtailError: there is no such layout or split, or see :func:`read_annotated_images`.
    """
    path, problems = find_path(path), AnnotationProblems() if problems is None else problems
    if not path.is_dir():
        annotations = read_coco(path, problems, masks=False)
        if not len(annotations):
            raise LongtailError(f"{path}: images: expected at least one")
        return annotations
    found = _read_folder(path, problems, "none")
    _check_images(found)
    splits = found.splits
    chosen = split if split in splits else "all" if split == "train" and "all" in splits else None
    if chosen is None:
        raise LongtailError(
            f"{path}: has no {_SPLIT_NAMES[split]} images ({found.layout}); name a .json file of them, as longtail "
            "split writes it"
        )
    return splits[chosen]


def _read_folder(root: Path, problems: AnnotationProblems, masks: Masks) -> AnnotatedImages:
    if not root.is_dir():
        raise LongtailError(f"data.root {root}: there is no such folder")
    if _is_voc(root):
        splits = read_voc(root, problems)
        return AnnotatedImages(
            root, splits, f"{root}: Pascal VOC (Annotations, JPEGImages; {_sizes(splits)})", problems
        )
    if find_yolo_folders(root):
        splits = read_yolo(root, problems)
        layout = f"{root}: YOLO (images, labels; {_sizes(splits)})"
        return AnnotatedImages(root, splits, layout, problems, sizes_read=True)
    files = _json_files(root)
    if not files:
        raise LongtailError(
            f"{root}: is no layout of images with boxes; expected .json files of COCO or LVIS (here, in annotations/ "
            "or beside the images), Annotations/ and JPEGImages/ (Pascal VOC), or images/ and labels/ (YOLO)"
        )
    return _read_json(root, _by_split(root, files), problems, masks)


def _is_voc(root: Path) -> bool:
    return (root / "Annotations").is_dir() and (root / "JPEGImages").is_dir()


def _json_files(root: Path) -> list[Path]:
    """Return the .json files of a folder that may be annotations: there, in annotations/, or in a split's folder."""
    if not root.is_dir():
        return []
    folders = [root, root / "annotations", *(root / name for name in _split_folders(root))]
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.json"))]
    return [path for path in files if not path.name.startswith((*_OTHER, ".")) and _OTHER_OF_LVIS not in path.name]


def _split_folders(folder: Path) -> dict[str, str]:
    """Return the splits of the folders in a folder by their names, ``train2017`` too."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
    return {name: split for name in names if (split := split_of(name.rstrip("0123456789"))) is not None}


def _by_split(root: Path, files: Sequence[Path]) -> dict[str, Path]:
    """Return the file of every split, by its name or that of its folder."""
    chosen: dict[str, Path] = {}
    for path in files:
        words = path.stem.replace("-", "_").replace(".", "_").split("_")
        splits = {split for word in words if (split := split_of(word.rstrip("0123456789"))) is not None}
        if not splits and path.parent != root:
            splits = {split for split in [split_of(path.parent.name.rstrip("0123456789"))] if split is not None}
        split = splits.pop() if len(splits) == 1 else "all"
        if split in chosen:
            raise LongtailError(
                f"{root}: {chosen[split].name} and {path.name} may both hold the "
                f"{'annotations' if split == 'all' else f'images of {split}'}; name the files: --data.train FILE "
                "--data.val FILE --data.test FILE"
            )
        chosen[split] = path
    if "all" in chosen and len(chosen) > 1:
        raise LongtailError(
            f"{root}: which images does {chosen['all'].name} hold? Name the files: --data.train FILE --data.val FILE "
            "--data.test FILE"
        )
    if "all" not in chosen and "train" not in chosen:
        held = ", ".join(path.name for path in chosen.values())
        raise LongtailError(f"{root}: holds no annotations of training images ({held}); name them: --data.train FILE")
    return {split: chosen[split] for split in (*SPLITS, "all") if split in chosen}


def _read_json(root: Path, files: Mapping[str, Path], problems: AnnotationProblems, masks: Masks) -> AnnotatedImages:
    splits: dict[str, Annotations] = {}
    for split, path in files.items():
        is_evaluated = split != "train" or "test" not in files
        keeps_masks = masks == "all" or (masks == "evaluation" and is_evaluated)
        annotations = read_coco(path, problems, masks=keeps_masks, partial_masks=masks == "all")
        first = next(iter(splits.values()), None)
        if first is not None:
            annotations = _with_classes(annotations, first, path, next(iter(files.values())))
        folder = _folder_of(root, path, split, annotations.files)
        names = shortest_paths((posixpath.join(folder, name) for name in annotations.files), root)
        splits[split] = dataclasses.replace(annotations, files=tuple(names))
    kind = "LVIS" if any(part.negatives is not None for part in splits.values()) else "COCO"
    shown = ", ".join(path.name for path in files.values())
    layout = f"{root}: {kind} ({shown}; {_sizes(splits)})"
    return AnnotatedImages(root, splits, layout, problems, tuple(files.values()))


def _with_classes(annotations: Annotations, first: Annotations, path: Path, first_path: Path) -> Annotations:
    """Return annotations with the classes of another file."""
    if annotations.class_names == first.class_names:
        return annotations
    place = {name: label for label, name in enumerate(first.class_names)}
    unknown = next((name for name in annotations.class_names if name not in place), None)
    if unknown is not None:
        raise LongtailError(
            f"{path}: the category '{printable(unknown)}' is not listed in {first_path}{did_you_mean(unknown, place)}; "
            "list the same categories in every file"
        )
    numbers = torch.tensor([place[name] for name in annotations.class_names], dtype=torch.int64)

    def renumbered(sets: tuple[frozenset[int], ...] | None) -> tuple[frozenset[int], ...] | None:
        return None if sets is None else tuple(frozenset(int(numbers[label]) for label in labels) for labels in sets)

    return dataclasses.replace(
        annotations,
        class_names=first.class_names,
        class_ids=first.class_ids,
        labels=numbers[annotations.labels],
        negatives=renumbered(annotations.negatives),
        incomplete=renumbered(annotations.incomplete),
    )


def _folder_of(root: Path, path: Path, split: str, names: Sequence[str]) -> str:
    """Return the folder below the root that the images of a json file are in, ending in a slash, or nothing."""
    if not names:
        return ""
    folders = [root, root / "images", path.parent]
    for parent in (root, root / "images"):
        folders += [parent / name for name, of in _split_folders(parent).items() if split in {of, "all"}]

    def held(folder: Path) -> int:
        return sum(find_path(folder / name).is_file() for name in names[:_TRIED_NAMES])

    best = max(folders, key=held)
    if held(best):
        below = os.path.relpath(best, root)
        return "" if below == "." else f"{below}/"
    looked = ", ".join(dict.fromkeys(str(folder) for folder in folders if folder.is_dir()))
    backslash = "\\" in names[0]
    advice = (
        "separate folders by / in place of \\" if backslash else "name the folder of the images: --data.root FOLDER"
    )
    raise LongtailError(f"{path}: there is no image {printable(names[0])} in {looked}; {advice}")


def _check_images(found: AnnotatedImages) -> None:
    """Raise LongtailError if an image is missing, or is in two splits; folders are read once, and no image is.

    Paths that differ from a file's name in their Unicode form only become that name.
    """
    folders = Folders(found.root)
    split_of_file: dict[str, str] = {}
    for split, part in found.splits.items():
        files = [folders.find(name) for name in part.files]
        missing = [name for name, file in zip(part.files, files, strict=True) if file is None]
        if missing:
            more = f" ({len(missing):,} of {len(part):,} images of {split} are missing)"
            raise LongtailError(
                f"{printable(found.root / missing[0])}: there is no such image{more if len(missing) > 1 else ''}; "
                "add it, or remove it from the annotations"
            )
        names = tuple(name for name in files if name is not None)
        check_unique(names, f"{printable(found.root)}: {split}", "the image")
        shared = [name for name in names if name in split_of_file]
        if shared:
            first, count = shared[0], len(shared)
            raise LongtailError(
                f"{printable(first)}: is in {split_of_file[first]} and in {split} ({count:,} such images); test and "
                "validation images must not be trained on"
            )
        split_of_file |= dict.fromkeys(names, split)
        found.splits[split] = dataclasses.replace(part, files=names)


def _sizes(splits: Mapping[str, Annotations]) -> str:
    return ", ".join(f"{split} {len(annotations):,}" for split, annotations in splits.items()) + " images"
