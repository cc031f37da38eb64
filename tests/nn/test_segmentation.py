"""Networks with features of pixels, and the names that do not give one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtail.errors import LongtailError
from longtail.nn import Encoder, build_backbone
from longtail.nn.pretrained import normalization, timm_name
from longtail.nn.segmentation import build_segmentation_backbone, downsample_labels, upsample_scores

pytest.importorskip("segmentation_models_pytorch")


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 33)])
def test_features_have_a_quarter_of_the_resolution(height: int, width: int) -> None:
    encoder = Encoder("upernet:resnet10t:16", [0.5] * 3, [0.2] * 3, build=build_segmentation_backbone).eval()
    features = encoder(torch.rand(1, 3, height, width))
    assert features.shape == (1, 16, -(-height // 4), -(-width // 4))
    assert upsample_scores(features, height, width).shape == (1, 16, height, width)
    assert downsample_labels(torch.zeros(1, height, width)).shape == (1, *features.shape[2:])


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("resnet18", "none", "expected upernet:ENCODER or segformer:ENCODER"),
        ("upernet:", "none", "expected upernet:ENCODER or upernet:ENCODER:WIDTH"),
        ("upernet:resnet18:0", "none", "expected upernet:ENCODER or upernet:ENCODER:WIDTH"),
        ("upernet:resnet181", "none", "there is no encoder 'resnet181'; perhaps you meant"),
        ("upernet:resnet18", "none.pth", "pretrained 'none.pth': expected none, auto, timm, or a file of weights"),
        ("upernet:mit_b0", "none.pth", "expected none or timm; 'mit_b0' is no timm model"),
        ("upernet:vit_tiny_patch16_224", "none", "choose another encoder"),
        ("upernet:efficientformerv2_s0:8", "none", "takes images of one size only; choose another encoder, such as"),
    ],
)
def test_names_that_do_not_fit(name: str, pretrained: str, message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        build_segmentation_backbone(name, 3, pretrained)


def test_trying_a_network_leaves_it_as_it_was_built() -> None:
    network = build_segmentation_backbone("upernet:resnet10t:8")
    assert network.training
    seen = [t for name, t in network.state_dict().items() if name.endswith(("running_mean", "num_batches_tracked"))]
    assert seen
    assert not any(tensor.any() for tensor in seen)
    with torch.device("meta"):
        assert next(build_segmentation_backbone("upernet:resnet10t:8").parameters()).is_meta


def test_other_networks_are_unknown_to_the_default_builder() -> None:
    with pytest.raises(LongtailError, match="network 'upernet:resnet18' is not known"):
        build_backbone("upernet:resnet18")


def test_the_timm_model_of_a_name() -> None:
    assert timm_name("resnet18") == timm_name("upernet:resnet18") == timm_name("upernet:resnet18:64") == "resnet18"
    assert normalization("upernet:tf_efficientnet_lite0:64", 3) == ([0.5] * 3, [0.5] * 3)
    with pytest.raises(LongtailError, match="'mit_b0' is none"):
        normalization("upernet:mit_b0", 3)


def test_weights_of_a_file(tmp_path: Path) -> None:
    weights = {f"other.{key}": tensor for key, tensor in timm_weights("resnet10t").items()}
    torch.save(weights, tmp_path / "weights.pth")
    network = build_segmentation_backbone("upernet:resnet10t:16", 3, str(tmp_path / "weights.pth"))
    assert torch.equal(network.encoder.state_dict()["model.conv1.0.weight"], weights["other.conv1.0.weight"])
    with pytest.raises(LongtailError, match=r"tensors that are not those of resnet18"):
        build_backbone("resnet18.a1_in1k", 3, str(tmp_path / "weights.pth"))


def timm_weights(name: str) -> dict[str, torch.Tensor]:
    import timm

    weights: dict[str, torch.Tensor] = timm.create_model(name).state_dict()
    return weights
