"""Accuracy metrics for classes of different frequency, in percent. Legend: N images, C classes.

They are computed from counts of each class, which can be summed over batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtail.config import Shots
from longtail.evaluation.calibration import wilson_interval
from longtail.losses.checks import valid_labels
from longtail.losses.reduction import to_full_precision


def count_correct(scores: Tensor, labels: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """Return (3, C) int64: images of each class, those predicted correctly, those with the class in the top 5.

    The counts of disjoint parts of a test set can be added. An image with a score that is NaN is predicted wrongly.
    Of equal scores that of the lower class number ranks first, as in ``scores.argmax(dim=1)``.

    Args:
        scores: (N, C) log-likelihood scores, or probabilities.
        labels: (N,) int64 true classes; −1 is ignored.
        log_prior: (C,) log class frequencies that predictions assume; None is the uniform prior.

    Raises:
        ValueError: a label is out of range, or not an int64; on an accelerator such an image is ignored.
    """
    classes = scores.shape[1]
    labels = valid_labels(labels, classes)
    # not of their softmax, in which close probabilities of many classes would be equal
    scores = to_full_precision(scores)
    if log_prior is not None:
        scores = scores + log_prior
    own = labels.clamp(min=0)[:, None]
    true_scores = scores.gather(1, own)
    # not topk, whose order of equal scores is open
    ahead = scores > true_scores
    ahead |= (scores == true_scores) & (torch.arange(classes, device=scores.device) < own)
    rank = ahead.sum(dim=1, dtype=torch.int32).masked_fill(scores.isnan().any(dim=1), classes)
    # ignored images are counted in an extra column
    columns = torch.where(labels < 0, classes, labels)
    chosen = (columns, columns[rank < 1], columns[rank < min(5, classes)])
    return torch.stack([torch.bincount(part, minlength=classes + 1)[:classes] for part in chosen])


def classification_metrics(counts: Tensor, class_counts: Sequence[int], shots: Shots) -> dict[str, Any]:
    """Return accuracy metrics of a test set.

    Args:
        counts: (3, C), :func:`count_correct` of the whole test set.
        class_counts: (C,) training images of each class, which determine the shot groups.
        shots: thresholds of the shot groups.

    Returns:
        ``balanced_accuracy`` (mean over the classes with test images), ``top1``, ``top5`` (over images), ``many``,
        ``medium``, ``few`` (mean over a group's classes with test images; None without any), ``worst_tenth``,
        ``worst_class``, ``harmonic_mean`` (see :func:`low_end`), ``per_class`` (C values, None for a class without test
        images), ``images``; and 95 % intervals, which cover the sampling of the test images only: ``intervals`` of the
        means over classes, ``per_class_interval`` (Wilson).
    """
    present, top1_hits, top5_hits = counts.tolist()
    per_class = [100 * h / n if n else None for h, n in zip(top1_hits, present, strict=True)]
    groups, images = shots.groups(class_counts), sum(present)
    accuracies: dict[str, Any] = {
        "balanced_accuracy": mean_of_present(per_class),
        "top1": 100 * sum(top1_hits) / max(images, 1),
        "top5": 100 * sum(top5_hits) / max(images, 1),
    }
    for group in ("many", "medium", "few"):
        values = [value for value, name in zip(per_class, groups, strict=True) if name == group]
        accuracies[group] = mean_of_present(values)
    accuracies |= low_end(per_class)
    class_hits = list(zip(top1_hits, present, groups, strict=True))
    intervals = {
        name: _interval_of_mean([(h, n) for h, n, group in class_hits if n and name in {group, "balanced_accuracy"}])
        for name in ("balanced_accuracy", "many", "medium", "few")
    }
    return {
        **accuracies,
        "per_class": per_class,
        "images": images,
        "intervals": intervals,
        "per_class_interval": [list(wilson_interval(h, n)) if n else None for h, n, _ in class_hits],
    }


def low_end(per_class: Sequence[float | None]) -> dict[str, float | None]:
    """Return what a mean over classes hides, of accuracies in percent; None where no class has test images.

    With few test images of a class the worst values are partly chance, and lower than the classes' true accuracies.

    Args:
        per_class: (C,) accuracies; None for a class without test images.

    Returns:
        ``worst_tenth`` (mean of the tenth of the classes with the lowest accuracy, rounded up to whole classes),
        ``worst_class`` (the lowest accuracy), ``harmonic_mean`` (over classes; 0 as soon as one class has 0).
    """
    values = sorted(value for value in per_class if value is not None)
    if not values:
        return {"worst_tenth": None, "worst_class": None, "harmonic_mean": None}
    tenth = values[: -(-len(values) // 10)]
    return {
        "worst_tenth": sum(tenth) / len(tenth),
        "worst_class": values[0],
        "harmonic_mean": len(values) / sum(1 / value for value in values) if values[0] > 0 else 0.0,
    }


def _interval_of_mean(pairs: Sequence[tuple[int, int]]) -> list[float] | None:
    """Return the 95 % interval of a mean over classes, in percent, from (hits, images) of each class."""
    if not pairs:
        return None
    mean = sum(h / n for h, n in pairs) / len(pairs)
    # one more hit and one more miss for each class, so that an accuracy of 100 % has a variance too
    variance = sum((h + 1) / (n + 2) * (1 - (h + 1) / (n + 2)) / n for h, n in pairs) / len(pairs) ** 2
    half_width = 1.96 * math.sqrt(variance)
    return [100 * max(0.0, mean - half_width), 100 * min(1.0, mean + half_width)]


def confused_pairs(
    labels: Tensor, predicted: Tensor, class_counts: Sequence[int], max_pairs: int = 20
) -> list[dict[str, Any]]:
    """Return the most confused pairs of classes, by falling share of the true class's images.

    Args:
        labels: (N,) int64 true classes; −1 is ignored.
        predicted: (N,) int64 predicted classes.
        class_counts: (C,) training images of each class.
        max_pairs: maximum number of pairs; a pair with a single image is left out.

    Returns:
        For each pair ``class`` and ``predicted`` (class numbers), ``images``, ``share`` of the true class's test images
        in percent, ``to_larger`` (whether the predicted class has more training images).

    Raises:
        ValueError: a class is out of range, or not an int64.
    """
    classes = len(class_counts)
    labels, predicted = valid_labels(labels, classes), valid_labels(predicted, classes, "predicted")
    counted = (labels >= 0) & (predicted >= 0)
    labels, predicted = labels[counted], predicted[counted]
    present = torch.bincount(labels, minlength=classes)
    wrong = predicted != labels
    pairs, pair_counts = torch.unique(labels[wrong] * classes + predicted[wrong], return_counts=True)
    shares = pair_counts.double() / present[pairs // classes]
    order = torch.argsort(shares, descending=True, stable=True)
    entries = []
    for index in order[pair_counts[order] > 1][:max_pairs].tolist():
        true_class, predicted_class = divmod(int(pairs[index]), classes)
        entries.append(
            {
                "class": true_class,
                "predicted": predicted_class,
                "images": int(pair_counts[index]),
                "share": 100 * float(shares[index]),
                "to_larger": class_counts[predicted_class] > class_counts[true_class],
            }
        )
    return entries


def most_confident_errors(
    labels: Tensor, predicted: Tensor, confidence: Tensor, class_counts: Sequence[int], max_errors: int = 8
) -> dict[str, list[dict[str, Any]]]:
    """Return the most confident errors of each kind, at most one of each true class.

    Args:
        labels: (N,) int64 true classes; −1 is ignored.
        predicted: (N,) int64 predicted classes.
        confidence: (N,) probability of the predicted class, in [0, 1].
        class_counts: (C,) training images of each class.
        max_errors: maximum number of errors of each kind.

    Returns:
        Entries by falling confidence, with ``image`` (index in the set), ``class`` and ``predicted`` (class numbers)
        and ``confidence`` (in percent), where the predicted class has at least twice as many training images as the
        true one (``to_larger``), at most half as many (``to_smaller``), or neither (``alike``).

    Raises:
        ValueError: a class is out of range, or not an int64.
    """
    classes = len(class_counts)
    labels, predicted = valid_labels(labels, classes), valid_labels(predicted, classes, "predicted")
    train_counts = torch.tensor(class_counts, dtype=torch.float64)
    # two classes without training images are alike
    ratio = (train_counts[predicted] / train_counts[labels]).nan_to_num(nan=1.0, posinf=math.inf)
    wrong = (predicted != labels) & (labels >= 0) & (predicted >= 0)
    masks = {
        "to_larger": wrong & (ratio >= 2),
        "to_smaller": wrong & (ratio <= 0.5),
        "alike": wrong & (ratio > 0.5) & (ratio < 2),
    }
    errors: dict[str, list[dict[str, Any]]] = {}
    for kind, mask in masks.items():
        images = torch.nonzero(mask).flatten()
        images = images[torch.argsort(confidence[images], descending=True, stable=True)]
        # position of the first image of each class, which is its most confident error
        first = torch.full((len(class_counts),), len(images)).scatter_reduce_(
            0, labels[images], torch.arange(len(images)), "amin"
        )
        chosen = images[first[first < len(images)].sort().values[:max_errors]]
        errors[kind] = [
            {
                "image": image,
                "class": int(labels[image]),
                "predicted": int(predicted[image]),
                "confidence": 100 * float(confidence[image]),
            }
            for image in chosen.tolist()
        ]
    return errors


def mean_of_present(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if all are."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
