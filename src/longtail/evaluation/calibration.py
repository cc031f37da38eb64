"""How far probabilities can be trusted: temperature, reliability, and sets of classes that hold the truth.

Legend: N images, C classes, G shot groups, S bins. Everything is fitted on held-out images that are not the test set's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtail.objectives import posterior

BINS = 15
GROUPS = ("many", "medium", "few")


def fit_temperature(scores: Tensor, labels: Tensor, log_prior: Tensor | None = None) -> float:
    """Return T > 0 that makes the labels likeliest under softmax(scores / T + log prior).

    Source: Guo et al., ICML 2017, arXiv 1706.04599, on scores free of the prior.

    Args:
        scores: (N, C), N at least 1.
        labels: (N,) truth.
        log_prior: (C,) of the images that the scores are of; None is the uniform one.
    """
    scores, labels = scores.double().cpu(), labels.cpu()
    bias = None if log_prior is None else log_prior.double().cpu()

    def loss(logarithm: float) -> float:
        log_p = posterior(scores / math.exp(logarithm), bias)
        return -float(log_p.gather(1, labels[:, None]).mean())

    # one dimension, and nearly always one minimum: golden section between 1/20 and 20
    low, high, ratio = -3.0, 3.0, (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    for _ in range(40):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return math.exp((low + high) / 2)


def fit_bias(scores: Tensor, labels: Tensor, log_prior: Tensor | None = None, strength: float = 1.0) -> Tensor:
    """Return (C,) what to add to the scores of every class so that the labels are likeliest.

    An estimate of class frequencies by maximum likelihood takes every class's scores at their word, and the tail's are
    too low after most trainings; corrected, it is ahead of black-box estimates (Alexandari et al., *Maximum Likelihood
    with Bias-Corrected Calibration is Hard-To-Beat at Label Shift Adaptation*, ICML 2020, arXiv 1901.06852).

    Args:
        scores: (N, C), N at least 1, at their temperature.
        labels: (N,) truth.
        log_prior: (C,) of the images that the scores are of; None is the uniform one.
        strength: of a pull towards 0, as of so many images that say so: a class with few is not believed at once.
    """
    scores, labels = scores.double().cpu(), labels.cpu()
    offset = scores if log_prior is None else scores + log_prior.double().cpu()
    bias = torch.zeros(scores.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(offset + bias, labels) + strength * bias.square().sum() / 2 / len(
            labels
        )
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return bias.detach().float()


class Reliability(NamedTuple):
    """Sums over images; those of parts of a set add up."""

    counts: Tensor
    """(G, S) images by their class's group and the bin of their confidence."""
    confidence: Tensor
    """(G, S) their confidence, the largest probability."""
    hits: Tensor
    """(G, S) of them the right ones."""
    nll: Tensor
    """(G,) −log p(label)."""
    brier: Tensor
    """(G,) Σ_c (p_c − [c is the label])²."""
    class_confidence: Tensor
    """(C, S) probability of a class, by its bin."""
    class_hits: Tensor
    """(C, S) images of the class among them."""


def reliability(log_probabilities: Tensor, labels: Tensor, group_of: Tensor) -> Reliability:
    """Return the sums of some images.

    Args:
        log_probabilities: (N, C).
        labels: (N,) truth.
        group_of: (C,) int64, the number in :data:`GROUPS` of every class.
    """
    log_p = log_probabilities.to(torch.float32 if log_probabilities.device.type == "mps" else torch.float64)
    p = log_p.exp()
    classes = p.shape[1]
    confidence, predicted = p.max(dim=1)
    cell = group_of[labels] * BINS + _bin(confidence)
    shape = (len(GROUPS), BINS)

    def over_cells(values: Tensor) -> Tensor:
        return p.new_zeros(len(GROUPS) * BINS).index_add_(0, cell, values.to(p.dtype)).view(shape)

    def over_groups(values: Tensor) -> Tensor:
        return p.new_zeros(len(GROUPS)).index_add_(0, group_of[labels], values)

    truth = torch.nn.functional.one_hot(labels, classes).to(p.dtype)
    class_cell = (torch.arange(classes, device=p.device) * BINS + _bin(p)).flatten()

    def over_classes(values: Tensor) -> Tensor:
        return p.new_zeros(classes * BINS).index_add_(0, class_cell, values.flatten()).view(classes, BINS)

    return Reliability(
        over_cells(torch.ones_like(confidence)),
        over_cells(confidence),
        over_cells(predicted == labels),
        over_groups(-log_p.gather(1, labels[:, None])[:, 0]),
        over_groups(((p - truth) ** 2).sum(dim=1)),
        over_classes(p),
        over_classes(truth),
    )


def added(a: Reliability, b: Reliability) -> Reliability:
    """Return the sums of both parts."""
    return Reliability(*(x + y for x, y in zip(a, b, strict=True)))


def _bin(p: Tensor) -> Tensor:
    return (p * BINS).long().clamp(max=BINS - 1)


def calibration_metrics(sums: Reliability) -> dict[str, Any]:
    """Judge probabilities.

    Returns:
        ``ece`` (expected calibration error, in percent, over :data:`BINS` bins), ``class_ece`` (the mean over classes
        of each one's), ``nll`` (nats), ``brier``; ``groups``, the first, third and fourth for each shot group; and
        ``diagram``, for each group the images, mean confidence and accuracy of every bin.
    """
    images = float(sums.counts.sum())
    gap = (sums.confidence.sum(dim=0) - sums.hits.sum(dim=0)).abs().sum()
    class_gap = (sums.class_confidence - sums.class_hits).abs().sum(dim=1).mean()
    groups, diagram = {}, {}
    for number, name in enumerate(GROUPS):
        of_group = sums.counts[number]
        total = float(of_group.sum())
        if total == 0:
            continue
        groups[name] = {
            "ece": 100 * float((sums.confidence[number] - sums.hits[number]).abs().sum()) / total,
            "nll": float(sums.nll[number]) / total,
            "brier": float(sums.brier[number]) / total,
        }
        filled = of_group.clamp(min=1)
        diagram[name] = [
            {"images": int(n), "confidence": 100 * float(c), "accuracy": 100 * float(h)}
            for n, c, h in zip(of_group, sums.confidence[number] / filled, sums.hits[number] / filled, strict=True)
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


def conformal_thresholds(true_probability: Tensor, labels: Tensor, classes: int, coverage: float = 0.9) -> Tensor:
    """Return (C,) thresholds: the set of classes whose probability reaches theirs holds the truth as promised.

    Of every class by itself, so that the tail is covered as the head is: of images of class c at least ``coverage``
    have c in their set, whatever the class frequencies are (Vovk, *Conditional validity of inductive conformal
    predictors*, 2012; Sadinle et al., 2019). A class with too few held-out images to promise that is in every set:
    threshold 0.

    Args:
        true_probability: (N,) probability of its label for every held-out image.
        labels: (N,) the labels.
        classes: C.
        coverage: share of a class's images, in (0, 1).
    """
    thresholds = torch.zeros(classes, dtype=torch.float64)
    # sorted by class and, within one, by probability; the host loops over nothing
    order = torch.argsort(true_probability.double(), stable=True)
    order = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels, minlength=classes)
    starts = counts.cumsum(0) - counts
    allowed = torch.floor((1 - coverage) * (counts + 1) + 1e-9).long()  # images that may be left out
    kept = allowed > 0
    thresholds[kept] = true_probability.double()[order][(starts + allowed - 1)[kept]]
    return thresholds


def wilson(hits: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share, in percent (Wilson, 1927); of no image (0, 100)."""
    if count == 0:
        return 0.0, 100.0
    share = hits / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def rejection_curve(confidence: Tensor, right: Tensor, steps: int = 20) -> list[dict[str, float]]:
    """Return the accuracy in percent over the most confident images, for falling shares of them kept."""
    order = torch.argsort(confidence, descending=True, stable=True)
    hits = right[order].double().cumsum(0)
    curve = []
    for step in range(steps, 0, -1):
        kept = max(1, round(len(order) * step / steps))
        curve.append({"kept": 100 * kept / len(order), "accuracy": 100 * float(hits[kept - 1]) / kept})
    return curve


def group_numbers(groups: Sequence[str]) -> Tensor:
    """Return (C,) int64, the number in :data:`GROUPS` of every class's group."""
    return torch.tensor([GROUPS.index(group) for group in groups])
