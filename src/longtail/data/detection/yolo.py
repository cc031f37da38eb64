"""Annotations as text files in the layouts of YOLO (Ultralytics, Darknet).

    ROOT/images/{train,val,test}/NAME.jpg     ROOT/labels/{train,val,test}/NAME.txt
                                              or train/images, train/labels, …; or no folders of splits
    ROOT/data.yaml                            names of the classes: a list, or a mapping from their numbers; kpt_shape
    ROOT/classes.txt                          the names, one on a line

The folders of a split may be several, as train2007 and train2012. One of validation or test images without a folder of
labels is left out: the labels of a test set are often not published.

A line of a text file is an object: its class from 0, then the centre's x and y, the width and the height of its box as
fractions of the image's width and height; or a polygon, x and y in turn, whose box is taken. Where data.yaml has
``kpt_shape``, the number of keypoints and the numbers of each (2 or 3), the keypoints follow the box, and are left out;
without it they cannot be told from a polygon. An image without a file, or with an empty one, has no objects.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from longtail.data.detection.annotations import Annotations, concatenate
from longtail.data.detection.assemble import AnnotationProblems, Columns, assemble, check_unique
from longtail.data.detection.voc import read_class_names
from longtail.data.image_io import StorageError, is_image_name, read_shown_size
from longtail.data.listing import SPLITS, split_of
from longtail.data.paths import visible_files
from longtail.errors import LongtailError
from longtail.files import read_lines

_FAR = 2.0  # fractions beyond it are pixels


class SplitFolders(NamedTuple):
    """Where a split's images and their text files are, as paths below the root."""

    images: str
    labels: str


class LabelFormat(NamedTuple):
    """What the text files hold."""

    class_names: list[str]
    keypoint_numbers: int = 0
    """Numbers that follow the box of each object; 0 where there are no keypoints."""


def find_yolo_folders(root: Path) -> dict[str, list[SplitFolders]]:
    """Return the folders of every split, ``all`` where there are no splits; empty if it is no such layout.

    Folders of labels may be missing, but not all of them.
    """
    splits: dict[str, list[SplitFolders]] = {}
    if (root / "images").is_dir() and (root / "labels").is_dir():
        for folder in sorted((root / "images").iterdir()):
            if folder.is_dir() and (split := split_of(folder.name.rstrip("0123456789"))) is not None:
                splits.setdefault(split, []).append(SplitFolders(f"images/{folder.name}", f"labels/{folder.name}"))
        return splits or {"all": [SplitFolders("images", "labels")]}
    for folder in sorted(root.iterdir()):
        split = split_of(folder.name.rstrip("0123456789"))
        if split is not None and (folder / "images").is_dir():
            splits.setdefault(split, []).append(SplitFolders(f"{folder.name}/images", f"{folder.name}/labels"))
    has_labels = any((root / each.labels).is_dir() for folders in splits.values() for each in folders)
    return splits if has_labels else {}


def read_yolo(root: Path, problems: AnnotationProblems | None = None) -> dict[str, Annotations]:
    """Read a folder in one of these layouts.

    Args:
        root: the folder.
        problems: where to say which boxes were clipped or left out.

    Returns:
        The annotations by split, ``all`` where there are none; of the same classes.

    Raises:
        LongtailError: the names of the classes are missing, training images have no folder of labels, a file cannot be
            read or has no image, a class is not listed, or a box is outside of its image.
    """
    problems = AnnotationProblems() if problems is None else problems
    folders, label_format = _with_labels(root, find_yolo_folders(root), problems), _read_format(root)
    return {
        split: concatenate([_read_split(root, each, label_format, problems) for each in folders[split]])
        for split in (*SPLITS, "all")
        if split in folders
    }


def _with_labels(
    root: Path, splits: dict[str, list[SplitFolders]], problems: AnnotationProblems
) -> dict[str, list[SplitFolders]]:
    """Return the folders of every split without those of validation or test images that have no folder of labels.

    Raises:
        LongtailError: those of training images have none.
    """
    labelled: dict[str, list[SplitFolders]] = {}
    for split, folders in splits.items():
        for each in folders:
            if (root / each.labels).is_dir():
                labelled.setdefault(split, []).append(each)
            elif split == "train":
                raise LongtailError(
                    f"{root / each.labels}: there is no such folder; expected the labels of {root / each.images} there "
                    "(an empty folder if these images have no objects)"
                )
            else:
                problems.unlabelled.append(f"{root / each.images} (expected {root / each.labels})")
    return labelled


def _read_format(root: Path) -> LabelFormat:
    for path in (root / "data.yaml", root / "data.yml", *sorted(root.glob("*.yaml"))):
        if path.is_file():
            return _read_yaml(path)
    for path in (root / "classes.txt", root / "labels" / "classes.txt"):
        names = read_class_names(path)
        if names is not None:
            return LabelFormat(names)
    raise LongtailError(f"{root}: expected the names of the classes in data.yaml (names: […]) or classes.txt")


def _read_yaml(path: Path) -> LabelFormat:
    expected = "expected names: a list of the classes, or a mapping from 0, 1, … to them"
    try:
        # all values as text: of the words yes, no, on, off and null yaml makes others
        content = yaml.load("\n".join(read_lines(path)), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise LongtailError(f"{path}{line}: is not valid YAML; {expected}") from None
    names: Any = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if sorted(names) != sorted(map(str, range(len(names)))):
            raise LongtailError(f"{path}: {expected}")
        names = [names[str(number)] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise LongtailError(f"{path}: {expected}")
    check_unique(names, str(path), "the class")
    return LabelFormat(names, _keypoint_numbers(path, content.get("kpt_shape")))


def _keypoint_numbers(path: Path, shape: Any) -> int:
    if shape in (None, "", "~", "null"):
        return 0
    sides = shape if isinstance(shape, list) else []
    if len(sides) != 2 or not all(isinstance(side, str) and side.isdecimal() for side in sides):
        sides = ["0", "0"]
    keypoints, numbers = map(int, sides)
    if keypoints < 1 or numbers not in {2, 3}:
        raise LongtailError(
            f"{path}: kpt_shape: expected [KEYPOINTS, 2] or [KEYPOINTS, 3]; correct it, or remove it if there are none"
        )
    return keypoints * numbers


def _read_split(
    root: Path, folders: SplitFolders, label_format: LabelFormat, problems: AnnotationProblems
) -> Annotations:
    images = sorted(path for path in visible_files(root / folders.images) if is_image_name(path.name))
    names = [path.relative_to(root / folders.images).as_posix() for path in images]
    stems = [name.rpartition(".")[0] for name in names]
    check_unique(stems, str(root / folders.images), "the image")
    labels = root / folders.labels
    texts = {
        path.relative_to(labels).as_posix().rpartition(".")[0]: path
        for path in visible_files(labels)
        if path.suffix == ".txt" and path.name != "classes.txt"
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
            for line, row in _read_rows(texts[stem], label_format):
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
            ignored=np.zeros(len(table), dtype=bool),
            crowd=np.zeros(len(table), dtype=bool),
        ),
        describe,
        problems,
        files=[f"{folders.images}/{name}" for name in names],
        sizes=sizes,
        image_ids=stems,
        class_names=label_format.class_names,
    )


def _read_rows(path: Path, label_format: LabelFormat) -> list[tuple[int, list[float]]]:
    """Return the lines of a text file with their numbers: class, x1, y1, x2, y2 as fractions of the image."""
    rows, classes, further = [], len(label_format.class_names), label_format.keypoint_numbers
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            label, *values = map(float, line.split())
        except ValueError:
            values, label = [], 0.0
        if further:
            if len(values) not in {4, 4 + further}:
                raise LongtailError(
                    f"{path}, line {number}: expected a class, x, y, width, height and {further} numbers of keypoints, "
                    f"as kpt_shape in data.yaml says, got {len(line.split())} values"
                )
            values = values[:4]
        elif len(values) != 4 and (len(values) < 6 or len(values) % 2):
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
        width, height = read_shown_size(path)
    except StorageError:
        raise
    except LongtailError as error:
        return str(error)
    return height, width
