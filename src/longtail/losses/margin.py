"""Label-distribution-aware margins. Legend: B samples, C classes, n_c training images of class c."""

from __future__ import annotations

from torch import Tensor


def ldam_margins(class_counts: Tensor, max_margin: float = 0.5) -> Tensor:
    """Return margins Δ_c ∝ n_c^(−1/4), scaled to a maximum of ``max_margin``; shape (C,).

    Source: Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, NeurIPS 2019,
    arXiv 1906.07413.

    Args:
        class_counts: (C,) training images of each class, at least 1.
        max_margin: margin of the smallest class, in units of the cosine.

    Raises:
        ValueError: a class has no image; its margin is not defined.
    """
    if bool((class_counts < 1).any()):
        raise ValueError("class_counts: expected at least 1 image of each class; a margin is not defined without any")
    margins = class_counts.double() ** -0.25
    return (margins * (max_margin / margins.max())).float()


def with_margin(scores: Tensor, labels: Tensor, margins: Tensor, scale: float) -> Tensor:
    """Return the scores with the margin subtracted from the cosine of the true class, (B, C).

    Args:
        scores: (B, C), scale · cos(h, w_c).
        labels: (B,) int64 in [0, C).
        margins: (C,) in units of the cosine.
        scale: factor of the cosine classifier.
    """
    return scores.scatter_add(1, labels[:, None], -scale * margins[labels][:, None].to(scores.dtype))
