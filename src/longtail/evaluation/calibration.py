"""Calibration of class probabilities: temperature, reliability, and conformal prediction sets.

Legend: N images, C classes, G shot groups, S bins. Everything is fitted on held-out images outside the test set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtail.evaluation.temperature_fit import TemperatureFit
from longtail.losses import posterior

BINS = 15
"""Equally wide bins of confidence."""
GROUPS = ("many", "medium", "few")
PRIOR_IMAGES = 10.0
"""Images that the prior of a temperature is worth, see :func:`fit_temperature`."""
_MAX_LOG_TEMPERATURE = 3.0
_ROWS = 512  # images at a time, whose scores are converted to float64
_HALF_CHI2 = 1.92  # half the 95 % quantile of χ² with one degree of freedom


def fit_temperature(scores: Tensor, labels: Tensor, log_prior: Tensor | None = None) -> TemperatureFit:
    """Return the temperature T of softmax(scores / T + log prior), as far from 1 as the images show it to be.

    The maximum of the likelihood (Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017, arXiv 1706.04599,
    here for scores free of the prior) runs away on few images: if all of them are classified correctly, T = 0 is the
    best. Therefore:

    - A prior worth :data:`PRIOR_IMAGES` images whose labels are distributed as the scores say at T = 1 (catalytic
      prior: Huang et al., PNAS 117(22), 2020).
    - Of the 95 % interval, the T whose log posterior is at most 1.92 below the maximum (likelihood-ratio interval), the
      value closest to 1 is used. The likelihood has one maximum, so any T between 1 and the best one is better than 1.

    Both were chosen on simulated validation sets of 3 to 300 images and 3 or 20 classes, whose true temperature is 0.7,
    1, 1.5 or 3: the NLL of other images was at most 1.0 % above that at T = 1 (without the interval: 186 %; without the
    prior: 19 %). This is paid for with some of the gain: at a true temperature of 3, 10, 30, 100 and 300 images give
    28, 62, 82 and 92 % of it, at 1.5 only 3, 22, 44 and 65 %.

    Args:
        scores: (N, C), N at least 1.
        labels: (N,) true classes.
        log_prior: (C,) log class frequencies of these images; None is the uniform prior.
    """
    scores, labels = scores.cpu(), labels.cpu()
    bias = torch.zeros(scores.shape[1], dtype=torch.float64) if log_prior is None else log_prior.double().cpu()
    # −Σ targets · log posterior is Σ logsumexp − Σ targets · scores / T − Σ targets · bias, where the targets of an
    # image are its label and the prior's share: the two last sums do not depend on T. Classes without images, whose
    # bias is −∞, have probability 0 at every temperature
    share, finite_bias = PRIOR_IMAGES / len(labels), bias.masked_fill(bias == -math.inf, 0)
    scores_sum = bias_sum = 0.0
    for part, true in zip(scores.split(_ROWS), labels.split(_ROWS), strict=True):
        values = part.double()
        p = posterior(values, bias).exp()
        scores_sum += float(values.gather(1, true[:, None]).sum() + share * (p * values).sum())
        bias_sum += float(bias[true].sum() + share * (p @ finite_bias).sum())

    def loss(logarithm: float) -> float:
        temperature = math.exp(logarithm)
        parts = scores.split(_ROWS)
        normalizers = sum(float((part.double() / temperature + bias).logsumexp(dim=1).sum()) for part in parts)
        return (1 + share) * normalizers - scores_sum / temperature - bias_sum

    best = _minimum(loss, -_MAX_LOG_TEMPERATURE, _MAX_LOG_TEMPERATURE)
    limit = loss(best) + _HALF_CHI2
    low, high = (
        _interval_end(loss, best, -_MAX_LOG_TEMPERATURE, limit),
        _interval_end(loss, best, _MAX_LOG_TEMPERATURE, limit),
    )
    return TemperatureFit(
        temperature=math.exp(min(max(0.0, low), high)), interval=(math.exp(low), math.exp(high)), images=len(labels)
    )


def _minimum(loss: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function with one minimum has it, by golden-section search."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    for _ in range(25):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return (low + high) / 2


def _interval_end(loss: Callable[[float], float], best: float, bound: float, limit: float) -> float:
    """Return where between its minimum and a bound a function reaches a limit; the bound if it does not."""
    if loss(bound) <= limit:
        return bound
    inside, outside = best, bound
    for _ in range(14):
        middle = (inside + outside) / 2
        if loss(middle) <= limit:
            inside = middle
        else:
            outside = middle
    return inside


def fit_bias(
    scores: Tensor, labels: Tensor, log_prior: Tensor | None = None, strength: float = 1.0, shrink: bool = True
) -> Tensor:
    """Return a (C,) bias that makes the labels more likely when it is added to the scores.

    Maximum-likelihood estimates of class frequencies need unbiased scores, and after most trainings those of tail
    classes are too low. With the correction they are more accurate than black-box estimates (Alexandari et al.,
    *Maximum Likelihood with Bias-Corrected Calibration is Hard-To-Beat at Label Shift Adaptation*, ICML 2020,
    arXiv 1901.06852).

    The bias of largest posterior under the prior N(0, 1/strength) is multiplied by max(0, 1 − (C − 1)/χ²), where χ² is
    twice the log likelihood that it gains and C − 1 the mean of that gain if the true bias is 0 (the positive-part
    estimator of James and Stein 1961 and Baranchik 1964, with Wilks' approximation). So it is exactly 0 on most sets of
    images that need none, and hardly changed by many images.

    Args:
        scores: (N, C) divided by their temperature; without images the bias is 0.
        labels: (N,) true classes.
        log_prior: (C,) log class frequencies of these images; None is the uniform prior.
        strength: weight of the L2 penalty strength/2 · ‖bias‖² beside the summed loss, which keeps the bias of classes
            with few images small.
        shrink: whether the factor is applied.
    """
    scores, labels = scores.cpu(), labels.cpu()
    if len(labels) == 0:
        return torch.zeros(scores.shape[1])
    bias = torch.zeros(scores.shape[1], dtype=torch.float64)
    prior = bias.clone() if log_prior is None else log_prior.double().cpu()
    counts = torch.bincount(labels, minlength=len(bias)).double()
    scores_sum = sum(
        float(part.double().gather(1, true[:, None]).sum())
        for part, true in zip(scores.split(_ROWS), labels.split(_ROWS), strict=True)
    ) + float(prior[labels].sum())

    def nll(bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy and its (C,) gradient; of all images at once a graph is many times them."""
        total, gradient = -scores_sum - counts @ bias, -counts
        for part in scores.split(_ROWS):
            values = part.double() + (prior + bias)
            normalizers = values.logsumexp(dim=1, keepdim=True)
            total = total + normalizers.sum()
            gradient = gradient + (values - normalizers).exp().sum(dim=0)
        return total, gradient

    optimizer = torch.optim.LBFGS([bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        total, gradient = nll(bias)
        bias.grad = (gradient + strength * bias) / len(labels)
        return (total + strength * bias.square().sum() / 2) / len(labels)

    optimizer.step(closure)
    fitted = bias
    if shrink:
        gain = float(nll(torch.zeros_like(fitted))[0] - nll(fitted)[0])
        fitted = fitted * max(0.0, 1 - (len(fitted) - 1) / max(2 * gain, 1e-9))
    return fitted.float()


class Reliability(NamedTuple):
    """Sums over images, from which :func:`calibration_metrics` are computed; those of disjoint sets can be added.

    Where images have weights, every sum and number is one of weights.
    """

    counts: Tensor
    """(G, S) number of images by shot group of the label and bin of the confidence."""
    confidence: Tensor
    """(G, S) sum of the confidence, the largest class probability."""
    hits: Tensor
    """(G, S) number of correct predictions."""
    nll: Tensor
    """(G,) sum of −log p(label), in nats."""
    brier: Tensor
    """(G,) sum of the Brier score Σ_c (p_c − [c is the label])²."""
    class_confidence: Tensor
    """(C, S) sum of the class's probability, by its bin."""
    class_hits: Tensor
    """(C, S) number of images of the class, by the bin of its probability."""


def reliability(
    log_probabilities: Tensor, labels: Tensor, group_of: Tensor, weights: Tensor | None = None
) -> Reliability:
    """Return the calibration sums of images.

    An image with a NaN is predicted wrongly, as by :func:`~longtail.evaluation.metrics.count_correct`: every class has
    probability 0, so that its confidence is 0, its Brier score 1 and its NLL infinite.

    Args:
        log_probabilities: (N, C).
        labels: (N,) true classes.
        group_of: (C,) int64, the index in :data:`GROUPS` of each class's group.
        weights: (N,) of the images, at least 0; 1 each if not given. An image of weight 0 counts nowhere.
    """
    if weights is not None:  # the NLL of an image of weight 0 may be infinite
        counted = weights > 0
        log_probabilities, labels, weights = log_probabilities[counted], labels[counted], weights[counted]
    log_p = log_probabilities.to(torch.float32 if log_probabilities.device.type == "mps" else torch.float64)
    undefined = log_p.isnan().any(dim=1)
    log_p = log_p.masked_fill(undefined[:, None], -math.inf)
    p = log_p.exp()
    classes = p.shape[1]
    confidence, predicted = p.max(dim=1)
    cell = group_of[labels] * BINS + _bin(confidence)
    shape = (len(GROUPS), BINS)
    weight = torch.ones_like(confidence) if weights is None else weights.to(p)

    def sum_cells(values: Tensor) -> Tensor:
        return p.new_zeros(len(GROUPS) * BINS).index_add_(0, cell, weight * values).view(shape)

    def sum_groups(values: Tensor) -> Tensor:
        return p.new_zeros(len(GROUPS)).index_add_(0, group_of[labels], weight * values)

    one_hot = torch.nn.functional.one_hot(labels, classes).to(p.dtype)
    class_cell = (torch.arange(classes, device=p.device) * BINS + _bin(p)).flatten()

    def sum_classes(values: Tensor) -> Tensor:
        weighted = values if weights is None else weight[:, None] * values
        return p.new_zeros(classes * BINS).index_add_(0, class_cell, weighted.flatten()).view(classes, BINS)

    return Reliability(
        sum_cells(torch.ones_like(confidence)),
        sum_cells(confidence),
        sum_cells((predicted == labels) & ~undefined),
        sum_groups(-log_p.gather(1, labels[:, None])[:, 0]),
        sum_groups(((p - one_hot) ** 2).sum(dim=1)),
        sum_classes(p),
        sum_classes(one_hot),
    )


def add_reliability(a: Reliability, b: Reliability) -> Reliability:
    """Return the sums of two disjoint sets of images together."""
    return Reliability(*(x + y for x, y in zip(a, b, strict=True)))


def _bin(p: Tensor) -> Tensor:
    return (p * BINS).long().clamp(max=BINS - 1)


def calibration_metrics(sums: Reliability) -> dict[str, Any]:
    """Return calibration metrics.

    Args:
        sums: of all images of a set.

    Returns:
        ``ece`` (expected calibration error in percent, over :data:`BINS` bins), ``class_ece`` (mean over the classes of
        the error of each class's probability), ``nll`` (nats), ``brier``; ``groups`` with ``ece``, ``nll`` and
        ``brier`` of each shot group that has images; and ``diagram``, the reliability diagram of each such group: for
        every non-empty bin ``images``, mean ``confidence``, ``accuracy`` and its 95 % ``interval`` [low, high]
        (Wilson), in percent.
    """
    images = float(sums.counts.sum())
    gap = (sums.confidence.sum(dim=0) - sums.hits.sum(dim=0)).abs().sum()
    class_gap = (sums.class_confidence - sums.class_hits).abs().sum(dim=1).mean()
    groups, diagram = {}, {}
    for index, name in enumerate(GROUPS):
        counts = sums.counts[index]
        total = float(counts.sum())
        if total == 0:
            continue
        groups[name] = {
            "ece": 100 * float((sums.confidence[index] - sums.hits[index]).abs().sum()) / total,
            "nll": float(sums.nll[index]) / total,
            "brier": float(sums.brier[index]) / total,
        }
        diagram[name] = [
            {
                "images": int(n),
                "confidence": 100 * (confidence / n),
                "accuracy": 100 * (hits / n),
                "interval": list(wilson_interval(hits, n)),
            }
            for n, confidence, hits in zip(
                counts.tolist(), sums.confidence[index].tolist(), sums.hits[index].tolist(), strict=True
            )
            if n
        ]
    return {
        "ece": 100 * float(gap) / max(images, 1),
        "class_ece": 100 * float(class_gap) / max(images, 1),
        "nll": float(sums.nll.sum()) / max(images, 1),
        "brier": float(sums.brier.sum()) / max(images, 1),
        "groups": groups,
        "diagram": diagram,
    }


def conformal_thresholds(true_probability: Tensor, labels: Tensor, num_classes: int, coverage: float = 0.9) -> Tensor:
    """Return the (C,) probability thresholds of class-conditional conformal prediction sets.

    The prediction set of an image contains the classes whose probability is at least their threshold. The coverage
    holds for each class, so for the tail as for the head: at least the fraction ``coverage`` of the images of class c
    have c in their set, whatever the class frequencies are. A class with too few held-out images for this guarantee has
    threshold 0, and is in every set.

    Source: Vovk, *Conditional validity of inductive conformal predictors*, 2012; Sadinle et al., *Least Ambiguous
    Set-Valued Classifiers with Bounded Error Levels*, 2019.

    Args:
        true_probability: (N,) probability of the true class of each held-out image.
        labels: (N,) true classes.
        num_classes: C.
        coverage: fraction of each class's images, in (0, 1).
    """
    thresholds = torch.zeros(num_classes, dtype=torch.float64)
    # sorted by class, and within a class by probability
    order = torch.argsort(true_probability.double(), stable=True)
    order = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels, minlength=num_classes)
    starts = counts.cumsum(0) - counts
    allowed = torch.floor((1 - coverage) * (counts + 1) + 1e-9).long()  # images whose set may miss their class
    enough = allowed > 0
    thresholds[enough] = true_probability.double()[order][(starts + allowed - 1)[enough]]
    return thresholds


def conformal_interval(count: int, coverage: float = 0.9) -> tuple[float, float]:
    """Return the 95 % interval of the fraction of a class's images whose set contains it, in percent.

    The coverage of a threshold that is the l-th smallest of n probabilities is distributed as Beta(n + 1 − l, l) (Vovk,
    *Conditional validity of inductive conformal predictors*, 2012): the mean is at least ``coverage``, with few images
    a single threshold may be far from it.

    Args:
        count: n, held-out images of the class. With fewer than :func:`conformal_minimum` the class is in every set.
        coverage: as of :func:`conformal_thresholds`.
    """
    from scipy.special import betaincinv

    if count < conformal_minimum(coverage):
        return 100.0, 100.0
    rank = math.floor((1 - coverage) * (count + 1) + 1e-9)
    low, high = (100 * float(betaincinv(count + 1 - rank, rank, q)) for q in (0.025, 0.975))
    return low, high


def conformal_minimum(coverage: float = 0.9) -> int:
    """Return the number of held-out images of a class below which :func:`conformal_thresholds` has it in every set."""
    return math.ceil(1 / (1 - coverage) - 1e-9) - 1


def wilson_interval(hits: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a binomial proportion, in percent; (0, 100) without images.

    Source: Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, 1927.

    Args:
        hits: number of successes.
        count: number of trials.
        z: quantile of the normal distribution; 1.96 gives 95 %.
    """
    if count == 0:
        return 0.0, 100.0
    proportion = hits / count
    centre = (proportion + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(proportion * (1 - proportion) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def rejection_curve(confidence: Tensor, correct: Tensor, steps: int = 20) -> list[dict[str, float]]:
    """Return the accuracy over the most confident images, for falling fractions of the images.

    Args:
        confidence: (N,) probability of the predicted class.
        correct: (N,) bool, whether the prediction is correct.
        steps: number of points.

    Returns:
        ``kept`` (fraction of the images) and ``accuracy`` of each point, in percent.
    """
    order = torch.argsort(confidence, descending=True, stable=True)
    hits = correct[order].double().cumsum(0)
    curve = []
    for step in range(steps, 0, -1):
        kept = max(1, round(len(order) * step / steps))
        curve.append({"kept": 100 * kept / len(order), "accuracy": 100 * float(hits[kept - 1]) / kept})
    return curve


def group_numbers(groups: Sequence[str]) -> Tensor:
    """Return (C,) int64, the index in :data:`GROUPS` of each class's group."""
    return torch.tensor([GROUPS.index(group) for group in groups])
