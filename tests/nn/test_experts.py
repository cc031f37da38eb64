"""Networks with experts: each computes what the network alone would, and only the last stages are its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from longtail.errors import LongtailError
from longtail.nn import CosineClassifier, Encoder, ExpertClassifier, FrozenEncoder
from longtail.nn.experts import relative_operations, split_experts
from longtail.nn.tuning import layer_depths

NETWORKS = [
    ("conv8-tiny", 8, 2),
    ("resnet8", 32, 1),
    ("resnet14x2", 32, 2),
    ("resnet10t", 64, 2),  # timm: stages as attributes
    ("test_efficientnet", 64, 1),  # a convolution and BatchNorm behind the last stage
    ("test_vit", 160, 2),  # blocks in a sequence, and a norm behind them
    ("test_convnext", 64, 1),
]


def new_encoder(name: str) -> Encoder:
    torch.manual_seed(0)
    return Encoder(name, [0.5] * 3, [0.3] * 3).eval()


@pytest.mark.parametrize(("name", "size", "stages"), NETWORKS)
def test_each_copy_computes_what_the_network_does(name: str, size: int, stages: int) -> None:
    encoder, images = new_encoder(name), torch.rand(3, 3, size, size)
    alone = copy.deepcopy(encoder)
    width, parameters = encoder.num_features, sum(p.numel() for p in encoder.parameters())
    split_experts(encoder, 3, stages)
    encoder.eval()
    assert encoder.num_features == 3 * width
    with torch.no_grad():
        expected, features = alone(images), encoder(images)
        frozen = FrozenEncoder(copy.deepcopy(encoder))(images)
    assert features.shape == (3, 3 * width)
    for expert in features.split(width, dim=1):
        torch.testing.assert_close(expert, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen, features, rtol=1e-4, atol=1e-5)
    assert parameters < sum(p.numel() for p in encoder.parameters()) < 3 * parameters
    assert 1 < relative_operations(name, 3, stages) < 3


@pytest.mark.parametrize(("name", "size", "stages"), NETWORKS)
def test_an_expert_depends_on_its_own_last_stages_and_on_the_stem(name: str, size: int, stages: int) -> None:
    encoder = new_encoder(name)
    width = encoder.num_features
    split_experts(encoder, 2, stages, independent=True)
    first, second = encoder.train()(torch.rand(4, 3, size, size)).split(width, dim=1)
    assert not torch.allclose(first, second)  # weights of their own from the start
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    pairs = zip(
        names,
        torch.autograd.grad((first * torch.rand_like(first)).sum(), parameters, retain_graph=True, allow_unused=True),
        torch.autograd.grad((second * torch.rand_like(second)).sum(), parameters, allow_unused=True),
        strict=True,
    )
    kinds = {"own": 0, "other's": 0, "shared": 0}
    for name, one, two in pairs:
        reached = [gradient is not None and bool(gradient.abs().sum() > 0) for gradient in (one, two)]
        if ".experts.0." in name or ".experts.1." in name:
            assert not reached[int(".experts.0." in name)], name
            kinds["own" if reached[0] else "other's"] += any(reached)
        else:
            kinds["shared"] += all(reached)
    assert min(kinds.values()) > 0
    assert kinds["own"] == kinds["other's"]


def test_a_projection_for_each_where_all_stages_are_shared() -> None:
    encoder = new_encoder("resnet8")
    width = encoder.num_features
    before = sum(p.numel() for p in encoder.parameters())
    split_experts(encoder, 3, 0)
    assert sum(p.numel() for p in encoder.parameters()) == before + 3 * (width**2 + 2 * width)
    first, second, _ = encoder(torch.rand(2, 3, 32, 32)).split(width, dim=1)
    assert not torch.allclose(first, second)


def test_operations_of_a_resnet() -> None:
    # the three stages have equally many operations but for the first convolution of a stage, and the stem has few
    assert relative_operations("resnet110", 3, 1) == pytest.approx(1 + 2 / 3, abs=0.02)
    assert relative_operations("resnet110", 3, 2) == pytest.approx(1 + 4 / 3, abs=0.02)
    assert relative_operations("resnet8", 4, 0) == pytest.approx(1, abs=0.01)


def test_layers_of_all_experts_have_the_same_depth() -> None:
    encoder = new_encoder("resnet10t")
    split_experts(encoder, 2, 1)
    depths = layer_depths(encoder.backbone, coarse=True)
    assert depths.keys() == {name for name, _ in encoder.backbone.named_parameters()}
    own = {name: depth for name, depth in depths.items() if ".experts." in name}
    assert set(own.values()) == {max(depths.values())}
    assert max(depth for name, depth in depths.items() if name not in own) < max(depths.values())


@pytest.mark.parametrize(
    ("name", "stages", "message"),
    [
        ("resnet8", 3, r"experts\.stages 3: network 'resnet8' has 3 stages, and at least one is shared; .*at most 2"),
        ("conv8", 9, r"experts\.stages 9: network 'conv8' has 3 stages"),
        ("test_vit", 7, r"experts\.stages 7: network 'test_vit' has 6 stages"),
    ],
)
def test_too_many_stages_are_refused(name: str, stages: int, message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        split_experts(new_encoder(name), 3, stages)


class _TwoPaths(nn.Module):
    """A network whose last stage has the input of an earlier one beside it, so that it cannot be split there."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(3, 4, 1)) for _ in range(2))
        self.skip = nn.Conv2d(3, 4, 1)

    def stage_depths(self) -> dict[str, int]:
        return {name: 2 if name.startswith("second") else 1 for name, _ in self.named_parameters()}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        y = self.skip(images) + self.second(images[:, :3])
        features: torch.Tensor = y.mean(dim=(2, 3))
        return features


def test_a_network_with_another_path_is_refused() -> None:
    encoder, other = (Encoder("resnet8", [0.5] * 3, [0.3] * 3, build=lambda *_: _TwoPaths()) for _ in range(2))
    with pytest.raises(LongtailError, match=r"cannot be split into experts .* use experts\.stages 0"):
        split_experts(encoder, 3, 1)
    split_experts(other, 3, 0)
    assert other(torch.rand(2, 3, 8, 8)).shape == (2, 12)


def test_the_head_is_the_mean_of_corrected_cosines() -> None:
    head, features = ExpertClassifier(8, 5, scale=10.0, num_experts=2), torch.randn(3, 8)
    head.contained_log_prior.copy_(torch.randn(2, 5))
    cosines = [CosineClassifier(4, 5, 10.0) for _ in range(2)]
    for index, cosine in enumerate(cosines):
        cosine.weight.data.copy_(head.weight[:, 4 * index : 4 * index + 4])
    each = torch.stack([cosine(features[:, 4 * i : 4 * i + 4]) for i, cosine in enumerate(cosines)], dim=1)
    torch.testing.assert_close(head.expert_scores(features), each)
    torch.testing.assert_close(head(features), (each - head.contained_log_prior).mean(dim=1))
