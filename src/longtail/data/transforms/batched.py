"""Augmentation of a whole batch at once, with random parameters of each image's own.

Legend: B images, S side in pixels. A view maps (B, channels, R, R) uint8 to (B, channels, S, S) float32 in [0, 1]; its
random numbers are a function of (seed, epoch, view, image id), see :mod:`longtail.randomness`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.data.transforms import BatchTransform, Transform
from longtail.data.transforms.autoaugment import CifarAutoAugment, RandAugment
from longtail.randomness import uniform


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1], channels last in memory."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def center(images: Tensor, size: int) -> Tensor:
    """Return the central (size, size) pixels of (B, channels, H, W) images, H and W at least ``size``."""
    top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
    return images[:, :, top : top + size, left : left + size]


def crop_and_flip(images: Tensor, draws: Tensor, padding: int = 4) -> Tensor:
    """Crop at random from images padded with black, and mirror one in two.

    Args:
        images: (B, channels, S, S) uint8.
        draws: (B, 3) uniform in [0, 1): vertical shift, horizontal shift, mirror.
        padding: in pixels, the largest shift.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    top = (draws[:, 0] * (2 * padding + 1)).long()
    left = (draws[:, 1] * (2 * padding + 1)).long()
    rows = top[:, None] + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(draws[:, 2:3] < 0.5, width - 1 - across, across)
    index = torch.arange(batch, device=images.device)
    return padded.permute(0, 2, 3, 1)[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor, draws: Tensor, length: int = 16) -> Tensor:
    """Black out a square centred anywhere in the image, clipped at the borders (DeVries & Taylor, 2017).

    Args:
        images: (B, channels, S, S).
        draws: (B, 2) uniform in [0, 1): vertical and horizontal centre.
        length: side of the square in pixels.
    """
    height, width = images.shape[2:]
    y, x = (draws[:, :1] * height).long(), (draws[:, 1:] * width).long()
    down = torch.arange(height, device=images.device) - y
    across = torch.arange(width, device=images.device) - x
    half = length // 2
    inside = ((down >= -half) & (down < half))[:, :, None] & ((across >= -half) & (across < half))[:, None, :]
    return images.masked_fill(inside[:, None], 0)


def affine(images: Tensor, matrices: Tensor, size: int | None = None) -> Tensor:
    """Sample images bilinearly through affine maps; black outside.

    Args:
        images: (B, channels, H, W) float.
        matrices: (B, 2, 3), from output to input coordinates in [−1, 1].
        size: side of the result in pixels; (H, W) if not given.
    """
    side = (images.shape[2], images.shape[3]) if size is None else (size, size)
    grid = F.affine_grid(matrices, [len(images), images.shape[1], *side], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _digits(images: Tensor, ids: Tensor, keys: tuple[int, ...]) -> Tensor:
    """Rotate by up to 10°, scale by .9 to 1.1, shift by up to an eighth of the side."""
    u = uniform(ids, 4, *keys) * 2 - 1
    angle, scale, shift = u[:, 0] * math.radians(10), 1 + 0.1 * u[:, 1], u[:, 2:] * 0.25
    cos, sin = angle.cos() / scale, angle.sin() / scale
    matrices = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
    return affine(to_float(images), matrices)


class _Cifar:
    """Crop, mirror, AutoAugment's CIFAR policy or RandAugment, and Cutout of half the side."""

    def __init__(self, policy: CifarAutoAugment | RandAugment) -> None:
        self.policy = policy

    def __call__(self, images: Tensor, ids: Tensor, keys: tuple[int, ...]) -> Tensor:
        u = uniform(ids, 5 + self.policy.draws, *keys)
        images = crop_and_flip(images, u[:, :3], padding=max(1, images.shape[2] // 8))
        images = self.policy(images, u[:, 5:])
        return to_float(cutout(images, u[:, 3:5], length=images.shape[2] // 2))


class _Photo:
    """RandomResizedCrop(.08–1), mirror, brightness, contrast and saturation by ±40 %."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, images: Tensor, ids: Tensor, keys: tuple[int, ...]) -> Tensor:
        u = uniform(ids, 8, *keys)
        area, ratio = 0.08 + 0.92 * u[:, 0], ((2 * u[:, 1] - 1) * math.log(4 / 3)).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        x, y = (2 * u[:, 2] - 1) * (1 - width), (2 * u[:, 3] - 1) * (1 - height)
        zero = torch.zeros_like(x)
        mirrored = torch.where(u[:, 4] < 0.5, -width, width)
        matrices = torch.stack([mirrored, zero, x, zero, height, y], dim=1).view(-1, 2, 3)
        pixels = affine(to_float(images), matrices, self.size)
        brightness, contrast, saturation = (0.6 + 0.8 * u[:, 5:]).view(-1, 3, 1, 1, 1).unbind(1)
        pixels = (pixels * brightness).clamp(0, 1)
        weights = pixels.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        mean = (pixels * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        pixels = (mean + contrast * (pixels - mean)).clamp(0, 1)
        grey = (pixels * weights).sum(1, keepdim=True)
        return (grey + saturation * (pixels - grey)).clamp(0, 1)


def _no_augmentation(size: int) -> BatchTransform:
    return lambda images, _ids, _keys: to_float(center(images, size))


def _cifar_plain(images: Tensor, ids: Tensor, keys: tuple[int, ...]) -> Tensor:
    """Crop and mirror."""
    return to_float(crop_and_flip(images, uniform(ids, 3, *keys), padding=max(1, images.shape[2] // 8)))


NONE = Transform(_no_augmentation, needs_color=False)
DIGITS = Transform(lambda _size: _digits, needs_color=False)
CIFAR = Transform(lambda _size: _Cifar(CifarAutoAugment()))
CIFAR_PLAIN = Transform(lambda _size: _cifar_plain, needs_color=False)
CIFAR_RAND = Transform(lambda _size: _Cifar(RandAugment()))
PHOTO = Transform(_Photo)
