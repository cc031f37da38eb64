"""Learning rates and weight decay of every parameter."""

from __future__ import annotations

from typing import Any

import pytest

from longtail.config import Config
from longtail.nn import Encoder
from longtail.nn.tuning import layer_depths, set_trainable
from longtail.registry import METHODS
from longtail.training.optim import build_optimizer, set_learning_rate


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
