"""Annotations in the layout of Pascal VOC (Everingham et al., IJCV 2010).

    ROOT/Annotations/NAME.xml           size and objects of an image
    ROOT/JPEGImages/NAME.jpg            the image
    ROOT/ImageSets/Main/SPLIT.txt       names, one on a line: train, val, trainval, test; without it there are no splits
    ROOT/classes.txt                    names of the classes, one on a line; without it those that the objects have

A box is xmin, ymin, xmax, ymax: of the first and the last pixel in it, counted from 1 (VOC devkit, «Annotation
guidelines»), so that 1 … W is the whole width. As the sides of a box in COCO's coordinates this is xmin − 1 … xmax,
which is how Detectron2 reads it as well. Objects that are ``difficult`` are ignored: as in VOC's evaluation they need
not be found, and a detection of one, by the usual IoU, is no error; here a second one of it is.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longtail.data.detection.annotations import Annotations
from longtail.data.detection.assemble import AnnotationProblems, Columns, assemble, check_unique
from longtail.data.image_io import is_image_name, read_size
from longtail.data.listing import split_of
from longtail.data.paths import printable
from longtail.errors import LongtailError, did_you_mean
from longtail.files import read_lines

_SIDES = ("xmin", "ymin", "xmax", "ymax")
_FLAGS = frozenset({"-1", "0", "1"})  # in VOC's list of a class: none, only difficult ones, or some are in the image


class VOCObject(NamedTuple):
    """An object of an image."""

    name: str
    """Of its class."""
    box: tuple[float, float, float, float]
    """xmin, ymin, xmax, ymax as they are written."""
    difficult: bool


class VOCImage(NamedTuple):
    """What an xml file says."""

    stem: str
    """Name of the file without its suffix."""
    size: tuple[int, int]
    """(H, W)."""
    objects: list[VOCObject]


def read_voc(
    root: Path, problems: AnnotationProblems | None = None, files: Mapping[str, str] | None = None
) -> dict[str, Annotations]:
    """Read a folder in this layout.

    Args:
        root: the folder.
        problems: where to say which boxes were clipped or left out.
        files: paths of the images below the root by their names without suffix; looked for if not given.

    Returns:
        The annotations by split, ``all`` where there are none; the same classes, in order of their names.

    Raises:
        LongtailError: a file cannot be read, an image or its annotations are missing, an image is in a list twice, a
            class is not listed, or a box is outside of its image.
    """
    problems = AnnotationProblems() if problems is None else problems
    files = _find_files(root / "JPEGImages") if files is None else files
    stems = _read_lists(root, files)
    images = {split: [_read_image(root, stem, files) for stem in names] for split, names in stems.items()}
    class_names = read_class_names(root / "classes.txt")
    if class_names is None:
        class_names = sorted({item.name for part in images.values() for image in part for item in image.objects})
    return {split: _assemble(root, part, files, class_names, problems) for split, part in images.items()}


def read_class_names(path: Path) -> list[str] | None:
    """Return the names in a file, one on a line; None if there is no such file.

    Raises:
        LongtailError: it cannot be read, is empty, or has a name twice.
    """
    if not path.is_file():
        return None
    names = [line.strip() for line in read_lines(path) if line.strip()]
    if not names:
        raise LongtailError(f"{path}: expected the names of the classes, each on a line of its own; it is empty")
    check_unique(names, str(path), "the class")
    return names


def _read_lists(root: Path, files: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of the images of every split."""
    folder = root / "ImageSets" / "Main"
    lists = {path.stem: path for path in sorted(folder.glob("*.txt"))} if folder.is_dir() else {}
    chosen = {split: path for stem, path in lists.items() if (split := split_of(stem)) is not None}
    if "trainval" in lists and "train" not in chosen:
        chosen["train"] = lists["trainval"]
    if not chosen:
        names = [path.stem for path in sorted((root / "Annotations").glob("*.xml"))]
        if not names:
            raise LongtailError(f"{root / 'Annotations'}: holds no .xml files; expected one for each image")
        return {"all": names}
    splits = {}
    for split in ("train", "val", "test"):
        if split in chosen:
            splits[split] = [_stem_of(root, line, files) for line in read_lines(chosen[split]) if line.strip()]
            check_unique(splits[split], str(chosen[split]), "the image")
    return splits


def _stem_of(root: Path, line: str, files: Mapping[str, str]) -> str:
    """Return the name in a line of a list: all of it, or what is before the flag of a list of a class."""
    whole, first = line.strip(), line.split()[0]
    if whole == first:
        return whole
    before, flag = whole.rsplit(maxsplit=1)
    named = before if flag in _FLAGS else whole
    for stem in (whole, named, first):
        if stem in files or (root / "Annotations" / f"{stem}.xml").is_file():
            return stem
    return named


def _find_files(folder: Path) -> dict[str, str]:
    """Return the images of a folder by their names without suffix, as paths below its parent.

    Raises:
        LongtailError: there is no such folder, or two images have the same name.
    """
    if not folder.is_dir():
        raise LongtailError(f"{folder}: there is no such folder; expected the images there")
    images = [path for path in sorted(folder.iterdir()) if is_image_name(path.name) and not path.name.startswith(".")]
    files: dict[str, str] = {}
    for path in images:
        other = files.setdefault(path.stem, f"{folder.name}/{path.name}")
        if other != f"{folder.name}/{path.name}":
            raise LongtailError(
                f"{printable(path)}: {path.stem}.xml may be of this image or of {printable(Path(other).name)}; rename "
                "or remove one"
            )
    return files


def _read_image(root: Path, stem: str, files: Mapping[str, str]) -> VOCImage:
    path = root / "Annotations" / f"{stem}.xml"
    if stem not in files:
        raise LongtailError(
            f"{root / 'JPEGImages' / stem}.jpg: there is no such image{did_you_mean(stem, files)[:200]}; add it, or "
            f"remove {stem} from the lists in ImageSets/Main"
        )
    try:
        tree = ET.parse(path).getroot()
    except FileNotFoundError:
        raise LongtailError(f"{path}: there is no such file; expected the objects of {files[stem]} there") from None
    except OSError as error:
        raise LongtailError(f"{path}: cannot be read: {error.strerror}") from None
    except ET.ParseError as error:
        line, column = error.position
        reason = str(error).partition(":")[0]
        raise LongtailError(
            f"{path}, line {line}: is not valid XML ({reason}, column {column}); repair or remove it"
        ) from None
    objects = []
    for number, element in enumerate(tree.iter("object"), 1):
        name, box = (element.findtext("name") or "").strip(), element.find("bndbox")
        try:
            sides = [float(box.findtext(side) or "") for side in _SIDES] if box is not None else []
        except ValueError:
            sides = []
        if not name or len(sides) != 4:
            raise LongtailError(
                f"{path}: object {number}: expected a name, and a bndbox with the numbers {', '.join(_SIDES)}"
            )
        difficult = (element.findtext("difficult") or "0").strip() == "1"
        objects.append(VOCObject(name, (sides[0], sides[1], sides[2], sides[3]), difficult))
    sides_of = [(tree.findtext(f"size/{side}") or "").strip() for side in ("height", "width")]
    if all(side.isdecimal() and int(side) > 0 for side in sides_of):
        return VOCImage(stem, (int(sides_of[0]), int(sides_of[1])), objects)
    width, height = read_size(root / files[stem])  # some tools write no size, or zeros
    return VOCImage(stem, (height, width), objects)


def _assemble(
    root: Path,
    images: Sequence[VOCImage],
    files: Mapping[str, str],
    class_names: Sequence[str],
    problems: AnnotationProblems,
) -> Annotations:
    place = {name: label for label, name in enumerate(class_names)}
    objects = [(index, number, item) for index, image in enumerate(images) for number, item in enumerate(image.objects)]

    def describe(row: int) -> str:
        index, number, item = objects[row]
        path = root / "Annotations" / f"{images[index].stem}.xml"
        return f"{path}: object {number + 1} ({printable(item.name)})"

    for row, (_, _, item) in enumerate(objects):
        if item.name not in place:
            raise LongtailError(
                f"{describe(row)}: its class is not listed in {root / 'classes.txt'}{did_you_mean(item.name, place)}"
            )
    written = np.array([item.box for _, _, item in objects], dtype=np.float64).reshape(-1, 4)
    return assemble(
        Columns(
            np.array([index for index, _, _ in objects], dtype=np.int64),
            written - np.array([1.0, 1.0, 0.0, 0.0]),
            np.array([place[item.name] for _, _, item in objects], dtype=np.int64),
            ignored=np.array([item.difficult for _, _, item in objects], dtype=bool),
            crowd=np.zeros(len(objects), dtype=bool),
            # a single row of pixels, if taken at its word; what is meant is a click instead of a box
            empty=np.any(written[:, 2:] <= written[:, :2], axis=1),
        ),
        describe,
        problems,
        files=[files[image.stem] for image in images],
        sizes=np.array([image.size for image in images], dtype=np.int64).reshape(-1, 2),
        image_ids=[image.stem for image in images],
        class_names=class_names,
    )
