"""At what size images of files are used and kept, and what follows from it. Legend: S side in pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longtail.config import Data
from longtail.data.dataset import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD
from longtail.registry import TRANSFORMS

SAMPLE = 64
"""Images whose sides are read to choose a size."""
_SMALL = 64  # the largest side at which images are treated as CIFAR's are


@dataclass(frozen=True)
class SizePolicy:
    """How the images of a set are used."""

    size: int
    """Side in pixels of what a network is given, S."""
    stored: int
    """Side in pixels of the images that views are made from; photographs are kept larger, in the ratio 256 : 224."""
    in_memory: bool
    """Whether all the images are decoded once and kept; otherwise they are decoded batch by batch."""
    squares: bool
    """Whether every view is made from squares of the stored size, so that copies of these can replace the files.

    A set that memory does not hold is by default augmented as ImageNet-LT and iNaturalist are in the literature: one
    image at a time, from its full size, of which no copy is kept. Its squares are enough for a batched augmentation
    that is asked for, such as ``photo``; with copies on disk an epoch then decodes nothing."""
    augment: str
    """Default augmentation."""
    mean: tuple[float, ...]
    """Of each channel of the images in [0, 1]."""
    std: tuple[float, ...]


def natural_size(short_sides: Sequence[int]) -> int:
    """Return 32 or 64 for small images and 224 for photographs, by the median of their shorter sides in pixels."""
    median = sorted(short_sides)[len(short_sides) // 2]
    return 32 if median < 48 else 64 if median < 128 else 224


def choose_size(
    config: Data,
    images: int,
    short_sides: Callable[[], Sequence[int]],
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> SizePolicy:
    """Return how the images of a set are used.

    Args:
        config: settings of the set: image_size, memory_gib and augment.
        images: number of images in all splits.
        short_sides: returns the shorter sides in pixels of some images; called if the configuration gives no size.
        mean: of each channel of photographs; ImageNet's if not given.
        std: of each channel of photographs; ImageNet's if not given.
    """
    size = config.image_size or natural_size(short_sides())
    small = size <= _SMALL
    stored = size if small else round(size * 256 / 224)
    # augmentations of one image at a time start from photographs at their full size
    full_size = config.augment != "auto" and TRANSFORMS[config.augment].per_image and not small
    in_memory = not full_size and images * stored**2 * 3 <= config.memory_gib * 2**30
    default = "cifar" if small else "photo" if in_memory else "imagenet"
    return SizePolicy(
        size=size,
        stored=stored,
        in_memory=in_memory,
        squares=in_memory or not TRANSFORMS[default if config.augment == "auto" else config.augment].per_image,
        augment=default,
        mean=CIFAR_MEAN if small else mean or IMAGENET_MEAN,
        std=CIFAR_STD if small else std or IMAGENET_STD,
    )
