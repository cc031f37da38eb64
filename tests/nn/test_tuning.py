"""Which parameters of a network are trained."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from longtail.errors import LongtailError
from longtail.nn import build_backbone
from longtail.nn.backbones import is_suited_to_lora
from longtail.nn.tuning import Adapted, freeze_batch_norm, layer_depths, lora_share, merge_lora, set_trainable


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


@pytest.mark.parametrize(
    ("network", "norms"),
    [
        ("aimv2_large_patch14_224", ("patch_embed.norm.weight", "blocks.0.norm1.weight")),  # RmsNorm
        ("resmlp_12_224", ("blocks.0.norm1.alpha", "blocks.0.norm1.beta")),  # Affine, (1, 1, C)
        ("resnetv2_50d_evos", ("stem.norm1.weight", "stem.norm1.v")),  # EvoNorm, with an activation
        ("convnextv2_atto", ("stages.0.blocks.0.mlp.grn.weight", "stages.0.blocks.0.norm.weight")),
    ],
)
def test_norm_trains_the_normalisation_layers_of_the_network_itself(network: str, norms: tuple[str, ...]) -> None:
    with torch.device("meta"):  # without memory
        backbone = timm.create_model(network, num_classes=0)
    set_trainable(backbone, "norm")
    assert trained(backbone) >= set(norms)
    shapes = [parameter.shape for parameter in backbone.parameters() if parameter.requires_grad]
    assert all(shape.numel() == max(shape) for shape in shapes)


def test_norm_needs_normalisation_layers() -> None:
    class NormalBlock(nn.Module):  # called like a normalisation layer
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))
            self.convolution = nn.Conv2d(3, 4, 1)

    for network in (NormalBlock(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))):
        with pytest.raises(LongtailError, match="tune norm: this network has no normalisation layers"):
            set_trainable(network, "norm")


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


TRANSFORMERS = [
    "test_vit",  # qkv, proj, fc1, fc2
    "beit_base_patch16_224(depth=1, embed_dim=48, num_heads=3)",  # reads the weight of qkv, unless it is told otherwise
    "eva02_tiny_patch14_224(depth=1)",  # three layers in place of qkv, a gated MLP
    "swin_tiny_patch4_window7_224(depths=(1, 1, 1, 1), embed_dim=24)",
]
CONVNETS = [
    *("test_efficientnet", "test_convnext", "resnet18", "tf_efficientnet_lite0"),
    "resnet18(output_stride=8)",  # dilated convolutions
    "davit_tiny(depths=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48), num_heads=(2, 2, 2, 2))",  # reads the kernel's size
]


def built(network: str) -> nn.Module:
    """Return a network in eval mode whose norms are not zero, as in some networks before their training."""
    torch.manual_seed(0)
    backbone = build_backbone(network, 3).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for name, parameter in backbone.named_parameters():
        if name.endswith(".gamma"):  # which scales a block of ConvNeXt by 1e-6
            nn.init.ones_(parameter)
    return backbone


def images_for(backbone: nn.Module) -> torch.Tensor:
    settings: Any = backbone.pretrained_cfg
    side = settings["input_size"][-1] if settings.get("fixed_input_size") else 64
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("network", [*TRANSFORMERS, *CONVNETS])
def test_lora_changes_nothing_at_first_trains_every_update_and_merges(network: str) -> None:
    backbone = built(network)
    names, images = set(backbone.state_dict()), images_for(backbone)
    frozen = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    plain = backbone(images)
    set_trainable(backbone, "lora:4")
    updates = dict(backbone.named_parameters())
    assert trained(backbone) == {name for name in updates if "lora_" in name}
    torch.testing.assert_close(backbone(images), plain)
    for name in trained(backbone):
        if "lora_B" in name:  # they start at zero, where lora_A has no gradient
            nn.init.normal_(updates[name], std=0.1)
    output = backbone(images)
    # of a random direction: LayerNorm makes the sum of squares constant
    (output * torch.rand(output.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    dead = [name for name in trained(backbone) if updates[name].grad is None or not updates[name].grad.any()]  # type: ignore[union-attr]
    assert dead == []
    merged = merge_lora(backbone)
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(merged(images), output, atol=1e-4, rtol=1e-4)
    assert (output - plain).abs().max() > 1e-3 * plain.abs().max()
    assert "lora_" in " ".join(backbone.state_dict())  # the network itself goes on training
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, frozen[name])}
    assert changed == {name.partition(".lora_A")[0] + ".weight" for name in updates if ".lora_A" in name}


def test_lora_is_on_attention_and_mlp_and_on_pointwise_convolutions() -> None:
    def layers(network: str) -> set[str]:
        backbone = build_backbone(network, 3)
        set_trainable(backbone, "lora:2")
        return {name.partition(".lora_A")[0] for name in trained(backbone) if ".lora_A" in name}

    assert {name for name in layers("test_vit") if name.startswith("blocks.0.")} == {
        f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    lite = build_backbone("tf_efficientnet_lite0", 3)
    pointwise = {
        name for name, module in lite.named_modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    }
    assert layers("tf_efficientnet_lite0") == pointwise


def test_the_rank_is_that_of_the_updates() -> None:
    for tune, rank in (("lora", 8), ("lora:3", 3)):
        backbone = build_backbone("test_vit", 3)
        set_trainable(backbone, tune)
        shapes = {tuple(p.shape) for name, p in backbone.named_parameters() if "attn.proj.lora_A" in name}
        assert shapes == {(rank, 64)}


def test_a_network_without_updates_is_not_copied(backbone: nn.Module) -> None:
    assert merge_lora(backbone) is backbone


def test_a_new_decoder_is_trained_in_full() -> None:
    whole = nn.Module()
    whole.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    whole.decoder = nn.Sequential(nn.Conv2d(4, 4, 1))
    set_trainable(whole, "lora:2")
    assert trained(whole) == {
        *("encoder.1.lora_A.default.weight", "encoder.1.lora_B.default.weight"),
        *("decoder.0.weight", "decoder.0.bias"),
    }


def test_the_share_of_parameters_with_updates() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4))
    # not the first convolution, not the one in groups, not the normalisation
    assert lora_share(network) == 20 / (112 + 20 + 40 + 8)
    for name in ("tf_efficientnet_lite0", "resnet18", "test_vit", "convnext_atto"):
        assert is_suited_to_lora(name), name
    assert not is_suited_to_lora("test_nfnet")  # of standardised weights, which an update beside them would not see


@pytest.mark.parametrize("network", ["test_vit", "test_convnext", "resnet18", "tf_efficientnet_lite0"])
def test_adapters_are_a_bottleneck_beside_the_layer(network: str) -> None:
    plain = built(network)
    images = images_for(plain)
    backbone = build_backbone(f"{network}(adapter=5)", 3).eval()
    own = {name: name.replace(".layer.", ".") for name in backbone.state_dict() if ".adapter." not in name}
    weights = {name: plain.state_dict()[old] for name, old in own.items()}
    assert len(weights) == len(plain.state_dict())
    backbone.load_state_dict(weights, strict=False)
    torch.testing.assert_close(backbone(images), plain(images))  # up starts at zero
    set_trainable(backbone, "adapter:5")
    assert trained(backbone)
    assert trained(backbone) == {name for name, _ in backbone.named_parameters() if ".adapter." in name}
    for module in backbone.modules():
        if isinstance(module, Adapted):
            nn.init.normal_(module.adapter[2].weight, std=0.1)  # type: ignore[arg-type]
            module.register_forward_hook(check_adapter)
    assert not torch.allclose(backbone(images), plain(images), atol=1e-4)


def check_adapter(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    """Compare with the formula: y = layer(x) + 0.1 · (U · max(D · x + d, 0) + u)."""
    assert isinstance(module, Adapted)
    down, _, up = module.adapter
    first = isinstance(down, nn.Conv2d)
    x = inputs[0].movedim(1, -1) if first else inputs[0]
    weights = [layer.weight.flatten(1).double() for layer in (down, up)]  # type: ignore[operator]
    hidden = (x.double() @ weights[0].T + down.bias).clamp(min=0)  # type: ignore[operator]
    added = 0.1 * (hidden @ weights[1].T + up.bias)  # type: ignore[operator]
    expected = module.layer(inputs[0]).double() + (added.movedim(-1, 1) if first else added)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


def test_residual_blocks_have_normalisation_of_any_kind() -> None:
    backbone = build_backbone("resnetv2_50d_evos(layers=(2, 1, 1, 1), adapter=4)", 3)  # EvoNorm
    assert {name for name, module in backbone.named_modules() if isinstance(module, Adapted)} == {
        "stages.0.blocks.1"  # the others change the width
    }


def test_adapters_need_blocks() -> None:
    with pytest.raises(LongtailError, match="tune adapter: this network has no MLPs and no residual blocks"):
        build_backbone("densenet121(adapter=4)", 3)
    with pytest.raises(LongtailError, match="was built without adapters"):
        set_trainable(build_backbone("test_vit", 3), "adapter")
    with pytest.raises(LongtailError, match="adapter 0: expected the width"):
        build_backbone("test_vit(adapter=0)", 3)


def test_depths_of_a_vision_transformer_go_from_the_patches_to_the_norm() -> None:
    for network in ("test_vit", "test_vit(adapter=4)"):
        backbone = build_backbone(network, 3)
        depths = layer_depths(backbone)
        assert set(depths) == {name for name, _ in backbone.named_parameters()}
        blocks = [depths[f"blocks.{number}.attn.qkv.weight"] for number in range(6)]
        assert blocks == sorted(set(blocks))
        assert depths["patch_embed.proj.weight"] == depths["pos_embed"] == 0 < blocks[0]
        assert depths["norm.weight"] >= blocks[-1] == max(depths.values())
