"""The moving average of the student: its weights, and what is distilled from it (Mean Teacher)."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from longtail.config import Config
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.losses import distillation
from longtail.methods.ema import EMAEncoder
from longtail.registry import METHODS
from tests.methods.steps import batches, build_method

DISTILLED: dict[str, Any] = {
    "method": "la",
    "teacher": {"source": "ema", "ema_decay": 0.9, "ema_warmup": 0.0},
    "classifier": {"distillation_weight": 0.5},
}


def test_the_average_with_warm_up_is_the_mean_and_then_the_moving_average() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    ema = EMAEncoder([module], decay=0.75, warm_up=True).double()
    expected = [0.0] * 6
    for step in range(10):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3))
        ema.update([module])
        decay = min(1 - 1 / (step + 1), 0.75)
        current = module.weight.flatten().tolist()
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, current, strict=True)]
        weights = ema.average.state_dict()["0.weight"].flatten().tolist()
        assert weights == pytest.approx(expected, rel=1e-6, abs=1e-6), step  # the weight of an update is float32
    assert int(ema.updates) == 10
    # part of a checkpoint
    other = EMAEncoder([module], decay=0.75, warm_up=True).double()
    other.load_state_dict(ema.state_dict())
    assert int(other.updates) == 10


def test_statistics_that_are_not_trained_stay() -> None:
    module = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1))
    module[0].requires_grad_(False)
    ema = EMAEncoder([module], decay=0.9).train()
    before = copy.deepcopy(ema.state_dict())
    ema(torch.randn(8, 1, 2, 2) + 3)
    after = ema.state_dict()
    assert torch.equal(after["average.0.0.running_mean"], before["average.0.0.running_mean"])
    assert not torch.equal(after["average.0.1.running_mean"], before["average.0.1.running_mean"])


@pytest.mark.parametrize("views", [1, 2, 3])
def test_every_view_learns_from_the_next_ones_scores(tiny: Config, views: int) -> None:
    config = tiny.replace(**DISTILLED).replace(classifier={"views": views, "distill_every_view": True})
    assert not METHODS["la"].needs_teacher(config)
    assert not METHODS["la"].teacher_is_frozen(config)
    method = build_method(config, load_data(config.data, 0))
    batch = batches(method, load_data(config.data, 0))[0]
    with torch.no_grad():  # another teacher than the student
        method.mean_teacher.updates.fill_(100)
        for parameter in method.mean_teacher.average.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    average = copy.deepcopy(method.mean_teacher)
    average.update([method.encoder, method.classifier])
    with torch.no_grad():
        each = [
            distillation(
                method.classifier(copy.deepcopy(method.encoder)(batch.views[view])),
                average(batch.views[(view + 1) % views]),
            ).item()
            for view in range(views)
        ]
    assert min(each) > 0
    assert method(batch)["distillation"].item() == pytest.approx(0.5 * sum(each) / views, rel=1e-4)


def test_the_weight_grows_over_the_first_epochs(tiny: Config) -> None:
    config = tiny.replace(**DISTILLED).replace(teacher={"ema_warmup": 0.2})
    data = load_data(config.data, 0)
    method = build_method(config, data)
    batch = batches(method, data)[0]
    for done in (0.0, 0.05, 0.1, 0.2, 0.7):
        expected = 0.5 * math.exp(-5 * max(0.0, 1 - done / 0.2) ** 2)
        for fraction in (done, torch.tensor(done)):
            weight = method.distillation_strength(dataclasses.replace(batch, epoch_fraction=fraction))
            assert float(weight) == pytest.approx(expected, rel=1e-5)
    # a frozen teacher's does not
    frozen = build_method(config.replace(teacher={"source": "train"}), data)
    assert frozen.distillation_strength(batch) == 0.5


def test_parts_of_a_batch_move_the_average_as_one(tiny: Config) -> None:
    data = load_data(tiny.data, 0)
    averages = []
    for parts in (1, 4):
        config = tiny.replace(**DISTILLED, optimizer={"grad_accumulation_steps": parts})
        method = build_method(config, data)
        method.mean_teacher.updates.fill_(1000)
        with torch.no_grad():
            method.classifier.weight.add_(1.0)
        for part in batches(method, data)[0].split(parts):
            method.teacher_outputs(part)
        averages.append(method.mean_teacher.average.state_dict()["1.weight"])
    assert torch.allclose(averages[0], averages[1], rtol=1e-4, atol=1e-5)


def test_gml_has_keys_and_scores_of_moving_averages(tiny: Config) -> None:
    config = tiny.replace(teacher={"source": "ema"}, gml={"keys": "momentum"})
    data = load_data(config.data, 0)
    config, reasons = METHODS["gml"].auto_config(config, data.class_counts, lambda: False)
    assert METHODS["gml"].distillation_weight(config) == 1
    assert "the moving average of the student has a classifier" in " ".join(reasons)
    assert not METHODS["gml"].needs_teacher(config)
    terms = build_method(config, data)(batches(build_method(config, data), data)[0])
    assert {"distillation", "mixture"} <= terms.keys()
    for keys in ("teacher", "both"):
        with pytest.raises(LongtailError, match=f"gml.keys {keys}: needs a frozen teacher, which teacher.source ema"):
            METHODS["gml"].check(config.replace(gml={"keys": keys}), data.class_counts)


def test_a_method_that_needs_a_trained_teacher_says_so(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS["la"], "needs_teacher", lambda config: True)
    config = tiny.replace(method="la", teacher={"source": "ema"})
    with pytest.raises(
        LongtailError, match=r"source ema: method la needs a trained teacher; use train, a folder or timm:NAME"
    ):
        METHODS["la"].check(config, [10] * 10)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"source": "ema", "cache": 2}, r"teacher.source ema: its scores change in every step and cannot be cached"),
        ({"source": "ema", "views": 2}, r"teacher.views 2: is for a teacher that is trained; set teacher.source to"),
        ({"source": "runs/a", "count": 2}, r"teacher.count 2: is for a teacher that is trained"),
        ({"source": "runs/a", "generations": 3}, r"teacher.generations 3: is for a teacher that is trained"),
        ({"source": ("train", "runs/a")}, r"teacher.source train, runs/a: expected train, ema, or one or more folders"),
        ({"source": ()}, r"teacher.source \(\): expected train, ema"),
    ],
)
def test_settings_of_a_teacher_that_contradict_one_another(tiny: Config, teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        tiny.replace(teacher=teacher)
