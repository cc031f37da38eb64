"""Augmentation of images together with the labels of their pixels. Legend: h and w, height and width of a view."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from longtail.data.dataset import IMAGENET_MEAN
from longtail.data.sources.segmentation import SegmentationSample
from longtail.data.transforms import PerImageTransform
from longtail.randomness import generator


@dataclass(frozen=True)
class SegmentationTransform(PerImageTransform):
    """Random scale and crop, mirror with probability .5, and jitter of brightness, contrast and saturation.

    A call takes a :class:`SegmentationSample` and returns (3, h, w) uint8 and (h, w) int64 labels. What lies outside
    the image is filled with the mean colour and unlabelled (−1).

    Args:
        size: (h, w).
        scale: smallest and largest scale; its logarithm is drawn uniformly.
        jitter: largest relative change of brightness, contrast and saturation.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    jitter: float

    def __call__(self, sample: SegmentationSample, image_id: int, keys: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the view that (keys, image id) determine."""
        draws: list[float] = torch.rand(7, generator=generator(*keys, image_id)).tolist()
        low, high = self.scale
        image, labels = _scale_and_crop(sample, self.size, low * (high / low) ** draws[0], draws[1], draws[2])
        if draws[3] < 0.5:
            image, labels = ImageOps.mirror(image), np.ascontiguousarray(labels[:, ::-1])
        for draw, enhancer in zip(
            draws[4:7], (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), strict=True
        ):
            if self.jitter:
                image = enhancer(image).enhance(1 + self.jitter * (2 * draw - 1))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(labels.astype(np.int64))


def _scale_and_crop(
    sample: SegmentationSample, size: tuple[int, int], scale: float, down: float, across: float
) -> SegmentationSample:
    """Return (h, w) pixels of the scaled image, at a vertical and horizontal place from 0 (one edge) to 1 (the other).

    Where the scaled image is smaller than the crop, the place is its place within the crop.
    """
    spans, boxes = [], []
    for side, wanted, place in zip(sample.image.size, size[::-1], (across, down), strict=True):
        start = place * (side - wanted / scale)
        first, last = max(0.0, start), min(float(side), start + wanted / scale)
        begin = min(round((first - start) * scale), wanted - 1)
        spans.append((begin, max(1, min(wanted - begin, round((last - first) * scale)))))
        boxes.append((first, last))
    (left, width), (top, height) = spans
    box = (boxes[0][0], boxes[1][0], boxes[0][1], boxes[1][1])
    image = sample.image.resize((width, height), Image.Resampling.BILINEAR, box)
    mask = Image.fromarray(sample.labels).resize((width, height), Image.Resampling.NEAREST, box)
    if (height, width) == size:
        return SegmentationSample(image, np.array(mask))
    canvas = Image.new("RGB", size[::-1], tuple(round(255 * value) for value in IMAGENET_MEAN))
    canvas.paste(image, (left, top))
    labels = np.full(size, -1, np.int32)
    labels[top : top + height, left : left + width] = np.array(mask)
    return SegmentationSample(canvas, labels)
