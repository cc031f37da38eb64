"""Splitting annotated images, so that rare classes are on both sides.

An image has several classes, and is in one split as a whole. The rarest class is placed first and each image goes where
its classes are missing most, as in iterative stratification (Sechidis, Tsoumakas and Vlahavas, ECML 2011). That alone
may leave a class of two images in one split; :mod:`longtail.data.grouped_split`, whose groups are the images here,
repairs it by a local search.

Legend: N images, C classes.
"""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtail.config import Data
from longtail.data.detection.annotations import Annotations, concatenate
from longtail.data.detection.coco import write_coco
from longtail.data.detection.layouts import read_annotated_images
from longtail.data.grouped_split import grouped_split
from longtail.data.listing import SPLITS
from longtail.data.paths import printable
from longtail.errors import LongtailError
from longtail.files import make_folder
from longtail.randomness import Stream, generator, mix

_EMPTY = mix(Stream.EMPTY_IMAGES)


class ImageSplit(NamedTuple):
    """Parts of annotated images."""

    parts: Tensor
    """(N,) int64: 0 for train, 1 for val, 2 for test."""
    missing: list[int]
    """Classes with objects, but without an image in one of the parts."""


def split_images(annotations: Annotations, val: float, test: float, seed: int) -> ImageSplit:
    """Split annotated images into train, val and test.

    A class of at least 2 images is in train and in test (in val where no test is asked for) and one of at least 3 in
    all parts, wherever the other classes of its images allow it; and otherwise it is said to be missing. One of a
    single image is in train. Images without objects are divided by the fractions.

    Args:
        annotations: of N images.
        val: fraction of each class's images for validation, in [0, 1); 0 makes no such part.
        test: fraction of each class's images for the test, in [0, 1); 0 makes no such part.
        seed: decides which images.
    """
    classes = len(annotations.class_names)
    counted = ~annotations.ignored
    pairs = (annotations.image_index * classes + annotations.labels)[counted].unique()
    images, labels = pairs // classes, pairs % classes
    parts = torch.full((len(annotations),), -1, dtype=torch.int64)
    missing: list[int] = []
    if len(pairs):
        split = grouped_split(labels, images, classes, val, test, seed, strict=True)
        parts[images] = split.parts
        missing = split.missing
    empty = torch.nonzero(parts < 0).flatten()
    empty = empty[torch.randperm(len(empty), generator=generator(seed, _EMPTY))]
    in_test, in_val = round(test * len(empty)), round(val * len(empty))
    parts[empty] = 0
    parts[empty[:in_test]] = 2
    parts[empty[in_test : in_test + in_val]] = 1
    return ImageSplit(parts, missing)


def write_split(config: Data, out: Path, val: float, test: float, seed: int) -> dict[str, Any]:
    """Split a set, and write train.json, val.json and test.json in COCO's format; splits that it has are joined.

    Such a file of an earlier split is removed where this one has no such part: its images may be trained on now.

    Args:
        config: the set.
        out: the folder of the files.
        val: see :func:`split_images`, as the following.
        test: fraction of each class's images for the test.
        seed: decides which images.

    Returns:
        ``root`` (folder that the paths are relative to), ``images`` (their number by split), ``short`` (names of the
        classes without an image in one of the splits), ``remarks`` and ``data`` (flags to train on the split).

    Raises:
        LongtailError: the set cannot be read, nothing would be left to train on, a file of the split is one that the
            set is read from, or one cannot be written.
    """
    annotated = read_annotated_images(config, masks="all")
    for path in (out / f"{name}.json" for name in SPLITS):
        if path.exists() and any(path.samefile(read) for read in annotated.json_files):
            raise LongtailError(f"--out {out}: {path} is read by this command; choose another --out")
    whole = concatenate(list(annotated.splits.values()), partial_masks=True)
    split = split_images(whole, val, test, seed)
    chosen = {name: torch.nonzero(split.parts == number).flatten() for number, name in enumerate(SPLITS)}
    if not len(chosen["train"]):
        raise LongtailError(f"{annotated.root}: none of its {len(whole)} images would be left to train on; add images")
    make_folder(out)
    files = {name: out / f"{name}.json" for name, images in chosen.items() if len(images)}
    partial = {name: out / f".{name}.json.partial" for name in files}
    try:
        for name, path in partial.items():
            write_coco(whole.select(chosen[name]), path)
        # an interruption may leave the files of one split, or no training set, but never one beside the others of
        # another split, whose images could be in it
        for name in SPLITS:
            (out / f"{name}.json").unlink(missing_ok=True)
        for name in reversed(files):
            partial[name].rename(files[name])
    except OSError as error:
        raise LongtailError(f"{error.filename or out}: cannot be written: {error.strerror}") from None
    finally:
        for path in partial.values():
            with contextlib.suppress(OSError):
                path.unlink()
    remarks = [annotated.layout, *annotated.problems.remarks()]
    bare = [index for index, mask in enumerate(whole.masks or ()) if not mask]
    if bare:
        image = whole.files[int(whole.image_index[bare[0]])]
        remarks.append(
            f"{len(bare):,} of {len(whole.boxes):,} objects have no mask, and are written without one; the first is of "
            f"{printable(image)}"
        )
    if len(annotated.splits) > 1:
        remarks.append(f"its own splits ({', '.join(annotated.splits)}) were joined and divided again")
    named = " ".join(f"--data.{name} {shlex.quote(str(path))}" for name, path in files.items())
    return {
        "root": str(annotated.root),
        "images": {name: len(images) for name, images in chosen.items()},
        "short": [whole.class_names[label] for label in split.missing],
        "remarks": remarks,
        "data": f"--data.source boxes --data.root {shlex.quote(str(annotated.root))} {named}",
    }
