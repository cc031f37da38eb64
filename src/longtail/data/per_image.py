"""Augmented views one image at a time, from torchvision's and timm's own transforms: the recipes as they are published.

For photographs that are decoded as they are needed, in several processes. The batched views of
:mod:`longtail.data.views` agree with these in distribution. Legend: S side in pixels.
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

from longtail.data.pictures import upright
from longtail.randomness import mix

RECIPES = ("cifar", "imagenet", "imagenet-contrast")


class PerImageView:
    """Call with a Pillow image, its id and the keys of the draw; returns (3, S, S) uint8.

    It seeds the generators that the libraries draw from; :func:`undisturbed` keeps a caller's own.

    - cifar: crop with padding 4, mirror, AutoAugment's CIFAR policy, Cutout 16;
    - imagenet: RandomResizedCrop(.08–1), mirror, colour jitter .4 .4 .4 0, RandAugment n2 m10 mstd .5 (timm's);
    - imagenet-contrast: the same, and grey with odds .2 and blur with odds .5.

    Args:
        name: one of these.
        size: S.
    """

    def __init__(self, name: str, size: int) -> None:
        assert name in RECIPES
        self.name, self.size = name, size
        self._transform: Any = None

    def prepare(self) -> None:
        """Make the transforms; before processes are forked, so that each need not import what takes seconds."""
        if self._transform is None:
            self._transform = _compose(self.name, self.size)

    def __call__(self, image: Image.Image, image_id: int, keys: tuple[int, ...]) -> Tensor:
        """Return the view that (keys, image id) decide on."""
        self.prepare()
        _seed(mix(*keys, image_id))
        view: Tensor = self._transform(upright(image))
        return view


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave what the libraries draw from as it was: nobody's random numbers are ours to move."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _compose(name: str, size: int) -> Any:
    from torchvision.transforms import v2

    if name == "cifar":
        steps = [
            v2.RandomCrop(size, padding=size // 8),
            v2.RandomHorizontalFlip(),
            v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
            v2.Lambda(_to_tensor),
            v2.Lambda(_cutout),
        ]
        return v2.Compose(steps)
    from timm.data.auto_augment import rand_augment_transform

    mean = tuple(round(255 * value) for value in (0.485, 0.456, 0.406))
    settings = {"translate_const": int(0.45 * size), "img_mean": mean}
    steps = [
        v2.RandomResizedCrop(size, scale=(0.08, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.4, 0.0),
        rand_augment_transform("rand-n2-m10-mstd0.5", settings),
    ]
    if name == "imagenet-contrast":
        blur = v2.GaussianBlur(kernel_size=2 * (size // 20) + 1, sigma=(0.1, 2.0))
        steps += [v2.RandomGrayscale(0.2), v2.RandomApply([blur], p=0.5)]
    return v2.Compose([*steps, v2.Lambda(_to_tensor)])


def _to_tensor(image: Image.Image) -> Tensor:
    """Return (3, S, S) without moving a pixel: they stay as Pillow has them, channels last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _cutout(image: Tensor) -> Tensor:
    """Black out a square of half the side around any pixel, clipped at the borders (DeVries & Taylor, 2017)."""
    size = image.shape[-1]
    y, x = torch.randint(0, size, (2,)).tolist()
    half = size // 4
    image = image.clone()
    image[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return image
