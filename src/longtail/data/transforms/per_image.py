"""Augmentation of photographs one at a time, with torchvision's and timm's transforms, as published for ImageNet-LT.

For images that are decoded as they are needed, in several processes. Legend: S side in pixels.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longtail.data.dataset import IMAGENET_MEAN
from longtail.data.image_io import to_rgb
from longtail.data.transforms import PerImageTransform, Transform
from longtail.randomness import mix


class ImageNetTransform(PerImageTransform):
    """RandomResizedCrop(.08–1), mirror, colour jitter .4 .4 .4 0, and timm's RandAugment n2 m10 mstd .5.

    A call takes a Pillow image and returns a (3, S, S) uint8 view and no labels. It seeds the global generators that
    the libraries draw from; :func:`preserve_rng_state` keeps the caller's.

    Args:
        size: S.
        contrast: for query and key views: also grey with probability .2 and blurred with probability .5.
    """

    def __init__(self, size: int, contrast: bool = False) -> None:
        self.size, self.contrast = size, contrast
        self._transform: Any = None

    def prepare(self) -> None:
        """Build the transforms, whose imports take seconds."""
        if self._transform is None:
            self._transform = self._compose()

    def __call__(self, sample: Image.Image, image_id: int, keys: tuple[int, ...]) -> tuple[Tensor, None]:
        """Return the view that (keys, image id) determine."""
        self.prepare()
        seed_libraries(mix(*keys, image_id))
        return self._transform(to_rgb(sample)), None

    def _compose(self) -> Any:
        from timm.data.auto_augment import rand_augment_transform
        from torchvision.transforms import v2

        mean = tuple(round(255 * value) for value in IMAGENET_MEAN)
        settings = {"translate_const": int(0.45 * self.size), "img_mean": mean}
        steps = [
            v2.RandomResizedCrop(self.size, scale=(0.08, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.0),
            rand_augment_transform("rand-n2-m10-mstd0.5", settings),
        ]
        if self.contrast:
            blur = v2.GaussianBlur(kernel_size=2 * (self.size // 20) + 1, sigma=(0.1, 2.0))
            steps += [v2.RandomGrayscale(0.2), v2.RandomApply([blur], p=0.5)]
        return v2.Compose([*steps, v2.Lambda(image_tensor)])


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the global random states of torch, random and NumPy on exit."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def seed_libraries(seed: int) -> None:
    """Seed the global generators of torch (CPU), random and NumPy."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def image_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as (3, H, W) uint8 without copying it again: channels last in memory, as Pillow has them."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


IMAGENET = Transform(ImageNetTransform, per_image=True, contrast="imagenet-contrast")
IMAGENET_CONTRAST = Transform(lambda size: ImageNetTransform(size, contrast=True), per_image=True)
