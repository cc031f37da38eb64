"""Contrastive rivals: supervised, balanced and parametric.

Legend: B queries, K keys, C classes, D embedding width. s_ij = z_i·k_j/τ with unit-norm z and k; P(i) the keys of
query i's class but itself, A(i) all keys but itself. A key of label −1 does not count.

    supervised   −(1/|P|) Σ_{p∈P} s_ip + log Σ_{a∈A} exp(s_ia)                        (Khosla et al., NeurIPS 2020)
    balanced     −(1/|P|) Σ_{p∈P} s_ip + log Σ_c (1/|A_c|) Σ_{a∈A_c} exp(s_ia)        (Zhu et al., CVPR 2022)
    parametric   one softmax over class scores and keys; the positives weighed by kind  (Cui et al., ICCV 2021)

Balanced is a posterior: its last sum is the mixture likelihood of :mod:`longtail.objectives.mixture` under a uniform
prior. It differs from GML in the numerator, where the logarithm is inside the mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longtail.objectives.reduction import batch_mean


def _similarities(
    queries: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, temperature: float, own: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, K) similarities, −inf where a key does not count, the positives, and what counts."""
    counts = (key_labels >= 0)[None].expand(len(queries), -1)
    if own is not None:
        counts = counts & ~own
    positive = counts & (labels[:, None] == key_labels[None])
    return (queries @ keys.t() / temperature).masked_fill(~counts, -math.inf), positive, counts


def _mean_of_positives(values: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B,) means over the positives, 0 where there is none, and whether there is one."""
    number = positive.sum(dim=1)
    return torch.where(positive, values, 0.0).sum(dim=1) / number.clamp(min=1), number > 0


def supcon_loss(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    temperature: float = 0.1,
    own: Tensor | None = None,
) -> Tensor:
    """Return the supervised contrastive loss, a scalar.

    A query without a positive is left out of the mean; where none has one, the loss is 0.

    Source: Khosla et al., *Supervised Contrastive Learning*, NeurIPS 2020, arXiv 2004.11362, equation 2 (L_out).

    Args:
        queries: (B, D), unit norm.
        labels: (B,) int64 in [0, C).
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 does not count.
        temperature: τ > 0.
        own: (B, K) bool, True where a key is the query itself; None where none is.
    """
    similarities, positive, _ = _similarities(queries, labels, keys, key_labels, temperature, own)
    mean, counts = _mean_of_positives(similarities, positive)
    # a row of −inf alone, of a query that is compared with nothing, would give NaN
    rows = torch.where(counts[:, None], similarities, 0.0)
    return batch_mean(torch.where(counts, rows.logsumexp(dim=1) - mean, 0.0), counts)


def balanced_contrastive_loss(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    num_classes: int,
    temperature: float = 0.1,
    own: Tensor | None = None,
) -> Tensor:
    """Return the balanced contrastive loss, a scalar: every class has one share of the denominator.

    Source: Zhu et al., *Balanced Contrastive Learning for Long-Tailed Visual Recognition*, CVPR 2022, arXiv 2207.09052,
    equation 7; with a class centre among the keys of every class, as there, every query has a positive.

    Args:
        queries: (B, D), unit norm.
        labels: (B,) int64 in [0, C).
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 does not count.
        num_classes: C.
        temperature: τ > 0.
        own: (B, K) bool, True where a key is the query itself; None where none is.
    """
    similarities, positive, counted = _similarities(queries, labels, keys, key_labels, temperature, own)
    mean, counts = _mean_of_positives(similarities, positive)
    column = key_labels.clamp(min=0)
    # |A_c|: a query misses itself among the keys of its class
    size = queries.new_zeros(len(queries), num_classes).index_add(1, column, counted.to(queries.dtype))
    share = size.clamp(min=1).log().gather(1, column[None].expand(len(queries), -1))
    rows = torch.where(counts[:, None], similarities - share, 0.0)
    return batch_mean(torch.where(counts, rows.logsumexp(dim=1) - mean, 0.0), counts)


def parametric_contrastive_loss(
    scores: Tensor,
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    temperature: float = 0.05,
    sample_weight: float = 0.05,
    own: Tensor | None = None,
) -> Tensor:
    """Return the parametric contrastive loss, a scalar.

    A query is compared with all class centres and all keys in one softmax; its class's centre is a positive of weight
    1, every key of its class one of weight α.

    Source: Cui et al., *Parametric Contrastive Learning*, ICCV 2021, arXiv 2107.12028, equation 5.

    Args:
        scores: (B, C) of the queries' images, with the log prior in them: what stands for the centres.
        queries: (B, D), unit norm.
        labels: (B,) int64 in [0, C).
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 does not count.
        temperature: τ > 0.
        sample_weight: α ≥ 0; 0 leaves the samples to the denominator.
        own: (B, K) bool, True where a key is the query itself; None where none is.
    """
    similarities, positive, _ = _similarities(queries, labels, keys, key_labels, temperature, own)
    log_sum = torch.logaddexp(scores.logsumexp(dim=1), similarities.logsumexp(dim=1))
    weights = sample_weight * positive.to(scores.dtype)
    total = 1 + weights.sum(dim=1)
    attracted = scores.gather(1, labels[:, None])[:, 0] + (weights * similarities.masked_fill(~positive, 0.0)).sum(1)
    losses = log_sum - attracted / total
    return batch_mean(losses, torch.ones_like(labels, dtype=torch.bool))
