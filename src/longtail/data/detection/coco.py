"""Annotations as json in the formats of COCO (Lin et al., ECCV 2014) and LVIS (Gupta et al., CVPR 2019).

A box is [x, y, width, height] in pixels from the upper left corner of the image; (0, 0) is the corner of the first
pixel. LVIS has no ``file_name``, but the address where an image is (``coco_url``), of which the last two parts are its
path; and for every image the classes that were looked for and are not there (``neg_category_ids``), and those of which
not every object is annotated (``not_exhaustive_category_ids``).

Masks are kept as the file has them, as polygons or run-length encoded: ``annToRLE`` of pycocotools and of
faster-coco-eval takes either, and neither is needed to read them.

Legend: N images, M objects, C classes.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longtail.data.detection.annotations import Annotations, Mask
from longtail.data.detection.assemble import AnnotationProblems, Columns, assemble, check_unique
from longtail.data.detection.run_lengths import check_runs
from longtail.data.paths import printable
from longtail.errors import LongtailError
from longtail.files import write_text

Entry = dict[str, Any]
_PARTS = ("images", "annotations", "categories")
_LARGEST = 2**31  # pixels of a side; beyond it is no size
_FLAGS = {"": False, "0": False, "false": False, "1": True, "true": True}
_FEWEST_NUMBERS = 6  # of a polygon: three points
_MASK = "a segmentation of polygons, each x and y in turn, or run-length encoded (size and counts)"


def read_coco(
    path: Path,
    problems: AnnotationProblems | None = None,
    *,
    masks: bool = True,
    partial_masks: bool = False,
    as_written: bool = False,
) -> Annotations:
    """Read a json file in COCO's or LVIS's format.

    Classes are in order of their ids. Objects with ``iscrowd`` or ``ignore`` are ignored, the former as crowds. An
    object's area is the file's, which is that of the mask, or that of the box where the file has none. A field that is
    null is read as one that is missing. Whether the image files exist is not looked at.

    With ``as_written`` the objects are those that COCO's and LVIS's own code evaluates: no box is clipped or left out;
    of COCO ``ignore`` is not looked at, which pycocotools overwrites by ``iscrowd``; of LVIS ``iscrowd`` is not, as
    lvis-api knows no crowds.

    Args:
        path: the file.
        problems: where to say which boxes were clipped or left out, and whether masks were.
        masks: keep the masks, if every object has one; those of LVIS take gigabytes.
        partial_masks: keep them also if some objects have none, an empty list in its place; they cannot be compared.
        as_written: see above; otherwise as they can be learned from.

    Raises:
        LongtailError: it is no such file; a field is not what it should be; an id or an image occurs twice; an
            annotation is of an unknown image or class; a box is outside of its image; or, ``as_written``, the runs of
            a mask are not those of its image.
    """
    content, problems = _load(path), AnnotationProblems() if problems is None else problems
    images, entries, categories = (content[part] for part in _PARTS)
    class_ids, class_names = _read_categories(path, categories, entries, problems)
    image_ids, files, sizes = _read_images(path, images)
    ids = _column(path, entries, "annotations", _id_or_none, "a number or text as its id")
    check_unique([entry_id for entry_id in ids if entry_id is not None], str(path), "the annotation id")
    image_index = _positions(path, entries, "image_id", image_ids, "images")
    labels = _positions(path, entries, "category_id", class_ids, "categories")
    corners = _numbers(path, entries, "annotations", lambda entry: entry["bbox"], 4, "a bbox of 4 numbers")
    corners[:, 2:] += corners[:, :2]
    segmentations = _column(path, entries, "annotations", _mask_of, _MASK) if masks else None
    class_of = {class_id: position for position, class_id in enumerate(class_ids)}
    negatives = _class_sets(path, images, "neg_category_ids", class_of)
    ignored, crowd = _read_ignored(path, entries, as_written, is_federated=negatives is not None)

    def describe(index: int) -> str:
        return f"{path}: {_name_of(entries, 'annotations', index)} of {printable(files[image_index[index]])}"

    if as_written:
        _check_masks(segmentations or (), sizes[image_index], describe)
    # where no object has a mask, there is nothing to say, unless what the file has as masks is none
    if segmentations and not any(segmentations) and any(entry.get("segmentation") for entry in entries):
        problems.without_mask += map(describe, range(len(entries)))
    return assemble(
        Columns(
            image_index,
            corners,
            labels,
            ignored,
            crowd,
            areas=_areas(path, entries),
            masks=segmentations,
        ),
        describe,
        problems,
        files=files,
        sizes=sizes.astype(np.int64),
        image_ids=image_ids,
        class_names=class_names,
        class_ids=class_ids,
        negatives=negatives,
        incomplete=_class_sets(path, images, "not_exhaustive_category_ids", class_of),
        partial_masks=partial_masks,
        as_written=as_written,
    )


def _read_categories(
    path: Path, categories: list[Entry], entries: list[Entry], problems: AnnotationProblems
) -> tuple[list[int], list[str]]:
    """Return the ids and names of the classes, in order of the ids."""
    categories = sorted(categories, key=lambda entry: entry["id"]) if _have_ids(path, categories) else []
    check_unique([entry["id"] for entry in categories], str(path), "the category id")
    categories = _without_unused_twins(path, categories, entries, problems)
    names = _column(path, categories, "categories", lambda entry: _text_of(entry, "name"), "a name")
    check_unique(names, str(path), "the category")
    return [entry["id"] for entry in categories], names


def _read_images(path: Path, images: list[Entry]) -> tuple[list[Any], list[str], np.ndarray[Any, Any]]:
    """Return ids and paths of the images, and (N, 2) float64 height and width, which are whole numbers."""
    ids = _column(path, images, "images", _id_of, "an id, a number or text")
    check_unique(ids, str(path), "the image id")
    files = _column(path, images, "images", _file_of, "a file_name or coco_url")
    check_unique(files, str(path), "the image")
    sizes = _numbers(path, images, "images", lambda entry: (entry["height"], entry["width"]), 2, "height and width")
    are_sides = ((sizes >= 1) & (sizes < _LARGEST) & (sizes == np.floor(sizes))).all(axis=1)
    if not are_sides.all():
        index = int(np.argmin(are_sides))
        raise LongtailError(f"{path}: images[{index}]: expected whole numbers above 0 as its height and width")
    return ids, files, sizes


def _read_ignored(
    path: Path, entries: list[Entry], as_written: bool, is_federated: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return (M,) bool, which objects are ignored, and which of these are crowds; see :func:`read_coco`."""
    crowd, ignore = _flags(path, entries, "iscrowd"), _flags(path, entries, "ignore")
    if not as_written:
        return crowd | ignore, crowd
    return (ignore, np.zeros_like(crowd)) if is_federated else (crowd, crowd)


def to_coco(annotations: Annotations) -> dict[str, Any]:
    """Return annotations as COCO's json has them, for ``COCO`` of pycocotools or faster-coco-eval, or for a file.

    Ids of the images that are no numbers become 1, 2, …, as other tools expect numbers. Objects that are ignored have
    ``ignore``, which lvis-api looks at, and crowds ``iscrowd``, to which pycocotools alone looks.
    """
    known = annotations.category_ids
    numbers = all(isinstance(image_id, int) for image_id in annotations.image_ids)
    image_ids = annotations.image_ids if numbers else tuple(range(1, len(annotations) + 1))
    images: list[Entry] = [
        {"id": image_id, "file_name": file, "height": height, "width": width}
        for image_id, file, (height, width) in zip(
            image_ids, annotations.files, annotations.sizes.tolist(), strict=True
        )
    ]
    for key, sets in (
        ("neg_category_ids", annotations.negatives),
        ("not_exhaustive_category_ids", annotations.incomplete),
    ):
        for image, classes in zip(images, sets or (), strict=False):
            image[key] = [known[label] for label in sorted(classes)]
    boxes = annotations.boxes.double().clone()  # in which the differences of float32 are exact
    boxes[:, 2:] -= boxes[:, :2]
    entries: list[Entry] = [
        {
            "id": number,
            "image_id": image_ids[image],
            "category_id": known[label],
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        | ({"ignore": 1} if ignored else {})
        for number, (image, label, box, area, ignored, crowd) in enumerate(
            zip(
                annotations.image_index.tolist(),
                annotations.labels.tolist(),
                boxes.tolist(),
                annotations.areas.tolist(),
                annotations.ignored.tolist(),
                annotations.crowds.tolist(),
                strict=True,
            ),
            1,
        )
    ]
    for entry, mask in zip(entries, annotations.masks or (), strict=False):
        entry["segmentation"] = mask
    categories = [{"id": class_id, "name": name} for class_id, name in zip(known, annotations.class_names, strict=True)]
    return {"images": images, "annotations": entries, "categories": categories}


def write_coco(annotations: Annotations, path: Path) -> None:
    """Write annotations as a json file in COCO's format, atomically; :func:`read_coco` of it gives the same again.

    Raises:
        LongtailError: it cannot be written.
    """
    # of a name that is no text, the bytes stay; json would write them as characters of another encoding
    text = json.dumps(to_coco(annotations), ensure_ascii=False)
    write_text(path, text, errors="surrogateescape")


def _load(path: Path) -> dict[str, list[Entry]]:
    try:
        with _without_collection():
            content = json.loads(path.read_bytes().decode("utf-8-sig", "surrogateescape"))
    except OSError as error:
        raise LongtailError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise LongtailError(
            f"{path}, line {error.lineno}: is not valid JSON ({error.msg}, column {error.colno}); is the file complete?"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise LongtailError(f"{path}: is not valid JSON in COCO's or LVIS's format ({error})") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in _PARTS):
        raise LongtailError(
            f"{path}: expected an object with the lists {', '.join(_PARTS)}, as COCO and LVIS have them"
        )
    for part in _PARTS:
        wrong = next((index for index, entry in enumerate(content[part]) if not isinstance(entry, dict)), None)
        if wrong is not None:
            raise LongtailError(f"{path}: {part}[{wrong}]: expected an object with named fields")
    return content


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector from walking over millions of new objects again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _have_ids(path: Path, categories: list[Entry]) -> bool:
    if not categories:
        raise LongtailError(f"{path}: categories: expected at least one")
    for index, entry in enumerate(categories):
        if not isinstance(entry.get("id"), int):
            raise LongtailError(f"{path}: categories[{index}]: expected a whole number as its id")
    return True


def _without_unused_twins(
    path: Path, categories: list[Entry], entries: list[Entry], problems: AnnotationProblems
) -> list[Entry]:
    """Return the categories without those that have no objects, but the name of another.

    Roboflow lists the project as the category 0, which has the name of the only class where the project has it. Of a
    name without any objects the last category is kept.
    """
    of_name: dict[str, list[Entry]] = {}
    for entry in categories:
        of_name.setdefault(str(entry.get("name")), []).append(entry)
    if len(of_name) == len(categories):
        return categories
    used = {value for entry in entries if isinstance(value := entry.get("category_id"), int)}
    dropped = set[int]()
    for name, twins in of_name.items():
        unused = [entry["id"] for entry in twins if entry["id"] not in used]
        left_out = unused[:-1] if len(unused) == len(twins) else unused
        problems.unused_categories += [f"{path}: {printable(name)}, id {category_id}" for category_id in left_out]
        dropped.update(left_out)
    return [entry for entry in categories if entry["id"] not in dropped]


def _name_of(entries: list[Entry], part: str, index: int) -> str:
    """Return what an entry is called in messages."""
    entry_id = entries[index].get("id")
    if part != "annotations" or not isinstance(entry_id, int | float | str):
        return f"{part}[{index}]"
    return f"annotation {printable(str(entry_id))}"


def _id_of(entry: Entry) -> Any:
    if not isinstance(entry.get("id"), int | float | str):
        raise KeyError
    return entry["id"]


def _id_or_none(entry: Entry) -> Any:
    return None if entry.get("id") is None else _id_of(entry)


def _text_of(entry: Entry, key: str) -> str:
    if not isinstance(entry.get(key), int | float | str):
        raise KeyError
    return str(entry[key])


def _file_of(image: Entry) -> str:
    if image.get("file_name") is not None:
        return _text_of(image, "file_name")
    return "/".join(_text_of(image, "coco_url").split("/")[-2:])


def _flags(path: Path, entries: list[Entry], key: str) -> np.ndarray[Any, Any]:
    """Return (M,) bool, False where an annotation does not say."""

    def flag(entry: Entry) -> bool:
        value = entry.get(key)
        if isinstance(value, str):
            return _FLAGS[value.strip().lower()]
        if value is not None and not isinstance(value, int | float):
            raise KeyError
        return bool(value)

    return np.array(_column(path, entries, "annotations", flag, f"0 or 1 as its {key}"), dtype=bool)


def _mask_of(entry: Entry) -> Mask:
    """Return an object's mask, an empty list if it has none; raise KeyError if it is neither."""
    mask = entry.get("segmentation")
    if not mask:
        return []
    if isinstance(mask, dict):
        size, counts = mask.get("size"), mask.get("counts")
        is_encoded = isinstance(counts, str) or (isinstance(counts, list) and {*map(type, counts)} <= {int})
        if not is_encoded or not isinstance(size, list) or [*map(type, size)] != [int, int]:
            raise KeyError
        return mask
    if not isinstance(mask, list):
        raise KeyError
    polygons = mask if isinstance(mask[0], list) else [mask]  # some tools write the only polygon without its brackets
    if not all(map(_is_polygon, polygons)) or (len(polygons) > 1 and {*map(len, polygons)} == {2}):  # a list of points
        raise KeyError
    # a polygon of one or two points has no area, and four numbers would be taken as a box
    return [polygon for polygon in polygons if len(polygon) >= _FEWEST_NUMBERS]


def _check_masks(masks: Sequence[Mask], sizes: np.ndarray[Any, Any], describe: Callable[[int], str]) -> None:
    """Raise LongtailError where the runs of a mask are not those of its image: COCO's tools take it for another."""
    for index, mask in enumerate(masks):
        if isinstance(mask, Mapping):
            try:
                check_runs(mask, sizes[index])
            except LongtailError as error:
                raise LongtailError(f"{describe(index)}: {error}") from None


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) % 2 or not {*map(type, polygon)} <= {int, float}:
        return False
    try:
        return math.isfinite(sum(polygon))
    except OverflowError:
        return False


def _areas(path: Path, entries: list[Entry]) -> np.ndarray[Any, Any]:
    """Return (M,) float64, NaN where an annotation has no area."""
    areas = _numbers(path, entries, "annotations", lambda entry: (entry.get("area"),), 1, "a number as its area")[:, 0]
    wrong = (areas < 0) | np.isinf(areas)
    if wrong.any():
        name = _name_of(entries, "annotations", int(np.argmax(wrong)))
        raise LongtailError(f"{path}: {name}: expected an area of at least 0; correct or remove it")
    return areas


def _column(path: Path, entries: list[Entry], part: str, read: Callable[[Entry], Any], what: str) -> list[Any]:
    try:
        return [read(entry) for entry in entries]
    except KeyError:
        for index, entry in enumerate(entries):
            try:
                read(entry)
            except KeyError:
                raise LongtailError(f"{path}: {_name_of(entries, part, index)}: expected {what}") from None
        raise


def _numbers(
    path: Path, entries: list[Entry], part: str, read: Callable[[Entry], Sequence[Any]], width: int, what: str
) -> np.ndarray[Any, Any]:
    """Return (number of entries, width) float64, NaN in place of null."""
    try:
        rows = [read(entry) for entry in entries]
        values = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.float64)
        if {*map(type, rows)} <= {list, tuple} and {*map(len, rows)} <= {width}:
            return values.reshape(-1, width)
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    for index, entry in enumerate(entries):
        try:
            row = np.array(read(entry), dtype=np.float64)
        except (KeyError, TypeError, ValueError, OverflowError):
            row = np.zeros(0)
        if row.shape != (width,):
            raise LongtailError(f"{path}: {_name_of(entries, part, index)}: expected {what}")
    raise AssertionError


def _positions(
    path: Path, entries: list[Entry], key: str, ids: Sequence[Any], listed: str
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return (M,) where the ids that annotations name are in ``ids``."""
    place = {entry_id: position for position, entry_id in enumerate(ids)}
    try:
        positions = [place.get(entry.get(key), -1) for entry in entries]
    except TypeError:  # a list or an object, which is no key
        named = [entry.get(key) for entry in entries]
        positions = [-1 if isinstance(value, list | dict) else place.get(value, -1) for value in named]
    found = np.array(positions, dtype=np.int64)
    unknown = np.flatnonzero(found < 0)
    if len(unknown):
        name, value = _name_of(entries, "annotations", int(unknown[0])), repr(entries[unknown[0]].get(key))
        more = f" ({len(unknown):,} annotations have such)" if len(unknown) > 1 else ""
        raise LongtailError(
            f"{path}: {name}: its {key} {value:.60} is not listed in {listed}{more}; list it there, or remove the "
            "annotation"
        )
    return found


def _class_sets(path: Path, images: list[Entry], key: str, class_of: Mapping[int, int]) -> list[frozenset[int]] | None:
    given = [image.get(key) for image in images]
    if all(ids is None for ids in given):
        return None
    for index, ids in enumerate(given):
        if ids is not None and not isinstance(ids, list):
            raise LongtailError(f"{path}: images[{index}]: expected a list of category ids as its {key}")
        unknown = [class_id for class_id in ids or () if isinstance(class_id, list | dict) or class_id not in class_of]
        if unknown:
            raise LongtailError(
                f"{path}: images[{index}]: {key}: the category id {unknown[0]!r:.60} is not listed in categories"
            )
    return [frozenset(class_of[class_id] for class_id in ids or ()) for ids in given]
