"""AutoAugment's CIFAR policy (Cubuk et al., CVPR 2019) and RandAugment for a whole batch, drawn for each image.

The table of sub-policies and the magnitudes of their steps are torchvision's; an operation is applied to all the images
that drew it at once. Legend: B images, S side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_SIGNED = frozenset({*_GEOMETRIC, "Brightness", "Color", "Contrast", "Sharpness"})


class CifarAutoAugment:
    """Maps (B, 3, S, S) uint8 and (B, draws) uniform numbers in [0, 1) to (B, 3, S, S) uint8."""

    draws = 5
    """Random numbers per image: its sub-policy, then for each of two steps whether it is applied, and its sign."""

    def __init__(self) -> None:
        from torchvision.transforms import AutoAugment, AutoAugmentPolicy

        policies = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
        self.names = sorted({step[0] for policy in policies for step in policy})
        self.operations = torch.tensor([[self.names.index(step[0]) for step in policy] for policy in policies])
        self.probabilities = torch.tensor([[step[1] for step in policy] for policy in policies])
        # magnitudes run over ten levels; 0 where an operation has none
        self.levels = torch.tensor([[step[2] or 0 for step in policy] for policy in policies]) / 9

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the images after the two steps of the sub-policy that each drew."""
        # which image gets which operation is decided on the CPU, where indexing needs no synchronisation
        draws = draws.cpu()
        policy = (draws[:, 0] * len(self.operations)).long()
        images = images.contiguous()
        for step in range(2):
            happens = draws[:, 1 + 2 * step] < self.probabilities[policy, step]
            operation = torch.where(happens, self.operations[policy, step], -1)
            images = _apply(images, self.names, operation, self.levels[policy, step], draws[:, 2 + 2 * step])
        return images


class RandAugment:
    """Two operations, each any of fourteen with equal probability, at one magnitude (Cubuk et al., NeurIPS 2020).

    Operations and ranges are those of torchvision's RandAugment; called as :class:`CifarAutoAugment` is.

    Args:
        magnitude: from 0 to 30.
    """

    draws = 4
    """Random numbers per image: for each of two steps its operation and its sign."""

    names = (
        "Identity",
        *_GEOMETRIC,
        "Brightness",
        "Color",
        "Contrast",
        "Sharpness",
        "Posterize",
        "Solarize",
        "AutoContrast",
        "Equalize",
    )

    def __init__(self, magnitude: int = 9) -> None:
        self.level = magnitude / 30

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the images after two steps."""
        draws = draws.cpu()
        images = images.contiguous()
        for step in range(2):
            operation = (draws[:, 2 * step] * len(self.names)).long()
            images = _apply(
                images, self.names, operation, torch.full((len(images),), self.level), draws[:, 2 * step + 1]
            )
        return images


def _apply(images: Tensor, names: Sequence[str], operation: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Apply to every image the operation that it drew (−1: none), at its level, in the direction of its sign.

    Args:
        images: (B, 3, S, S) uint8, changed in place.
        names: of the operations.
        operation: (B,) int64, indices of ``names``.
        level: (B,) float in [0, 1].
        sign: (B,) float; negative below .5.
    """
    sign = torch.where(sign < 0.5, -1.0, 1.0)
    signed = torch.tensor([name in _SIGNED for name in names])
    # grouped on the CPU and copied at once: the number of images of an operation is known without synchronisation
    order = operation.argsort(stable=True)
    strength = torch.where(signed[operation], level * sign, level)[order].to(images.device)
    counts = torch.bincount(operation + 1, minlength=len(names) + 1).tolist()
    groups = zip(order.to(images.device).split(counts)[1:], strength.split(counts)[1:], names, strict=True)
    for chosen, of_each, name in groups:
        if len(chosen) and name != "Identity":
            images[chosen] = apply_operation(name, images[chosen], of_each)
    return images


def apply_operation(name: str, images: Tensor, strength: Tensor) -> Tensor:
    """Apply one of AutoAugment's operations.

    Args:
        name: as torchvision calls it.
        images: (B, 3, S, S) uint8.
        strength: (B,) fraction of the operation's range, in [0, 1], or [−1, 1] where it has two directions.
    """
    if name in _GEOMETRIC:
        return _geometric(name, images, strength)
    return _PIXEL[name](images, strength)


def _geometric(name: str, images: Tensor, strength: Tensor) -> Tensor:
    """Nearest-neighbour affine maps, black outside; pixel centres lie at half-integers."""
    batch, channels, height, width = images.shape
    y, x = torch.meshgrid(
        torch.arange(height, device=images.device) + 0.5, torch.arange(width, device=images.device) + 0.5, indexing="ij"
    )
    s = strength.view(-1, 1, 1)
    if name == "ShearX":
        from_x, from_y = x - 0.3 * s * y, y.expand(batch, -1, -1)
    elif name == "ShearY":
        from_x, from_y = x.expand(batch, -1, -1), y - 0.3 * s * x
    elif name == "TranslateX":
        from_x, from_y = x - (150 / 331 * width * s).trunc(), y.expand(batch, -1, -1)
    elif name == "TranslateY":
        from_x, from_y = x.expand(batch, -1, -1), y - (150 / 331 * height * s).trunc()
    else:
        cos, sin = torch.cos(s * math.radians(30)), torch.sin(s * math.radians(30))
        dx, dy = x - width / 2, y - height / 2
        from_x, from_y = cos * dx - sin * dy + width / 2, sin * dx + cos * dy + height / 2
    column, row = from_x.floor().long(), from_y.floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    flat = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).view(batch, 1, -1)
    taken = images.reshape(batch, channels, -1).gather(2, flat.expand(-1, channels, -1)).view_as(images)
    return taken.masked_fill(~inside[:, None], 0)


def _blend(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """Interpolate between ``other`` and the image, and extrapolate beyond it: factor 1 ± .9."""
    factor = 1 + 0.9 * strength.view(-1, 1, 1, 1)
    return (other + factor * (images.float() - other)).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor([0.2989, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return (images.float() * weights).sum(dim=1, keepdim=True).floor_()


def _brightness(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(images, torch.zeros((), device=images.device), strength)


def _color(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(images, _grey(images), strength)


def _contrast(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean(dim=(2, 3), keepdim=True), strength)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    weight = (kernel / kernel.sum()).expand(images.shape[1], 1, 3, 3)
    smooth = images.float()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images.float(), weight, groups=images.shape[1]).round_()
    return _blend(images, smooth, strength)


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    bits = 8 - (strength * 4).round()
    mask = (256 - 2 ** (8 - bits)).to(torch.uint8).view(-1, 1, 1, 1)
    return images & mask


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    threshold = (255 * (1 - strength)).view(-1, 1, 1, 1)
    return torch.where(images >= threshold, 255 - images, images)


def _invert(images: Tensor, _strength: Tensor) -> Tensor:
    return 255 - images


def _auto_contrast(images: Tensor, _strength: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import autocontrast

    stretched: Tensor = autocontrast(images)
    return stretched


def _equalize(images: Tensor, _strength: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import equalize

    equal: Tensor = equalize(images)
    return equal


_PIXEL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Invert": _invert,
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
}
