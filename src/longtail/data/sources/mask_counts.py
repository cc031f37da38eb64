"""How many pixels of which class are in masks. Legend: N masks, C classes, K of them in a mask, H and W its sides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from longtail.data.sources.mask_files import DrawnOn

Integers = np.ndarray[Any, np.dtype[np.int64]]


class MaskCount(NamedTuple):
    """What is in a mask: of thousands of classes it has a few, so that only these are kept."""

    labels: Integers
    """(K,) classes in it, ascending; none where no pixel is labelled."""
    pixels: Integers
    """(K,) their pixels."""
    size: tuple[int, int]
    """(H, W)."""
    digest: bytes
    """Hash of the values of all pixels."""
    zeros: int = 0
    """Pixels of the value 0 in the file; other unlabelled ones may have the value that is ignored."""
    drawn: DrawnOn = "plain"
    """What it is drawn on."""


def count_mask(values: np.ndarray[Any, np.dtype[np.int32]]) -> MaskCount:
    """Return what is in a mask, of (H, W) values from 0, unlabelled, to 65,535: the number of a class, from 1."""
    pixels = np.bincount(values.ravel())[1:]
    labels = np.flatnonzero(pixels)
    digest = hashlib.blake2b(values.astype("<u2").tobytes(), digest_size=8)
    return MaskCount(labels, pixels[labels], values.shape, digest.digest())


def largest_value(masks: Sequence[MaskCount]) -> int:
    """Return the largest value of any pixel, which is the number of its class; 0 if none is labelled."""
    return max((int(mask.labels[-1]) + 1 for mask in masks if len(mask.labels)), default=0)


def class_sums(masks: Sequence[MaskCount], classes: int) -> tuple[Integers, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return (C,) the pixels of each class, and the sum over its masks of 1 / number of classes in the mask."""
    totals, shares = np.zeros(classes, dtype=np.int64), np.zeros(classes)
    for mask in masks:
        totals[mask.labels] += mask.pixels
        shares[mask.labels] += 1 / max(1, len(mask.labels))
    return totals, shares


def zero_remarks(masks: Sequence[MaskCount]) -> list[str]:
    """Return a remark on how many pixels have the value 0; none if none has."""
    zeros, pixels = (sum(mask.zeros for mask in masks), sum(mask.size[0] * mask.size[1] for mask in masks))
    if not zeros:
        return []
    return [f"{zeros / pixels:.2%} of the training pixels have the value 0, which means unlabelled, and are left out"]


def drawn_as_stored(masks: Sequence[MaskCount], remarks: list[str]) -> bool:
    """Return whether all masks of a set are drawn on the images as they are stored, where sizes tell it of some.

    Args:
        masks: of all splits.
        remarks: takes one, if there are others, of which it is not known.
    """
    count = Counter(mask.drawn for mask in masks)
    told = {drawn for drawn in ("shown", "stored") if count[drawn]}
    if count["either"] and len(told) != 1:
        images = "1 image is" if count["either"] == 1 else f"{count['either']:,} images are"
        remarks.append(
            f"{images} turned by the Exif tag, and the size of the mask does not tell whether it is turned too; it is "
            "taken to be drawn on the image as this is shown"
        )
    return told == {"stored"}
