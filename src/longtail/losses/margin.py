"""Label-distribution-aware margins. Legend: B samples, C classes, n_c training images of class c."""

from __future__ import annotations

import torch
from torch import Tensor

from longtail.losses.checks import Counts, as_counts, valid_labels
from longtail.losses.reduction import to_full_precision


def ldam_margins(class_counts: Counts, max_margin: float = 0.5) -> Tensor:
    """Return margins Δ_c ∝ n_c^(−1/4), scaled to a maximum of ``max_margin``; shape (C,), 0 for a class without images.

    A class without images has no margin. Its samples are left out by the weight 0 that
    :func:`~longtail.losses.reweighting.effective_number_weights` gives it.

    Source: Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, NeurIPS 2019,
    arXiv 1906.07413.

    Args:
        class_counts: (C,) training images of each class: a sequence, array or tensor.
        max_margin: margin of the smallest class that has images, in units of the cosine.

    Raises:
        ValueError: counts that are negative, not finite, not one-dimensional, or all zero.
    """
    counts = as_counts(class_counts)
    margins = torch.where(counts > 0, counts, torch.inf) ** -0.25
    return (margins * (max_margin / margins.max())).float()


def with_margin(scores: Tensor, labels: Tensor, margins: Tensor, scale: float, *, validate: bool = False) -> Tensor:
    """Return the scores with the margin subtracted from the cosine of the true class, (B, C).

    Args:
        scores: (B, C), scale · cos(h, w_c); converted to float32 if they are in half precision.
        labels: (B,) int64 in [0, C), or −1, whose scores stay as they are.
        margins: (C,) in units of the cosine.
        scale: factor of the cosine classifier.
        validate: see :func:`longtail.losses.posterior_cross_entropy`.

    Raises:
        ValueError: a label is out of range, or not an int64.
    """
    scores = to_full_precision(scores)
    labels = valid_labels(labels, scores.shape[1], validate=validate)
    column = labels.clamp(min=0)
    shift = torch.where(labels >= 0, -scale * margins[column].to(scores.dtype), 0.0)
    return scores.scatter_add(1, column[:, None], shift[:, None])
