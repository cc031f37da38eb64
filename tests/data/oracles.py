"""Reference augmentations that the library's are compared with, from torchvision's own transforms."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from longtail.data.transforms.per_image import image_tensor, seed_libraries
from longtail.randomness import mix


class CifarTransform:
    """CIFAR's recipe one image at a time: crop, mirror, AutoAugment's CIFAR policy, Cutout of half the side.

    Args:
        size: side in pixels.
    """

    def __init__(self, size: int) -> None:
        self.transform = v2.Compose(
            [
                v2.RandomCrop(size, padding=size // 8),
                v2.RandomHorizontalFlip(),
                v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
                v2.Lambda(image_tensor),
                v2.Lambda(cutout),
            ]
        )

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Return (3, S, S) uint8."""
        seed_libraries(mix(seed))
        view: Tensor = self.transform(image)
        return view


def cutout(image: Tensor) -> Tensor:
    """Black out a square of half the side around any pixel, clipped at the borders (DeVries & Taylor, 2017)."""
    size = image.shape[-1]
    y, x = torch.randint(0, size, (2,)).tolist()
    half = size // 4
    image = image.clone()
    image[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return image
