"""Class frequencies of unlabelled images under label shift, estimated from the scores of a classifier.

Legend: N images, C classes. Scores are log-likelihoods free of any prior, as :meth:`longtail.Recognizer.scores` returns
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longtail.errors import LongtailError

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]
Indices = np.ndarray[Any, np.dtype[np.int64]]

MAX_BBSE_CLASSES = 500
"""Classes up to which ``longtail evaluate`` runs :func:`estimate_bbse`, whose time grows with their cube: a minute at
500, days at 8,000."""
MAX_EXACT_CLASSES = 2000
"""Classes up to which intervals are from the whole Fisher information, which is C × C, and float32 scores are computed
with in float64."""
_ROWS = 1024  # images at a time
_RESAMPLES = 200  # of the bootstrap
_PRIOR_STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
_POWERS = np.linspace(-2, 2, 81)
# pseudo-images per class that the Dirichlet prior has at least: the two halves of a handful of images resemble each
# other by chance, and cross-validation would choose too weak a prior
_MIN_PSEUDO_IMAGES = 0.5
_MAX_VALIDATION_IMAGES = 10_000  # images that the cross-validation uses at most


@dataclass(frozen=True)
class EstimatedPrior:
    """Estimated class frequencies with 95 % intervals, each (C,).

    The intervals cover the sampling of the images only, not errors of the model that the estimate is based on.
    """

    method: str
    frequencies: list[float]
    low: list[float]
    high: list[float]
    power: float | None = None
    """Method ``map``: the Dirichlet prior has its mode at the training frequencies to this power."""
    prior_strength: float | None = None
    """Method ``map``: pseudo-images of the Dirichlet prior, as a multiple of the number of images."""
    validation_images: int | None = None
    """Labelled images that the correction of the scores or the confusion matrix rests on, if that was said."""


def estimate_em(
    scores: Any, weights: Any = None, tolerance: float = 1e-7, max_iterations: int = 5000
) -> EstimatedPrior:
    """Estimate class frequencies by maximum likelihood, with expectation maximisation.

    Source: Saerens et al., Neural Computation 14(1), 2002; the intervals are from the Fisher information. Above
    :data:`MAX_EXACT_CLASSES` classes they are from its diagonal alone: as if it were known how often a class is taken
    for another, so they are too narrow for classes that are confused. There float32 scores stay in float32.

    Args:
        scores: (N, C) of unlabelled images, N at least 1.
        weights: (N,) how many images each image counts as; 1 if not given. With 0 an image is left out.
        tolerance: the iteration ends when no frequency changes by more than this.
        max_iterations: maximum number of iterations.

    Raises:
        LongtailError: the scores are not (N, C) finite numbers, or a weight is not finite and at least 0.
    """
    scores, weights = _counted_images(scores, weights)
    likelihood = _likelihood(scores)
    frequencies = _em(likelihood, weights / weights.sum(), tolerance=tolerance, max_iterations=max_iterations)
    half_width = 1.96 * np.sqrt(_variance(likelihood, weights, frequencies))
    return _build_estimate("em", frequencies, frequencies - half_width, frequencies + half_width)


def estimate_map(
    scores: Any,
    class_counts: Any,
    bias: Any = None,
    halves: Any = None,
    weights: Any = None,
    validation_images: int | None = None,
) -> EstimatedPrior:
    """Estimate class frequencies by maximum a posteriori, with a Dirichlet prior chosen by cross-validation.

    For a weak classifier the likelihood of :func:`estimate_em` is flat, and its maximum follows the noise of the images
    and of the validation images that corrected the scores, most of all in the tail. The Dirichlet prior has its mode at
    the training frequencies to a power: 0 (the uniform distribution) or the power with the largest likelihood (1 is
    the training set's tail, −1 its reverse). Which of the two, and how strong the prior is, is chosen by two-fold
    cross-validation: by the likelihood of one half of the images, with one half's correction, under the frequencies
    estimated from the other half with the other's correction. Scores without a correction are too unreliable for
    single classes; then the prior has its largest strength, so that the estimate is close to the power.

    Source: Dirichlet priors for label shift as in Ye et al., *Label Shift Estimation for Class-Imbalance Problem: A
    Bayesian Approach*, WACV 2024; the power of the training frequencies and the cross-validation are ours.

    Args:
        scores: (N, C) of unlabelled images, N at least 1.
        class_counts: (C,) training images of each class; a class without any is taken to have one.
        bias: (C,) correction of the scores, see :func:`~longtail.evaluation.calibration.fit_bias`; none if not given.
        halves: (2, C) corrections fitted on each half of the validation images; required with ``bias``.
        weights: (N,) how many images each image counts as; 1 if not given. With 0 an image is left out.
        validation_images: number of images that the corrections were fitted on, for the record.

    Returns:
        Frequencies, with intervals that cover the number of images, as those of :func:`estimate_em`, and the difference
        between the halves.

    Raises:
        LongtailError: the scores are not (N, C) finite numbers, there is not one count of at least 0 for each class, a
            weight is not finite and at least 0, or a correction has another shape.
    """
    scores, weights = _counted_images(scores, weights)
    counts = _numbers(class_counts, "class_counts")
    if counts.shape != scores.shape[1:] or not (np.isfinite(counts) & (counts >= 0)).all():
        raise LongtailError(
            f"class_counts: expected {scores.shape[1]} counts of at least 0, one for each column of the scores, got "
            f"{np.shape(class_counts)}"
        )
    log_counts = np.log(np.where(counts > 0, counts, 1.0))
    full_bias = np.zeros(scores.shape[1]) if bias is None else _numbers(bias, "bias")
    fold_biases = np.stack([full_bias] * 2) if halves is None else _numbers(halves, "halves")
    for name, value, shape in (("bias", full_bias, scores.shape[1:]), ("halves", fold_biases, (2, scores.shape[1]))):
        if value.shape != shape or not np.isfinite(value).all():
            raise LongtailError(f"{name}: expected finite numbers of shape {shape}, got shape {value.shape}")
    order = np.random.default_rng(0).permutation(len(scores))
    folds = [order[::2], order[1::2]]
    if halves is None:
        use_power, prior_strength = True, _PRIOR_STRENGTHS[0]
    else:
        use_power, prior_strength = _cross_validate(scores, fold_biases, weights, log_counts, folds)
    prior_strength = max(prior_strength, _MIN_PSEUDO_IMAGES * scores.shape[1] / len(scores))

    def estimate(correction: Array, images: Indices) -> tuple[float, Array]:
        likelihood, share = _likelihood(scores[images], correction), weights[images] / weights[images].sum()
        power = _best_power(likelihood, weights[images], log_counts) if use_power else 0.0
        return power, _em(likelihood, share, _power_of_frequencies(log_counts, power), prior_strength)

    power, frequencies = estimate(full_bias, order)
    # without the information of the Dirichlet prior, which is an assumption: as wide as for maximum likelihood
    variance = _variance(_likelihood(scores, full_bias), weights, frequencies)
    if len(folds[1]):
        # the halves differ by twice the standard error of the whole; pooled over the classes, relative to frequencies
        first, second = (np.log(estimate(*fold)[1]) for fold in zip(fold_biases, folds, strict=True))
        variance += np.mean((first - second) ** 2) / 4 * frequencies**2
    if validation_images is not None and bias is not None:
        # few images leave the bias, of which one in log frequency is a typical size, as uncertain as it was before
        variance += frequencies**2 / (1 + validation_images / scores.shape[1])
    half_width = 1.96 * np.sqrt(variance)
    result = _build_estimate("map", frequencies, frequencies - half_width, frequencies + half_width)
    return dataclasses.replace(result, power=power, prior_strength=prior_strength, validation_images=validation_images)


def _cross_validate(
    scores: Array, fold_biases: Array, weights: Array, log_counts: Array, folds: Sequence[Indices]
) -> tuple[bool, float]:
    """Return whether the Dirichlet prior uses a power of the training frequencies, and its strength."""
    if len(folds[1]) == 0:
        return False, _PRIOR_STRENGTHS[0]
    folds = [fold[: _MAX_VALIDATION_IMAGES // 2] for fold in folds]
    log_likelihoods: dict[tuple[bool, float], float] = {}
    for fit, validate in ((0, 1), (1, 0)):
        fitted, validated = (_likelihood(scores[folds[fold]], fold_biases[fold]) for fold in (fit, validate))
        # relative to the likelihood under the uniform prior; otherwise a correction could raise that of every image
        validated /= validated.sum(axis=1, keepdims=True)
        fit_share, validate_share = (weights[folds[fold]] / weights[folds[fold]].sum() for fold in (fit, validate))
        for use_power in (False, True):
            power = _best_power(fitted, weights[folds[fit]], log_counts) if use_power else 0.0
            mode = _power_of_frequencies(log_counts, power)
            frequencies = mode
            for prior_strength in _PRIOR_STRENGTHS:
                frequencies = _em(
                    fitted,
                    fit_share,
                    mode,
                    prior_strength,
                    tolerance=1e-4 / len(mode),
                    max_iterations=200,
                    start=frequencies,
                )
                value = float(validate_share @ np.log(_product(validated, frequencies)))
                log_likelihoods[use_power, prior_strength] = (
                    log_likelihoods.get((use_power, prior_strength), 0.0) + value
                )
    use_power, prior_strength = max(log_likelihoods, key=lambda choice: log_likelihoods[choice])
    return use_power, prior_strength


def _best_power(likelihood: Array, weights: Array, log_counts: Array) -> float:
    """Return the power of the training frequencies with the largest posterior, under a prior N(0, 1) of the power."""
    frequencies = np.stack([_power_of_frequencies(log_counts, power) for power in _POWERS], axis=1)
    values = weights @ np.log(_product(likelihood, frequencies)) - _POWERS**2 / 2
    return float(_POWERS[int(np.argmax(values))])


def _power_of_frequencies(log_counts: Array, power: float) -> Array:
    """Return (C,) training frequencies to a power, normalised."""
    exponents = power * log_counts
    unnormalized: Array = np.exp(exponents - exponents.max())
    frequencies: Array = unnormalized / unnormalized.sum()
    return frequencies


def _numbers(values: Any, name: str, dtype: type[np.floating[Any]] = np.float64) -> Array:
    if hasattr(values, "detach"):  # a tensor, which may be on an accelerator or have a gradient
        values = values.detach().cpu()
    try:
        array: Array = np.asarray(values, dtype=dtype)
    except (TypeError, ValueError):
        raise LongtailError(f"{name}: expected numbers, got {values!r:.80}") from None
    return array


def _class_numbers(values: Any, name: str, num_classes: int) -> Indices:
    """Return (N,) class numbers in [0, C), N at least 1."""
    array = _numbers(values, name)
    if array.ndim != 1 or len(array) == 0:
        raise LongtailError(f"{name}: expected the class number of at least one image, got shape {array.shape}")
    wrong = (array < 0) | (array >= num_classes) | (array != np.floor(array))
    if wrong.any():
        raise LongtailError(f"{name}: expected class numbers in [0, {num_classes}), got {array[wrong][0]:g}")
    return array.astype(np.int64)


def _counted_images(scores: Any, weights: Any) -> tuple[Array, Array]:
    """Return scores and weights of the images whose weight is not 0.

    Of an image that does not count, all likely classes may get the frequency 0; and half of the images might have no
    weight.
    """
    scores = _check_scores(scores)
    weights = _image_weights(scores, weights)
    counted = weights > 0
    return (scores, weights) if counted.all() else (scores[counted], weights[counted])


def _check_scores(scores: Any) -> Array:
    """Return (N, C) scores in float64, or in float32 if they are and have so many classes that memory counts."""
    single = "float32" in str(getattr(scores, "dtype", "")) and scores.shape[-1:] > (MAX_EXACT_CLASSES,)
    array = _numbers(scores, "scores", np.float32 if single else np.float64)
    if array.ndim != 2 or len(array) == 0 or not np.isfinite(array).all():
        raise LongtailError(f"scores: expected (N, C) finite numbers of at least one image, got {array.shape}")
    return array


def _likelihood(scores: Array, bias: Any = 0.0) -> Array:
    """Return (N, C) likelihoods of scores plus a (C,) bias, scaled to a maximum of 1 for each image; in their type."""
    likelihood = scores + np.asarray(bias, dtype=scores.dtype)
    likelihood -= likelihood.max(axis=1, keepdims=True)
    return np.exp(likelihood, out=likelihood)


def _product(likelihood: Array, vectors: Array) -> Array:
    """Return ``likelihood @ vectors`` in the likelihood's type, of which there is no second copy."""
    product: Array = likelihood @ vectors.astype(likelihood.dtype)
    return product


def _image_weights(scores: Any, weights: Any) -> Array:
    array: Array = np.full(len(scores), 1.0) if weights is None else _numbers(weights, "weights")
    if array.shape != (len(scores),) or not (np.isfinite(array) & (array >= 0)).all() or not array.any():
        raise LongtailError(
            f"weights: expected {len(scores)} numbers of at least 0, one for each image and not all 0, got "
            f"{np.shape(weights)}"
        )
    return array


def _em(
    likelihood: Array,
    share: Array,
    mode: Array | None = None,
    prior_strength: float = 0.0,
    tolerance: float = 1e-7,
    max_iterations: int = 5000,
    start: Array | None = None,
) -> Array:
    """Return (C,) frequencies of largest posterior, under a Dirichlet prior.

    Args:
        likelihood: (N, C).
        share: (N,) weights of the images, with sum 1.
        mode: (C,) mode of the Dirichlet prior; uniform if not given.
        prior_strength: its pseudo-images, as a multiple of the images; 0 is maximum likelihood.
        tolerance: the iteration ends when no frequency changes by more than this.
        max_iterations: maximum number of iterations.
        start: (C,) frequencies to start from; ``mode`` if not given.
    """
    classes = likelihood.shape[1]
    mode = np.full(classes, 1 / classes) if mode is None else mode
    frequencies = mode if start is None else start
    for _ in range(max_iterations):
        shared = _product(likelihood.T, share / _product(likelihood, frequencies))
        new = frequencies * shared + prior_strength * mode
        new = new / new.sum()
        change = np.abs(new - frequencies).max()
        frequencies = new
        if change < tolerance:
            break
    return frequencies


def _variance(likelihood: Array, weights: Array, frequencies: Array) -> Array:
    """Return the (C,) variances of maximum-likelihood frequencies, from the Fisher information or its diagonal."""
    classes = len(frequencies)
    exact = classes <= MAX_EXACT_CLASSES
    information = np.zeros((classes, classes) if exact else classes)
    for start in range(0, len(likelihood), _ROWS):
        rows = slice(start, start + _ROWS)
        ratio = likelihood[rows] / (likelihood[rows] @ frequencies)[:, None]
        information += (ratio * weights[rows, None]).T @ ratio if exact else weights[rows] @ ratio**2
    # a small multiple of the identity makes it invertible where the images carry no information
    if exact:
        information[np.diag_indices_from(information)] += 1e-9 * np.trace(information) / classes
        inverse = np.linalg.inv(information)
        row_sums, inverse_diagonal = inverse.sum(axis=1), np.diag(inverse)
    else:
        row_sums = inverse_diagonal = 1 / (information + 1e-9 * information.mean())
    # restricted to the directions that keep the sum of the frequencies
    variance: Array = (inverse_diagonal - row_sums**2 / row_sums.sum()).clip(min=0)
    return variance


def estimate_bbse(predicted: Any, heldout_labels: Any, heldout_predicted: Any, num_classes: int) -> EstimatedPrior:
    """Estimate class frequencies by black-box shift estimation, from predicted classes and a confusion matrix.

    Solves μ = P(predicted | label) q for q ≥ 0 by least squares. Each column of the confusion matrix has a Dirichlet
    prior worth one image, whose prediction is as often correct as those of all classes together: a class with one
    held-out image is not taken to be always, or never, recognised. The intervals are percentiles over resampled
    unlabelled images and confusion matrices from their posterior, so that few held-out images make them wide.

    Source: Lipton et al., *Detecting and Correcting for Label Shift with Black Box Predictors*, ICML 2018,
    arXiv 1802.03916; resampling from the posterior: Rubin, *The Bayesian Bootstrap*, 1981.

    Args:
        predicted: (N,) predicted classes of unlabelled images.
        heldout_labels: (M,) labels of held-out images.
        heldout_predicted: (M,) predicted classes of held-out images.
        num_classes: C.

    Raises:
        LongtailError: a class has no held-out image, there is no image, or a class number is out of range.
    """
    predicted = _class_numbers(predicted, "predicted", num_classes)
    labels = _class_numbers(heldout_labels, "heldout_labels", num_classes)
    guesses = _class_numbers(heldout_predicted, "heldout_predicted", num_classes)
    if len(labels) != len(guesses):
        raise LongtailError(
            f"heldout_predicted: expected {len(labels)} classes, one for each of heldout_labels, got {len(guesses)}"
        )
    confusion = np.zeros((num_classes, num_classes))
    np.add.at(confusion, (guesses, labels), 1)
    per_class = confusion.sum(axis=0)
    if not per_class.all():
        raise LongtailError(
            f"prior: class number {int(per_class.argmin())} has no held-out image, which the confusion matrix needs"
        )
    accuracy = (np.trace(confusion) + 1) / (len(labels) + 2)
    prior = np.full((num_classes, num_classes), (1 - accuracy) / max(1, num_classes - 1))
    np.fill_diagonal(prior, accuracy)
    posterior = confusion + prior
    counts = np.bincount(predicted, minlength=num_classes).astype(np.float64)
    rng = np.random.default_rng(0)
    frequencies = _solve(posterior / posterior.sum(axis=0), counts / counts.sum())
    resampled = []
    for _ in range(_RESAMPLES):
        columns = [rng.dirichlet(column) for column in posterior.T]
        target = rng.multinomial(len(predicted), counts / counts.sum()) / len(predicted)
        resampled.append(_solve(np.stack(columns, axis=1), target))
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    estimate = _build_estimate("bbse", frequencies, low, high)
    return dataclasses.replace(estimate, validation_images=len(labels))


def _solve(confusion: Array, target: Array) -> Array:
    from scipy.optimize import nnls

    # an additional row makes the solution sum to 1
    matrix, values = np.vstack([confusion, np.ones(len(target))]), np.append(target, 1.0)
    solution: Array = nnls(matrix, values, maxiter=100 * len(target))[0]
    frequencies: Array = solution / max(solution.sum(), 1e-12)
    return frequencies


def _build_estimate(method: str, frequencies: Array, low: Array, high: Array) -> EstimatedPrior:
    # a class that does not occur among the images may still occur among others
    floored = frequencies.clip(min=1e-6)
    return EstimatedPrior(method, (floored / floored.sum()).tolist(), low.clip(0, 1).tolist(), high.clip(0, 1).tolist())
