"""Annotations as text files in the layouts of YOLO (Ultralytics, Darknet).

    ROOT/images/{train,val,test}/NAME.jpg     ROOT/labels/{train,val,test}/NAME.txt
                                              or train/images, train/labels, …; or no folders of splits
    ROOT/data.yaml                            names of the classes: a list, or a mapping from their numbers
    ROOT/classes.txt                          the same, one on a line

A line of a text file is an object: its class from 0, then the centre's x and y, the width and the height of its box as
fractions of the image's width and height; or a polygon, x and y in turn, whose box is taken. An image without a file,
or with an empty one, has no objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from longtail.data.detection.annotations import Annotations
from longtail.data.detection.assemble import AnnotationProblems, Columns, assemble, check_unique
from longtail.data.detection.voc import read_class_names, read_lines
from longtail.data.image_io import image_errors, is_image_name
from longtail.data.listing import SPLITS, split_of
from longtail.errors import LongtailError

_ORIENTATION, _ROTATED = 0x0112, frozenset({5, 6, 7, 8})  # Exif: those that exchange width and height
_FAR = 2.0  # fractions beyond it are pixels


class SplitFolders(NamedTuple):
    """Where a split's images and their text files are, as paths below the root."""

    images: str
    labels: str


def find_yolo_folders(root: Path) -> dict[str, SplitFolders]:
    """Return the folders of every split, ``all`` where there are no splits; empty if it is no such layout."""
    if (root / "images").is_dir() and (root / "labels").is_dir():
        splits = {
            split: SplitFolders(f"images/{folder.name}", f"labels/{folder.name}")
            for folder in sorted((root / "images").iterdir())
            if folder.is_dir() and (split := split_of(folder.name.rstrip("0123456789"))) is not None
        }
        return splits or {"all": SplitFolders("images", "labels")}
    return {
        split: SplitFolders(f"{folder.name}/images", f"{folder.name}/labels")
        for folder in sorted(root.iterdir())
        if (folder / "images").is_dir()
        and (folder / "labels").is_dir()
        and (split := split_of(folder.name)) is not None
    }


def read_yolo(root: Path, problems: AnnotationProblems | None = None) -> dict[str, Annotations]:
    """Read a folder in one of these layouts.

    Args:
        root: the folder.
        problems: where to say which boxes were clipped or left out.

    Returns:
        The annotations by split, ``all`` where there are none; of the same classes.

    Raises:
        LongtailError: the names of the classes are missing, a file cannot be read or has no image, a class is not
            listed, or a box is outside of its image.
    """
    problems = AnnotationProblems() if problems is None else problems
    folders, class_names = find_yolo_folders(root), _read_names(root)
    return {
        split: _read_split(root, folders[split], class_names, problems)
        for split in (*SPLITS, "all")
        if split in folders
    }


def _read_names(root: Path) -> list[str]:
    for path in (root / "data.yaml", root / "data.yml", *sorted(root.glob("*.yaml"))):
        if path.is_file():
            return _names_of_yaml(path)
    for path in (root / "classes.txt", root / "labels" / "classes.txt"):
        names = read_class_names(path)
        if names is not None:
            return names
    raise LongtailError(f"{root}: expected the names of the classes in data.yaml (names: […]) or classes.txt")


def _names_of_yaml(path: Path) -> list[str]:
    expected = "expected names: a list of the classes, or a mapping from 0, 1, … to them"
    try:
        content = yaml.safe_load("\n".join(read_lines(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise LongtailError(f"{path}{line}: is no yaml; {expected}") from None
    names: Any = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise LongtailError(f"{path}: {expected}")
        names = [names.get(number, names.get(str(number))) for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise LongtailError(f"{path}: {expected}")
    class_names = [str(name) for name in names]
    check_unique(class_names, str(path), "the class")
    return class_names


def _read_split(
    root: Path, folders: SplitFolders, class_names: Sequence[str], problems: AnnotationProblems
) -> Annotations:
    images = sorted(path for path in (root / folders.images).rglob("*") if is_image_name(path.name))
    names = [path.relative_to(root / folders.images).as_posix() for path in images]
    stems = [name.rpartition(".")[0] for name in names]
    check_unique(stems, str(root / folders.images), "the image")
    labels = root / folders.labels
    texts = {
        path.relative_to(labels).as_posix().rpartition(".")[0]: path
        for path in labels.rglob("*.txt")
        if path.name != "classes.txt"
    }
    lost = sorted(set(texts) - set(stems))
    if lost:
        raise LongtailError(f"{texts[lost[0]]}: has no image in {root / folders.images}; add it, or remove the file")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(_read_shown_size, images))
    reasons = {index: result for index, result in enumerate(results) if isinstance(result, str)}
    problems.unreadable |= {f"{folders.images}/{names[index]}": reason for index, reason in reasons.items()}
    names, stems = ([of[k] for k in range(len(of)) if k not in reasons] for of in (names, stems))
    sizes = np.array([result for result in results if not isinstance(result, str)], dtype=np.int64).reshape(-1, 2)
    rows: list[list[float]] = []
    places: list[tuple[int, int]] = []
    for index, stem in enumerate(stems):
        if stem in texts:
            for line, row in _read_rows(texts[stem], len(class_names)):
                rows.append(row)
                places.append((index, line))
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    image_index = np.array([index for index, _ in places], dtype=np.int64)

    def describe(row: int) -> str:
        index, line = places[row]
        return f"{texts[stems[index]]}, line {line}"

    return assemble(
        Columns(
            image_index,
            table[:, 1:] * sizes[image_index][:, [1, 0, 1, 0]],
            table[:, 0].astype(np.int64),
            np.zeros(len(table), dtype=bool),
        ),
        describe,
        problems,
        files=[f"{folders.images}/{name}" for name in names],
        sizes=sizes,
        image_ids=stems,
        class_names=class_names,
    )


def _read_rows(path: Path, classes: int) -> list[tuple[int, list[float]]]:
    """Return the lines of a text file with their numbers: class, x1, y1, x2, y2 as fractions of the image."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            label, *values = map(float, line.split())
        except ValueError:
            values, label = [], 0.0
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise LongtailError(
                f"{path}, line {number}: expected a class and x, y, width, height (or a polygon), got "
                f"'{line.strip()[:40]}'"
            )
        if not 0 <= label < classes or label != int(label):
            raise LongtailError(
                f"{path}, line {number}: class {label:g} is not listed; expected 0 to {classes - 1}, the number of "
                "names − 1"
            )
        if not all(abs(value) <= _FAR for value in values):
            raise LongtailError(
                f"{path}, line {number}: expected fractions of the image's width and height in [0, 1], got "
                f"{max(values, key=abs):g}"
            )
        if len(values) == 4:
            x, y, width, height = values
            box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        else:
            box = [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
        rows.append((number, [label, *box]))
    return rows


def _read_shown_size(path: Path) -> tuple[int, int] | str:
    """Return height and width of an image as it is shown, which its Exif tag may rotate; or why it cannot be read."""
    try:
        return _shown_size(path)
    except LongtailError as error:
        return str(error)


def _shown_size(path: Path) -> tuple[int, int]:
    with image_errors(path), Image.open(path) as image:
        width, height = image.size
        # of a PNG file without Exif in its header, asking for it would decode the whole image
        has_exif = "exif" in image.info or image.format != "PNG"
        rotated = has_exif and image.getexif().get(_ORIENTATION) in _ROTATED
    return (width, height) if rotated else (height, width)
