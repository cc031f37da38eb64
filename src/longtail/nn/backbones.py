"""Encoders: the CIFAR ResNets, a small net for 8 × 8 images, and any timm model by name.

An encoder maps images in [0, 1], shape (B, channels, H, W), to features (B, F); it normalises them itself, so that
student and teacher may differ in it, and a saved model needs no note on it.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.errors import LongtailError, nearest
from longtail.nn.segmentation import build_dense, is_dense


class Normalize(nn.Module):
    """Subtract a mean and divide by a deviation a channel; both live outside the state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, channels, H, W) normalised images."""
        return (images - self.mean) / self.std


class _Block(nn.Module):
    """Two 3 × 3 convolutions and a parameter-free shortcut (He et al., CVPR 2016, option A)."""

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
    """The ResNet of 6n + 2 layers for 32 × 32 images; 0.47 M parameters at 32 layers.

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
    """Three stages of two 3 × 3 convolutions, halving between them, for images of 8 × 8."""

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


OURS = {f"resnet{depth}": functools.partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)} | {
    "conv8": functools.partial(SmallConv, 16),
    "conv8-tiny": functools.partial(SmallConv, 3),
}
"""Networks that timm does not have."""


def build_backbone(name: str, channels: int = 3, pretrained: str = "none") -> nn.Module:
    """Return a network without its classifier, with its feature width as ``num_features``.

    Args:
        name: one of :data:`OURS`, a timm model, or one of :mod:`longtail.nn.segmentation`.
        channels: channels of the images.
        pretrained: none, timm (its weights, downloaded at first use), or a file of weights for the timm model.

    Raises:
        LongtailError: no such network, or its weights cannot be had.
    """
    if name in OURS:
        if pretrained != "none":
            raise LongtailError(f"pretrained {pretrained}: there are no weights for {name}, only for timm models")
        return OURS[name](channels=channels)
    import timm  # 2 s, and needed by few

    if not is_dense(name) and not timm.is_model(name.split(".")[0]):
        raise LongtailError(f"network '{name}' is not known{nearest(name, [*OURS, *timm.list_models()])}")
    overlay: dict[str, Any] = {}
    if pretrained not in {"none", "timm"}:
        overlay = {"state_dict": _weights(Path(pretrained), timm_name(name))}
    try:
        if is_dense(name):
            return build_dense(name, channels, pretrained != "none", overlay)
        model: nn.Module = timm.create_model(
            name,
            pretrained=pretrained != "none",
            pretrained_cfg_overlay=overlay or None,
            num_classes=0,
            in_chans=channels,
        )
    except LongtailError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        if pretrained != "timm":
            raise LongtailError(f"network '{name}': {' '.join(str(error).split())}") from None
        raise LongtailError(
            f"network '{name}': its pretrained weights could not be loaded ({type(error).__name__}); "
            "check the network, or download them once where there is one"
        ) from None
    model.num_features = getattr(model, "head_hidden_size", None) or model.num_features
    return model


def timm_name(name: str) -> str:
    """Return the timm model that a network is, or that its encoder is."""
    return name.split(":")[1] if is_dense(name) and ":" in name else name


def _weights(path: Path, name: str) -> dict[str, Tensor]:
    """Return the weights in a file under timm's names.

    A file that names its tensors otherwise is taken where number, order and shapes are the model's.

    Raises:
        LongtailError: the file cannot be read, or does not fit.
    """
    import timm
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise LongtailError(f"pretrained '{path}': expected none, timm, or a file of weights; there is no such file")
    try:
        weights: Any
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:  # tensors and plain values alone, so that a foreign file cannot run code
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, ValueError, LookupError):
        raise LongtailError(f"pretrained '{path}': cannot be read as weights (.safetensors, .pth)") from None
    for key in ("state_dict", "model"):
        weights = weights[key] if isinstance(weights, dict) and isinstance(weights.get(key), dict) else weights
    with torch.device("meta"):
        expected = timm.create_model(name).state_dict()
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise LongtailError(f"pretrained '{path}': holds no weights, expected those of {name}")
    if set(expected) & set(weights):
        return weights
    if [tuple(tensor.shape) for tensor in weights.values()] != [tuple(tensor.shape) for tensor in expected.values()]:
        raise LongtailError(
            f"pretrained '{path}': holds {len(weights)} tensors that are not those of {name} ({len(expected)}), "
            "neither by name nor by shape"
        )
    return dict(zip(expected, weights.values(), strict=True))


def normalization(name: str, channels: int) -> tuple[list[float], list[float]]:
    """Return mean and deviation, a channel, of the images that a timm model's pretrained weights were made with."""
    import timm

    settings = timm.get_pretrained_cfg(timm_name(name))
    assert settings is not None
    mean, std = list(settings.mean), list(settings.std)
    if channels == 1:
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    return mean, std


def pretrained_encoder(name: str, channels: int) -> Encoder:
    """Return a timm model with its weights, its own normalisation and its own input size.

    Raises:
        LongtailError: timm has no such model, or its weights cannot be had.
    """
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise LongtailError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    settings = timm.get_pretrained_cfg(name)
    if settings is None or not settings.has_weights:
        raise LongtailError(f"timm has no pretrained weights for '{name}'")
    return Encoder(name, *normalization(name, channels), pretrained="timm", resize=settings.input_size[-1])


class Encoder(nn.Module):
    """Normalisation and a backbone.

    Args:
        name: the backbone's name, see :func:`build_backbone`.
        mean: of the images, a channel.
        std: of the images, a channel.
        pretrained: see :func:`build_backbone`.
        resize: side in pixels that images are brought to first; None leaves them.
    """

    def __init__(
        self,
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        pretrained: str = "none",
        resize: int | None = None,
    ) -> None:
        super().__init__()
        self.resize = resize
        self.mean, self.std = tuple(mean), tuple(std)
        self.normalize = Normalize(mean, std)
        self.backbone = build_backbone(name, channels=len(mean), pretrained=pretrained)
        width = self.backbone.num_features
        assert isinstance(width, int)
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, num_features) features of (B, channels, H, W) images in [0, 1].

        Of a network for segmentation (B, num_features, ⌈H/4⌉, ⌈W/4⌉).
        """
        features: Tensor = self.backbone(self.normalize(_resized(images, self.resize)))
        return features


def _resized(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[-1] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


_CPU_IMAGES = 64  # images that a frozen network sees at a time on a CPU, whose caches then hold what a layer hands on


class FrozenEncoder(nn.Module):
    """An encoder that is only ever looked through: no gradients, BatchNorm folded into the convolutions before it.

    Folding changes the last digits and saves a fifth of the pass; a network that torch.fx cannot trace stays as it is.

    Args:
        encoder: trained; it is left as it was.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.normalize, self.resize, self.num_features = encoder.normalize, encoder.resize, encoder.num_features
        self.backbone = _folded(encoder.backbone.eval())
        self.eval().requires_grad_(False)

    def train(self, _mode: bool = True) -> FrozenEncoder:
        """Stay in eval mode."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, num_features) features of (B, channels, H, W) images in [0, 1]."""
        if images.device.type == "cpu" and len(images) > _CPU_IMAGES:
            return torch.cat([self._look(part) for part in images.split(_CPU_IMAGES)])
        return self._look(images)

    def _look(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(self.normalize(_resized(images, self.resize)))
        return features


def _folded(backbone: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    if not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()):
        return backbone
    try:
        folded: nn.Module = fuse(backbone)
    except Exception:  # tracing runs the network's own code, which may do anything
        return backbone
    return folded
