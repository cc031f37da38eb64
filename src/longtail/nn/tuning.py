"""How much of a pretrained network is trained: all of it, its last blocks, its normalisation layers, or nothing."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from longtail.errors import LongtailError

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def set_trainable(backbone: nn.Module, tune: str) -> None:
    """Set ``requires_grad`` of the parameters of a network.

    Args:
        backbone: the network, without its classifier.
        tune: ``full``, ``head`` (none of them), ``norm`` (weights of normalisation layers, and all biases), or
            ``last:N`` (the last N blocks, as timm groups them).

    Raises:
        LongtailError: the network has no blocks, or fewer than N.
    """
    if tune == "full":
        return
    if tune == "head":
        backbone.requires_grad_(False)
        return
    backbone.requires_grad_(False)
    if tune == "norm":
        for module in backbone.modules():
            if isinstance(module, _NORMS):
                module.requires_grad_(True)
        for name, parameter in backbone.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)
        return
    last, depths = int(tune.partition(":")[2]), layer_depths(backbone, coarse=True)
    if not depths:
        raise LongtailError(f"tune {tune}: this network has no blocks that timm knows; use full, norm or head")
    blocks = sorted(set(depths.values()))
    if last > len(blocks):
        raise LongtailError(f"tune {tune}: the network has {len(blocks)} blocks, expected at most that many")
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(depths[name] in blocks[-last:])


def freeze_batch_norm(backbone: nn.Module) -> None:
    """Put the BatchNorm layers whose weights are not trained into eval mode, so that their statistics stay."""
    for module in backbone.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
            module.eval()


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
