"""Learning rates and weight decay of every parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longtail.config import Config, Optimizer
from longtail.errors import LongtailError
from longtail.nn import Encoder, LinearClassifier, RegionClassifier
from longtail.nn.tuning import layer_depths, set_trainable
from longtail.registry import METHODS
from longtail.training.checkpoint import load_checkpoint
from longtail.training.optim import build_optimizer, limit_row_norms, set_learning_rate
from longtail.training.trainer import fit


def groups_of(config: Config, tune: str = "full") -> tuple[Any, dict[str, dict[str, Any]]]:
    """Return an optimizer, and the group of every parameter that is trained."""
    encoder = Encoder("test_efficientnet", [0.5] * 3, [0.5] * 3)
    set_trainable(encoder.backbone, tune)
    method = METHODS["la"](config, encoder, [9, 3, 1])
    optimizer = build_optimizer(method, config)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    return optimizer, {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_sgd_decays_everything_at_one_rate() -> None:
    optimizer, groups = groups_of(Config())
    assert len(optimizer.param_groups) == 1
    assert {group["weight_decay"] for group in groups.values()} == {5e-4}
    set_learning_rate(optimizer, 0.03)
    assert {group["lr"] for group in groups.values()} == {0.03}


def test_adamw_decays_matrices_only_and_the_head_has_its_own_rate() -> None:
    settings = {"name": "adamw", "learning_rate": 1e-3, "head_learning_rate": 1e-2, "weight_decay": 0.05}
    optimizer, groups = groups_of(Config().replace(optimizer=settings))
    set_learning_rate(optimizer, 5e-4)  # in the middle of the schedule
    assert groups["classifier.weight"]["lr"] == pytest.approx(5e-3)
    assert groups["encoder.backbone.conv_stem.weight"]["lr"] == pytest.approx(5e-4)
    assert groups["encoder.backbone.conv_stem.weight"]["weight_decay"] == 0.05
    assert groups["encoder.backbone.bn1.weight"]["weight_decay"] == 0
    assert groups["encoder.backbone.bn1.bias"]["weight_decay"] == 0


def test_layer_decay_falls_towards_the_input() -> None:
    config = Config().replace(optimizer={"layer_decay": 0.5})
    optimizer, groups = groups_of(config)
    set_learning_rate(optimizer, 1.0)
    depths = layer_depths(Encoder("test_efficientnet", [0.5] * 3, [0.5] * 3).backbone)
    deepest = max(depths.values())
    for name, depth in depths.items():
        assert groups[f"encoder.backbone.{name}"]["lr"] == pytest.approx(0.5 ** (deepest - depth))
    assert groups["classifier.weight"]["lr"] == 1.0


def test_what_is_frozen_is_not_in_the_optimizer() -> None:
    _, groups = groups_of(Config(), tune="head")
    assert set(groups) == {"classifier.weight"}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_part_has_its_own_weight_decay(name: str) -> None:
    settings = {"name": name, "weight_decay": 0.05, "head_weight_decay": 0.2, "norm_weight_decay": 0.01}
    _, groups = groups_of(Config().replace(optimizer=settings))
    assert groups["classifier.weight"]["weight_decay"] == 0.2
    assert groups["encoder.backbone.conv_stem.weight"]["weight_decay"] == 0.05
    assert groups["encoder.backbone.bn1.weight"]["weight_decay"] == 0.01
    assert groups["encoder.backbone.bn1.bias"]["weight_decay"] == 0.01
    assert len({id(group) for group in groups.values()}) == 3


def test_the_temperature_is_never_decayed() -> None:
    config = Config().replace(method="gml", gml={"keys": "momentum"}, optimizer={"norm_weight_decay": 0.1})
    method = METHODS["gml"](config, Encoder("conv8-tiny", [0.5], [0.5]), [9, 3, 1])
    decays = {
        id(p): group["weight_decay"] for group in build_optimizer(method, config).param_groups for p in group["params"]
    }
    assert [decays[id(p)] for p in method.no_weight_decay()] == [0.0]
    assert sorted(set(decays.values())) == [0.0, 5e-4, 0.1]


def test_adamw_can_be_recorded_on_the_device_it_will_run_on() -> None:
    config = Config().replace(optimizer={"name": "adamw"})
    method = METHODS["la"](config, Encoder("conv8-tiny", [0.5], [0.5]), [9, 3, 1])  # moved there afterwards
    groups = build_optimizer(method, config, True, torch.device("cuda")).param_groups
    assert all(group["capturable"] for group in groups)
    assert not any(group["capturable"] for group in build_optimizer(method, config, True).param_groups)


def test_norms_of_the_classes_are_limited_to_a_maximum() -> None:
    config = Config().replace(method="la")
    method = METHODS["la"](config, Encoder("conv8-tiny", [0.5], [0.5]), [9, 3, 1])
    before = method.classifier.weight.detach().double().clone()
    before[0] = 0.0
    with torch.no_grad():
        method.classifier.weight.copy_(before)
    limit = before.norm(dim=1)[1:].mean().item()  # one of two classes is above it
    limit_row_norms(method, limit)
    for row, after in zip(before, method.classifier.weight.double(), strict=True):
        norm = sum(float(value) ** 2 for value in row) ** 0.5
        torch.testing.assert_close(after, row * min(1.0, limit / max(norm, 1e-12)), rtol=1e-6, atol=1e-7)
    assert method.classifier.weight.norm(dim=1).max().item() == pytest.approx(limit, rel=1e-6)


@pytest.mark.parametrize("classifier", [LinearClassifier(4, 3), RegionClassifier(4, 3)])
def test_norms_of_other_classifiers_are_limited_too(classifier: LinearClassifier | RegionClassifier) -> None:
    method: Any = METHODS["la"](Config().replace(method="la"), Encoder("conv8-tiny", [0.5], [0.5]), [9, 3, 1])
    method.classifier = classifier
    torch.nn.init.constant_(classifier.weight, 2.0)
    limit_row_norms(method, 0.5)
    assert classifier.weight.norm(dim=1).tolist() == pytest.approx([0.5] * len(classifier.weight))


@pytest.mark.parametrize("batches", ["host", "device"])
def test_the_limit_holds_after_every_step(tiny: Config, tmp_path: Path, batches: str) -> None:
    settings = {"head_max_norm": 0.9, "sharpness": "sam"}
    config = tiny.replace(method="la", optimizer=settings, accelerator={"batches": batches})
    fit(config, tmp_path / "run", quiet=True)
    weight = load_checkpoint(tmp_path / "run" / "last.ckpt")["method"]["classifier.weight"]
    assert weight.norm(dim=1).tolist() == pytest.approx([0.9] * 10, rel=1e-5)


def test_nesterov_needs_a_momentum() -> None:
    with pytest.raises(LongtailError, match=r"optimizer.nesterov: needs a momentum, got optimizer.momentum 0"):
        Optimizer(nesterov=True, momentum=0.0)
