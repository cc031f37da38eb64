"""From the columns that a file of annotations has to checked :class:`Annotations`.

Legend: N images, M objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from longtail.data.detection.annotations import Annotations, Mask
from longtail.data.paths import printable
from longtail.errors import LongtailError

Array = np.ndarray[Any, Any]

_ROUNDING = 1.0  # pixels: a box may leave its image by as much because coordinates were rounded, or counted from 1


@dataclass
class AnnotationProblems:
    """What had to be changed or left out when annotations were read; every entry names it."""

    without_area: list[str] = field(default_factory=list)
    """Boxes without width or height, which are left out."""
    outside: list[str] = field(default_factory=list)
    """Boxes that leave their image by more than a pixel, which are clipped."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Images whose size had to be read and cannot be, which are left out: path below the root, and the reason."""
    without_mask: list[str] = field(default_factory=list)
    """Objects without a mask in a file in which others have one; its masks are left out."""
    unused_categories: list[str] = field(default_factory=list)
    """Categories without objects that have the name of another one, which are left out."""
    unlabelled: list[str] = field(default_factory=list)
    """Folders of validation or test images without a folder of labels, which are left out."""

    def remarks(self, *, unreadable: bool = True) -> list[str]:
        """Return a sentence on each kind of problem.

        Args:
            unreadable: on unreadable images too; who adds them to those found later says it of all of them.
        """
        kinds = (
            (self.without_area, "1 box has no area, and is left out", "boxes have no area, and are left out"),
            (
                self.outside,
                "1 box has parts outside of the image, and is clipped",
                "boxes have parts outside of the image, and are clipped",
            ),
            (
                self.without_mask,
                "1 object has no mask, and those of its file are left out",
                "objects have no mask, and those of their file are left out",
            ),
            (
                self.unused_categories,
                "1 category without objects has the name of another, and is left out",
                "categories without objects have the name of another, and are left out",
            ),
            (
                self.unlabelled,
                "1 folder of images has no folder of labels, and is left out",
                "folders of images have no folder of labels, and are left out",
            ),
            (
                list(self.unreadable.values()) if unreadable else [],
                "1 image cannot be read, and is left out",
                "images cannot be read, and are left out",
            ),
        )
        return [
            f"{len(entries):,} {several}; the first: {entries[0]}" if len(entries) > 1 else f"{single}: {entries[0]}"
            for entries, single, several in kinds
            if entries
        ]


class Columns(NamedTuple):
    """Objects in the order of their file."""

    image_index: Array
    """(M,) int64 position of each object's image."""
    boxes: Array
    """(M, 4) float64 x1, y1, x2, y2 in pixels, the right and lower sides outside the box."""
    labels: Array
    """(M,) int64 in [0, C)."""
    ignored: Array
    """(M,) bool."""
    crowd: Array
    """(M,) bool, of the ignored."""
    empty: Array | None = None
    """(M,) bool: boxes that are to be left out as without area, besides those that have none."""
    areas: Array | None = None
    """(M,) float64; that of the box where it is NaN, and everywhere if None."""
    masks: Sequence[Mask] | None = None
    """M masks, an empty one where an object has none."""


def assemble(
    columns: Columns,
    describe: Callable[[int], str],
    problems: AnnotationProblems,
    *,
    files: Sequence[str],
    sizes: Array,
    image_ids: Sequence[int | str],
    class_names: Sequence[str],
    class_ids: Sequence[int] = (),
    negatives: Sequence[frozenset[int]] | None = None,
    incomplete: Sequence[frozenset[int]] | None = None,
    partial_masks: bool = False,
    as_written: bool = False,
) -> Annotations:
    """Return annotations whose boxes are inside their images and have an area.

    A box that is partly outside is clipped, as it can only mean the part inside; one that is outside as a whole means
    something else, such as another image or another unit, and is an error.

    Args:
        columns: the objects.
        describe: names an object by its position, for messages.
        problems: where to say what was changed.
        files: see :class:`Annotations`, as the following.
        sizes: (N, 2) int64.
        image_ids: of the images.
        class_names: of the classes.
        class_ids: of the classes.
        negatives: of every image.
        incomplete: of every image.
        partial_masks: keep masks where some objects have none.
        as_written: keep every box as it is, whether it has an area or is inside of its image.

    Raises:
        LongtailError: a coordinate is no finite number, or a box is outside of its image.
    """
    clipped, has_area = _clip(columns, describe, problems, sizes, as_written)
    kept = np.flatnonzero(has_area)
    kept = kept[np.argsort(columns.image_index[kept], kind="stable")]
    box_areas = (clipped[:, 2] - clipped[:, 0]) * (clipped[:, 3] - clipped[:, 1])
    areas = box_areas if columns.areas is None else np.where(np.isnan(columns.areas), box_areas, columns.areas)
    return Annotations(
        files=tuple(files),
        sizes=torch.from_numpy(sizes.astype(np.int64).reshape(-1, 2)),
        image_ids=tuple(image_ids),
        class_names=tuple(class_names),
        image_index=torch.from_numpy(columns.image_index[kept].astype(np.int64)),
        boxes=torch.from_numpy(clipped[kept].astype(np.float32)),
        labels=torch.from_numpy(columns.labels[kept].astype(np.int64)),
        ignored=torch.from_numpy(columns.ignored[kept].astype(bool)),
        crowd=torch.from_numpy(columns.crowd[kept].astype(bool)),
        areas=torch.from_numpy(areas[kept].astype(np.float32)),
        masks=_masks_of(columns, kept, describe, problems, partial_masks),
        class_ids=tuple(class_ids),
        negatives=None if negatives is None else tuple(negatives),
        incomplete=None if incomplete is None else tuple(incomplete),
    )


def _clip(
    columns: Columns, describe: Callable[[int], str], problems: AnnotationProblems, sizes: Array, as_written: bool
) -> tuple[Array, Array]:
    """Return (M, 4) boxes clipped to their images, and (M,) bool, False for those that are left out as without area.

    The arguments and what is raised are those of :func:`assemble`.
    """
    boxes = columns.boxes.reshape(-1, 4)
    finite = np.isfinite(boxes).all(axis=1)
    if not finite.all():
        raise LongtailError(
            f"{describe(int(np.argmin(finite)))}: has a box with coordinates that are no finite numbers"
        )
    flat: Array = np.asarray((boxes[:, 2:] <= boxes[:, :2]).any(axis=1))
    if columns.empty is not None:
        flat |= columns.empty
    flat &= not as_written
    problems.without_area += [describe(index) for index in np.flatnonzero(flat).tolist()]
    limits = sizes.astype(np.float64).reshape(-1, 2)[columns.image_index][:, [1, 0]]
    start = 0.0
    if as_written:  # as if images had no end
        start, limits = -np.inf, np.full_like(limits, np.inf)
    away = ~flat & ((boxes[:, 2:] <= start) | (boxes[:, :2] >= limits)).any(axis=1)
    if away.any():
        index = int(np.argmax(away))
        box, (width, height) = ", ".join(f"{value:g}" for value in boxes[index]), limits[index]
        more = f" ({int(away.sum()):,} boxes are)" if away.sum() > 1 else ""
        raise LongtailError(
            f"{describe(index)}: its box (x1, y1, x2, y2 = {box}) is outside of its image, {width:g} × {height:g} "
            f"pixels{more}; correct or remove it"
        )
    beyond = ~flat & ((boxes[:, :2] < start - _ROUNDING) | (boxes[:, 2:] > limits + _ROUNDING)).any(axis=1)
    problems.outside += [describe(index) for index in np.flatnonzero(beyond).tolist()]
    return np.clip(boxes, start, np.concatenate([limits, limits], axis=1)), ~flat


def _masks_of(
    columns: Columns, kept: Array, describe: Callable[[int], str], problems: AnnotationProblems, partial_masks: bool
) -> tuple[Mask, ...] | None:
    """Return the masks of the objects at some positions; None where they have none, or not all that have to.

    The arguments are those of :func:`assemble`.
    """
    masks = None if columns.masks is None else tuple(columns.masks[index] for index in kept.tolist())
    bare = [index for index, mask in zip(kept.tolist(), masks or (), strict=False) if not mask]
    if len(bare) == len(kept):
        return None
    if bare and not partial_masks:
        problems.without_mask += [describe(index) for index in bare]
        return None
    return masks


def check_unique(values: Sequence[Any], where: str, what: str) -> None:
    """Raise LongtailError if a value occurs twice.

    Args:
        values: hashable ones.
        where: begins the message.
        what: such a value is, "the image" for one.
    """
    if len(set(values)) == len(values):
        return
    seen = set[Any]()
    for value in values:
        if value in seen:
            raise LongtailError(f"{where}: {what} {printable(str(value))} occurs twice; remove one")
        seen.add(value)
