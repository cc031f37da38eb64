"""What a data argument on the command line stands for. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

import itertools
import mmap
import os
import re
from pathlib import Path
from typing import Any

from longtail.data.paths import find_path, nfc, visible_files
from longtail.errors import LongtailError, did_you_mean
from longtail.registry import SOURCES

_KINDS = frozenset({"folder", "list", "hub", "masks", "boxes"})
"""Sources that are no data set of their own: which files they read follows from a path."""
TABLES = frozenset({".txt", ".lst", ".csv", ".tsv", ".parquet", ".json"})
"""Endings of lists, tables and annotations."""
_IMAGE_FOLDER, _MASK_FOLDER = re.compile(r"(jpeg)?images"), re.compile(r"masks?|labels|\w+class")  # the last as in VOC
_COMPARED = 20  # masks whose images are looked for


def named_sets() -> list[str]:
    """Return the names of the data sets that need no path to be identified, in order of registration."""
    return [name for name in SOURCES if name not in _KINDS]


def source_of(text: str) -> dict[str, Any]:
    """Return the fields of ``data`` that an argument on the command line stands for.

    Args:
        text: the name of a source; ``hub:NAME``; a folder (of classes, of Parquet files, of images/ and annotations/,
            or of images with boxes in Pascal VOC's, YOLO's or COCO's layout); or a list (.txt), a table (.csv, .tsv,
            .parquet) or annotations (.json).

    Raises:
        LongtailError: it is none of these, or a folder of images and masks in another layout than images/ and
            annotations/.
    """
    path = find_path(Path(text))  # under the name that the disk has
    if text in SOURCES and not (text in _KINDS and path.exists()):
        return {"source": text}
    if text.startswith("hub:"):
        return {"source": "hub", "name": text.removeprefix("hub:")}
    _refuse_other_masks(path)
    if _has_boxes(path):
        return {"source": "boxes", "root": str(path)}
    if (path / "images").is_dir() and (path / "annotations").is_dir():
        return {"source": "masks", "root": str(path)}
    if path.is_dir():
        is_hub = next(path.rglob("*.parquet"), None) is not None and not _has_classes(path)
        return {"source": "hub" if is_hub else "folder", "root": str(path)}
    if path.suffix.lower() in TABLES:
        return {"source": "list", "train": str(path)}
    raise LongtailError(
        f"data '{text}': there is no such folder or set{did_you_mean(text, named_sets())}; expected a named set, a "
        "folder, a list (.txt), a table (.csv, .tsv, .parquet), annotations (.json) or hub:NAME"
    )


def _refuse_other_masks(path: Path) -> None:
    """Raise LongtailError for images and masks whose folders have other names: they would be taken for two classes."""
    for folder in (path, path / "train", path / "training"):
        names = _folders(folder)
        if any(name.lower() == "annotations" for name in names):  # of this layout, or of one of boxes
            continue
        first, second = (
            [name for name in names if kind.fullmatch(name.lower())] for kind in (_IMAGE_FOLDER, _MASK_FOLDER)
        )
        for images, masks in itertools.product(first, second):
            if _same_names(folder / images, folder / masks):
                raise LongtailError(
                    f"{folder}: has images ({images}/) and masks ({masks}/) of the same names; for "
                    f"labels of pixels expected {path / 'images'} and {path / 'annotations'}, each with folders "
                    "training/ and validation/ or test/: rename the folders"
                )


def _same_names(images: Path, masks: Path) -> bool:
    """Return whether there are images in a folder of masks, the first of which have an image of the same name."""
    from longtail.data.image_io import is_image_name

    files = (file.relative_to(masks) for file in visible_files(masks) if is_image_name(file.name))
    first = list(itertools.islice(files, _COMPARED))
    stems: dict[Path, set[str]] = {}
    for parent in {file.parent for file in first}:
        folder = images / parent
        stems[parent] = {nfc(file.stem) for file in folder.iterdir()} if folder.is_dir() else set()
    return bool(first) and all(nfc(file.stem) in stems[file.parent] for file in first)


def _has_boxes(path: Path) -> bool:
    """Return whether a folder has Pascal VOC's, YOLO's or COCO's layout, by names that a folder of classes has not."""
    if (path / "Annotations").is_dir() and (path / "JPEGImages").is_dir():
        return True
    if any((folder / "images").is_dir() and (folder / "labels").is_dir() for folder in (path, path / "train")):
        return True
    if any((path / "annotations").glob("*.json")) or (path / "train" / "_annotations.coco.json").is_file():
        return True
    files, folders, inside = [*path.glob("*.json")], {*_folders(path)} - {"images", "runs"}, _folders(path / "images")
    if not files or (not folders and not inside):  # beside the images, or beside images/, where no folder is a class
        return bool(files)
    if not any(map(_annotates_boxes, files)):
        return False
    from longtail.data.listing.types import split_of  # imports torch, which boxes are not read without

    return all(split_of(name.rstrip("0123456789")) is not None for name in (*folders, *inside))


def _annotates_boxes(path: Path) -> bool:
    """Return whether a .json file has the lists of COCO's and LVIS's annotations, with boxes; it is not parsed."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(b'"%b"' % key) >= 0 for key in (b"bbox", b"images", b"annotations", b"categories"))
    except (OSError, ValueError):  # it cannot be read, or is empty
        return False


def _has_classes(path: Path) -> bool:
    """Return whether there are images in a folder of a class, beside which a table in Parquet's format is no set."""
    from longtail.data.image_io import is_image_name
    from longtail.data.listing import split_of

    for file in visible_files(path):
        first, *others = file.relative_to(path).parts[:-1] or ("",)
        if is_image_name(file.name) and first and (others or split_of(first) is None):
            return True
    return False


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
