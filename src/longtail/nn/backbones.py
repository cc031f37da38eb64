"""Backbones: the CIFAR ResNets, a small network for 8 × 8 images, and any timm model by name.

A backbone maps normalised images (B, channels, H, W) to features (B, F), and has F as ``num_features``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from longtail.errors import LongtailError
from longtail.nn.network_name import format_network, is_decoder_network, parse_network, resolve_network, timm_settings
from longtail.nn.pretrained import build_empty, check_timm_network, pretrained_cfg_overlay, wrap_timm_errors
from longtail.nn.tuning import add_adapters, lora_share


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that does not count its batches, which would be one more operation in every layer and step.

    torch needs the count only where ``momentum`` is None. It stays in the state dict, as it was.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised (B, channels, H, W)."""
        if not self.training or self.momentum is None:
            return super().forward(x)
        self._check_input_dim(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )


class _Block(nn.Module):
    """Two 3 × 3 convolutions with a parameter-free shortcut (He et al., CVPR 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm(outputs)
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
        width: factor of the channels of every layer.

    Source: He et al., CVPR 2016, arXiv 1512.03385, section 4.2.
    """

    def __init__(self, depth: int, channels: int = 3, width: int = 1) -> None:
        super().__init__()
        self.num_features = 64 * width
        self.stem = nn.Conv2d(channels, 16 * width, 3, 1, 1, bias=False)
        self.bn = BatchNorm(16 * width)
        blocks, inputs = [], 16 * width
        for outputs, first_stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for index in range((depth - 2) // 6):
                blocks.append(_Block(inputs, outputs, first_stride if index == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.blocks_per_stage = (depth - 2) // 6
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 64 · width) features."""
        y = self.blocks(F.relu(self.bn(self.stem(x)), inplace=True))
        features: Tensor = y.mean(dim=(2, 3))
        return features

    def stage_depths(self) -> dict[str, int]:
        """Return the stage of every parameter, 1 to 3; 0 before the first."""

        def stage(name: str) -> int:
            return 1 + int(name.split(".")[1]) // self.blocks_per_stage if name.startswith("blocks.") else 0

        return {name: stage(name) for name, _ in self.named_parameters()}


_SMALL_STAGE = 7  # layers of a stage of SmallConv, with the pooling behind it


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
                layers += [nn.Conv2d(inputs, width << stage, 3, 1, 1, bias=False), BatchNorm(width << stage)]
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

    def stage_depths(self) -> dict[str, int]:
        """Return the stage of every parameter, 1 to 3."""
        return {name: 1 + int(name.split(".")[1]) // _SMALL_STAGE for name, _ in self.named_parameters()}


_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
CUSTOM_BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": functools.partial(CifarResNet, depth) for depth in _DEPTHS},
    **{
        f"resnet{depth}x{width}": functools.partial(CifarResNet, depth, width=width)
        for depth in _DEPTHS
        for width in (2, 4)
    },
    "conv8": functools.partial(SmallConv, 16),
    "conv8-tiny": functools.partial(SmallConv, 3),
}
"""Networks that timm does not have, by name; called with ``channels``."""


def build_backbone(name: str, channels: int = 3, pretrained: str = "none") -> nn.Module:
    """Return a network without its classifier, which has its feature width as ``num_features``.

    Args:
        name: one of :data:`CUSTOM_BACKBONES`, a timm model, ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``; all but the
            first with arguments in parentheses, ``vit_small_patch16_224(img_size=160)``, for ``timm.create_model``.
            The argument ``adapter`` is the width of adapters, see :func:`longtail.nn.tuning.add_adapters`.
        channels: channels of the images.
        pretrained: ``none``, ``timm`` (the model's own weights, downloaded at first use), or a file of weights for the
            timm model.

    Raises:
        LongtailError: there is no such network, or its weights cannot be loaded.
    """
    if name in CUSTOM_BACKBONES:
        if pretrained != "none":
            raise LongtailError(f"pretrained {pretrained}: there are no weights for {name}, only for timm models")
        return CUSTOM_BACKBONES[name](channels=channels)
    check_network(name)
    import timm  # imported here, since it takes 2 s and many trainings do not need it

    overlay = pretrained_cfg_overlay(pretrained, name)
    architecture, arguments = parse_network(resolve_network(name))
    adapter = arguments.pop("adapter", None)
    with wrap_timm_errors(name, pretrained):
        model: nn.Module = timm.create_model(
            architecture,
            pretrained=pretrained != "none",
            pretrained_cfg_overlay=overlay or None,
            num_classes=0,
            in_chans=channels,
            **arguments,
        )
    model.num_features = getattr(model, "head_hidden_size", None) or model.num_features
    if adapter is not None:
        add_adapters(model, adapter)
    return model


def check_network(network: str) -> None:
    """Raise LongtailError if there is no such network; the names of its closest are in the message.

    Args:
        network: see :func:`build_backbone`.
    """
    if network in CUSTOM_BACKBONES:
        return
    name, arguments = parse_network(network)
    if name in CUSTOM_BACKBONES:
        raise LongtailError(
            f"network '{network}': {name} takes no arguments ({', '.join(arguments)}), only timm models do"
        )
    check_timm_network(network, *CUSTOM_BACKBONES)


def input_size(network: str) -> int | None:
    """Return the side in pixels of the images that a network is built for; None where it takes images of any size.

    Args:
        network: see :func:`build_backbone`.

    Raises:
        LongtailError: see :func:`longtail.nn.network_name.timm_settings`.
    """
    settings = None if network in CUSTOM_BACKBONES or is_decoder_network(network) else timm_settings(network)
    arguments = parse_network(network)[1]
    if settings is None or not settings.fixed_input_size or arguments.get("dynamic_img_size"):
        return None
    size = arguments.get("img_size", settings.input_size[-1])
    return int(size if isinstance(size, int) else size[-1])


def with_input_size(network: str, size: int) -> str:
    """Return the network for images of another size: position embeddings are resampled when weights are loaded.

    Args:
        network: one with an :func:`input_size`.
        size: side in pixels.

    Raises:
        LongtailError: the size is no multiple of the network's patches, or the network exists in one size only.
    """
    import timm

    name, arguments = parse_network(network)
    if size != input_size(network):
        arguments["img_size"] = size
    architecture, options = parse_network(resolve_network(format_network(name, arguments)))
    options.pop("adapter", None)
    with wrap_timm_errors(network, "none"):
        model = build_empty(lambda: timm.create_model(architecture, num_classes=0, **options))
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    side = patch if isinstance(patch, int) else patch[-1]
    if size % side:
        below = size // side * side
        near = f"{below} or {below + side}" if below else f"{side}"
        raise LongtailError(
            f"network '{network}': has patches of {side} × {side} pixels, so images of {size} × {size} do not fit; use "
            f"--network_size {near}"
        )
    return format_network(name, arguments)


@functools.lru_cache
def is_suited_to_lora(network: str) -> bool:
    """Return whether most parameters of a timm model are in layers that low-rank updates are for.

    Args:
        network: see :func:`build_backbone`.

    Raises:
        LongtailError: there is no such network.
    """
    return lora_share(build_empty(lambda: build_backbone(network))) > 0.5


def with_adapters(network: str, width: int) -> str:
    """Return the network with adapters of some width.

    Args:
        network: see :func:`build_backbone`.
        width: of the bottleneck.

    Raises:
        LongtailError: the network is no timm model.
    """
    name, arguments = parse_network(network)
    if name in CUSTOM_BACKBONES or is_decoder_network(network):
        raise LongtailError(
            f"tune adapter: network '{network}' has no adapters, only timm models have; use --tune lora"
        )
    return format_network(name, {**arguments, "adapter": width})
