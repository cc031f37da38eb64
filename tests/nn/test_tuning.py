"""Which parameters of a network are trained."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from longtail.errors import LongtailError
from longtail.nn import build_backbone
from longtail.nn.tuning import freeze_batch_norm, layer_depths, set_trainable


def trained(backbone: nn.Module) -> set[str]:
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}


@pytest.fixture
def backbone() -> nn.Module:
    return build_backbone("test_efficientnet", 3)


def test_full_trains_everything_and_head_nothing(backbone: nn.Module) -> None:
    everything = {name for name, _ in backbone.named_parameters()}
    set_trainable(backbone, "full")
    assert trained(backbone) == everything
    set_trainable(backbone, "head")
    assert trained(backbone) == set()


def test_norm_trains_normalisation_and_biases_only(backbone: nn.Module) -> None:
    set_trainable(backbone, "norm")
    norms = {name for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert trained(backbone) == {
        name for name, _ in backbone.named_parameters() if name.rpartition(".")[0] in norms or name.endswith("bias")
    }
    assert all(parameter.ndim == 1 for parameter in backbone.parameters() if parameter.requires_grad)


def test_norm_of_a_vision_transformer_is_layer_norm_and_biases() -> None:
    vit = timm.create_model("test_vit", num_classes=0)
    set_trainable(vit, "norm")
    assert "blocks.0.norm1.weight" in trained(vit)
    assert "blocks.0.attn.qkv.bias" in trained(vit)
    assert "blocks.0.attn.qkv.weight" not in trained(vit)


def test_last_trains_the_blocks_at_the_output(backbone: nn.Module) -> None:
    set_trainable(backbone, "last:1")
    one = trained(backbone)
    set_trainable(backbone, "last:2")
    two = trained(backbone)
    depths = layer_depths(backbone, coarse=True)
    deepest = max(depths.values())
    assert one
    assert one < two
    assert one == {name for name, depth in depths.items() if depth == deepest}
    assert "conv_stem.weight" not in two


def test_last_of_more_blocks_than_there_are_is_refused(backbone: nn.Module) -> None:
    with pytest.raises(LongtailError, match=r"tune last:99: the network has \d+ blocks"):
        set_trainable(backbone, "last:99")
    with pytest.raises(LongtailError, match="no blocks that timm knows"):
        set_trainable(build_backbone("conv8-tiny", 1), "last:1")


def test_statistics_of_frozen_batch_norm_stay(backbone: nn.Module) -> None:
    set_trainable(backbone, "last:1")
    backbone.train()
    freeze_batch_norm(backbone)
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers() if "running" in name}
    backbone(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    changed = {
        name for name, buffer in backbone.named_buffers() if "running" in name and not buffer.equal(before[name])
    }
    assert changed
    own = trained(backbone)
    assert {f"{name.rpartition('.')[0]}.weight" for name in changed} <= own
