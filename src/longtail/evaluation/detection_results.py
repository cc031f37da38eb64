"""Detections in the format of COCO's result files: a list of image_id, category_id, bbox and score.

Legend: C classes of the annotations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longtail.data.detection import Annotations, Detections
from longtail.data.detection.run_lengths import check_runs
from longtail.data.paths import nfc, printable
from longtail.errors import LongtailError, did_you_mean
from longtail.evaluation.detection_matches import coco_masks, encode_mask

_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("image_id", (int, float, str), "a number or text"),
    ("category_id", (int, float, str), "a number or text"),
    ("file_name", (str,), "a text"),
    ("category_name", (str,), "a text"),
)


def to_results(
    detections: Sequence[Detections],
    image_ids: Sequence[int | str],
    class_ids: Sequence[int],
    files: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return detections as COCO's result files have them.

    Args:
        detections: of each image.
        image_ids: of the images.
        class_ids: C ids of the classes in the annotations.
        files: paths of the images, which are added as ``file_name``.
        class_names: C names, which are added as ``category_name``.
    """
    results = []
    for position, (image_id, each) in enumerate(zip(image_ids, detections, strict=True)):
        boxes = torch.cat([each.boxes[:, :2], each.boxes[:, 2:] - each.boxes[:, :2]], dim=1).double()
        rows = zip(each.labels.tolist(), boxes.tolist(), each.scores.tolist(), strict=True)
        for index, (label, box, score) in enumerate(rows):
            entry = {"image_id": image_id, "category_id": class_ids[label], "bbox": box, "score": score}
            if each.masks is not None:
                mask = dict(each.masks[index])
                if isinstance(mask["counts"], bytes):
                    mask["counts"] = mask["counts"].decode()
                entry["segmentation"] = mask
            if class_names is not None:
                entry["category_name"] = class_names[label]
            if files is not None:
                entry["file_name"] = files[position]
            results.append(entry)
    return results


def read_results(path: Path, annotations: Annotations, entries: list[dict[str, Any]] | None = None) -> list[Detections]:
    """Return the detections of a result file, in the order of the annotations' images.

    Which image and class a detection is of say its ids; but the path under ``file_name`` and the name under
    ``category_name`` where there are such, as ``longtail predict`` writes them: its ids may be numbers of its own.

    Args:
        path: the file.
        annotations: of the images, with their ids and those of the classes.
        entries: of :func:`load_results`, for who has them already.

    Raises:
        LongtailError: it is no such file, names an image or class that the annotations do not have, or its names and
            ids contradict each other.
    """
    entries = load_results(path) if entries is None else entries
    labels, images = match_classes(path, entries, annotations), _match_images(path, entries, annotations)
    by_image: list[list[tuple[int, dict[str, Any]]]] = [[] for _ in annotations.files]
    sizes = annotations.sizes.tolist()
    with_masks = have_masks(entries)
    for number, (entry, label, image) in enumerate(zip(entries, labels, images, strict=True)):
        where = f"{path}: entry {number}"
        box, mask = entry.get("bbox"), None
        if entry.get("segmentation") and (with_masks or box is None):
            mask = _encoded(where, entry["segmentation"], sizes[image])
        if box is None and mask is not None:
            box = coco_masks().toBbox(mask).tolist()
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise LongtailError(f"{where}: expected a bbox of four numbers (x, y, width, height)")
        by_image[image].append((label, {"bbox": box, "score": entry["score"], "segmentation": mask}))
    return [_detections(found, with_masks) for found in by_image]


def have_masks(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all entries of a result file have masks, and there are any; otherwise boxes are compared alone."""
    return bool(entries) and all(entry.get("segmentation") for entry in entries)


def load_results(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a result file as they are.

    Args:
        path: the file.

    Raises:
        LongtailError: it is no such file.
    """
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise LongtailError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise LongtailError(f"{path}: is not valid JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(entries, list):
        raise LongtailError(f"{path}: expected a list of detections, as COCO's result files hold it")
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or not {"image_id", "category_id", "score"} <= set(entry):
            raise LongtailError(f"{where}: expected image_id, category_id, bbox and score")
        if not _is_number(entry["score"]):
            raise LongtailError(f"{where}: expected a number as its score, got {entry['score']!r}")
        for key, kinds, what in _KINDS:
            if not isinstance(entry.get(key, ""), kinds):
                raise LongtailError(f"{where}: expected {what} as its {key}")
    return entries


def match_classes(path: Path, entries: Sequence[Mapping[str, Any]], annotations: Annotations) -> list[int]:
    """Return the class of each entry, in [0, C): by its ``category_name`` where it has one, else by its id.

    Args:
        path: of the file, for messages.
        entries: of :func:`load_results`.
        annotations: of the classes.

    Raises:
        LongtailError: a class is not among the annotations', or one id has two names, or one name two ids.
    """
    by_id: dict[Any, int] = {class_id: label for label, class_id in enumerate(annotations.category_ids)}
    by_name = {nfc(name): label for label, name in enumerate(annotations.class_names)}
    labels, pairs = [], _Pairs(path, "category_id", "category_name", "the category")
    for number, entry in enumerate(entries):
        where, name, class_id = f"{path}: entry {number}", entry.get("category_name"), entry["category_id"]
        if name is None and class_id not in by_id:
            raise LongtailError(f"{where}: category_id {class_id!r} is not among the annotations' categories")
        if name is not None and nfc(name) not in by_name:
            raise LongtailError(
                f"{where}: the category '{printable(name)}' is not among the annotations' categories"
                f"{did_you_mean(name, annotations.class_names)}"
            )
        label = by_id[class_id] if name is None else by_name[nfc(name)]
        pairs.add(number, class_id, label, annotations.class_names[label])
        labels.append(label)
    return labels


def _match_images(path: Path, entries: Sequence[Mapping[str, Any]], annotations: Annotations) -> list[int]:
    """Return the position of each entry's image: by its ``file_name`` where it has one, else by its id."""
    by_id = {image_id: index for index, image_id in enumerate(annotations.image_ids)}
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(annotations.files):
        by_name.setdefault(_parts(name)[-1], []).append(index)
    files: dict[str, int] = {}
    images, pairs = [], _Pairs(path, "image_id", "file_name", "the image")
    for number, entry in enumerate(entries):
        where, file, image_id = f"{path}: entry {number}", entry.get("file_name"), entry["image_id"]
        if file is None:
            if image_id not in by_id:
                raise LongtailError(f"{where}: image_id {image_id!r} is not among the images of the annotations")
            image = by_id[image_id]
        else:
            if file not in files:
                files[file] = _image_of(where, file, by_name.get(_parts(file)[-1], []), annotations.files)
            image = files[file]
        pairs.add(number, image_id, image, annotations.files[image])
        images.append(image)
    taken: dict[int, str] = {}
    for name, image in files.items():
        if taken.setdefault(image, name) != name:
            raise LongtailError(
                f"{path}: {printable(taken[image])} and {printable(name)} are both the image "
                f"{printable(annotations.files[image])} of the annotations; expected one file for each image"
            )
    return images


def _image_of(where: str, file: str, candidates: Sequence[int], files: Sequence[str]) -> int:
    """Return the one of some images of the same name whose path ends in the most folders of a file's."""
    if not candidates:
        raise LongtailError(
            f"{where}: file_name {printable(file)} is not among the images of the annotations; correct it, or leave "
            "file_name out where image_id is that of the annotations"
        )
    own = _parts(file)[::-1]

    def closeness(index: int) -> tuple[int, bool]:
        """Return how many last parts are the same, and whether these are the whole path in the annotations."""
        other = _parts(files[index])[::-1]
        same = [one == another for one, another in zip(own, other, strict=False)]
        depth = [*same, False].index(False)
        return depth, depth == len(other)

    ranks = [closeness(index) for index in candidates]
    best = [index for index, rank in zip(candidates, ranks, strict=True) if rank == max(ranks)]
    if len(best) > 1:
        raise LongtailError(
            f"{where}: file_name {printable(file)} may be {printable(files[best[0]])} or {printable(files[best[1]])} "
            "of the annotations; write the path as the annotations have it"
        )
    return best[0]


def _parts(file: str) -> list[str]:
    """Return the folders and the name of a path of any system."""
    return [part for part in nfc(file).replace("\\", "/").split("/") if part not in {"", "."}] or [""]


class _Pairs:
    """Checks that ids of a file and what they stand for belong together one to one."""

    def __init__(self, path: Path, key: str, name_key: str, what: str) -> None:
        self.path, self.key, self.name_key, self.what = path, key, name_key, what
        self.of_id: dict[Any, tuple[int, str]] = {}
        self.id_of: dict[int, Any] = {}

    def add(self, number: int, own_id: Any, index: int, name: str) -> None:
        """Add what an id stands for in an entry.

        Raises:
            LongtailError: it has stood for something else, or another id for the same.
        """
        known, known_name = self.of_id.setdefault(own_id, (index, name))
        if known != index:
            raise LongtailError(
                f"{self.path}: entry {number}: {self.key} {own_id!r} is {self.what} {printable(name)} here, and "
                f"{printable(known_name)} in another entry; correct {self.key} or {self.name_key}"
            )
        other = self.id_of.setdefault(index, own_id)
        if other != own_id:
            raise LongtailError(
                f"{self.path}: entry {number}: {self.what} {printable(name)} has the {self.key} {own_id!r} here, and "
                f"{other!r} in another entry; correct {self.key} or {self.name_key}"
            )


def _encoded(where: str, mask: Any, size: Sequence[int]) -> dict[str, Any]:
    """Return the mask of an entry with its runs compressed.

    Raises:
        LongtailError: it is neither polygons nor run-length encoded.
    """
    try:
        if isinstance(mask, Mapping):
            check_runs(mask, size)
        encoded = encode_mask(mask, size)
        fits = list(encoded["size"]) == list(size)  # a polygon of two corners has no size
    except LongtailError as error:
        raise LongtailError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise LongtailError(
            f"{where}: expected a segmentation of polygons, x and y in turn, or of size and counts (run-length encoded)"
        )
    return encoded


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond float's range
        return False


def _detections(entries: list[tuple[int, dict[str, Any]]], with_masks: bool) -> Detections:
    entries = sorted(entries, key=lambda entry: -entry[1]["score"])
    boxes = torch.tensor([entry["bbox"] for _, entry in entries], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        boxes.float(),
        torch.tensor([label for label, _ in entries], dtype=torch.int64),
        torch.tensor([entry["score"] for _, entry in entries], dtype=torch.float32),
        tuple(entry["segmentation"] for _, entry in entries) if with_masks else None,
    )
