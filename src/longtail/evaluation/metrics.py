"""Accuracy where classes differ in frequency. Legend: N images, C classes. Everything is in percent.

Per-class hits and counts are all there is to it, and both add up over batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtail.config import Shots
from longtail.evaluation.calibration import wilson
from longtail.objectives import posterior


def tally(scores: Tensor, labels: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """Return (3, C) int64: images of each class, those where it is the most probable, those where it is in the top 5.

    Tallies of parts of a test set add up to the tally of the whole.

    Args:
        scores: (N, C) log-likelihood scores.
        labels: (N,) truth.
        log_prior: (C,) assumed at prediction; None is the uniform one.
    """
    classes = scores.shape[1]
    hits = posterior(scores, log_prior).topk(min(5, classes), dim=1).indices == labels[:, None]
    chosen = (labels, labels[hits[:, 0]], labels[hits.any(dim=1)])
    return torch.stack([torch.bincount(part, minlength=classes) for part in chosen])


def metrics(counted: Tensor, class_counts: Sequence[int], shots: Shots) -> dict[str, Any]:
    """Judge predictions.

    Args:
        counted: (3, C), a :func:`tally` of a whole test set.
        class_counts: (C,) training images a class; they make the shot groups.
        shots: thresholds of the groups.

    Returns:
        ``balanced_accuracy`` (mean over the classes that are present), ``top1``, ``top5`` (over images), ``many``,
        ``medium``, ``few`` (mean over a group's present classes; None where it has none), ``per_class`` (C values,
        None where a class has no test image), ``images``; and 95 % intervals that know of the test images' number
        alone: ``intervals`` of the means over classes, ``per_class_interval`` (Wilson's).
    """
    present, first, five = counted.tolist()
    per_class = [100 * h / n if n else None for h, n in zip(first, present, strict=True)]
    groups, images = shots.groups(class_counts), sum(present)
    result: dict[str, Any] = {
        "balanced_accuracy": mean_of_present(per_class),
        "top1": 100 * sum(first) / max(images, 1),
        "top5": 100 * sum(five) / max(images, 1),
    }
    for group in ("many", "medium", "few"):
        result[group] = mean_of_present([value for value, name in zip(per_class, groups, strict=True) if name == group])
    pairs = list(zip(first, present, groups, strict=True))
    intervals = {
        name: _interval_of_mean([(h, n) for h, n, group in pairs if n and name in {group, "balanced_accuracy"}])
        for name in ("balanced_accuracy", "many", "medium", "few")
    }
    return {
        **result,
        "per_class": per_class,
        "images": images,
        "intervals": intervals,
        "per_class_interval": [list(wilson(h, n)) if n else None for h, n, _ in pairs],
    }


def _interval_of_mean(pairs: Sequence[tuple[int, int]]) -> list[float] | None:
    """Return the 95 % interval of a mean over classes, in percent, from hits and images of each."""
    if not pairs:
        return None
    mean = sum(h / n for h, n in pairs) / len(pairs)
    # a class that is always right is not certain to be: each gets a hit and a miss more
    variance = sum((h + 1) / (n + 2) * (1 - (h + 1) / (n + 2)) / n for h, n in pairs) / len(pairs) ** 2
    half = 1.96 * math.sqrt(variance)
    return [100 * max(0.0, mean - half), 100 * min(1.0, mean + half)]


def confusions(labels: Tensor, predicted: Tensor, class_counts: Sequence[int], most: int = 20) -> list[dict[str, Any]]:
    """Return which class is taken for which, those that lose the largest share of their images first.

    Args:
        labels: (N,) truth.
        predicted: (N,).
        class_counts: (C,) training images a class.
        most: pairs at most; one of a single image is none.

    Returns:
        ``class``, ``taken_for`` (numbers), ``images``, ``share`` of the class's test images in percent, ``to_larger``
        (whether the other has more training images).
    """
    classes = len(class_counts)
    present = torch.bincount(labels, minlength=classes)
    wrong = predicted != labels
    pairs, counts = torch.unique(labels[wrong] * classes + predicted[wrong], return_counts=True)
    shares = counts.double() / present[pairs // classes]
    order = torch.argsort(shares, descending=True, stable=True)
    listed = []
    for index in order[counts[order] > 1][:most].tolist():
        a, b = divmod(int(pairs[index]), classes)
        entry = {"class": a, "taken_for": b, "images": int(counts[index]), "share": 100 * float(shares[index])}
        listed.append({**entry, "to_larger": class_counts[b] > class_counts[a]})
    return listed


KINDS_OF_MISTAKES = ("to_larger", "to_smaller", "alike")
"""A class is taken for one at least twice as large in training, one at most half as large, or one in between."""


def mistakes(
    labels: Tensor, predicted: Tensor, confidence: Tensor, class_counts: Sequence[int], most: int = 8
) -> dict[str, list[dict[str, Any]]]:
    """Return the surest mistakes of each kind, of every class its surest alone, so that many classes are seen.

    Args:
        labels: (N,) truth.
        predicted: (N,).
        confidence: (N,) probability of what is predicted, in [0, 1].
        class_counts: (C,) training images a class.
        most: mistakes at most of a kind.

    Returns:
        For each of :data:`KINDS_OF_MISTAKES` entries of ``image`` (its place in the set), ``class``, ``taken_for``
        (numbers) and ``confidence`` (in percent), the surest first.
    """
    counts = torch.tensor(class_counts, dtype=torch.float64)
    ratio = counts[predicted] / counts[labels]
    wrong = predicted != labels
    kinds = {
        "to_larger": wrong & (ratio >= 2),
        "to_smaller": wrong & (ratio <= 0.5),
        "alike": wrong & (ratio > 0.5) & (ratio < 2),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, chosen in kinds.items():
        places = torch.nonzero(chosen).flatten()
        places = places[torch.argsort(confidence[places], descending=True, stable=True)]
        # the first of each class is its surest
        first = torch.full((len(class_counts),), len(places)).scatter_reduce_(
            0, labels[places], torch.arange(len(places)), "amin"
        )
        surest = places[first[first < len(places)].sort().values[:most]]
        found[kind] = [
            {
                "image": place,
                "class": int(labels[place]),
                "taken_for": int(predicted[place]),
                "confidence": 100 * float(confidence[place]),
            }
            for place in surest.tolist()
        ]
    return found


def mean_of_present(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is not None, or None."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
