"""How much of a pretrained network is trained: all of it, its last blocks, its normalisation layers, a few parameters
that are added to it (LoRA, adapters), or nothing.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from longtail.errors import LongtailError

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_LORA_RANK = 8
ADAPTER_WIDTH = 64
"""Width of the adapters where none is given, as in AdaptFormer."""
_ADAPTER_SCALE = 0.1

_Network = TypeVar("_Network", bound=nn.Module)


def set_trainable(backbone: nn.Module, tune: str) -> None:
    """Set ``requires_grad`` of the parameters of a network.

    Args:
        backbone: the network, without its classifier.
        tune: ``full``, ``head`` (none of them), ``norm`` (weights of normalisation layers, and all biases),
            ``last:N`` (the last N blocks, as timm groups them), ``lora`` or ``lora:R`` (see :func:`add_lora`), or
            ``adapter`` or ``adapter:W`` (the adapters that the network was built with, see :func:`add_adapters`).

    Raises:
        LongtailError: the network has no normalisation layers; no blocks, or fewer than N; no adapters; or no layer for
            LoRA.
    """
    if tune == "full":
        return
    if tune == "head":
        backbone.requires_grad_(False)
        return
    backbone.requires_grad_(False)
    if tune == "norm":
        norms = [module for module in backbone.modules() if _is_norm(module)]
        if not norms:
            raise LongtailError(
                "tune norm: this network has no normalisation layers with weights; use full, last:N, lora or head"
            )
        for module in norms:
            module.requires_grad_(True)
        for name, parameter in backbone.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)
        return
    kind, _, number = tune.partition(":")
    if kind == "lora":
        add_lora(backbone, int(number or _LORA_RANK))
        return
    if kind == "adapter":
        adapted = [module for module in backbone.modules() if isinstance(module, Adapted)]
        if not adapted:
            raise LongtailError(
                "tune adapter: this network was built without adapters; use a timm model, or --tune lora"
            )
        for module in adapted:
            module.adapter.requires_grad_(True)
        return
    last, depths = int(tune.partition(":")[2]), layer_depths(backbone, coarse=True)
    if not depths:
        raise LongtailError(f"tune {tune}: this network has no blocks that timm knows; use full, norm or head")
    blocks = sorted(set(depths.values()))
    if last > len(blocks):
        raise LongtailError(f"tune {tune}: the network has {len(blocks)} blocks, expected at most that many")
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(depths[name] in blocks[-last:])


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation layer with weights, torch's or a network's own.

    The latter, as timm's RmsNorm and EvoNorm and the Affine of ResMLP, have no common class: they are called so, and
    all their weights are their own, one for each channel.
    """
    own = list(module.parameters(recurse=False))
    if not own or isinstance(module, _NORMS):
        return bool(own)
    name = type(module).__name__
    named = "norm" in name.lower() or name == "Affine"
    return named and len(own) == len(list(module.parameters())) and all(p.numel() == max(p.shape) for p in own)


def freeze_batch_norm(backbone: nn.Module) -> None:
    """Put the BatchNorm layers whose weights are not trained into eval mode, so that their statistics stay."""
    for name in frozen_batch_norms(backbone):
        backbone.get_submodule(name).eval()


def frozen_batch_norms(module: nn.Module) -> list[str]:
    """Return the names of the BatchNorm layers whose weights are not trained."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.weight is not None and not layer.weight.requires_grad
    ]


def add_lora(backbone: nn.Module, rank: int) -> None:
    """Freeze a network and add trainable low-rank updates to its layers.

    The layers are all linear ones (attention and MLP of a transformer), and the convolutions without groups and without
    dilation but the first: in EfficientNet the pointwise ones, in ResNet all. A decoder beside the encoder is new and
    trained in full. :func:`merge_lora` turns the updates into weights.

    Args:
        backbone: the network, which is changed.
        rank: of the updates; they start at zero and are not scaled.

    Raises:
        LongtailError: the network has no such layer.

    Source: Hu et al., *LoRA*, ICLR 2022, arXiv 2106.09685; implemented by the package peft.
    """
    import peft  # imported here, since it takes seconds

    names = _lora_layers(backbone)
    if not names:
        raise LongtailError("tune lora: this network has no linear layer or plain convolution; use full, norm or head")
    backbone.requires_grad_(False)
    pattern = "|".join(re.escape(name) for name in names)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), backbone)
    for module in backbone.modules():
        base = module.get_base_layer() if isinstance(module, peft.tuners.lora.LoraLayer) else None
        if isinstance(base, nn.Conv2d):
            for attribute in ("kernel_size", "stride", "padding", "dilation", "groups"):  # some networks read them
                setattr(module, attribute, getattr(base, attribute))
    decoder = getattr(backbone, "decoder", None)
    if isinstance(decoder, nn.Module):
        decoder.requires_grad_(True)


def lora_share(backbone: nn.Module) -> float:
    """Return the share of a network's parameters, from 0 to 1, in the layers that :func:`add_lora` updates."""
    updated = [backbone.get_submodule(name) for name in _lora_layers(backbone)]
    count, total = (sum(p.numel() for layer in layers for p in layer.parameters()) for layers in (updated, [backbone]))
    return count / total


def _lora_layers(backbone: nn.Module) -> list[str]:
    convolutions = [name for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)]
    names = []
    for name, module in backbone.named_modules():
        if name.startswith("decoder."):
            continue
        # some attentions read the weight of qkv instead of calling the layer, unless they are told to
        if getattr(module, "qkv_bias_separate", None) is False:
            module.qkv_bias_separate = True
        # sub-classes may compute their weight or their padding, which an update beside them would not see
        linear = type(module) is nn.Linear
        pointwise = isinstance(module, nn.Conv2d) and _is_pointwise(module)
        if linear or (name not in convolutions[:1] and (pointwise or _is_plain_convolution(module))):
            names.append(name)
    return names


def _is_plain_convolution(module: nn.Module) -> bool:
    # peft's updates know neither dilation nor another padding than by zeros
    plain = type(module) is nn.Conv2d and module.groups == 1
    return plain and module.dilation == (1, 1) and module.padding_mode == "zeros"


def _is_pointwise(module: nn.Conv2d) -> bool:
    from timm.layers import Conv2dSame

    plain = type(module) in {nn.Conv2d, Conv2dSame} and module.groups == 1
    return plain and module.kernel_size == (1, 1) and module.stride == (1, 1)


def merge_lora(network: _Network) -> _Network:
    """Return the network with the updates of :func:`add_lora` added to its weights, and without peft's modules.

    Args:
        network: is not changed; returned as it is where it has no updates.
    """
    if "peft" not in sys.modules:  # whose import takes seconds
        return network
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not any(isinstance(module, BaseTunerLayer) for module in network.modules()):
        return network
    merged = copy.deepcopy(network)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, module.get_base_layer())
    return merged


class Adapted(nn.Module):
    """A layer with a bottleneck beside it: y = layer(x) + s · up(ReLU(down(x))), with s = 0.1.

    Args:
        layer: maps (…, F) or (B, F, H, W) to the same shape.
        features: F.
        width: of the bottleneck.
        channels_first: whether x is (B, F, H, W).
    """

    def __init__(self, layer: nn.Module, features: int, width: int, channels_first: bool) -> None:
        super().__init__()
        self.layer = layer
        down: nn.Module = nn.Conv2d(features, width, 1) if channels_first else nn.Linear(features, width)
        up = nn.Conv2d(width, features, 1) if channels_first else nn.Linear(width, features)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))  # type: ignore[arg-type]
        for parameter in (down.bias, up.weight, up.bias):
            nn.init.zeros_(parameter)  # type: ignore[arg-type]
        self.adapter = nn.Sequential(down, nn.ReLU(), up)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the adapter's."""
        y: Tensor = self.layer(x) + _ADAPTER_SCALE * self.adapter(x)
        return y


def add_adapters(backbone: nn.Module, width: int) -> None:
    """Add a bottleneck beside the MLP of every block, or, in a network without MLPs, beside its residual blocks.

    The output does not change before the adapters are trained. Residual blocks are those of convolutions and
    normalisation layers that keep resolution and width. peft has no adapter with a non-linearity for images, and none
    could be merged into the weights: the adapters are part of the network, ``NAME(adapter=W)``.

    Args:
        backbone: the network with its pretrained weights, which is changed.
        width: of the bottleneck.

    Raises:
        LongtailError: the width is not a positive integer, or the network has no such block.

    Source: Chen et al., *AdaptFormer*, NeurIPS 2022, arXiv 2205.13535. There the adapter has the input of the block's
    normalisation, here its output.
    """
    if not isinstance(width, int) or width < 1:
        raise LongtailError(f"adapter {width!r}: expected the width of the adapters, at least 1")
    places = _mlps(backbone) or _residual_blocks(backbone)
    if not places:
        raise LongtailError("tune adapter: this network has no MLPs and no residual blocks; use --tune lora")
    for name, features, channels_first in places:
        parent, _, child = name.rpartition(".")
        layer = backbone.get_submodule(name)
        setattr(backbone.get_submodule(parent), child, Adapted(layer, features, width, channels_first))


def _mlps(backbone: nn.Module) -> list[tuple[str, int, bool]]:
    """Return name, width and layout of every MLP."""
    places = []
    for name, module in backbone.named_modules():
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        if name.rpartition(".")[2] == "mlp" and layers and _inputs(layers[0]) == _outputs(layers[-1]):
            places.append((name, _inputs(layers[0]), isinstance(layers[0], nn.Conv2d)))
    return places


def _residual_blocks(backbone: nn.Module) -> list[tuple[str, int, bool]]:
    """Return name, width and layout of every block of convolutions that keeps its shape."""
    places: list[tuple[str, int, bool]] = []
    for name, module in backbone.named_modules():
        inside = any(name.startswith(f"{place}.") for place, _, _ in places)
        if not name or inside or isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        normalized = any(_is_norm(layer) for layer in module.modules())
        same = len(convolutions) > 1 and convolutions[0].in_channels == convolutions[-1].out_channels
        if normalized and same and all(layer.stride == (1, 1) for layer in convolutions):
            places.append((name, convolutions[0].in_channels, True))
    return places


def _inputs(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _outputs(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def layer_depths(backbone: nn.Module, coarse: bool = False) -> dict[str, int]:
    """Return the depth of every parameter's layer, 0 at the input; empty for a network that timm cannot group.

    Args:
        backbone: the network.
        coarse: count stages instead of blocks.
    """
    from timm.models import group_parameters

    matcher = getattr(backbone, "group_matcher", None)
    if matcher is None:
        return {}
    depths: dict[str, int] = group_parameters(backbone, matcher(coarse=coarse), reverse=True)
    return depths
