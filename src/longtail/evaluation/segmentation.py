"""Judging labels of pixels: counts that add up over a set, and what they say.

Intersections and unions are summed over the whole set, not averaged over its images, as ADE20K's convention has it.
Legend: C classes, H and W sides in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.data.scenes import thirds
from longtail.evaluation.metrics import mean_of_present


def tally_pixels(predicted: Tensor, labels: Tensor, classes: int, boundary: float = 0.02) -> Tensor:
    """Return (6, C) int64 counts of one image; those of a set add up.

    In order: labelled pixels of a class, pixels predicted as it, both; and the same within the bands along outlines.
    An unlabelled pixel counts nowhere.

    Args:
        predicted: (H, W) int64 in [0, C).
        labels: (H, W) int64 in [0, C), −1 where unlabelled.
        classes: C.
        boundary: width of the bands as a share of the diagonal, at least a pixel.
    """
    known = labels >= 0
    width = max(1, round(boundary * math.hypot(*labels.shape)))
    bands = (outlined(labels, width), outlined(predicted, width))
    everywhere = torch.ones_like(known)
    counts = []
    for of_labels, of_predicted in ((everywhere, everywhere), bands):
        true, found = known & of_labels, known & of_predicted
        both = true & found & (predicted == labels)
        counts += [(labels, true), (predicted, found), (labels, both)]
    return torch.stack([torch.bincount(values[chosen], minlength=classes) for values, chosen in counts])


def outlined(labels: Tensor, width: int) -> Tensor:
    """Return (H, W) bool: which pixels have another label, or the image's border, within ``width`` pixels either way.

    Source: the band of boundary IoU, Cheng et al., CVPR 2021, arXiv 2103.16562.
    """
    values = F.pad(labels[None, None].float(), (width,) * 4, value=-2.0)
    side = 2 * width + 1

    def largest(of: Tensor) -> Tensor:  # a square's maximum is that of its columns' maxima
        return F.max_pool2d(F.max_pool2d(of, (side, 1), stride=1), (1, side), stride=1)

    return (largest(values) != -largest(-values))[0, 0]


def pixel_metrics(counted: Tensor, pixel_counts: Sequence[int], images: int) -> dict[str, Any]:
    """Judge a segmentation, in percent.

    Args:
        counted: (6, C), :func:`tally_pixels` summed over a test set.
        pixel_counts: (C,) training pixels a class; they make the thirds.
        images: of the test set.

    Returns:
        ``mean_iou`` (over the classes that are in the truth or in the prediction), ``head``, ``middle``, ``tail`` (the
        same over a third), ``boundary_iou``, ``balanced_accuracy`` (mean class accuracy), ``top1`` (pixel accuracy),
        ``per_class`` (IoU; None for a class in neither), ``per_class_accuracy``, ``per_class_boundary``, ``images``.
    """
    true, found, both, band_true, band_found, band_both = counted.tolist()
    iou, boundary = _iou(true, found, both), _iou(band_true, band_found, band_both)
    accuracy = [100 * b / t if t else None for t, b in zip(true, both, strict=True)]
    names = thirds(pixel_counts)

    def of_third(third: str) -> float | None:
        return mean_of_present([value for value, name in zip(iou, names, strict=True) if name == third])

    return {
        "mean_iou": mean_of_present(iou),
        **{
            third: mean_of_present([v for v, n in zip(iou, names, strict=True) if n == third])
            for third in ("head", "middle", "tail")
        },
        "boundary_iou": mean_of_present(boundary),
        "balanced_accuracy": mean_of_present(accuracy),
        "top1": 100 * sum(both) / max(sum(true), 1),
        "per_class": iou,
        "per_class_accuracy": accuracy,
        "per_class_boundary": boundary,
        "images": images,
    }


def _iou(true: Sequence[int], found: Sequence[int], both: Sequence[int]) -> list[float | None]:
    return [100 * b / (t + f - b) if t + f - b else None for t, f, b in zip(true, found, both, strict=True)]
