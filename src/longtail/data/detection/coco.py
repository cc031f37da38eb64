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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longtail.data.detection.annotations import Annotations
from longtail.data.detection.assemble import AnnotationProblems, Columns, assemble, check_unique
from longtail.data.paths import printable
from longtail.errors import LongtailError
from longtail.files import write_text

Entry = dict[str, Any]
_PARTS = ("images", "annotations", "categories")
_BEYOND_AREAS = 1e12  # pixels: larger than the objects of any range of areas that is evaluated


def read_coco(
    path: Path, problems: AnnotationProblems | None = None, *, masks: bool = True, as_written: bool = False
) -> Annotations:
    """Read a json file in COCO's or LVIS's format.

    Classes are in order of their ids. COCO's ``iscrowd`` is what :attr:`Annotations.ignored` says. Areas are the
    file's, which are those of the masks, or those of the boxes where it has none. Whether the image files exist is not
    looked at.

    With ``as_written`` the objects are those that COCO's and LVIS's own code evaluates: no box is clipped or left out;
    of COCO ``ignore`` is not looked at, which pycocotools overwrites by ``iscrowd``; of LVIS ``iscrowd`` is not, and an
    object with ``ignore`` has an area beyond all ranges, since lvis-api ignores it without taking it for a crowd.

    Args:
        path: the file.
        problems: where to say which boxes were clipped or left out.
        masks: keep the masks, if every object has one; those of LVIS take gigabytes.
        as_written: see above; otherwise as they can be learned from.

    Raises:
        LongtailError: it is no such file; an id or an image is there twice; an annotation is of an unknown image or
            class; or a box is outside of its image.
    """
    content = _load(path)
    images, entries, categories = (content[part] for part in _PARTS)
    categories = sorted(categories, key=lambda entry: entry["id"]) if _have_ids(path, categories) else []
    class_ids = [entry["id"] for entry in categories]
    class_names = [str(name) for name in _column(path, categories, "categories", _get("name"), "a name")]
    check_unique(class_ids, str(path), "the category id")
    check_unique(class_names, str(path), "the category")
    image_ids = _column(path, images, "images", _get("id"), "an id")
    check_unique(image_ids, str(path), "the image id")
    files = _column(path, images, "images", _file_of, "a file_name or coco_url")
    check_unique(files, str(path), "the image")
    sizes = _numbers(path, images, "images", lambda entry: (entry["height"], entry["width"]), 2, "height and width")
    if len(sizes) and sizes.min() < 1:
        raise LongtailError(f"{path}: images[{int(np.argmin(sizes.min(axis=1)))}]: expected a height and width above 0")
    ids = [entry["id"] for entry in entries if "id" in entry]
    check_unique(ids, str(path), "the annotation id")
    image_index = _positions(path, entries, "image_id", image_ids, "images")
    labels = _positions(path, entries, "category_id", class_ids, "categories")
    corners = _numbers(path, entries, "annotations", _get("bbox"), 4, "a bbox of 4 numbers")
    corners[:, 2:] += corners[:, :2]
    has_areas = bool(entries) and all("area" in entry for entry in entries)
    areas = _numbers(path, entries, "annotations", lambda entry: (entry["area"],), 1, "an area")[:, 0]
    segmentations: list[Any] = [entry.get("segmentation") for entry in entries] if masks else []
    class_of = {class_id: position for position, class_id in enumerate(class_ids)}
    negatives = _class_sets(path, images, "neg_category_ids", class_of)
    crowd, ignore = (np.array([bool(entry.get(key)) for entry in entries], dtype=bool) for key in ("iscrowd", "ignore"))
    ignored = crowd | ignore
    if as_written:
        ignored = crowd if negatives is None else np.zeros_like(crowd)
        if negatives is not None and ignore.any():
            areas = areas if has_areas else (corners[:, 2:] - corners[:, :2]).prod(axis=1)
            areas, has_areas = np.where(ignore, _BEYOND_AREAS, areas), True

    def describe(index: int) -> str:
        entry = entries[index]
        name = f"annotation {entry['id']}" if "id" in entry else f"annotations[{index}]"
        return f"{path}: {name} of {printable(files[image_index[index]])}"

    return assemble(
        Columns(
            image_index,
            corners,
            labels,
            ignored,
            areas=areas if has_areas else None,
            masks=segmentations if segmentations and all(segmentations) else None,
        ),
        describe,
        AnnotationProblems() if problems is None else problems,
        files=files,
        sizes=sizes.astype(np.int64),
        image_ids=image_ids,
        class_names=class_names,
        class_ids=class_ids,
        negatives=negatives,
        incomplete=_class_sets(path, images, "not_exhaustive_category_ids", class_of),
        as_written=as_written,
    )


def to_coco(annotations: Annotations) -> dict[str, Any]:
    """Return annotations as COCO's json has them, for ``COCO`` of pycocotools or faster-coco-eval, or for a file.

    Ids of the images that are no numbers become 1, 2, …, as other tools expect numbers.
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
            "iscrowd": int(ignored),
        }
        for number, (image, label, box, area, ignored) in enumerate(
            zip(
                annotations.image_index.tolist(),
                annotations.labels.tolist(),
                boxes.tolist(),
                annotations.areas.tolist(),
                annotations.ignored.tolist(),
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
            f"{path}, line {error.lineno}: is no json ({error.msg}, column {error.colno}); is the file complete?"
        ) from None
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


def _get(key: str) -> Callable[[Entry], Any]:
    return lambda entry: entry[key]


def _file_of(image: Entry) -> str:
    if "file_name" in image:
        return str(image["file_name"])
    return "/".join(str(image["coco_url"]).split("/")[-2:])


def _column(path: Path, entries: list[Entry], part: str, read: Callable[[Entry], Any], what: str) -> list[Any]:
    try:
        return [read(entry) for entry in entries]
    except KeyError:
        for index, entry in enumerate(entries):
            try:
                read(entry)
            except KeyError:
                raise LongtailError(f"{path}: {part}[{index}]: expected {what}") from None
        raise


def _numbers(
    path: Path, entries: list[Entry], part: str, read: Callable[[Entry], Sequence[float]], width: int, what: str
) -> np.ndarray[Any, Any]:
    """Return (number of entries, width) float64; of a field that not all have, zeros if it is ``area``."""
    if part == "annotations" and width == 1 and not all("area" in entry for entry in entries):
        return np.zeros((len(entries), 1))
    try:
        rows = [read(entry) for entry in entries]
        values = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.float64)
        if values.size == len(rows) * width and (not rows or {*map(len, rows)} == {width}):
            return values.reshape(-1, width)
    except (KeyError, TypeError, ValueError):
        pass
    for index, entry in enumerate(entries):
        try:
            row = np.array(read(entry), dtype=np.float64)
        except (KeyError, TypeError, ValueError):
            row = np.zeros(0)
        if row.shape != (width,):
            name = f"annotation {entry['id']}" if part == "annotations" and "id" in entry else f"{part}[{index}]"
            raise LongtailError(f"{path}: {name}: expected {what}")
    raise AssertionError


def _positions(
    path: Path, entries: list[Entry], key: str, ids: Sequence[Any], listed: str
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return (M,) where the ids that annotations name are in ``ids``."""
    place = {entry_id: position for position, entry_id in enumerate(ids)}
    found = np.array([place.get(entry.get(key), -1) for entry in entries], dtype=np.int64)
    unknown = np.flatnonzero(found < 0)
    if len(unknown):
        entry = entries[unknown[0]]
        name = f"annotation {entry['id']}" if "id" in entry else f"annotations[{unknown[0]}]"
        more = f" ({len(unknown):,} annotations have such)" if len(unknown) > 1 else ""
        raise LongtailError(
            f"{path}: {name}: its {key} {entry.get(key)!r} is not listed in {listed}{more}; list it there, or remove "
            "the annotation"
        )
    return found


def _class_sets(path: Path, images: list[Entry], key: str, class_of: Mapping[int, int]) -> list[frozenset[int]] | None:
    if not any(key in image for image in images):
        return None
    try:
        return [frozenset(class_of[class_id] for class_id in image.get(key, ())) for image in images]
    except KeyError as error:
        raise LongtailError(f"{path}: {key}: the category id {error} is not listed in categories") from None
