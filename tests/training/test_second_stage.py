"""The second stage of a run: a new classifier on the frozen encoder, within the budget of its epochs."""

from __future__ import annotations

import math
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from longtail import Recognizer
from longtail.config import Config, first_stage_epochs
from longtail.data.samplers import epoch_order
from longtail.errors import LongtailError, StoppedError
from longtail.experiments.rebalance import RebalanceSettings, rebalance
from longtail.nn import LinearClassifier
from longtail.randomness import mix
from longtail.report import run_report
from longtail.training import second_stage
from longtail.training.metric_log import read_metrics
from longtail.training.preemption import PreemptionHandler
from longtail.training.run_io import find_finished
from longtail.training.second_stage import HeadSettings, fit_head, head_loss
from longtail.training.trainer import fit
from tests.training.runs import equal, fit_in_two, weights


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_stage, "MIN_STEPS", 30)


@pytest.fixture
def config(tiny: Config) -> Config:
    return tiny.replace(method="la", epochs=4, second_stage="crt", second_stage_fraction=0.5)


def test_the_loss_is_the_class_balanced_one() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 1, 1, 2])
    weights = torch.tensor([7 / (3 * count) for count in (4, 2, 1)], dtype=torch.float64)
    losses: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        losses[label].append(math.log(sum(math.exp(score) for score in row)) - row[label])
    expected = sum(sum(each) / len(each) for each in losses.values()) / 3
    assert head_loss(scores, labels, weights).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", ["reweight", "lws"])
def test_a_fit_is_gradient_descent_on_the_losses_of_its_batches(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole fit against float64 loops over passes and batches, with gradients written from the formula."""
    monkeypatch.setattr(second_stage, "MIN_STEPS", 1)
    monkeypatch.setattr(second_stage, "BATCH", 4)
    torch.manual_seed(0)
    features, labels = torch.randn(10, 2, dtype=torch.float64), torch.tensor([0] * 6 + [1] * 3 + [2])
    settings = HeadSettings(method, epochs=2, learning_rate=0.1, weight_decay=0.01)
    monkeypatch.setattr(second_stage, "LinearClassifier", _linear_in_float64)
    head, tau = fit_head(features, labels, 3, settings, seed=5)
    assert tau is None
    size = math.sqrt(features.square().mean().item())
    inputs = [[value / size for value in row] for row in features.tolist()]
    counts = Counter(labels.tolist())
    passes = [0]

    def fit_by_hand(matrix: Any, value: list[float], gradients: Any, sampler: str, weighted: bool) -> list[float]:
        """Return parameters after SGD with momentum 0.9, weight decay and a cosine schedule over 6 steps."""
        momentum: list[float] | None = None
        step = 0
        for _ in range(2):
            order = epoch_order(labels, sampler, mix(5, mix(6)), passes[0]).tolist()
            passes[0] += 1
            for start in range(0, 10, 4):
                rows = order[start : start + 4]
                total = [0.0] * len(value)
                for row in rows:
                    x, y = inputs[row], int(labels[row])
                    w = matrix(value)
                    scores = [sum(w[c][f] * x[f] for f in range(2)) for c in range(3)]
                    z = sum(math.exp(score) for score in scores)
                    factor = 10 / (3 * counts[y]) if weighted else 1.0
                    errors = [factor * (math.exp(scores[c]) / z - (c == y)) for c in range(3)]
                    for index, gradient in enumerate(gradients(errors, x)):
                        total[index] += gradient / len(rows)
                total = [gradient + 0.01 * parameter for gradient, parameter in zip(total, value, strict=True)]
                if momentum is None:
                    momentum = total
                else:
                    momentum = [0.9 * old + new for old, new in zip(momentum, total, strict=True)]
                rate = 0.1 * (1 + math.cos(math.pi * step / 6)) / 2
                value = [parameter - rate * m for parameter, m in zip(value, momentum, strict=True)]
                step += 1
        return value

    flat = fit_by_hand(
        lambda value: [value[2 * c : 2 * c + 2] for c in range(3)],
        [0.0] * 6,
        lambda errors, x: [errors[c] * x[f] for c in range(3) for f in range(2)],
        "instance",
        weighted=method == "reweight",
    )
    if method == "lws":
        base = [flat[2 * c : 2 * c + 2] for c in range(3)]
        factors = fit_by_hand(
            lambda value: [[value[c] * w for w in base[c]] for c in range(3)],
            [1.0] * 3,
            lambda errors, x: [errors[c] * sum(base[c][f] * x[f] for f in range(2)) for c in range(3)],
            "class",
            weighted=False,
        )
        flat = [factors[c] * base[c][f] for c in range(3) for f in range(2)]
    expected = [value / size for value in flat]
    assert head.weight.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def _linear_in_float64(in_features: int, num_classes: int) -> LinearClassifier:
    return LinearClassifier(in_features, num_classes).double()


@pytest.mark.parametrize(
    ("epochs", "fraction", "first"), [(2, 0.1, 1), (2, 0.99, 1), (20, 0.1, 18), (90, 0.1, 81), (10, 0.3, 7)]
)
def test_the_epochs_are_divided(epochs: int, fraction: float, first: int) -> None:
    assert first_stage_epochs(Config(epochs=epochs, second_stage="lws", second_stage_fraction=fraction)) == first
    assert first_stage_epochs(Config(epochs=epochs)) == epochs


@pytest.mark.parametrize("method", ["crt", "lws", "reweight"])
def test_it_is_what_rebalance_does_after_the_epochs_of_the_first(config: Config, tmp_path: Path, method: Any) -> None:
    run = fit(config.replace(second_stage=method), tmp_path / "run", quiet=True)
    first = fit(config.replace(second_stage="none", epochs=2), tmp_path / "first", quiet=True)
    metrics = rebalance(tmp_path / "first", tmp_path / "new", RebalanceSettings(method, views=2))
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "new"))
    assert run.test_metrics["uniform"] == metrics["uniform"]
    # the images that went through the encoder, and the time, are counted
    assert run.student_passes == 2 * first.student_passes
    model = Recognizer.load(tmp_path / "run")
    assert model.config.head == "linear"
    assert model.config.predicts_under == "uniform"
    assert model.config.training_info["second_stage"]["classifier"] == method
    assert model.config.training_info["second_stage"]["epochs"] == 2
    # the metrics of the first stage are beside those of the second
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["kind"] for line in lines] == ["epoch", "epoch", "first_stage", "second_stage", "test"]
    assert lines[2]["uniform"] == first.test_metrics["uniform"]
    page = run_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Effect of the second stage" in page
    assert f"<td>the second stage, {method}</td>" in page
    assert find_finished(tmp_path / "run", run.config) == run


@pytest.mark.parametrize("interrupted", ["first", "second"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    config = config.replace(second_stage="lws", data={"val_fraction": 0.2})
    fit(config, tmp_path / "whole", quiet=True)
    if interrupted == "first":
        fit_in_two(config, tmp_path / "cut", 8, monkeypatch)
    else:
        passes = [0]

        def stops(*arguments: Any) -> Any:
            passes[0] += 1
            if passes[0] == 5:
                raise KeyboardInterrupt
            return epoch_order(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(second_stage, "epoch_order", stops)
            with pytest.raises(KeyboardInterrupt):
                fit(config, tmp_path / "cut", quiet=True)
        torch.manual_seed(123)  # the state of the random numbers does not matter
        fit(config, tmp_path / "cut", resume=True, quiet=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    whole, cut = (
        [(line["kind"], line.get("uniform")) for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "cut")
    )
    assert whole == cut


def test_a_signal_stops_it_and_the_first_stage_is_kept(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(*_: object, **__: object) -> tuple[str, bool]:
        kinds = [line["kind"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
        return ("SIGTERM" if "first_stage" in kinds else ""), True

    with monkeypatch.context() as patched:
        patched.setattr(PreemptionHandler, "sync", sync)
        with pytest.raises(StoppedError, match="stopped by SIGTERM at the end of the first stage, all of it saved"):
            fit(config, tmp_path / "run", quiet=True)
    fit(config, tmp_path / "run", quiet=True, resume=True)
    fit(config, tmp_path / "whole", quiet=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_signal_in_its_last_pass_is_not_dropped(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain = second_stage.retrain_classifier

    def terminated(*args: Any, **options: Any) -> Any:
        trained = retrain(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return trained

    monkeypatch.setattr(second_stage, "retrain_classifier", terminated)
    with pytest.raises(StoppedError, match="stopped by SIGTERM at the end of the first stage"):
        fit(config, tmp_path / "run", quiet=True)


def test_features_that_take_too_much_memory_are_of_fewer_views(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(second_stage, "FEATURE_BYTES", 1)
    with caplog.at_level("INFO", logger="longtail"):
        fit(config, tmp_path / "run", quiet=True)
    assert "features of 1 of 2 views of every image" in caplog.text


def test_it_trains_on_kept_features(config: Config, tmp_path: Path) -> None:
    run = fit(config.replace(tune="head", feature_views=2), tmp_path / "run", quiet=True)
    assert Recognizer.load(tmp_path / "run").config.head == "linear"
    assert run.student_passes == 4 * 357


def test_what_it_is_not_for_is_said(config: Config, segmenting: Config, tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match=r"second_stage crt: takes at least one of the epochs .* 2 or more"):
        config.replace(epochs=1)
    with pytest.raises(LongtailError, match=r"second_stage lws: re-trains a classifier of whole images"):
        fit(segmenting.replace(second_stage="lws"), tmp_path / "run", quiet=True)
    with pytest.raises(LongtailError, match=r"gml.ensemble_weight: second_stage crt replaces the classifier"):
        fit(config.replace(method="gml", gml={"ensemble_weight": 1.0}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
