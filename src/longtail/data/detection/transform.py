"""Augmentation of images together with the boxes of their objects.

Legend: S side of a view in pixels, M objects of an image, T rows of targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from longtail.box_labels import IGNORED_TARGET, PADDING_TARGET
from longtail.data.detection.images import DetectionSample
from longtail.data.letterbox import FILL
from longtail.data.transforms import PerImageTransform
from longtail.data.transforms.per_image import image_tensor
from longtail.randomness import generator

_FEWEST_PIXELS = 2.0  # of each side of a visible box; of what is smaller nothing is left after the first layers


@dataclass(frozen=True)
class DetectionTransform(PerImageTransform):
    """Random scale, place and mirror, and jitter of brightness, contrast and saturation; or just a letterbox.

    A call takes a :class:`DetectionSample` and returns (3, S, S) uint8 and (T, 5) float32 targets: x1, y1, x2, y2 in
    pixels of the view and the class, which may be
    :data:`~longtail.box_labels.PADDING_TARGET` or :data:`~longtail.box_labels.IGNORED_TARGET`.

    The image is scaled to fit the square, with its aspect kept, times a random scale. What is larger than the square
    then is cropped at a random place, with the centre of an object in it if there is one; what is smaller is at a
    random place if the scale is below 1 (zoomed out), and in the upper left corner otherwise, as
    :func:`~longtail.data.letterbox.letterbox` has it. The rest has the mean colour. An object of
    which a crop leaves less than ``min_visible`` is ignored.

    Args:
        size: S.
        max_objects: T, the most objects of any image.
        scale: smallest and largest scale; its logarithm is drawn uniformly.
        mirror: probability of the mirror image.
        jitter: largest relative change of brightness, contrast and saturation.
        min_visible: fraction of an object's area, in [0, 1].
    """

    size: int
    max_objects: int
    scale: tuple[float, float] = (1.0, 1.0)
    mirror: float = 0.0
    jitter: float = 0.0
    min_visible: float = 0.25

    def __call__(self, sample: DetectionSample, image_id: int, keys: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the view that (keys, image id) determine, and its targets."""
        draws: list[float] = torch.rand(8, generator=generator(*keys, image_id)).tolist()
        low, high = self.scale
        zoom = low * (high / low) ** draws[0]
        centre = None
        if len(sample.boxes):
            box = sample.boxes[int(draws[7] * len(sample.boxes))].tolist()
            centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        image, window, corner = _scale_and_place(sample.image, self.size, zoom, (draws[1], draws[2]), centre)
        mirrored = draws[3] < self.mirror
        if mirrored:
            image = ImageOps.mirror(image)
        for draw, enhancer in zip(
            draws[4:7], (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), strict=True
        ):
            if self.jitter:
                image = enhancer(image).enhance(1 + self.jitter * (2 * draw - 1))
        if image.size != (self.size, self.size):
            canvas = Image.new("RGB", (self.size, self.size), FILL)
            canvas.paste(image, corner)
        else:
            canvas = image
        return image_tensor(canvas), self._targets(sample, window, image.size, corner, mirrored)

    def _targets(
        self,
        sample: DetectionSample,
        window: tuple[float, float, float, float],
        shown: tuple[int, int],
        corner: tuple[int, int],
        mirrored: bool,
    ) -> Tensor:
        """Return the (T, 5) targets of a window of the image that is shown as so many pixels at a corner."""
        targets = torch.zeros(self.max_objects, 5)
        targets[:, 4] = PADDING_TARGET
        boxes = sample.boxes[: self.max_objects]
        start = boxes.new_tensor([window[0], window[1]] * 2)
        sides = boxes.new_tensor([window[2] - window[0], window[3] - window[1]] * 2)
        limits = boxes.new_tensor(shown * 2)
        scaled = (boxes - start) * (limits / sides)
        visible = scaled.clamp(min=boxes.new_zeros(4), max=limits)
        if mirrored:
            visible = torch.stack(
                [shown[0] - visible[:, 2], visible[:, 1], shown[0] - visible[:, 0], visible[:, 3]], dim=1
            )
        widths, heights = visible[:, 2] - visible[:, 0], visible[:, 3] - visible[:, 1]
        whole = ((scaled[:, 2] - scaled[:, 0]) * (scaled[:, 3] - scaled[:, 1])).clamp(min=1e-6)
        cropped = widths * heights < self.min_visible * whole * (1 - 1e-4)
        # an object that is tiny as a whole stays one: what is too small to learn is for the caller to say
        sliver = (torch.minimum(widths, heights) < _FEWEST_PIXELS) & (widths * heights < whole * (1 - 1e-4))
        ignored = sample.ignored[: self.max_objects] | cropped | sliver
        labels = torch.where(ignored, IGNORED_TARGET, sample.labels[: self.max_objects])
        rows = torch.cat([visible + boxes.new_tensor(corner * 2), labels[:, None].to(boxes.dtype)], dim=1)
        rows = rows[(widths > 0) & (heights > 0)]
        targets[: len(rows)] = rows
        return targets


def _scale_and_place(
    image: Image.Image, size: int, zoom: float, place: tuple[float, float], centre: tuple[float, float] | None
) -> tuple[Image.Image, tuple[float, float, float, float], tuple[int, int]]:
    """Return what is seen of an image, the window of the image that this is, and where its corner is in the view.

    Args:
        image: in RGB.
        size: S.
        zoom: scale beyond that of the letterbox.
        place: of the crop in the image, or of the image in the view, across and down: 0 for one edge, 1 for the other.
        centre: x and y of a point that a crop contains, in pixels of the image.
    """
    factor = zoom * size / max(image.size)
    shown, spans, corner = [], [], []
    for side, where, point in zip(image.size, place, centre or (None, None), strict=True):
        scaled, width = max(1, round(side * factor)), size / factor
        first, last = (0.0, side - width) if point is None else (max(0.0, point - width), min(side - width, point))
        start = first + where * (last - first) if scaled > size else 0.0
        spans.append((start, min(float(side), start + width)) if scaled > size else (0.0, float(side)))
        shown.append(min(scaled, size))
        corner.append(round(where * (size - scaled)) if zoom < 1 and scaled < size else 0)
    window = (spans[0][0], spans[1][0], spans[0][1], spans[1][1])
    pixels = (shown[0], shown[1])
    if pixels != image.size or window != (0, 0, *image.size):
        image = image.resize(pixels, Image.Resampling.BILINEAR, window)
    return image, window, (corner[0], corner[1])
