"""Image files with their objects. Legend: N images, M objects of one image, S side of a letterboxed image in pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longtail.data.detection.annotations import Annotations
from longtail.data.image_io import open_image, read_shown_size, read_size, to_rgb
from longtail.data.images import FileImages
from longtail.data.letterbox import letterbox
from longtail.data.prefetch import prefetch
from longtail.data.transforms.batched import to_float
from longtail.errors import LongtailError


class DetectionSample(NamedTuple):
    """An image with its objects."""

    image: Image.Image
    """In RGB, as it is stored."""
    boxes: Tensor
    """(M, 4) float32 x1, y1, x2, y2 in pixels of the image."""
    labels: Tensor
    """(M,) int64 in [0, C)."""
    ignored: Tensor
    """(M,) bool."""


class DetectionImages(FileImages):
    """Image files with their objects.

    Args:
        root: folder that the annotations' files are below.
        annotations: of N images, by position.
        size: S.
        labels: (N,) a class of each image, from which the replacement of an unreadable one is chosen.
        max_unreadable_fraction: see :class:`~longtail.data.images.LazyImages`.
    """

    def __init__(
        self,
        root: Path,
        annotations: Annotations,
        size: int,
        labels: Tensor | None = None,
        max_unreadable_fraction: float = 0.0,
    ) -> None:
        labels = torch.zeros(len(annotations), dtype=torch.int64) if labels is None else labels
        super().__init__(root, annotations.files, size, 3, labels, max_unreadable_fraction)
        self.annotations = annotations

    def at(self, positions: Tensor) -> DetectionImages:
        """Return the images at (M,) positions, int64."""
        labels = None if self.labels is None else self.labels[positions]
        chosen = self.annotations.select(positions)
        return DetectionImages(self.root, chosen, self.size, labels, self.max_unreadable_fraction)

    def open(self, index: int) -> Image.Image:
        """Return an image in RGB, in the orientation that its boxes are in.

        Raises:
            LongtailError: it cannot be read, or has another size than the annotations say.
        """
        path = self.root / self.names[index]
        stored, (height, width) = open_image(path), self.annotations.sizes[index].tolist()
        shown = to_rgb(stored)
        if shown.size == (width, height):
            return shown
        if stored.size == (width, height):  # the annotations are of the image before its Exif tag rotates it
            plain = stored.convert("RGB")
            plain.info.clear()  # so that nobody rotates it later
            return plain
        raise LongtailError(
            f"{path}: has {shown.width} × {shown.height} pixels, its annotations say {width} × {height}; expected the "
            "same"
        )

    def check_size(self, index: int) -> None:
        """Raise LongtailError as :meth:`open` does, as far as the header of the file tells."""
        path, (height, width) = self.root / self.names[index], self.annotations.sizes[index].tolist()
        if (width, height) not in (read_size(path), read_shown_size(path)):
            self.open(index)  # which says what is wrong, if it is: of some PNG files the Exif tag follows the pixels

    def open_each(self, positions: Sequence[int]) -> Iterator[Image.Image]:
        """Yield images in RGB, decoded ahead.

        Raises:
            LongtailError: see :meth:`open`; another image in its place would have the wrong annotations.
        """
        for _, image in prefetch(self.open, positions):
            yield image

    def open_sample(self, index: int) -> DetectionSample:
        """Return an image with its objects; the next of the same class where it cannot be read.

        Raises:
            LongtailError: a larger fraction than ``max_unreadable_fraction`` cannot be read, or the whole class.
        """
        return cast("DetectionSample", self._with_fallback(index, cast("Any", self._open_with_objects)))

    def _open_with_objects(self, index: int) -> DetectionSample:
        objects, annotations = self.annotations.objects_of(index), self.annotations
        return DetectionSample(
            self.open(index), annotations.boxes[objects], annotations.labels[objects], annotations.ignored[objects]
        )

    def open_square(self, index: int) -> Image.Image:
        """Return the image at ``index`` letterboxed."""
        return letterbox(self.open(index), self.size)[0]

    def plain(self, indices: Tensor, size: int) -> Tensor:
        """Return the images at ``indices`` letterboxed, (B, 3, size, size) float32 in [0, 1]."""
        squares = [np.array(letterbox(self.open_with_fallback(index), size)[0]) for index in indices.tolist()]
        return to_float(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2))
