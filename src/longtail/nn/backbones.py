"""Backbones: the CIFAR ResNets, a small network for 8 × 8 images, and any timm model by name.

A backbone maps normalised images (B, channels, H, W) to features (B, F), and has F as ``num_features``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from longtail.errors import LongtailError, did_you_mean
from longtail.nn.pretrained import pretrained_cfg_overlay, wrap_timm_errors


class _Block(nn.Module):
    """Two 3 × 3 convolutions with a parameter-free shortcut (He et al., CVPR 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x, inplace=True)


class CifarResNet(nn.Module):
    """The ResNet with 6n + 2 layers for 32 × 32 images; 0.47 M parameters with 32 layers.

    Args:
        depth: number of layers, 6n + 2.
        channels: channels of the images.

    Source: He et al., CVPR 2016, arXiv 1512.03385, section 4.2.
    """

    num_features = 64

    def __init__(self, depth: int, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks, inputs = [], 16
        for outputs, first_stride in ((16, 1), (32, 2), (64, 2)):
            for index in range((depth - 2) // 6):
                blocks.append(_Block(inputs, outputs, first_stride if index == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 64) features."""
        y = self.blocks(F.relu(self.bn(self.stem(x)), inplace=True))
        features: Tensor = y.mean(dim=(2, 3))
        return features


class SmallConv(nn.Module):
    """Three stages of two 3 × 3 convolutions, with pooling between them, for images of 8 × 8.

    Args:
        width: channels of the first stage; each further stage has twice as many.
        channels: channels of the images.
    """

    def __init__(self, width: int, channels: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage in range(3):
            for _ in range(2):
                layers += [nn.Conv2d(inputs, width << stage, 3, 1, 1, bias=False), nn.BatchNorm2d(width << stage)]
                layers += [nn.ReLU(inplace=True)]
                inputs = width << stage
            if stage < 2:
                layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.num_features = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 4 · width) features."""
        features: Tensor = self.layers(x).mean(dim=(2, 3))
        return features


CUSTOM_BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": functools.partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "conv8": functools.partial(SmallConv, 16),
    "conv8-tiny": functools.partial(SmallConv, 3),
}
"""Networks that timm does not have, by name; called with ``channels``."""


def build_backbone(name: str, channels: int = 3, pretrained: str = "none") -> nn.Module:
    """Return a network without its classifier, which has its feature width as ``num_features``.

    Args:
        name: one of :data:`CUSTOM_BACKBONES`, or a timm model.
        channels: channels of the images.
        pretrained: ``none``, ``timm`` (the weights that timm downloads at first use), or a file of weights for the
            timm model.

    Raises:
        LongtailError: there is no such network, or its weights cannot be loaded.
    """
    if name in CUSTOM_BACKBONES:
        if pretrained != "none":
            raise LongtailError(f"pretrained {pretrained}: there are no weights for {name}, only for timm models")
        return CUSTOM_BACKBONES[name](channels=channels)
    import timm  # imported here, since it takes 2 s and many trainings do not need it

    if not timm.is_model(name.split(".")[0]):
        raise LongtailError(
            f"network '{name}' is not known{did_you_mean(name, [*CUSTOM_BACKBONES, *timm.list_models()])}"
        )
    overlay = pretrained_cfg_overlay(pretrained, name)
    with wrap_timm_errors(name, pretrained):
        model: nn.Module = timm.create_model(
            name,
            pretrained=pretrained != "none",
            pretrained_cfg_overlay=overlay or None,
            num_classes=0,
            in_chans=channels,
        )
    model.num_features = getattr(model, "head_hidden_size", None) or model.num_features
    return model
