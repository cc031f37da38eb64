"""Augmentations by name: of a whole batch at once, or of one image at a time.

Both are functions of (keys of the draw, image id), so that a view does not depend on the batch or process that it is
made in; see :mod:`longtail.randomness`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longtail.registry import TRANSFORMS

BatchTransform = Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]
"""(images, ids, keys of the draw) to a view, (B, channels, S, S) float32 in [0, 1].

Images are (B, channels, R, R) uint8, ids (B,) int64; an image that an epoch shows again has another number there.
"""


class PerImageTransform(ABC):
    """Augmentation of one image at a time, in the processes that decode the images."""

    def prepare(self) -> None:  # noqa: B027, most have nothing to prepare
        """Import and build what takes long; called once before worker processes are forked."""

    @abstractmethod
    def __call__(self, sample: Any, image_id: int, keys: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Return the view that (keys, image id) determine.

        Args:
            sample: what :meth:`longtail.data.images.Images.open_sample` returns.
            image_id: of the image, or another number where an epoch shows it again; for draws alone.
            keys: of the draw.

        Returns:
            (3, H, W) uint8, and what is labelled in this view: (H, W) int64 labels of its pixels, or (T, 5) float32
            boxes with their classes; None where an image has one label.
        """


AnyTransform = BatchTransform | PerImageTransform


@dataclass(frozen=True)
class Transform:
    """An augmentation, as registered in :data:`longtail.registry.TRANSFORMS`."""

    build: Callable[[int], AnyTransform]
    """Builds it for views of S × S pixels, from S."""
    per_image: bool = False
    """Whether it is a :class:`PerImageTransform`; it then starts from images at their full size."""
    needs_color: bool = True
    """Whether it expects three channels."""
    contrast: str | None = None
    """Name of the augmentation of the query and key views that goes with it, if it is another one."""


def build_transform(name: str, size: int) -> AnyTransform:
    """Return an augmentation by its name in :data:`longtail.registry.TRANSFORMS`.

    Args:
        name: of the augmentation.
        size: side of the views in pixels, S.

    Raises:
        LongtailError: there is no augmentation of that name.
    """
    return TRANSFORMS[name].build(size)
