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


def count_pixels(
    predicted: Tensor,
    labels: Tensor,
    num_classes: int,
    boundary: float | None = 0.02,
    labels_band: Tensor | None = None,
) -> Tensor:
    """Return (6, C) int64 counts of the pixels of one image; those of several images can be added.

    In order: pixels labelled as a class, pixels predicted as it, both; and the same within the bands along boundaries.
    Unlabelled pixels are ignored; where they begin is a boundary of labels and predictions alike.

    Args:
        predicted: (H, W) int64 in [0, C).
        labels: (H, W) int64 in [0, C), −1 where unlabelled.
        num_classes: C.
        boundary: width of the bands as a fraction of the image's diagonal, at least one pixel; None for (3, C) counts,
            without those within the bands.
        labels_band: (H, W) bool, :func:`boundary_band` of the labels, which several predictions share; computed if not
            given.
    """
    labelled = labels >= 0
    regions = [(labelled, labelled)]
    if boundary is not None:
        # labels have an edge where the labelled part ends, so predictions need it as well
        predicted_band = boundary_band(torch.where(labelled, predicted, -1), boundary)
        labels_band = boundary_band(labels, boundary) if labels_band is None else labels_band
        regions.append((labelled & labels_band, labelled & predicted_band))
    counts = []
    for label_mask, predicted_mask in regions:
        intersection = label_mask & predicted_mask & (predicted == labels)
        counts += [(labels, label_mask), (predicted, predicted_mask), (labels, intersection)]
    return torch.stack([torch.bincount(values[mask], minlength=num_classes) for values, mask in counts])


def boundary_band(labels: Tensor, boundary: float) -> Tensor:
    """Return (H, W) bool, :func:`boundary_mask` with a width that is a fraction of the diagonal, at least one pixel."""
    return boundary_mask(labels, max(1, round(boundary * math.hypot(*labels.shape))))


def boundary_mask(labels: Tensor, width: int) -> Tensor:
    """Return (H, W) bool, True for pixels with another label or the image's border within ``width`` pixels.

    Source: the band of boundary IoU, Cheng et al., CVPR 2021, arXiv 2103.16562.
    """
    values = F.pad(labels, (width,) * 4, value=-2)
    side = 2 * width + 1

    def maximum(image: Tensor) -> Tensor:  # over squares: first along columns, then along rows
        return _window_maximum(_window_maximum(image, side, 0), side, 1)

    return maximum(values) != -maximum(-values)


def _window_maximum(values: Tensor, length: int, dim: int) -> Tensor:
    """Return the maximum over every window of ``length`` neighbours along a dimension, which is length − 1 shorter.

    The window doubles from step to step, so that there are log2(length) of them: pooling takes time in proportion to
    the length, and an image of 2 megapixels took seconds.
    """
    reached = 1
    while reached < length:
        step = min(reached, length - reached)
        size = values.shape[dim] - step
        values = torch.maximum(values.narrow(dim, 0, size), values.narrow(dim, step, size))
        reached += step
    return values


def pixel_metrics(counts: Tensor, pixel_counts: Sequence[int], images: int) -> dict[str, Any]:
    """Return segmentation metrics of a test set, in percent.

    Args:
        counts: (6, C) or (3, C), :func:`count_pixels` summed over the test set.
        pixel_counts: (C,) training pixels of each class, which determine the thirds of the classes.
        images: number of images in the test set.

    Returns:
        ``mean_iou`` (over the classes that are labelled or predicted), ``head``, ``middle``, ``tail`` (the same over
        a third of the classes, by frequency), ``balanced_accuracy`` (mean class accuracy), ``top1`` (pixel accuracy),
        ``per_class`` (IoU; None for a class that is neither labelled nor predicted), ``per_class_accuracy``,
        ``images``; of (6, C) counts ``boundary_iou`` and ``per_class_boundary``.
    """
    labelled, predicted, both, *in_bands = counts.tolist()
    iou = _iou(labelled, predicted, both)
    accuracy = [100 * b / n if n else None for n, b in zip(labelled, both, strict=True)]
    thirds = frequency_thirds(pixel_counts)
    metrics: dict[str, Any] = {
        "mean_iou": mean_of_present(iou),
        **{
            name: mean_of_present([value for value, third in zip(iou, thirds, strict=True) if third == name])
            for name in ("head", "middle", "tail")
        },
        "balanced_accuracy": mean_of_present(accuracy),
        "top1": 100 * sum(both) / max(sum(labelled), 1),
        "per_class": iou,
        "per_class_accuracy": accuracy,
        "images": images,
    }
    if in_bands:
        boundary = _iou(*in_bands)
        metrics |= {"boundary_iou": mean_of_present(boundary), "per_class_boundary": boundary}
    return metrics


def _iou(labelled: Sequence[int], predicted: Sequence[int], both: Sequence[int]) -> list[float | None]:
    return [100 * b / (n + p - b) if n + p - b else None for n, p, b in zip(labelled, predicted, both, strict=True)]
