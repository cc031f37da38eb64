from __future__ import annotations

import math

import numpy as np
import pytest

from longtail.evaluation.paired import paired_half_width


def test_the_half_width_of_one_class() -> None:
    # 10 images of one class: ours alone is right on 3, theirs alone on 1
    ours = np.array([1, 1, 1, 0, 1, 1, 1, 1, 0, 0], dtype=bool)
    theirs = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0, 0], dtype=bool)
    differences = np.array([1, 1, 1, -1, 0, 0, 0, 0, 0, 0])
    expected = 196 * math.sqrt(differences.var(ddof=1) / 10 + 1 / 100)
    assert paired_half_width(np.zeros(10, dtype=int), [ours], [theirs]) == pytest.approx(expected)


def test_every_class_counts_alike() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 4, 7], [10, 40, 1])
    ours, theirs = rng.random((2, 51)) < 0.6
    difference = ours.astype(float) - theirs
    variances = [difference[labels == c].var(ddof=1) / n for c, n in ((0, 10), (4, 40))]
    variances.append(float(difference[-1]) ** 2)
    more = sum(n * (1 / (3 * n)) ** 2 for n in (10, 40, 1)) / 51
    expected = 196 * math.sqrt(sum(variances) / 9 + more)
    assert paired_half_width(labels, [ours], [theirs]) == pytest.approx(expected)


def test_errors_in_common_cancel() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 100)
    hard = rng.random(500) < 0.4
    ours, theirs = ~hard, ~hard
    theirs[:20] = False  # of one class
    independent = rng.random(500) < 0.6
    same = paired_half_width(labels, [ours], [theirs])
    assert 0 < same < paired_half_width(labels, [ours], [independent]) / 3
    # two methods that are right on the same images have a width, of the one more image alone
    assert 0 < paired_half_width(labels, [ours], [ours]) < same


def test_what_changes_with_the_seed_is_left_out() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 40)
    ours, theirs = (list(rng.random((4, 200)) < p) for p in (0.7, 0.6))
    one_more = 196 * math.sqrt(5 * 40 * (1 / 200) ** 2 / 200)
    # errors that another seed does not repeat: an interval over seeds has them
    assert paired_half_width(labels, ours, theirs) < 3 * one_more
    # errors that every seed repeats are all the images'
    repeated = paired_half_width(labels, ours[:1] * 4, theirs[:1] * 4)
    assert repeated == pytest.approx(paired_half_width(labels, ours[:1], theirs[:1]))
    assert repeated > 8


def test_the_interval_covers_the_difference_of_all_images() -> None:
    rng, gap = np.random.default_rng(0), 0.1
    labels = np.repeat(np.arange(8), 30)
    covered = []
    for _ in range(400):
        hard = rng.random(240)  # of both methods
        own = rng.random((2, 240)) < 0.3  # images on which a method errs for reasons of its own
        theirs = np.where(own[0], rng.random(240), hard) < 0.5
        ours = np.where(own[1], rng.random(240), hard) < 0.5 + gap
        mean = 100 * float(np.mean(ours.astype(float) - theirs))
        covered.append(abs(mean - 100 * gap) < paired_half_width(labels, [ours], [theirs]))
    assert 0.92 < np.mean(covered) < 0.98
