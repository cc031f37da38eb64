"""Class frequencies that are estimated: on mixtures whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from longtail.errors import LongtailError
from longtail.evaluation.shift import estimate_bbse, estimate_em, estimate_map


def drawn(prior: np.ndarray, count: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return exact log-likelihoods of points around the corners of a triangle, and their labels."""
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0], [2.0, 0], [0, 2.0]])
    labels = rng.choice(3, count, p=prior)
    points = centres[labels] + spread * rng.normal(size=(count, 2))
    return -((points[:, None] - centres) ** 2).sum(axis=2) / (2 * spread**2), labels


def test_em_finds_the_truth_and_its_intervals_hold_it() -> None:
    prior, inside = np.array([0.7, 0.25, 0.05]), 0
    for seed in range(60):
        scores, _ = drawn(prior, 400, seed)
        found = estimate_em(scores)
        inside += sum(low <= q <= high for q, low, high in zip(prior, found.low, found.high, strict=True))
    assert 0.9 < inside / 180 <= 1  # promised: 0.95
    scores, _ = drawn(prior, 20_000, 0)
    assert estimate_em(scores).frequencies == pytest.approx(prior, abs=0.02)


def test_em_is_the_maximum_of_the_likelihood() -> None:
    scores, _ = drawn(np.array([0.2, 0.3, 0.5]), 500, 1)
    best = np.array(estimate_em(scores).frequencies)

    def likelihood(prior: np.ndarray) -> float:
        return float(np.log((np.exp(scores) * prior).sum(axis=1)).mean())

    for direction in np.random.default_rng(0).normal(size=(20, 3)):
        other = np.abs(best + 0.02 * (direction - direction.mean()))
        assert likelihood(other / other.sum()) < likelihood(best)


def test_weights_count_images_as_often_as_they_say() -> None:
    scores, _ = drawn(np.array([0.2, 0.3, 0.5]), 200, 1)
    weights = np.random.default_rng(0).integers(0, 4, 200)
    assert estimate_em(scores, weights).frequencies == pytest.approx(
        estimate_em(scores.repeat(weights, axis=0)).frequencies, abs=1e-5
    )


COUNTS = [100, 30, 3]  # training images of the three classes


def test_map_takes_the_images_at_their_word_where_they_say_enough() -> None:
    prior = np.array([0.15, 0.8, 0.05])  # no power of the training frequencies
    scores, _ = drawn(prior, 20_000, 0)
    found = estimate_map(scores, COUNTS, np.zeros(3), np.zeros((2, 3)))
    assert found.frequencies == pytest.approx(prior, abs=0.02)
    assert found.pull is not None
    assert found.pull <= 0.03
    assert all(low <= q <= high for q, low, high in zip(prior, found.low, found.high, strict=True))


@pytest.mark.parametrize("power", [1.0, 0.0, -1.0])
def test_map_is_nearer_than_em_where_the_tail_is_a_power_of_the_training_sets(power: float) -> None:
    # 30 classes side by side on a line, a spread apart, and corrections of their scores that are noise
    counts = 100.0 ** (-np.arange(30) / 29)
    prior = counts**power / (counts**power).sum()
    distances, held = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        points = rng.choice(30, 3000, p=prior) + rng.normal(size=3000)
        scores = -((points[:, None] - np.arange(30)) ** 2) / 2
        halves = 0.3 * rng.normal(size=(2, 30))
        found = estimate_map(scores, counts, halves.mean(axis=0), halves)
        plain = estimate_em(scores + halves.mean(axis=0))
        # scores that nothing corrects are believed of the tail's direction and steepness alone
        bare = estimate_map(scores + halves.mean(axis=0), counts)
        assert bare.pull == 10
        distances.append([np.abs(np.array(entry.frequencies) - prior).sum() for entry in (found, bare, plain)])
        held += [low <= q <= high for q, low, high in zip(prior, found.low, found.high, strict=True)]
    ours, uncorrected, plain_ones = np.mean(distances, axis=0)
    assert max(ours, uncorrected) < 0.5 * plain_ones
    assert np.mean(held) > 0.9  # promised: 0.95


@pytest.mark.parametrize("images", [1, 2, 3])
def test_map_rules_no_class_out_by_a_handful_of_images(images: int) -> None:
    scores = np.array([[0.0, -1.0, -9.0]] * images)
    for corrections in ((), (np.zeros(3), np.zeros((2, 3)))):
        found = estimate_map(scores, COUNTS, *corrections)
        assert sum(found.frequencies) == pytest.approx(1)
        assert found.frequencies[2] > 0.01


def test_bbse_finds_the_truth_whatever_the_scores_scale() -> None:
    prior, found, inside = np.array([0.7, 0.25, 0.05]), [], 0
    for seed in range(12):
        known, labels = drawn(np.full(3, 1 / 3), 3000, 2 * seed)
        scores, _ = drawn(prior, 4000, 2 * seed + 1)
        one, other = (
            estimate_bbse((scale * scores).argmax(1), labels, (scale * known).argmax(1), 3) for scale in (0.1, 5.0)
        )
        assert one == other
        found.append(one.frequencies)
        inside += sum(low <= q <= high for q, low, high in zip(prior, one.low, one.high, strict=True))
    assert np.mean(found, axis=0) == pytest.approx(prior, abs=0.02)
    assert inside / 36 > 0.8  # promised: 0.95
    with pytest.raises(LongtailError, match="class number 2 has no held-out image"):
        estimate_bbse([0, 1], [0, 1], [0, 1], 3)


def test_a_class_that_is_not_there_is_not_ruled_out() -> None:
    scores, _ = drawn(np.array([0.5, 0.5, 0.0]), 500, 0, spread=0.2)
    found = estimate_em(scores)
    assert 0 < found.frequencies[2] < 0.01
    assert sum(found.frequencies) == pytest.approx(1)


@pytest.mark.parametrize("scores", [np.zeros((0, 3)), np.array([[np.nan, 0]]), np.zeros(3)])
def test_scores_that_are_none(scores: np.ndarray) -> None:
    with pytest.raises(LongtailError, match=r"scores: expected \(N, C\) finite numbers"):
        estimate_em(scores)
