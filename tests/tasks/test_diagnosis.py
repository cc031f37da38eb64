"""Findings from figures that show them, and none from figures that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longtail.config import Config, load_recipe
from longtail.evaluation.temperature_fit import TemperatureFit
from longtail.registry import METHODS
from longtail.tasks.classification.diagnosis import diagnose
from longtail.training.metric_log import read_metrics
from longtail.training.trainer import fit
from tests.conftest import small_card

# ten classes: a guess is right in 10 %
NAMES, COUNTS = tuple("abcdefghij"), (90, 80, 70, 60, 50, 40, 30, 20, 10, 9)
GOOD = {"many": 90.0, "medium": 85.0, "few": 70.0, "balanced_accuracy": 82.0, "calibration": {"ece": 3.0}}
LINE = {"loss/classifier": 0.5, "temperature": 0.1, "queue_fill": 1.0}
# at first every image is taken for one class, which may be of any group, and confidently so
UNTRAINED = {"many": 100.0, "medium": 0.0, "few": 0.0, "balanced_accuracy": 10.0, "calibration": {"ece": 85.0}}
UNTRAINED_LINE = {"loss/classifier": 9.8, "temperature": 0.1, "queue_fill": 1.0}


def findings(
    metrics: dict[str, Any] | None = None,
    lines: list[dict[str, Any]] | None = None,
    under: str = "uniform",
    card: dict[str, Any] | None = None,
    **config: Any,
) -> list[str]:
    """Return what is reported of a good run in which these figures are others."""
    by_prior = {prior: {**GOOD, **(metrics or {})} for prior in ("uniform", "train")}
    model_config = small_card(NAMES, COUNTS, predicts_under=under, **(card or {}))
    reported = diagnose(model_config, Config().replace(**config), lines or [LINE] * 16, by_prior)
    return [f"{finding.problem} {finding.evidence} {finding.advice}" for finding in reported]


def losses(*values: float) -> list[dict[str, Any]]:
    return [{**LINE, "loss/classifier": value} for value in values]


def test_nothing_stands_out_of_a_good_run() -> None:
    for method in ("gml", "la", "focal"):
        assert findings(method=method) == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"metrics": {"few": 5.0}}, ["The tail is hardly recognised", "5.0 %", "gml.queue_minimum above 2", "crt"]),
        (
            {"metrics": {"few": 5.0, "intervals": {"few": [1.2, 44.0]}}},
            ["Accuracy in few is 5.0 % (95 % interval 1 to 44), in many 90.0 %."],
        ),
        ({"metrics": {"few": 5.0}, "method": "la", "pretrained": "timm"}, ["The tail", "--tune lora"]),
        ({"metrics": {"few": 5.0}, "method": "la", "init": "runs/first"}, ["The tail", "--tune lora"]),
        (
            {"metrics": {"few": 5.0}, "method": "la", "pretrained": "timm", "tune": "lora:4"},
            ["The tail", "many 90.0 %. A larger network, larger images, or more images of the rare classes."],
        ),
        (
            {"metrics": {"few": 5.0}, "method": "la", "pretrained": "timm", "card": {"network": "test_nfnet"}},
            ["The tail", "A larger network"],  # hardly a layer of which has low-rank updates
        ),
        (
            {
                **{"metrics": {"few": 5.0}, "method": "la", "pretrained": "timm", "tune": "head"},
                "card": {"network": "test_nfnet"},
            },
            ["The tail", "--tune full"],
        ),
        (
            {"metrics": {"few": 5.0}, "method": "la", "pretrained": "timm", "card": {"network": "of_a_later_timm"}},
            ["The tail", "A larger network"],
        ),
        ({"metrics": {"few": 5.0}, "method": "la", "second_stage": "crt"}, ["The tail", "Distil a teacher"]),
        ({"metrics": {"few": 5.0}, "under": "train", "method": "ce"}, ["The tail", "uniform prior (few +0.0 points)"]),
        ({"metrics": {"many": 30.0}}, ["Head accuracy is below medium accuracy", "30.0 %, in medium 85.0 %"]),
        (
            {"lines": losses(*(2.0 - 0.1 * index for index in range(16)))},
            ["The training has not converged", "Over its last 2 epochs", "More epochs"],
        ),
        (
            {"lines": losses(*[0.01] * 9), "metrics": {"balanced_accuracy": 40.0}},
            ["The network overfits", "0.010", "40.0 %", "data.augment"],
        ),
        (
            {"lines": [{**LINE, "temperature": 0.021}]},
            ["temperature of the mixture is at its bound", "0.021", "narrow"],
        ),
        ({"lines": [{**LINE, "temperature": 0.95}]}, ["temperature of the mixture is at its bound", "0.950", "wide"]),
        ({"lines": [{**LINE, "queue_fill": 0.4}]}, ["The queues were never full", "40 %"]),
        (
            {"metrics": {"calibration": {"ece": 23.0}}},
            ["Probabilities are poorly calibrated", "23 %", "--data.val_fraction"],
        ),
        (
            {
                "metrics": {"calibration": {"ece": 23.0}},
                "card": {"temperature_fits": {"all": TemperatureFit(temperature=1.0, interval=(0.5, 2.0), images=12)}},
            },
            ["Probabilities are poorly calibrated", "23 %", "rests on 12 validation images", "More validation images"],
        ),
        ({"metrics": UNTRAINED}, ["The network has learned hardly anything", "10.0 %, that of a guess 10.0 %"]),
    ],
)
def test_each_signature_is_reported_with_its_figure(changes: dict[str, Any], parts: list[str]) -> None:
    reported = findings(**changes)
    assert len(reported) == 1
    for part in parts:
        assert part in reported[0]


@pytest.mark.parametrize(
    "changes",
    [
        # not converged
        {"lines": losses(*[1.0] * 14, 0.92, 0.92)},
        {
            "lines": losses(*(0.001 - 0.0005 * index / 15 for index in range(16))),
            "metrics": {"balanced_accuracy": 97.0},
        },
        {"lines": losses(2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8)},
        # tail, head
        {"metrics": {"few": 46.0}},
        {"metrics": {"few": 41.7, "many": 86.7, "intervals": {"few": [10.0, 73.0]}}},  # too few test images to say
        {"metrics": {"many": 70.0}},
        # overfitting: the test set is known as well, the loss is not that small, or it is no −log p(y|x)
        {"lines": losses(*[0.01] * 16)},
        {"lines": losses(*[0.06] * 16), "metrics": {"balanced_accuracy": 40.0}},
        {"lines": losses(*[0.01] * 16), "metrics": {"balanced_accuracy": 40.0}, "method": "focal"},
        # of GML
        {"lines": [{**LINE, "temperature": 0.03}]},
        {"lines": [{**LINE, "temperature": 0.021}], "gml": {"learn_temperature": False}},
        {"lines": [{**LINE, "queue_fill": 0.95}]},
        # calibration, chance
        {"metrics": {"calibration": {"ece": 9.9}}},
        {"metrics": {"balanced_accuracy": 16.0}},
    ],
)
def test_each_finding_is_silent_where_its_figure_is_good(changes: dict[str, Any]) -> None:
    assert findings(**changes) == []


@pytest.mark.parametrize("method", ["gml", "la", "ce", "focal"])
@pytest.mark.parametrize(
    "metrics",
    [
        UNTRAINED,
        {**UNTRAINED, "many": 0.0, "medium": 25.0},
        {**UNTRAINED, "many": 0.0, "few": 14.0},
        {**UNTRAINED, "many": 0.0, "few": None},
        {**UNTRAINED, "calibration": {"ece": 0.5}},
    ],
)
def test_of_an_untrained_network_that_alone_is_reported(method: str, metrics: dict[str, Any]) -> None:
    for epochs in (1, 16):
        (reported,) = findings(metrics, [UNTRAINED_LINE] * epochs, method=method)
        assert "learned hardly anything" in reported


@pytest.mark.parametrize(
    "lines",
    [
        [{**UNTRAINED_LINE, "loss/classifier": 9.8 - 0.4 * index} for index in range(16)],  # not converged
        [{**UNTRAINED_LINE, "temperature": 0.021}],
        [{**UNTRAINED_LINE, "temperature": 0.95}],
        [{**UNTRAINED_LINE, "queue_fill": 0.1}],
    ],
)
def test_what_an_untrained_network_has_anyway_is_not_reported(lines: list[dict[str, Any]]) -> None:
    good = findings(lines=lines)
    assert len(good) == 1  # of a network that has learned something it would be
    (reported,) = findings(UNTRAINED, lines)
    assert "learned hardly anything" in reported


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"dice", "lovasz"}))
def test_of_every_method_a_good_run_has_no_finding_and_an_untrained_one_has_one(method: str) -> None:
    for under in ("uniform", "train"):
        assert findings(method=method, under=under) == []
        (reported,) = findings(UNTRAINED, [UNTRAINED_LINE] * 16, method=method, under=under)
        assert "learned hardly anything" in reported


def test_a_network_that_knows_its_training_images_alone() -> None:
    reported = findings(UNTRAINED, losses(*[0.01] * 16))
    assert [text.partition(".")[0] for text in reported] == [
        "The network has learned hardly anything",
        "The network overfits",
    ]


@pytest.mark.parametrize("method", ["gml", "la", "ce"])
def test_a_run_that_hardly_trained(tiny: Config, tmp_path: Path, method: str) -> None:
    config = tiny.replace(method=method, epochs=1, optimizer={"learning_rate": 1e-9}, teacher={"epochs": 1})
    run = fit(config, tmp_path / "run", quiet=True)
    epochs = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert len(epochs) == 1
    reported = diagnose(run.model_config, run.config, epochs, run.test_metrics)
    assert [finding.problem for finding in reported] == ["The network has learned hardly anything."]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gml", "la", "ce"])
def test_a_run_that_trained_well(tmp_path: Path, method: str) -> None:
    config = load_recipe("digits-lt").config.replace(method=method, epochs=60, data={"val_fraction": 0.2})
    run = fit(config, tmp_path / "run", quiet=True)
    epochs = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert run.test_metrics["uniform"]["balanced_accuracy"] > 85
    assert [finding.problem for finding in diagnose(run.model_config, run.config, epochs, run.test_metrics)] == []


def test_groups_that_are_not_there() -> None:
    assert findings({"few": None, "many": None, "medium": None}) == []
    assert findings({"calibration": None}) == []
