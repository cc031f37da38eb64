"""Settings that are given and change nothing are named, and no others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from longtail.config import Config, load_recipe, recipe_names
from longtail.experiments.compare import compare
from longtail.registry import METHODS
from longtail.training.unused_settings import remarks_on_unused


@pytest.fixture
def plain() -> Config:
    """digits-lt by logit adjustment."""
    return load_recipe("digits-lt").config.replace(method="la")


@pytest.mark.parametrize(
    ("given", "shown", "used_with"),
    [
        ({"teacher": {"count": 3}}, "teacher.count 3", {"classifier": {"distillation_weight": 1.0}}),
        ({"teacher": {"generations": 2}}, "teacher.generations 2", {"method": "gml"}),
        ({"teacher": {"cache": 4}}, "teacher.cache 4", {"method": "gml"}),
        ({"teacher": {"network": "resnet8"}}, "teacher.network resnet8", {"method": "gml"}),
        (
            {"classifier": {"distill_every_view": True}},
            "classifier.distill_every_view true",
            {"classifier": {"distillation_weight": 1.0, "views": 2}},
        ),
        (
            {"classifier": {"every_view": True}},
            "classifier.every_view true",
            {"method": "supcon", "supcon": {"views": 2}},
        ),
        ({"schedule": {"milestones": (0.5, 0.7)}}, "schedule.milestones 0.5 0.7", {"schedule": {"name": "multistep"}}),
        ({"optimizer": {"name": "adamw", "nesterov": True}}, "optimizer.nesterov true", {"optimizer": {"name": "sgd"}}),
        ({"optimizer": {"layer_decay": 0.5}}, "optimizer.layer_decay 0.5", {"network": "resnet18"}),
        ({"optimizer": {"rho": 0.2}}, "optimizer.rho 0.2", {"optimizer": {"sharpness": "sam"}}),
        ({"optimizer": {"sharpness_below": 5}}, "optimizer.sharpness_below 5", {"optimizer": {"sharpness": "imbsam"}}),
        ({"mixing": {"alpha": 0.4}}, "mixing.alpha 0.4", {"mixing": {"kind": "cutmix"}}),
        ({"mixing": {"threshold": 0.4}}, "mixing.threshold 0.4", {"mixing": {"kind": "remix"}}),
        ({"data": {"deferred_from": 0.5}}, "data.deferred_from 0.5", {"data": {"sampler": "deferred"}}),
        ({"data": {"repeat_threshold": 0.1}}, "data.repeat_threshold 0.1", {"data": {"sampler": "repeat_factor"}}),
        ({"feature_views": 4}, "feature_views 4", {"tune": "head"}),
        ({"second_stage_fraction": 0.5}, "second_stage_fraction 0.5", {"second_stage": "crt"}),
        ({"gml": {"queue_size": 64}}, "gml.queue_size 64", {"method": "gml"}),
    ],
)
def test_what_changes_nothing_is_named(
    plain: Config, given: dict[str, Any], shown: str, used_with: dict[str, Any]
) -> None:
    config = plain.replace(**given)
    assert remarks_on_unused(config) == [f"{shown}: without effect with the other settings"]
    assert remarks_on_unused(config.replace(**used_with)) == []


def test_all_are_named_in_one_line(plain: Config) -> None:
    config = plain.replace(teacher={"count": 3}, mixing={"alpha": 0.4})
    assert remarks_on_unused(config) == ["teacher.count 3, mixing.alpha 0.4: without effect with the other settings"]


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipes_own_values_are_not_remarked_on(recipe: str) -> None:
    config = load_recipe(recipe).config
    for method in METHODS:
        assert remarks_on_unused(config.replace(method=method)) == []


def test_what_another_method_of_a_comparison_uses_is_not_remarked_on(
    tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="longtail")
    config = tiny.replace(epochs=1, classifier={"every_view": True}, optimizer={"rho": 0.2}, supcon={"views": 2})
    compare(config.replace(gml={"share_query": True}), ["ce", "supcon"], [0], tmp_path / "out", quiet=True)
    remarks = {record.getMessage() for record in caplog.records if "without effect" in record.getMessage()}
    assert remarks == {"optimizer.rho 0.2: without effect with the other settings"}
