"""Temperature, calibration error and conformal sets, for scores with known true probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longtail.evaluation.calibration import (
    BINS,
    add_reliability,
    calibration_metrics,
    conformal_interval,
    conformal_minimum,
    conformal_thresholds,
    fit_bias,
    fit_temperature,
    group_numbers,
    rejection_curve,
    reliability,
    wilson_interval,
)
from longtail.tasks.classification.calibration import fit_group_temperatures


def calibrated(count: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores, and labels drawn from their softmax probabilities."""
    g = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(count, classes, generator=g, dtype=torch.float64)
    return scores, torch.multinomial(scores.softmax(dim=1), 1, generator=g)[:, 0]


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_is_a_factor_of_the_scores(factor: float) -> None:
    scores, labels = calibrated(20_000)
    fit = fit_temperature(factor * scores, labels)
    assert fit.temperature == pytest.approx(factor, rel=0.05)
    assert fit.interval[0] <= fit.temperature <= fit.interval[1]
    assert fit.images == 20_000


def test_the_temperature_is_of_scores_free_of_the_prior() -> None:
    prior = torch.tensor([0.7, 0.2, 0.07, 0.03]).double().log()
    g = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(20_000, 4, generator=g, dtype=torch.float64)
    labels = torch.multinomial((scores + prior).softmax(dim=1), 1, generator=g)[:, 0]
    assert fit_temperature(3 * scores, labels, prior).temperature == pytest.approx(3, rel=0.05)


def test_images_that_are_all_classified_correctly_are_no_reason_for_another_temperature() -> None:
    for count in (1, 3, 10):
        labels = torch.arange(count) % 3
        fit = fit_temperature(3.0 * torch.nn.functional.one_hot(labels, 3), labels)
        assert fit.temperature == 1
        assert fit.interval[0] < 1 < fit.interval[1]


def test_a_class_without_images_has_no_effect_on_the_temperature() -> None:
    scores, labels = calibrated(500)
    log_prior = (torch.bincount(labels, minlength=5) / 500).double().log()
    assert log_prior[4] == -torch.inf
    with_it = torch.cat([scores, torch.full((500, 1), 9.0)], dim=1)
    assert fit_temperature(3 * with_it, labels, log_prior) == fit_temperature(3 * scores, labels, log_prior[:4])


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


def test_no_copy_of_all_scores_is_made() -> None:
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(2000, 30, generator=g), torch.randint(25, (2000,), generator=g)
    log_prior = (torch.bincount(labels, minlength=30) / 2000).log()
    for fit in (fit_temperature, fit_bias):
        with LargestTensor() as largest:  # type: ignore[no-untyped-call]
            fit(scores, labels, log_prior)
        assert 30 * 500 <= largest.elements < 30 * 600


def test_the_fits_are_those_of_the_definition() -> None:
    """In one piece and with a graph of all images: what the sums by rows are to give."""
    g = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(1300, 6, generator=g)
    labels = torch.multinomial((scores / 2).softmax(dim=1), 1, generator=g)[:, 0] % 5
    log_prior = (torch.bincount(labels, minlength=6) / 1300).double().log()
    assert log_prior[5] == -math.inf

    known, known_prior = scores.double()[:, :5], log_prior[:5]
    targets = torch.nn.functional.one_hot(labels, 5) + 10 / 1300 * (known + known_prior).softmax(dim=1)

    def loss(temperature: float) -> float:
        return -float((targets * (known / temperature + known_prior).log_softmax(dim=1)).sum())

    low, high = fit_temperature(scores, labels, log_prior).interval
    best = min(loss(low + (high - low) * step / 1000) for step in range(1001))
    assert [loss(low) - best, loss(high) - best] == pytest.approx([1.92, 1.92], abs=0.02)

    bias = fit_bias(scores, labels, log_prior, shrink=False).double().requires_grad_()
    penalized = torch.nn.functional.cross_entropy(scores + log_prior + bias, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(penalized + bias.square().sum() / 2, bias)
    assert gradient.abs().max() < 0.05
    assert bias.abs().max() > 0.3


def test_the_interval_of_a_temperature_has_its_coverage() -> None:
    inside = 0
    for seed in range(100):
        scores, labels = calibrated(200, seed=seed)
        low, high = fit_temperature(1.5 * scores, labels).interval
        inside += low <= 1.5 <= high
    assert 90 <= inside < 100  # nominal: 95


def validation_set(
    count: int, classes: int, margin: float, factor: float, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores of a classifier whose right temperature is a factor, and labels."""
    scores = torch.randn(count, classes, generator=g, dtype=torch.float64)
    scores[torch.arange(count), torch.randint(classes, (count,), generator=g)] += margin
    return factor * scores, torch.multinomial(scores.softmax(dim=1), 1, generator=g)[:, 0]


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("margin", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("classes", [3, 20])
def test_temperatures_from_few_images_are_not_worse_than_none(classes: int, margin: float, factor: float) -> None:
    g = torch.Generator().manual_seed(1)
    fresh, fresh_labels = validation_set(4000, classes, margin, factor, g)
    groups = ["many"] + ["few"] * (classes - 1)
    uniform = torch.zeros(classes)
    group_of = torch.tensor([0] + [1] * (classes - 1))[fresh.argmax(dim=1)]

    def nll(temperature: torch.Tensor | float) -> float:
        return float(torch.nn.functional.cross_entropy(fresh / temperature, fresh_labels))

    plain = nll(1.0)
    for count in (3, 10, 10, 10, 10, 30, 30, 100, 300):
        scores, labels = validation_set(count, classes, margin, factor, g)
        single = fit_temperature(scores, labels)
        assert nll(single.temperature) < 1.02 * plain
        fits = fit_group_temperatures(scores, labels, uniform, groups, single)
        by_group = torch.tensor([fits[name].temperature for name in ("many", "few")], dtype=torch.float64)
        assert nll(by_group[group_of][:, None]) < 1.02 * plain
    if factor == 3 and margin > 1:  # and with 300 images most of what there is to gain is gained
        assert plain - nll(single.temperature) > 0.9 * (plain - nll(3.0))


def test_a_group_keeps_the_temperature_of_all_until_its_images_show_another_one() -> None:
    g = torch.Generator().manual_seed(0)
    scores, labels = validation_set(20_000, 4, 2.0, 1.0, g)
    groups = ["many", "many", "few", "few"]
    few = scores.argmax(dim=1) >= 2
    scores[few] *= 3
    overall = fit_temperature(scores, labels)
    fits = fit_group_temperatures(scores, labels, torch.zeros(4), groups, overall)
    assert fits["many"].temperature == pytest.approx(1, abs=0.1)
    assert fits["few"].temperature == pytest.approx(3, rel=0.1)
    assert fits["many"].images + fits["few"].images == 20_000
    handful = torch.cat([few.nonzero()[:3, 0], (~few).nonzero()[:1000, 0]])
    fits = fit_group_temperatures(scores[handful], labels[handful], torch.zeros(4), groups, overall)
    assert fits["few"].temperature == overall.temperature
    assert fits["few"].images == 3
    fits = fit_group_temperatures(scores[~few], labels[~few], torch.zeros(4), groups, overall)
    assert (fits["few"].temperature, fits["few"].images) == (overall.temperature, 0)


@pytest.mark.parametrize("classes", [3, 10, 30])
def test_a_bias_from_few_images_is_seldom_worse_than_none(classes: int) -> None:
    g = torch.Generator().manual_seed(2)
    fresh, fresh_labels = validation_set(4000, classes, 3.0, 1.0, g)
    plain = float(torch.nn.functional.cross_entropy(fresh, fresh_labels))
    for per_class in (1, 3, 10):
        neutral, excess, without_shrinkage = 0, list[float](), list[float]()
        for _ in range(10):
            scores, labels = validation_set(per_class * classes, classes, 3.0, 1.0, g)
            bias = fit_bias(scores, labels).double()
            neutral += bool((bias == 0).all())
            for values, sums in ((bias, excess), (fit_bias(scores, labels, shrink=False), without_shrinkage)):
                sums.append(float(torch.nn.functional.cross_entropy(fresh + values, fresh_labels)) / plain - 1)
        assert neutral >= 3
        assert sum(excess) / 10 < 0.02
        assert sum(excess) < sum(without_shrinkage)


def test_without_images_there_is_no_bias() -> None:
    assert fit_bias(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).tolist() == [0, 0, 0]


def test_the_bias_corrects_the_scores() -> None:
    scores, labels = calibrated(20_000)
    missing = torch.tensor([0.0, 1.0, -2.0, 0.5]).double()
    bias = fit_bias(scores - missing, labels).double()
    assert torch.allclose(bias - bias.mean(), missing - missing.mean(), atol=0.1)
    # with few images the penalty dominates
    few = fit_bias((scores - missing)[:8], labels[:8])
    assert few.abs().max() < bias.abs().max()


def test_errors_against_a_loop() -> None:
    scores, labels = calibrated(500)
    log_p, groups = (1.7 * scores).log_softmax(dim=1), group_numbers(["many", "few", "few", "medium"])
    parts = [reliability(log_p[a:b], labels[a:b], groups) for a, b in ((0, 123), (123, 500))]
    metrics = calibration_metrics(add_reliability(*parts))
    p = log_p.exp()
    confidence, predicted = p.max(dim=1)
    gaps = class_gaps = 0.0
    for b in range(BINS):
        in_bin = (confidence * BINS).long().clamp(max=BINS - 1) == b
        gaps += abs(float(confidence[in_bin].sum() - (predicted == labels)[in_bin].sum()))
        for c in range(4):
            in_class_bin = (p[:, c] * BINS).long().clamp(max=BINS - 1) == b
            class_gaps += abs(float(p[in_class_bin, c].sum() - (labels == c)[in_class_bin].sum()))
    assert metrics["ece"] == pytest.approx(100 * gaps / 500)
    assert metrics["class_ece"] == pytest.approx(100 * class_gaps / 500 / 4)
    assert metrics["nll"] == pytest.approx(float(-log_p.gather(1, labels[:, None]).mean()))
    one_hot = torch.nn.functional.one_hot(labels, 4)
    assert metrics["brier"] == pytest.approx(float(((p - one_hot) ** 2).sum(dim=1).mean()))
    assert set(metrics["groups"]) == {"many", "medium", "few"}
    few = metrics["diagram"]["few"]
    assert all(low <= entry["accuracy"] <= high for entry in few for low, high in [entry["interval"]])
    assert sum(entry["images"] for entry in few) == int(((labels == 1) | (labels == 2)).sum())


def test_weights_are_how_often_an_image_counts() -> None:
    scores, labels = calibrated(300)
    log_p, groups = (1.7 * scores).log_softmax(dim=1), group_numbers(["many", "few", "few", "medium"])
    weights = torch.arange(300) % 4
    log_p[weights == 0] = -math.inf  # counts nowhere
    repeated = reliability(log_p.repeat_interleave(weights, 0), labels.repeat_interleave(weights), groups)
    for one, other in zip(reliability(log_p, labels, groups, weights), repeated, strict=True):
        assert torch.allclose(one, other)


def test_a_row_with_nan_is_wrong_with_confidence_0() -> None:
    scores = torch.tensor([[4.0, 0.0], [math.nan, 1.0], [math.nan, math.nan]])
    labels, groups = torch.tensor([0, 0, 1]), group_numbers(["many", "few"])
    sums = reliability(scores.log_softmax(dim=1), labels, groups)
    good = reliability(scores[:1].log_softmax(dim=1), labels[:1], groups)
    assert sums.counts[:, 0].tolist() == [1, 0, 1]
    assert torch.equal(sums.confidence, good.confidence)
    assert torch.equal(sums.hits, good.hits)
    assert torch.equal(sums.class_confidence, good.class_confidence)
    assert float(sums.brier.sum() - good.brier.sum()) == pytest.approx(2)
    assert sums.nll.tolist() == [math.inf, 0, math.inf]


def test_overconfident_probabilities_have_a_large_error() -> None:
    scores, labels = calibrated(20_000)
    groups = group_numbers(["many"] * 4)
    errors = [
        calibration_metrics(reliability((factor * scores).log_softmax(dim=1), labels, groups))["ece"]
        for factor in (1, 4)
    ]
    assert errors[0] < 1.5 < 10 < errors[1]


def test_conformal_sets_have_their_coverage_for_every_class() -> None:
    counts, covered, images = [2000, 300, 40, 12], torch.zeros(4), torch.zeros(4)
    for seed in range(30):
        scores, labels = calibrated(60_000, seed=seed)
        p = (2 * scores).softmax(dim=1)  # overconfident: the coverage does not depend on calibration
        heldout = torch.cat([torch.nonzero(labels == c)[:n, 0] for c, n in enumerate(counts)])
        fresh = torch.cat([torch.nonzero(labels == c)[-2000:, 0] for c in range(4)])
        true_p = p.gather(1, labels[:, None])[:, 0]
        thresholds = conformal_thresholds(true_p[heldout], labels[heldout], 4, 0.8)
        inside = p[fresh].gather(1, labels[fresh][:, None])[:, 0] >= thresholds[labels[fresh]]
        covered.index_add_(0, labels[fresh], inside.float())
        images.index_add_(0, labels[fresh], torch.ones(len(fresh)))
    coverage = covered / images
    assert bool((coverage > 0.78).all())
    assert coverage[0] < 0.82  # with many held-out images the sets are not larger than needed


def test_a_class_with_too_few_held_out_images_is_in_every_set() -> None:
    labels = torch.tensor([0] * 20 + [1] * 3)
    thresholds = conformal_thresholds(torch.rand(23), labels, 3, 0.9)
    assert thresholds[0] > 0
    assert thresholds[1:].tolist() == [0, 0]


def test_the_coverage_of_a_class_varies_as_its_interval_says() -> None:
    assert conformal_minimum(0.9) == 9
    assert conformal_minimum(0.8) == 4
    assert conformal_interval(8, 0.9) == (100, 100)
    low, high = conformal_interval(15, 0.8)
    g = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        threshold = conformal_thresholds(torch.rand(15, generator=g), torch.zeros(15, dtype=torch.int64), 1, 0.8)
        inside += low <= 100 * (1 - float(threshold)) <= high  # of uniform probabilities: the fraction above it
    assert 0.92 < inside / 400 < 0.98  # nominal: 0.95
    assert conformal_interval(15_000, 0.8) == pytest.approx((80, 80), abs=1)


def test_wilson_interval() -> None:
    assert wilson_interval(8, 10) == pytest.approx((49.0, 94.3), abs=0.1)  # a textbook example
    assert wilson_interval(0, 0) == (0, 100)
    low, high = wilson_interval(10, 10)
    assert low == pytest.approx(72.2, abs=0.1)
    assert high == 100


def test_the_rejection_curve() -> None:
    curve = rejection_curve(torch.tensor([0.9, 0.8, 0.3, 0.2]), torch.tensor([True, True, False, True]), 4)
    assert [(point["kept"], round(point["accuracy"], 1)) for point in curve] == [
        (100, 75),
        (75, 66.7),
        (50, 100),
        (25, 100),
    ]
