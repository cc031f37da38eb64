"""What every method shares: a log-likelihood score per class, a log prior, and the posterior's cross-entropy.

Legend: B samples, C classes. Scores of images may have one row for every pixel: (B, C, H, W) with labels (B, H, W);
what has no label there is −1, and never counts.

    log p(y|x) = score_y + log p(y) − log Σ_c exp(score_c + log p(c))

Training adds the log prior of the training set; prediction adds that of the place of use. This is logit
adjustment (Menon et al., ICLR 2021), the same thing as Balanced Softmax (Ren et al., NeurIPS 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.objectives.reduction import batch_mean


def log_prior(class_counts: Tensor | Sequence[int]) -> Tensor:
    """Return log p(c) = log(n_c / Σ n), shape (C,) float32; a class without images has −inf.

    Raises:
        ValueError: counts that are negative, not one-dimensional, or all zero.
    """
    counts = torch.as_tensor(class_counts)
    if counts.ndim != 1 or counts.numel() == 0:
        raise ValueError(f"class_counts: expected shape (C,), one count a class, got {tuple(counts.shape)}")
    if bool((counts < 0).any()) or not bool((counts > 0).any()):
        raise ValueError("class_counts: expected counts of at least 0, one of them positive")
    return (counts.double() / counts.double().sum()).log().float()


class ClassPrior(nn.Module):
    """Class frequencies of a training set, and their logarithm.

    Args:
        class_counts: (C,) training images a class.

    Attributes:
        counts: (C,) int64 buffer.
        log: (C,) float32 buffer, log p(c).
    """

    counts: Tensor
    log: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int]) -> None:
        super().__init__()
        counts = torch.as_tensor(class_counts)
        self.register_buffer("log", log_prior(counts))
        self.register_buffer("counts", counts.long())


def posterior(log_likelihood: Tensor, prior: Tensor | None = None) -> Tensor:
    """Return log p(y|x), shape (B, C), or (B, C, H, W).

    Args:
        log_likelihood: (B, C) or (B, C, H, W) scores, log p(x|c) up to a constant a row.
        prior: (C,) log prior; None is the uniform one.
    """
    return F.log_softmax(log_likelihood if prior is None else log_likelihood + along(prior, log_likelihood), dim=1)


def along(values: Tensor, scores: Tensor) -> Tensor:
    """Return (C,) values in the shape that adds them to the classes of (B, C, …) scores."""
    return values.view(-1, *(1,) * (scores.ndim - 2))


def posterior_cross_entropy(
    log_likelihood: Tensor, labels: Tensor, prior: Tensor | None = None, strength: float = 1.0
) -> Tensor:
    """Return the mean of −log p(y|x), a scalar.

    Args:
        log_likelihood: (B, C) or (B, C, H, W) scores.
        labels: (B,) or (B, H, W) int64 in [0, C); −1 does not count.
        prior: (C,) log prior of the training set; None leaves plain cross-entropy.
        strength: factor of the log prior; 1 is Bayes' rule.
    """
    scores = log_likelihood if prior is None else log_likelihood + strength * along(prior, log_likelihood)
    return batch_mean(F.cross_entropy(scores, labels, reduction="none", ignore_index=-1), labels >= 0)


def distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0, counts: Tensor | None = None) -> Tensor:
    """Return T² · KL(teacher ‖ student) at temperature T, a scalar (Hinton et al., 2015).

    Args:
        student: (B, C) or (B, C, H, W) scores.
        teacher: scores of the same shape, held constant.
        temperature: T > 0.
        counts: (B,) or (B, H, W) bool, what counts; all if not given.
    """
    target = F.log_softmax(teacher.detach() / temperature, dim=1)
    log_probability = F.log_softmax(student / temperature, dim=1)
    divergences = F.kl_div(log_probability, target, reduction="none", log_target=True).sum(dim=1)
    if counts is None:
        counts = torch.ones_like(divergences, dtype=torch.bool)
    return batch_mean(divergences.where(counts, 0.0), counts) * temperature**2
