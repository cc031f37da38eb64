"""What annotations look like before they are trained on: objects and images of each class, and what looks wrong.

Legend: N images, M objects, C classes, S side of the square that images are letterboxed to, in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longtail.data.dataset import DataDetails
from longtail.data.detection.annotations import Annotations
from longtail.data.detection.assemble import AnnotationProblems
from longtail.data.samplers import ImageClasses, class_repeat_factors

SAME_IOU = 0.99
"""Two boxes of one class in one image that overlap as much are the same object, annotated twice."""
_TINY = 4.0  # pixels of the shorter side: less than a cell of the finest feature map of a usual pyramid


def annotation_details(
    splits: Mapping[str, Annotations],
    groups: Sequence[str],
    problems: AnnotationProblems,
    repeat_threshold: float,
    image_size: int,
) -> DataDetails:
    """Return what an inspection says of annotations.

    Args:
        splits: the annotations by split, train among them.
        groups: (C,) of each class.
        problems: what was changed or left out when they were read.
        repeat_threshold: t of :func:`longtail.data.samplers.repeat_factors`.
        image_size: S.
    """
    train = splits["train"]
    counted = ~train.ignored
    classes = ImageClasses(train.image_index[counted], train.labels[counted], len(train))
    present = class_repeat_factors(classes, repeat_threshold)
    factors = torch.ones(len(train.class_names), dtype=torch.float64)
    factors[: len(present)] = present
    objects, images = train.object_counts.tolist(), train.image_counts.tolist()
    doubled = [text for annotations in splits.values() for text in _describe(annotations, find_doubled(annotations))]
    tiny = [
        text for annotations in splits.values() for text in _describe(annotations, find_tiny(annotations, image_size))
    ]
    empty = [
        annotations.files[index]
        for annotations in splits.values()
        for index in torch.nonzero(annotations.num_objects == 0).flatten().tolist()
    ]
    kinds = {
        "box without area": problems.without_area,
        "box outside": problems.outside,
        "annotated twice": doubled,
        f"below {_TINY:g} pixels at size {image_size}": tiny,
        "no objects": empty,
    }
    names = ("boxes_without_area", "boxes_outside", "doubled", "tiny", "empty_images")
    values: dict[str, Any] = {
        "objects": {split: int((~annotations.ignored).sum()) for split, annotations in splits.items()},
        "ignored": {split: int(annotations.ignored.sum()) for split, annotations in splits.items()},
        "image_counts": images,
        "repeat_factors": [round(value, 6) for value in factors.tolist()],
        "repeat_threshold": repeat_threshold,
        **dict(zip(names, map(list, kinds.values()), strict=True)),
    }
    per_image = train.num_objects.sort().values
    rows = [
        ("objects", ", ".join(f"{split} {count:,}" for split, count in values["objects"].items())),
        (
            "objects in an image",
            f"{int(per_image[0])} to {int(per_image[-1])}, median {int(per_image[len(per_image) // 2])}",
        ),
        ("ignored objects", f"{sum(values['ignored'].values()):,}"),
        ("images without objects", f"{len(empty):,}"),
        ("boxes without area", f"{len(problems.without_area):,}"),
        ("boxes outside of the image", f"{len(problems.outside):,}"),
        ("objects annotated twice", f"{len(doubled):,}"),
        ("tiny objects", f"{len(tiny):,}"),
    ]
    return DataDetails(
        rows=rows,
        class_columns=("class", "group", "objects", "images", "repeat factor"),
        class_rows=[
            (name, group, f"{count:,}", f"{with_it:,}", f"{factor:.2f}")
            for name, group, count, with_it, factor in zip(
                train.class_names, groups, objects, images, factors.tolist(), strict=True
            )
        ],
        problems=[(kind, text) for kind, texts in kinds.items() if kind != "no objects" for text in texts],
        values=values,
    )


def find_doubled(annotations: Annotations) -> Tensor:
    """Return the positions of objects that another of the same image and class covers, int64 and ascending.

    They overlap by an IoU of at least :data:`SAME_IOU`; of such objects the first does not count.
    """
    boxes, classes = annotations.boxes.double(), len(annotations.class_names)
    keys = annotations.image_index * classes + annotations.labels
    by_left = torch.argsort(boxes[:, 0], stable=True)
    order = by_left[torch.argsort(keys[by_left], stable=True)]
    keys, boxes = keys[order], boxes[order]
    doubled: list[Tensor] = []
    # boxes that are the same begin at nearly the same x: only neighbours in that order have to be compared
    rows = torch.arange(len(order))
    for step in range(1, len(order)):
        rows = rows[rows + step < len(order)]
        first, second = boxes[rows], boxes[rows + step]
        near = (second[:, 0] - first[:, 0]) * SAME_IOU <= (1 - SAME_IOU) * (first[:, 2] - first[:, 0]) + 1e-9
        rows = rows[(keys[rows] == keys[rows + step]) & near]
        if not len(rows):
            break
        pairs = torch.stack([order[rows], order[rows + step]])
        doubled.append(pairs.max(dim=0).values[_iou(boxes[rows], boxes[rows + step]) >= SAME_IOU])
    return torch.cat(doubled).unique() if doubled else torch.zeros(0, dtype=torch.int64)


def find_tiny(annotations: Annotations, image_size: int) -> Tensor:
    """Return the positions of objects whose shorter side has fewer than 4 pixels in the letterboxed image."""
    scales = image_size / annotations.sizes.max(dim=1).values.double()
    boxes = annotations.boxes.double()
    sides = torch.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) * scales[annotations.image_index]
    return torch.nonzero((sides < _TINY) & ~annotations.ignored).flatten()


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the (K,) IoU of (K, 4) boxes with (K, 4) others."""
    sides = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    common = sides.clamp(min=0).prod(dim=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (first, second)]
    return common / (areas[0] + areas[1] - common)


def _describe(annotations: Annotations, positions: Tensor) -> list[str]:
    images, labels = annotations.image_index[positions].tolist(), annotations.labels[positions].tolist()
    boxes = annotations.boxes[positions].tolist()
    return [
        f"{annotations.files[image]}: {annotations.class_names[label]} at {', '.join(f'{side:g}' for side in box)}"
        for image, label, box in zip(images, labels, boxes, strict=True)
    ]
