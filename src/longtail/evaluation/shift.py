"""Class frequencies of images without labels, estimated from their scores.

Legend: N images, C classes. Scores are log-likelihoods free of any prior, as :meth:`longtail.Recognizer.scores` gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longtail.errors import LongtailError

_RESAMPLES = 200
Array = np.ndarray[Any, np.dtype[np.float64]]
Places = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class EstimatedPrior:
    """Class frequencies with 95 % intervals, each (C,); the intervals know of sampling alone, not of a wrong model."""

    method: str
    frequencies: list[float]
    low: list[float]
    high: list[float]
    power: float | None = None
    """The estimate is pulled towards the training frequencies to this power; of ``map`` alone."""
    pull: float | None = None
    """How much that counts, as a multiple of the images."""


def estimate_em(scores: Any, weights: Any = None, tolerance: float = 1e-7, steps: int = 5000) -> EstimatedPrior:
    """Estimate class frequencies by maximum likelihood: those under which the scores are likeliest.

    Source: Saerens et al., Neural Computation 14(1), 2002; the intervals are from the Fisher information.

    Args:
        scores: (N, C) of images without labels, N at least 1.
        weights: (N,) how much each image counts; alike if not given.
        tolerance: largest change of a frequency that ends the iteration.
        steps: most iterations.
    """
    likelihood, counted = _likelihood(scores), _counted(scores, weights)
    prior = _em(likelihood, counted / counted.sum(), tolerance=tolerance, steps=steps)
    half = 1.96 * np.sqrt(_variance(likelihood, counted, prior))
    return _estimated("em", prior, prior - half, prior + half)


def estimate_map(
    scores: Any, class_counts: Any, bias: Any = None, halves: Any = None, weights: Any = None
) -> EstimatedPrior:
    """Estimate class frequencies by maximum a posteriori, with as much of a prior as makes them foretell new images.

    Where a recogniser is weak, the likelihood of :func:`estimate_em` is flat, and its maximum follows the noise of the
    images and of the validation images that corrected the scores: most in the tail. Here a Dirichlet distribution pulls
    towards the training frequencies to a power: to 0 (all alike), or to the power under which the images are likeliest
    (1 is the training set's tail, −1 its reverse). Which, and how much, is what makes one half of the images likeliest,
    with one half's correction, when found on the other half with the other's: noise foretells nothing. Scores that
    nothing corrects are not to be believed of single classes at all, and the power alone is estimated.

    Source: Dirichlet priors of label shift as in Ye et al., *Label Shift Estimation for Class-Imbalance Problem: A
    Bayesian Approach*, WACV 2024; the power of the training frequencies and the choice are ours.

    Args:
        scores: (N, C) of images without labels, N at least 1.
        class_counts: (C,) training images a class.
        bias: (C,) what the scores lack, see :func:`~longtail.evaluation.calibration.fit_bias`; nothing if not given.
        halves: (2, C) the same as each half of the validation images says it; given where ``bias`` is.
        weights: (N,) how much each image counts; alike if not given.

    Returns:
        Frequencies; their intervals know of the number of images, and of the disagreement between halves.
    """
    scores, counted = _checked(scores), _counted(scores, weights)
    log_counts = np.log(np.asarray(class_counts, dtype=np.float64))
    whole = np.zeros(scores.shape[1]) if bias is None else np.asarray(bias, dtype=np.float64)
    parts = [whole, whole] if halves is None else [np.asarray(half, dtype=np.float64) for half in halves]
    order = np.random.default_rng(0).permutation(len(scores))
    sides = [order[::2], order[1::2]]
    follows, pull = (True, _PULLS[0]) if halves is None else _chosen(scores, parts, counted, log_counts, sides)
    pull = max(pull, _LEAST * scores.shape[1] / len(scores))

    def estimate(lacking: Array, chosen: Places) -> tuple[float, Array]:
        likelihood, share = _likelihood(scores[chosen] + lacking), counted[chosen] / counted[chosen].sum()
        power = _power(likelihood, counted[chosen], log_counts) if follows else 0.0
        return power, _em(likelihood, share, _raised(log_counts, power), pull)

    power, prior = estimate(whole, order)
    # what the pull assumes is not counted as known: as wide as if there were none
    variance = _variance(_likelihood(scores + whole), counted, prior)
    if len(sides[1]):
        # halves differ by twice the whole's error; pooled over the classes, in relation to their frequencies
        one, other = (np.log(estimate(*half)[1]) for half in zip(parts, sides, strict=True))
        variance += np.mean((one - other) ** 2) / 4 * prior**2
    half = 1.96 * np.sqrt(variance)
    return dataclasses.replace(_estimated("map", prior, prior - half, prior + half), power=power, pull=pull)


_PULLS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
_POWERS = np.linspace(-2, 2, 81)
_LEAST = 0.5  # images a class that the pull counts for at least: a handful of images foretells its like too well
_CHOOSING = 10_000  # images that are enough to choose by


def _chosen(
    scores: Array, parts: Sequence[Array], counted: Array, log_counts: Array, sides: Sequence[Places]
) -> tuple[bool, float]:
    """Return whether to pull towards a power of the training frequencies, and how much: what foretells best."""
    if len(sides[1]) == 0:
        return False, _PULLS[0]
    sides = [side[: _CHOOSING // 2] for side in sides]
    gained: dict[tuple[bool, float], float] = {}
    for here, there in ((0, 1), (1, 0)):
        seen, unseen = (_likelihood(scores[sides[side]] + parts[side]) for side in (here, there))
        # as ratios to the likelihood under the uniform prior, or a correction could make every image likelier
        unseen /= unseen.sum(axis=1, keepdims=True)
        share, other = (counted[sides[side]] / counted[sides[side]].sum() for side in (here, there))
        for follows in (False, True):
            base = _raised(log_counts, _power(seen, counted[sides[here]], log_counts) if follows else 0.0)
            prior = base
            for pull in _PULLS:
                prior = _em(seen, share, base, pull, tolerance=1e-4 / len(base), steps=200, start=prior)
                value = float(other @ np.log(unseen @ prior))
                gained[follows, pull] = gained.get((follows, pull), 0.0) + value
    follows, pull = max(gained, key=lambda choice: gained[choice])
    return follows, pull


def _power(likelihood: Array, counted: Array, log_counts: Array) -> float:
    """Return the power of the training frequencies that images speak for; a few images cannot say much (N(0, 1))."""
    values = [counted @ np.log(likelihood @ _raised(log_counts, power)) - power**2 / 2 for power in _POWERS]
    return float(_POWERS[int(np.argmax(values))])


def _raised(log_counts: Array, power: float) -> Array:
    """Return the training frequencies to a power."""
    exponents = power * log_counts
    raised: Array = np.exp(exponents - exponents.max())
    shares: Array = raised / raised.sum()
    return shares


def _checked(scores: Any) -> Array:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or len(scores) == 0 or not np.isfinite(scores).all():
        raise LongtailError(f"scores: expected (N, C) finite numbers of at least one image, got {scores.shape}")
    checked: Array = scores
    return checked


def _likelihood(scores: Any) -> Array:
    """Return (N, C) likelihoods, the largest of an image 1."""
    scores = _checked(scores)
    likelihood: Array = np.exp(scores - scores.max(axis=1, keepdims=True))
    return likelihood


def _counted(scores: Any, weights: Any) -> Array:
    counted: Array = np.full(len(scores), 1.0) if weights is None else np.asarray(weights, dtype=np.float64)
    return counted


def _em(
    likelihood: Array,
    share: Array,
    base: Array | None = None,
    pull: float = 0.0,
    tolerance: float = 1e-7,
    steps: int = 5000,
    start: Array | None = None,
) -> Array:
    """Return the frequencies under which images are likeliest, pulled towards ``base`` as by ``pull`` times as many."""
    classes = likelihood.shape[1]
    base = np.full(classes, 1 / classes) if base is None else base
    prior = base if start is None else start
    for _ in range(steps):
        new = prior * (likelihood.T @ (share / (likelihood @ prior))) + pull * base
        new = new / new.sum()
        change = np.abs(new - prior).max()
        prior = new
        if change < tolerance:
            break
    return prior


def _variance(likelihood: Array, counted: Array, prior: Array) -> Array:
    """Return the variance of frequencies of greatest likelihood, (C,), from the Fisher information."""
    ratio = likelihood / (likelihood @ prior)[:, None]
    information = (ratio * counted[:, None]).T @ ratio
    # what the images say nothing of has an information of 0: nearly that, so that there is an inverse
    information[np.diag_indices_from(information)] += 1e-9 * np.trace(information) / len(prior)
    inverse = np.linalg.inv(information)
    # along the directions that keep the sum of the frequencies
    along = inverse.sum(axis=1)
    variance: Array = (np.diag(inverse) - along**2 / along.sum()).clip(min=0)
    return variance


def estimate_bbse(predicted: Any, known_labels: Any, known_predicted: Any, classes: int) -> EstimatedPrior:
    """Estimate class frequencies from how often classes are predicted, and how often they are confused.

    Solves μ = P(predicted | label) q for q ≥ 0 by least squares; the intervals are percentiles over resamples of both.

    Source: Lipton et al., *Detecting and Correcting for Label Shift with Black Box Predictors*, ICML 2018,
    arXiv 1802.03916.

    Args:
        predicted: (N,) classes predicted for images without labels.
        known_labels: (M,) labels of held-out images.
        known_predicted: (M,) classes predicted for them.
        classes: C.

    Raises:
        LongtailError: a class has no held-out image.
    """
    predicted, labels, guesses = (np.asarray(a, dtype=np.int64) for a in (predicted, known_labels, known_predicted))
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (guesses, labels), 1)
    per_class = confusion.sum(axis=0)
    if not per_class.all():
        raise LongtailError(f"prior: class number {int(per_class.argmin())} has no held-out image to be confused with")
    counts = np.bincount(predicted, minlength=classes).astype(np.float64)
    rng = np.random.default_rng(0)
    prior = _solve(confusion / per_class, counts / counts.sum())
    drawn = []
    for _ in range(_RESAMPLES):
        columns = [rng.multinomial(int(n), confusion[:, c] / n) / n for c, n in enumerate(per_class)]
        target = rng.multinomial(len(predicted), counts / counts.sum()) / len(predicted)
        drawn.append(_solve(np.stack(columns, axis=1), target))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return _estimated("bbse", prior, low, high)


def _solve(confusion: Array, target: Array) -> Array:
    from scipy.optimize import nnls

    # a row more holds the sum at 1
    matrix, values = np.vstack([confusion, np.ones(len(target))]), np.append(target, 1.0)
    found: Array = nnls(matrix, values, maxiter=100 * len(target))[0]
    shares: Array = found / max(found.sum(), 1e-12)
    return shares


def _estimated(method: str, prior: Array, low: Array, high: Array) -> EstimatedPrior:
    # no class is ruled out by not being seen
    floored = prior.clip(min=1e-6)
    return EstimatedPrior(method, (floored / floored.sum()).tolist(), low.clip(0, 1).tolist(), high.clip(0, 1).tolist())
