"""Held-out images: the test and validation images of a set that has none of its own, and what is left to train on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from longtail.config import Data
from longtail.data.imbalance import stratified_split
from longtail.errors import LongtailError

_SHOWN = 5  # names of classes in a remark


def held_out_fractions(splits: Collection[str], config: Data, remarks: list[str]) -> tuple[float, float]:
    """Return the fractions of the training images that are held out for the test and for validation.

    Args:
        splits: names of those that the set has.
        config: ``test_fraction`` and ``val_fraction``, for splits that are missing.
        remarks: where to say that a fraction is not used.
    """
    if "val" in splits and config.val_fraction > 0:
        remarks.append("data.val_fraction is not used: the set has validation images of its own")
    return (
        0.0 if "test" in splits else config.test_fraction,
        0.0 if "val" in splits else config.val_fraction,
    )


def hold_out(
    labels: Tensor, class_names: Sequence[str], test: float, val: float, seed: int, remarks: list[str]
) -> dict[str, Tensor]:
    """Return the positions of the images in ``train`` and in the splits that are asked for, each (n,) int64.

    A split is empty where no class has enough images.

    Args:
        labels: (N,) int64 class of each image.
        class_names: of the C classes.
        test: fraction of each class for the test; 0 makes no such split.
        val: fraction of each class for validation; 0 makes no such split.
        seed: decides which images.
        remarks: where to say which classes are not in every split.
    """
    assignment, short = stratified_split(labels, len(class_names), val, test, seed)
    if short:
        remarks.append(remark_on_short_classes([class_names[index] for index in short]))
    numbers = {"train": 0} | ({"val": 1} if val > 0 else {}) | ({"test": 2} if test > 0 else {})
    return {name: torch.nonzero(assignment == number).flatten() for name, number in numbers.items()}


def remark_on_short_classes(names: Sequence[str]) -> str:
    """Return the remark on classes with fewer images than splits."""
    shown = ", ".join(names[:_SHOWN]) + ("…" if len(names) > _SHOWN else "")
    classes = "1 class has" if len(names) == 1 else f"{len(names)} classes have"
    return f"{classes} too few images for every split ({shown})"


def check_smallest_class(
    labels: Tensor,
    class_names: Sequence[str],
    where: str,
    min_images: int,
    unreadable: Sequence[tuple[int, str]] = (),
) -> None:
    """Raise LongtailError if a class has fewer training images than ``min_images``.

    Args:
        labels: (N,) int64 classes of the training images, without those that cannot be read.
        class_names: of the C classes.
        where: the images are, for the message: «below FOLDER», «in data.name 'NAME'».
        min_images: the setting ``data.min_images``.
        unreadable: class and reason of each training image that cannot be read; the reason names the file.
    """
    counts = torch.bincount(labels, minlength=len(class_names))
    index = int(counts.argmin())
    count = int(counts[index])
    if count < min_images:
        expected = f"{min_images} are" if min_images > 1 else "1 is"
        reasons = [reason for label, reason in unreadable if label == index]
        readable, cause = " that can be read" * bool(reasons), ""
        if reasons:
            cause = f"; {len(reasons)} cannot be read: {reasons[0]}{' …' * (len(reasons) > 1)}"
        raise LongtailError(
            f"class '{class_names[index]}' has {count} training image{'s' * (count != 1)}{readable} {where}: at least "
            f"{expected} expected (data.min_images); add images or remove the class{cause}"
        )
