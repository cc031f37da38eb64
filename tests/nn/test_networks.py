from __future__ import annotations

import pytest
import torch
from torch import nn

from longtail.errors import LongtailError
from longtail.nn import CosineClassifier, Encoder, ProjectionMLP, build_backbone
from longtail.nn.backbones import BatchNorm
from longtail.nn.encoder import FrozenEncoder


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)],
)
def test_parameters_are_the_published_ones(name: str, millions: float) -> None:
    count = sum(p.numel() for p in build_backbone(name).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.03)


def test_conv8_tiny_is_small() -> None:
    assert sum(p.numel() for p in build_backbone("conv8-tiny", channels=1).parameters()) < 3000


@pytest.mark.parametrize(
    ("name", "channels", "size"), [("conv8", 1, 8), ("resnet20", 3, 32), ("resnet20", 3, 48), ("resnet10t", 3, 64)]
)
def test_features_have_the_announced_width(name: str, channels: int, size: int) -> None:
    encoder = Encoder(name, [0.5] * channels, [0.2] * channels)
    assert encoder(torch.rand(2, channels, size, size)).shape == (2, encoder.num_features)


def test_the_encoder_normalises() -> None:
    encoder = Encoder("resnet20", [0.1, 0.2, 0.3], [0.5, 0.25, 0.2])
    image = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert encoder.normalize(image).abs().max() < 1e-6
    assert not any("normalize" in name for name in encoder.state_dict())


def test_images_are_resized() -> None:
    encoder = Encoder("resnet20", [0.5] * 3, [0.2] * 3, resize=48).eval()
    small = torch.rand(1, 3, 32, 32)
    large = torch.nn.functional.interpolate(small, size=48, mode="bicubic").clamp(0, 1)
    assert torch.allclose(encoder(small), encoder(large))
    shrunk = torch.nn.functional.interpolate(large, size=16, mode="bicubic", antialias=True).clamp(0, 1)
    encoder.resize = 16
    assert torch.allclose(encoder(large), encoder(shrunk), atol=1e-6)
    tall = torch.rand(1, 3, 32, 16)
    square = torch.nn.functional.interpolate(tall, size=16, mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.allclose(encoder(tall), encoder(square), atol=1e-6)


def test_an_unknown_network_is_named() -> None:
    with pytest.raises(LongtailError, match=r"network 'resnet23' is not known; perhaps you meant .*resnet"):
        build_backbone("resnet23")


def test_scores_are_scaled_cosines() -> None:
    classifier = CosineClassifier(4, 3, scale=10.0)
    features = torch.randn(5, 4)
    expected = 10 * torch.cosine_similarity(features[:, None], classifier.weight[None], dim=2)
    assert torch.allclose(classifier(features), expected, atol=1e-5)
    assert torch.allclose(classifier(features * 7), expected, atol=1e-5)


def test_embeddings_have_norm_one() -> None:
    assert ProjectionMLP(6, 3)(torch.randn(5, 6)).norm(dim=1).tolist() == pytest.approx([1] * 5)


def test_our_batch_norm_is_that_of_torch_without_the_count() -> None:
    ours, theirs = BatchNorm(4), nn.BatchNorm2d(4)
    theirs.load_state_dict(ours.state_dict())
    inputs = [torch.randn(5, 4, 6, 6).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [norm(x) for norm, x in zip((ours, theirs), inputs, strict=True)]
    for output in outputs:
        (output.square() * torch.arange(6)).sum().backward()
    assert torch.equal(*outputs)
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items() if name != "num_batches_tracked")
    assert (state["num_batches_tracked"], expected["num_batches_tracked"]) == (0, 1)
    assert torch.equal(ours.eval()(inputs[0]), theirs.eval()(inputs[0]))


@pytest.mark.parametrize("name", ["resnet8", "conv8-tiny"])
def test_a_frozen_encoder_has_no_batch_norm_of_its_own(name: str) -> None:
    encoder = Encoder(name, [0.5], [0.2])
    encoder(torch.rand(8, 1, 8, 8))  # statistics that are not those of the start
    frozen, images = FrozenEncoder(encoder), torch.rand(4, 1, 8, 8)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    torch.testing.assert_close(frozen(images), encoder.eval()(images), rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, BatchNorm) for module in encoder.modules())
