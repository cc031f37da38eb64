"""Label-distribution-aware margins. Legend: B samples, C classes, n_c training images of class c."""

from __future__ import annotations

from torch import Tensor


def ldam_margins(class_counts: Tensor, largest: float = 0.5) -> Tensor:
    """Return Δ_c ∝ n_c^(−1/4), the smallest class's being ``largest``; shape (C,).

    Source: Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, NeurIPS 2019,
    arXiv 1906.07413.

    Args:
        class_counts: (C,) training images a class, at least 1.
        largest: in cosines.

    Raises:
        ValueError: a class has no image, for which no margin is defined.
    """
    if bool((class_counts < 1).any()):
        raise ValueError("class_counts: expected at least 1 image a class, a margin is not defined without any")
    margins = class_counts.double() ** -0.25
    return (margins * (largest / margins.max())).float()


def with_margin(scores: Tensor, labels: Tensor, margins: Tensor, scale: float) -> Tensor:
    """Return the scores scale · cos with the margin taken off the cosine of the true class, (B, C).

    Args:
        scores: (B, C), scale · cos(h, w_c).
        labels: (B,) int64 in [0, C).
        margins: (C,) in cosines.
        scale: of the cosine classifier.
    """
    return scores.scatter_add(1, labels[:, None], -scale * margins[labels][:, None].to(scores.dtype))
