"""Temperature, calibration error and conformal sets, on probabilities whose truth is known."""

from __future__ import annotations

import pytest
import torch

from longtail.evaluation.calibration import (
    BINS,
    added,
    calibration_metrics,
    conformal_thresholds,
    fit_bias,
    fit_temperature,
    group_numbers,
    rejection_curve,
    reliability,
    wilson,
)


def honest(count: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and labels drawn from the probabilities that they stand for."""
    g = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(count, classes, generator=g, dtype=torch.float64)
    return scores, torch.multinomial(scores.softmax(dim=1), 1, generator=g)[:, 0]


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_undoes_a_factor(factor: float) -> None:
    scores, labels = honest(20_000)
    assert fit_temperature(factor * scores, labels) == pytest.approx(factor, rel=0.05)


def test_the_temperature_is_of_scores_free_of_the_prior() -> None:
    prior = torch.tensor([0.7, 0.2, 0.07, 0.03]).double().log()
    g = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(20_000, 4, generator=g, dtype=torch.float64)
    labels = torch.multinomial((scores + prior).softmax(dim=1), 1, generator=g)[:, 0]
    assert fit_temperature(3 * scores, labels, prior) == pytest.approx(3, rel=0.05)


def test_the_bias_undoes_what_a_class_lacks() -> None:
    scores, labels = honest(20_000)
    lacking = torch.tensor([0.0, 1.0, -2.0, 0.5]).double()
    found = fit_bias(scores - lacking, labels).double()
    assert torch.allclose(found - found.mean(), lacking - lacking.mean(), atol=0.1)
    # of few images it believes little
    few = fit_bias((scores - lacking)[:8], labels[:8])
    assert few.abs().max() < found.abs().max()


def test_errors_against_a_loop() -> None:
    scores, labels = honest(500)
    log_p, groups = (1.7 * scores).log_softmax(dim=1), group_numbers(["many", "few", "few", "medium"])
    parts = [reliability(log_p[a:b], labels[a:b], groups) for a, b in ((0, 123), (123, 500))]
    found = calibration_metrics(added(*parts))
    p = log_p.exp()
    confidence, predicted = p.max(dim=1)
    gaps = class_gaps = 0.0
    for b in range(BINS):
        chosen = (confidence * BINS).long().clamp(max=BINS - 1) == b
        gaps += abs(float(confidence[chosen].sum() - (predicted == labels)[chosen].sum()))
        for c in range(4):
            of_class = (p[:, c] * BINS).long().clamp(max=BINS - 1) == b
            class_gaps += abs(float(p[of_class, c].sum() - (labels == c)[of_class].sum()))
    assert found["ece"] == pytest.approx(100 * gaps / 500)
    assert found["class_ece"] == pytest.approx(100 * class_gaps / 500 / 4)
    assert found["nll"] == pytest.approx(float(-log_p.gather(1, labels[:, None]).mean()))
    truth = torch.nn.functional.one_hot(labels, 4)
    assert found["brier"] == pytest.approx(float(((p - truth) ** 2).sum(dim=1).mean()))
    assert set(found["groups"]) == {"many", "medium", "few"}
    assert sum(entry["images"] for entry in found["diagram"]["few"]) == int(((labels == 1) | (labels == 2)).sum())


def test_honest_probabilities_have_little_error_and_boastful_ones_much() -> None:
    scores, labels = honest(20_000)
    groups = group_numbers(["many"] * 4)
    errors = [
        calibration_metrics(reliability((factor * scores).log_softmax(dim=1), labels, groups))["ece"]
        for factor in (1, 4)
    ]
    assert errors[0] < 1.5 < 10 < errors[1]


def test_sets_hold_the_truth_of_every_class_as_promised() -> None:
    counts, covered, seen = [2000, 300, 40, 12], torch.zeros(4), torch.zeros(4)
    for seed in range(30):
        scores, labels = honest(60_000, seed=seed)
        p = (2 * scores).softmax(dim=1)  # boastful: the promise does not need honest probabilities
        held_out = torch.cat([torch.nonzero(labels == c)[:n, 0] for c, n in enumerate(counts)])
        fresh = torch.cat([torch.nonzero(labels == c)[-2000:, 0] for c in range(4)])
        true_p = p.gather(1, labels[:, None])[:, 0]
        thresholds = conformal_thresholds(true_p[held_out], labels[held_out], 4, 0.8)
        inside = p[fresh].gather(1, labels[fresh][:, None])[:, 0] >= thresholds[labels[fresh]]
        covered.index_add_(0, labels[fresh], inside.float())
        seen.index_add_(0, labels[fresh], torch.ones(len(fresh)))
    share = covered / seen
    assert bool((share > 0.78).all())
    assert share[0] < 0.82  # with many held-out images no more than was asked for


def test_too_few_held_out_images_promise_by_being_in_every_set() -> None:
    labels = torch.tensor([0] * 20 + [1] * 3)
    thresholds = conformal_thresholds(torch.rand(23), labels, 3, 0.9)
    assert thresholds[0] > 0
    assert thresholds[1:].tolist() == [0, 0]


def test_wilsons_interval() -> None:
    assert wilson(8, 10) == pytest.approx((49.0, 94.3), abs=0.1)  # Wilson (1927), the textbook's case
    assert wilson(0, 0) == (0, 100)
    low, high = wilson(10, 10)
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
