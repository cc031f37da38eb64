"""Accuracy where classes differ in frequency. Legend: N images, C classes. Everything is in percent.

Per-class hits and counts are all there is to it, and both add up over batches and processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtail.config import Shots
from longtail.objectives import posterior


def metrics(
    scores: Tensor, labels: Tensor, class_counts: Sequence[int], shots: Shots, log_prior: Tensor | None = None
) -> dict[str, Any]:
    """Judge predictions.

    Args:
        scores: (N, C) log-likelihood scores.
        labels: (N,) truth.
        class_counts: (C,) training images a class; they make the shot groups.
        shots: thresholds of the groups.
        log_prior: (C,) assumed at prediction; None is the uniform one.

    Returns:
        ``balanced_accuracy`` (mean over the classes that are present), ``top1``, ``top5`` (over images), ``many``,
        ``medium``, ``few`` (mean over a group's present classes; None where it has none), ``per_class`` (C values,
        None where a class has no test image), ``images``.
    """
    ranked = posterior(scores, log_prior).topk(min(5, scores.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    present = torch.bincount(labels, minlength=len(class_counts))
    hit = torch.bincount(labels[hits[:, 0]], minlength=len(class_counts))
    per_class = [100 * h / n if n else None for h, n in zip(hit.tolist(), present.tolist(), strict=True)]
    groups = shots.groups(class_counts)
    result: dict[str, Any] = {
        "balanced_accuracy": _mean(per_class),
        "top1": 100 * hits[:, 0].float().mean().item(),
        "top5": 100 * hits.any(dim=1).float().mean().item(),
    }
    for group in ("many", "medium", "few"):
        result[group] = _mean([value for value, name in zip(per_class, groups, strict=True) if name == group])
    return {**result, "per_class": per_class, "images": len(labels)}


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
