"""Random detections and annotations."""

from __future__ import annotations

import numpy as np
import torch

from longtail.data.detection import Annotations, Detections
from longtail.evaluation.detection_matches import coco_masks

SIDE = 256


def draw_detections(
    seed: int, *, crowd: bool = True, ties: bool = True, masks: bool = False
) -> tuple[list[Detections], Annotations]:
    """Return detections and annotations of 24 images and 4 classes.

    The last class has no object, the last image none either, and the one before no detection. Most detections lie
    near an object, some have another class. Masks are ellipses in the boxes.
    """
    rng = np.random.default_rng(seed)
    images, classes = 24, 4
    index = np.sort(rng.integers(images - 1, size=6 * images))
    corner, sides = rng.uniform(0, 90, (len(index), 2)), rng.uniform(8, 150, (len(index), 2))
    boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
    labels = rng.choice(classes - 1, size=len(index), p=[0.6, 0.25, 0.15])
    codes = tuple(_ellipse(box) for box in boxes) if masks else None
    areas = coco_masks().area(list(codes)) if codes else (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    annotations = Annotations(
        files=tuple(f"{image}.png" for image in range(images)),
        sizes=torch.full((images, 2), SIDE),
        image_ids=tuple(range(images)),
        class_names=("a", "b", "c", "d"),
        image_index=torch.from_numpy(index),
        boxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        ignored=torch.from_numpy(rng.random(len(index)) < (0.12 if crowd else 0)),
        areas=torch.from_numpy(np.asarray(areas, dtype=np.float32)),
        masks=codes,
    )
    detections = []
    for image in range(images):
        objects = annotations.objects_of(image).numpy()
        count = 0 if image == images - 2 else 12
        chosen = rng.choice(objects, count) if len(objects) else objects
        near = boxes[chosen] + rng.normal(0, 5, (len(chosen), 4))
        if len(objects) == 0:
            near = np.array([[3.0, 4.0, 50.0, 60.0]])
        near = near.clip(0, SIDE)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        other = rng.random(len(near)) < 0.25
        label = np.where(other, rng.integers(classes, size=len(near)), labels[chosen] if len(objects) else 0)
        drawn = rng.random(len(near))
        scores = np.sort(drawn.round(1) if ties else drawn)[::-1].astype(np.float32).copy()
        detections.append(
            Detections(
                torch.from_numpy(near.astype(np.float32)),
                torch.from_numpy(label),
                torch.from_numpy(scores),
                tuple(_ellipse(box) for box in near.astype(np.float32)) if masks else None,
            )
        )
    return detections, annotations


def _ellipse(box: np.ndarray) -> dict[str, object]:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    inside = ((columns - x) / max(1, box[2] - x)) ** 2 + ((rows - y) / max(1, box[3] - y)) ** 2 <= 1
    code: dict[str, object] = coco_masks().encode(np.asfortranarray(inside.astype(np.uint8)))
    return code
