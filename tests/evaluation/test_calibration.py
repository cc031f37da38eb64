"""Temperature, calibration error and conformal sets, for scores with known true probabilities."""

from __future__ import annotations

import pytest
import torch

from longtail.evaluation.calibration import (
    BINS,
    add_reliability,
    calibration_metrics,
    conformal_thresholds,
    fit_bias,
    fit_temperature,
    group_numbers,
    rejection_curve,
    reliability,
    wilson_interval,
)


def calibrated(count: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores, and labels drawn from their softmax probabilities."""
    g = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(count, classes, generator=g, dtype=torch.float64)
    return scores, torch.multinomial(scores.softmax(dim=1), 1, generator=g)[:, 0]


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_is_a_factor_of_the_scores(factor: float) -> None:
    scores, labels = calibrated(20_000)
    assert fit_temperature(factor * scores, labels) == pytest.approx(factor, rel=0.05)


def test_the_temperature_is_of_scores_free_of_the_prior() -> None:
    prior = torch.tensor([0.7, 0.2, 0.07, 0.03]).double().log()
    g = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(20_000, 4, generator=g, dtype=torch.float64)
    labels = torch.multinomial((scores + prior).softmax(dim=1), 1, generator=g)[:, 0]
    assert fit_temperature(3 * scores, labels, prior) == pytest.approx(3, rel=0.05)


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
