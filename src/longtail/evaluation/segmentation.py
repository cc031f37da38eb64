"""Segmentation metrics from counts of pixels, which can be summed over images and processes.

Intersections and unions are summed over the whole set, not averaged over its images, as for ADE20K.
Legend: C classes, H and W height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.data.class_order import frequency_thirds
from longtail.evaluation.metrics import mean_of_present


def count_pixels(predicted: Tensor, labels: Tensor, num_classes: int, boundary: float = 0.02) -> Tensor:
    """Return (6, C) int64 counts of the pixels of one image; those of several images can be added.

    In order: pixels labelled as a class, pixels predicted as it, both; and the same within the bands along boundaries.
    Unlabelled pixels are ignored; where they begin is a boundary of labels and predictions alike.

    Args:
        predicted: (H, W) int64 in [0, C).
        labels: (H, W) int64 in [0, C), −1 where unlabelled.
        num_classes: C.
        boundary: width of the bands as a fraction of the image's diagonal, at least one pixel.
    """
    labelled = labels >= 0
    width = max(1, round(boundary * math.hypot(*labels.shape)))
    # labels have an edge where the labelled part ends, so predictions need it as well
    bands = (boundary_mask(labels, width), boundary_mask(torch.where(labelled, predicted, -1), width))
    everywhere = torch.ones_like(labelled)
    counts = []
    for label_region, predicted_region in ((everywhere, everywhere), bands):
        label_mask, predicted_mask = labelled & label_region, labelled & predicted_region
        intersection = label_mask & predicted_mask & (predicted == labels)
        counts += [(labels, label_mask), (predicted, predicted_mask), (labels, intersection)]
    return torch.stack([torch.bincount(values[mask], minlength=num_classes) for values, mask in counts])


def boundary_mask(labels: Tensor, width: int) -> Tensor:
    """Return (H, W) bool, True for pixels with another label or the image's border within ``width`` pixels.

    Source: the band of boundary IoU, Cheng et al., CVPR 2021, arXiv 2103.16562.
    """
    values = F.pad(labels[None, None].float(), (width,) * 4, value=-2.0)
    side = 2 * width + 1

    def maximum(image: Tensor) -> Tensor:  # over squares: first along columns, then along rows
        return F.max_pool2d(F.max_pool2d(image, (side, 1), stride=1), (1, side), stride=1)

    return (maximum(values) != -maximum(-values))[0, 0]


def pixel_metrics(counts: Tensor, pixel_counts: Sequence[int], images: int) -> dict[str, Any]:
    """Return segmentation metrics of a test set, in percent.

    Args:
        counts: (6, C), :func:`count_pixels` summed over the test set.
        pixel_counts: (C,) training pixels of each class, which determine the thirds of the classes.
        images: number of images in the test set.

    Returns:
        ``mean_iou`` (over the classes that are labelled or predicted), ``head``, ``middle``, ``tail`` (the same over
        a third of the classes, by frequency), ``boundary_iou``, ``balanced_accuracy`` (mean class accuracy),
        ``top1`` (pixel accuracy), ``per_class`` (IoU; None for a class that is neither labelled nor predicted),
        ``per_class_accuracy``, ``per_class_boundary``, ``images``.
    """
    labelled, predicted, both, band_labelled, band_predicted, band_both = counts.tolist()
    iou, boundary = _iou(labelled, predicted, both), _iou(band_labelled, band_predicted, band_both)
    accuracy = [100 * b / n if n else None for n, b in zip(labelled, both, strict=True)]
    thirds = frequency_thirds(pixel_counts)
    return {
        "mean_iou": mean_of_present(iou),
        **{
            name: mean_of_present([value for value, third in zip(iou, thirds, strict=True) if third == name])
            for name in ("head", "middle", "tail")
        },
        "boundary_iou": mean_of_present(boundary),
        "balanced_accuracy": mean_of_present(accuracy),
        "top1": 100 * sum(both) / max(sum(labelled), 1),
        "per_class": iou,
        "per_class_accuracy": accuracy,
        "per_class_boundary": boundary,
        "images": images,
    }


def _iou(labelled: Sequence[int], predicted: Sequence[int], both: Sequence[int]) -> list[float | None]:
    return [100 * b / (n + p - b) if n + p - b else None for n, p, b in zip(labelled, predicted, both, strict=True)]
