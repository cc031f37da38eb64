"""The objects of a set of images, and what a detector finds in one image.

Legend: N images, M objects of all of them, K detections of one image, C classes, H and W sides of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

RLE = Mapping[str, Any]
"""A mask as COCO writes it: ``size`` (H, W) and ``counts``, run-length encoded."""
Mask = RLE | Sequence[Sequence[float]]
"""What COCO's ``segmentation`` may hold, and ``annToRLE`` of pycocotools and faster-coco-eval takes: a run-length
encoded mask, or polygons, each x and y in turn."""


class Detections(NamedTuple):
    """What a detector finds in one image."""

    boxes: Tensor
    """(K, 4) float32 x1, y1, x2, y2 in pixels of the image as it is stored."""
    labels: Tensor
    """(K,) int64 in [0, C)."""
    scores: Tensor
    """(K,) float32 in [0, 1], descending."""
    masks: Sequence[RLE] | None = None
    """K masks, where the detector makes masks."""


@dataclass(frozen=True, kw_only=True)
class PostProcessing:
    """Which of the scored boxes of an image a detector returns."""

    score_threshold: float = 0.05
    """Smallest probability of a detection, in [0, 1]."""
    nms_threshold: float = 0.5
    """Of two detections of one class that overlap by more, as intersection over union, the less probable one is left
    out."""
    max_detections: int = 100
    """The most of an image, those of highest probability."""


DEFAULT_POST_PROCESSING = PostProcessing()
"""Of a detector, if nothing else is said, and inside an exported one."""


@dataclass(frozen=True)
class Annotations:
    """The objects of N images."""

    files: tuple[str, ...]
    """N paths below the folder of the images."""
    sizes: Tensor
    """(N, 2) int64 height and width."""
    image_ids: tuple[int | str, ...]
    """N ids, as the annotations have them."""
    class_names: tuple[str, ...]
    """C names."""
    image_index: Tensor
    """(M,) int64 position of each object's image in ``files``; ascending."""
    boxes: Tensor
    """(M, 4) float32 x1, y1, x2, y2 in pixels; the right and lower sides are outside the box, as in COCO."""
    labels: Tensor
    """(M,) int64 in [0, C)."""
    ignored: Tensor
    """(M,) bool: neither found nor missed, and not trained on (COCO's iscrowd and ignore, VOC's difficult)."""
    areas: Tensor
    """(M,) float32, of the mask where there is one, else of the box; metrics divide objects by it."""
    masks: tuple[Mask, ...] | None = None
    """M masks, where there are masks, as the annotations have them. An empty list stands for an object without a mask;
    it is there only where ``partial_masks`` were asked for, as such masks cannot be compared."""
    crowd: Tensor | None = None
    """(M,) bool: the ignored that are groups (COCO's iscrowd), of which every detection inside is one; of another that
    is ignored one is, by the usual IoU. All that are ignored if None."""
    class_ids: tuple[int, ...] = ()
    """C ids of the classes in COCO or LVIS annotations; 1 to C if empty."""
    negatives: tuple[frozenset[int], ...] | None = None
    """Federated annotations (LVIS): the classes of each image that were looked for and are not there. A class that is
    neither there nor in this set is unknown in that image."""
    incomplete: tuple[frozenset[int], ...] | None = None
    """Federated annotations: the classes of each image of which not every object is annotated."""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """C ids of the classes: those of the annotations, or 1 to C."""
        return self.class_ids or tuple(range(1, len(self.class_names) + 1))

    @property
    def crowds(self) -> Tensor:
        """(M,) bool: which objects are groups."""
        return self.ignored if self.crowd is None else self.crowd

    @property
    def num_objects(self) -> Tensor:
        """(N,) int64 objects of each image, ignored ones too."""
        return torch.bincount(self.image_index, minlength=len(self))

    @property
    def object_counts(self) -> Tensor:
        """(C,) int64 objects of each class that are not ignored."""
        return torch.bincount(self.labels[~self.ignored], minlength=len(self.class_names))

    @property
    def image_counts(self) -> Tensor:
        """(C,) int64 images of each class."""
        classes = len(self.class_names)
        pairs = (self.image_index * classes + self.labels)[~self.ignored].unique()
        return torch.bincount(pairs % classes, minlength=classes)

    def objects_of(self, index: int) -> Tensor:
        """Return the positions of an image's objects, int64."""
        first, last = torch.searchsorted(self.image_index, torch.tensor([index, index + 1])).tolist()
        return torch.arange(first, last)

    def select(self, indices: Sequence[int] | Tensor) -> Annotations:
        """Return the annotations of some images, in the order of ``indices``."""
        chosen = [int(index) for index in indices]
        parts = [self.objects_of(index) for index in chosen]
        objects = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
        lengths = torch.tensor([len(part) for part in parts], dtype=torch.int64)

        def of_images(values: tuple[Any, ...] | None) -> Any:
            return None if values is None else tuple(values[index] for index in chosen)

        return Annotations(
            files=of_images(self.files),
            sizes=self.sizes[torch.tensor(chosen, dtype=torch.int64)],
            image_ids=of_images(self.image_ids),
            class_names=self.class_names,
            image_index=torch.repeat_interleave(torch.arange(len(chosen)), lengths),
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            ignored=self.ignored[objects],
            crowd=None if self.crowd is None else self.crowd[objects],
            areas=self.areas[objects],
            masks=None if self.masks is None else tuple(self.masks[index] for index in objects.tolist()),
            class_ids=self.class_ids,
            negatives=of_images(self.negatives),
            incomplete=of_images(self.incomplete),
        )


def concatenate(parts: Sequence[Annotations], *, partial_masks: bool = False) -> Annotations:
    """Return the annotations of several sets of images as one; ids of images that are not unique then are numbers.

    Args:
        parts: at least one, all of the same classes.
        partial_masks: keep masks where not all parts have them, an empty list as the mask of the other objects.
    """
    first = parts[0]
    assert all(part.class_names == first.class_names for part in parts)
    starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).tolist()
    ids = [image_id for part in parts for image_id in part.image_ids]

    def joined(name: str, lengths: Sequence[int], empty: Any) -> Any:
        values = [getattr(part, name) for part in parts]
        if all(value is None for value in values):
            return None
        filled = [(empty,) * length if value is None else value for value, length in zip(values, lengths, strict=True)]
        return tuple(value for part in filled for value in part)

    images, objects = [len(part) for part in parts], [len(part.boxes) for part in parts]
    keeps_masks = partial_masks or all(part.masks is not None for part in parts)
    return Annotations(
        files=tuple(file for part in parts for file in part.files),
        sizes=torch.cat([part.sizes for part in parts]),
        image_ids=tuple(ids) if len(set(ids)) == len(ids) else tuple(range(1, len(ids) + 1)),
        class_names=first.class_names,
        image_index=torch.cat([part.image_index + start for part, start in zip(parts, starts, strict=False)]),
        boxes=torch.cat([part.boxes for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        ignored=torch.cat([part.ignored for part in parts]),
        crowd=torch.cat([part.crowds for part in parts]),
        areas=torch.cat([part.areas for part in parts]),
        masks=joined("masks", objects, []) if keeps_masks else None,
        class_ids=first.class_ids,
        negatives=joined("negatives", images, frozenset[int]()),
        incomplete=joined("incomplete", images, frozenset[int]()),
    )
