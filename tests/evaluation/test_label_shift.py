"""Estimated class frequencies on mixtures whose class frequencies are known."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from longtail.errors import LongtailError
from longtail.evaluation.label_shift import EstimatedPrior, estimate_bbse, estimate_em, estimate_map


def sample(prior: np.ndarray, count: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return exact log-likelihoods of points around the corners of a triangle, and their labels."""
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0], [2.0, 0], [0, 2.0]])
    labels = rng.choice(3, count, p=prior)
    points = centres[labels] + spread * rng.normal(size=(count, 2))
    return -((points[:, None] - centres) ** 2).sum(axis=2) / (2 * spread**2), labels


def test_em_is_accurate_and_its_intervals_have_their_coverage() -> None:
    prior, inside = np.array([0.7, 0.25, 0.05]), 0
    for seed in range(60):
        scores, _ = sample(prior, 400, seed)
        estimate = estimate_em(scores)
        inside += sum(low <= q <= high for q, low, high in zip(prior, estimate.low, estimate.high, strict=True))
    assert 0.9 < inside / 180 <= 1  # nominal: 0.95
    scores, _ = sample(prior, 20_000, 0)
    assert estimate_em(scores).frequencies == pytest.approx(prior, abs=0.02)


def test_em_is_the_maximum_of_the_likelihood() -> None:
    scores, _ = sample(np.array([0.2, 0.3, 0.5]), 500, 1)
    best = np.array(estimate_em(scores).frequencies)

    def likelihood(prior: np.ndarray) -> float:
        return float(np.log((np.exp(scores) * prior).sum(axis=1)).mean())

    for direction in np.random.default_rng(0).normal(size=(20, 3)):
        other = np.abs(best + 0.02 * (direction - direction.mean()))
        assert likelihood(other / other.sum()) < likelihood(best)


def test_integer_weights_equal_repeated_images() -> None:
    scores, _ = sample(np.array([0.2, 0.3, 0.5]), 200, 1)
    weights = np.random.default_rng(0).integers(0, 4, 200)
    assert estimate_em(scores, weights).frequencies == pytest.approx(
        estimate_em(scores.repeat(weights, axis=0)).frequencies, abs=1e-5
    )


def test_map_leaves_out_images_of_weight_0() -> None:
    scores, _ = sample(np.array([0.2, 0.3, 0.5]), 6, 1)
    halves = np.array([[0.1, 0.0, -0.1], [0.0, 0.1, -0.1]])
    for images in ([0], [1, 4], [0, 2, 3, 5]):
        weights = np.zeros(6)
        weights[images] = 2
        got = estimate_map(scores, COUNTS, np.zeros(3), halves, weights)
        assert got == estimate_map(scores[images], COUNTS, np.zeros(3), halves, weights[images])
        assert np.isfinite([got.frequencies, got.low, got.high]).all()


COUNTS = [100, 30, 3]  # training images of the three classes
COUNTS_OF_FIVE = [100, 30, 20, 10, 3]


def test_map_has_little_prior_strength_with_many_images() -> None:
    prior = np.array([0.15, 0.8, 0.05])  # no power of the training frequencies
    scores, _ = sample(prior, 20_000, 0)
    estimate = estimate_map(scores, COUNTS, np.zeros(3), np.zeros((2, 3)))
    assert estimate.frequencies == pytest.approx(prior, abs=0.02)
    assert estimate.prior_strength is not None
    assert estimate.prior_strength <= 0.03
    assert all(low <= q <= high for q, low, high in zip(prior, estimate.low, estimate.high, strict=True))


@pytest.mark.parametrize("power", [1.0, *(pytest.param(value, marks=pytest.mark.slow) for value in (0.0, -1.0))])
def test_map_is_more_accurate_than_em_when_the_tail_is_a_power_of_the_training_sets(power: float) -> None:
    # 30 classes at equal distances on a line, and corrections of their scores that are noise
    counts = 100.0 ** (-np.arange(30) / 29)
    prior = counts**power / (counts**power).sum()
    distances, inside = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        points = rng.choice(30, 3000, p=prior) + rng.normal(size=3000)
        scores = -((points[:, None] - np.arange(30)) ** 2) / 2
        halves = 0.3 * rng.normal(size=(2, 30))
        corrected = estimate_map(scores, counts, halves.mean(axis=0), halves)
        em = estimate_em(scores + halves.mean(axis=0))
        # without corrections the prior has its largest strength: only the power is estimated
        uncorrected = estimate_map(scores + halves.mean(axis=0), counts)
        assert uncorrected.prior_strength == 10
        distances.append([np.abs(np.array(entry.frequencies) - prior).sum() for entry in (corrected, uncorrected, em)])
        inside += [low <= q <= high for q, low, high in zip(prior, corrected.low, corrected.high, strict=True)]
    *of_map, of_em = np.mean(distances, axis=0)
    assert max(of_map) < 0.5 * of_em
    assert np.mean(inside) > 0.9  # nominal: 0.95


@pytest.mark.parametrize("images", [1, 2, 3])
def test_map_keeps_every_class_possible_with_few_images(images: int) -> None:
    scores = np.array([[0.0, -1.0, -9.0]] * images)
    for corrections in ((), (np.zeros(3), np.zeros((2, 3)))):
        frequencies = estimate_map(scores, COUNTS, *corrections).frequencies
        assert sum(frequencies) == pytest.approx(1)
        assert frequencies[2] > 0.01


def test_bbse_is_accurate_and_independent_of_the_scores_scale() -> None:
    prior, estimates, inside = np.array([0.7, 0.25, 0.05]), [], 0
    for seed in range(12):
        heldout, labels = sample(np.full(3, 1 / 3), 3000, 2 * seed)
        scores, _ = sample(prior, 4000, 2 * seed + 1)
        one, other = (
            estimate_bbse((scale * scores).argmax(1), labels, (scale * heldout).argmax(1), 3) for scale in (0.1, 5.0)
        )
        assert one == other
        estimates.append(one.frequencies)
        inside += sum(low <= q <= high for q, low, high in zip(prior, one.low, one.high, strict=True))
    assert np.mean(estimates, axis=0) == pytest.approx(prior, abs=0.02)
    assert inside / 36 > 0.8  # nominal: 0.95
    with pytest.raises(LongtailError, match="class number 2 has no held-out image"):
        estimate_bbse([0, 1], [0, 1], [0, 1], 3)


def test_bbse_of_few_held_out_images_is_uncertain() -> None:
    prior, widths, inside = np.array([0.6, 0.3, 0.1]), [], 0
    for seed in range(12):
        scores, _ = sample(prior, 2000, 2 * seed + 1)
        estimates = []
        for per_class in (2, 200):
            # one after the other until every class has so many
            heldout, labels = sample(np.full(3, 1 / 3), 5000, 2 * seed)
            chosen = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(3)])
            estimates.append(estimate_bbse(scores.argmax(1), labels[chosen], heldout[chosen].argmax(1), 3))
        few, many = estimates
        assert (few.validation_images, many.validation_images) == (6, 600)
        widths.append([sum(entry.high) - sum(entry.low) for entry in estimates])
        inside += sum(low <= q <= high for q, low, high in zip(prior, few.low, few.high, strict=True))
    few_width, many_width = np.mean(widths, axis=0)
    assert few_width > 3 * many_width
    assert inside / 36 > 0.85  # nominal: 0.95; with the bootstrap two images that are both right leave no doubt


def test_a_correction_from_few_images_widens_the_intervals() -> None:
    inside, without = 0, 0
    shift = np.linspace(-1, 1, 5)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        prior = rng.dirichlet(np.ones(5))
        labels = rng.choice(5, 500, p=prior)
        noise = rng.normal(size=(500, 5))
        noise[np.arange(500), labels] += 2.0
        few = 0.2 * rng.normal(size=(2, 5))  # of what few images show of the shift nothing is left
        arguments = (2 * noise + shift, COUNTS_OF_FIVE, few.mean(axis=0), few)
        for images in (5, None):
            estimate = estimate_map(*arguments, validation_images=images)
            assert estimate.validation_images == images
            covered = sum(low <= q <= high for q, low, high in zip(prior, estimate.low, estimate.high, strict=True))
            if images:
                inside += covered
            else:
                without += covered
    assert without < 70 < 80 < inside  # of 100; nominal: 95


def test_with_many_classes_single_precision_gives_the_same_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2500, 30)).astype(np.float32)
    scores[np.arange(2500), rng.choice(30, 2500, p=rng.dirichlet(np.ones(30)))] += 3
    halves = 0.2 * rng.normal(size=(2, 30))
    weights = rng.random(2500)

    def estimates() -> list[EstimatedPrior]:
        corrected = estimate_map(scores, 100.0 ** (-np.arange(30) / 29), halves.mean(axis=0), halves, weights)
        return [estimate_em(scores, weights), corrected]

    exact = estimates()
    monkeypatch.setattr("longtail.evaluation.label_shift.MAX_EXACT_CLASSES", 29)
    for ours, theirs in zip(estimates(), exact, strict=True):
        assert ours.frequencies == pytest.approx(theirs.frequencies, abs=1e-6)
        assert (ours.power, ours.prior_strength) == (theirs.power, theirs.prior_strength)
        # without the correlations of the classes the intervals are narrower, and hardly so for good scores
        widths = [np.array(estimate.high) - estimate.low for estimate in (ours, theirs)]
        assert (widths[0] <= widths[1] + 1e-6).all()
        assert widths[0].sum() > 0.8 * widths[1].sum()


def test_with_many_classes_no_array_has_a_row_and_a_column_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).normal(size=(20, 1500)).astype(np.float32)
    monkeypatch.setattr("longtail.evaluation.label_shift.MAX_EXACT_CLASSES", 1499)
    tracemalloc.start()
    try:
        estimate_em(scores, max_iterations=3)
        assert tracemalloc.get_traced_memory()[1] < 1500 * 1500
    finally:
        tracemalloc.stop()


def test_an_absent_class_has_a_frequency_above_zero() -> None:
    scores, _ = sample(np.array([0.5, 0.5, 0.0]), 500, 0, spread=0.2)
    frequencies = estimate_em(scores).frequencies
    assert 0 < frequencies[2] < 0.01
    assert sum(frequencies) == pytest.approx(1)


@pytest.mark.parametrize("scores", [np.zeros((0, 3)), np.array([[np.nan, 0]]), np.zeros(3)])
def test_wrong_scores_raise(scores: np.ndarray) -> None:
    with pytest.raises(LongtailError, match=r"scores: expected \(N, C\) finite numbers"):
        estimate_em(scores)


def test_a_class_without_training_images_has_a_frequency_too() -> None:
    scores, labels = sample(np.array([0.6, 0.3, 0.1]), 2000, 0)
    estimate = estimate_map(scores, [90, 10, 0])
    assert np.isfinite([estimate.frequencies, estimate.low, estimate.high]).all()
    assert estimate.frequencies[2] == pytest.approx((labels == 2).mean(), abs=0.03)


@pytest.mark.parametrize(
    ("weights", "counts", "message"),
    [
        ([1, 2], [1, 2, 3], "weights: expected 30 numbers"),
        (-np.ones(30), [1, 2, 3], "weights: expected 30 numbers of at least 0"),
        (np.zeros(30), [1, 2, 3], "not all 0"),
        (None, [1, 2], "class_counts: expected 3 counts"),
        (None, [1, 2, -1], "class_counts: expected 3 counts of at least 0"),
    ],
)
def test_wrong_weights_and_counts_raise(weights: np.ndarray | None, counts: list[int], message: str) -> None:
    scores, _ = sample(np.array([0.2, 0.3, 0.5]), 30, 0)
    with pytest.raises(LongtailError, match=message):
        estimate_map(scores, counts, weights=weights)
    if weights is not None:
        with pytest.raises(LongtailError, match=message):
            estimate_em(scores, weights)


def test_em_leaves_out_images_of_weight_0() -> None:
    scores = np.array([[0.0, -1000.0], [-1000.0, 0.0]])
    estimate = estimate_em(scores, weights=[1, 0])
    assert estimate.frequencies == pytest.approx([1, 0], abs=1e-5)
    assert np.isfinite([estimate.low, estimate.high]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted": []}, r"predicted: expected the class number of at least one image, got shape \(0,\)"),
        ({"predicted": [0, 5]}, r"predicted: expected class numbers in \[0, 2\), got 5"),
        ({"predicted": [0, -1]}, r"predicted: expected class numbers in \[0, 2\), got -1"),
        ({"predicted": [0, 0.5]}, r"predicted: expected class numbers in \[0, 2\), got 0.5"),
        ({"predicted": ["a"]}, r"predicted: expected numbers, got \['a'\]"),
        ({"heldout_labels": [0, 2, 1, 1]}, r"heldout_labels: expected class numbers in \[0, 2\), got 2"),
        (
            {"heldout_predicted": [0, 1, 1]},
            "heldout_predicted: expected 4 classes, one for each of heldout_labels, got 3",
        ),
    ],
)
def test_wrong_predictions_raise(change: dict[str, list[float]], message: str) -> None:
    arguments = {"predicted": [0, 1], "heldout_labels": [0, 0, 1, 1], "heldout_predicted": [0, 1, 1, 1]}
    assert len(estimate_bbse(**arguments, num_classes=2).frequencies) == 2
    with pytest.raises(LongtailError, match=f"^{message}"):
        estimate_bbse(**(arguments | change), num_classes=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bias": np.zeros(2), "halves": np.zeros((2, 3))},
            r"bias: expected finite numbers of shape \(3,\), got shape \(2,",
        ),
        ({"bias": np.zeros(3), "halves": np.zeros((3, 3))}, r"halves: .* of shape \(2, 3\), got shape \(3, 3\)"),
        ({"bias": np.zeros(3), "halves": np.full((2, 3), np.nan)}, "halves: expected finite numbers"),
        ({"bias": ["a", "b", "c"]}, "bias: expected numbers, got"),
        ({"class_counts": ["a", "b", "c"]}, "class_counts: expected numbers, got"),
    ],
)
def test_wrong_corrections_raise(change: dict[str, Any], message: str) -> None:
    scores, _ = sample(np.array([0.2, 0.3, 0.5]), 30, 0)
    with pytest.raises(LongtailError, match=f"^{message}"):
        estimate_map(scores, **({"class_counts": [5, 3, 2]} | change))


def test_tensors_with_a_gradient() -> None:
    scores, _ = sample(np.array([0.6, 0.3, 0.1]), 50, 0)
    tensor = torch.tensor(scores, requires_grad=True)
    assert estimate_em(tensor) == estimate_em(scores)
    assert estimate_map(tensor, torch.tensor([6.0, 3.0, 1.0])) == estimate_map(scores, [6, 3, 1])
