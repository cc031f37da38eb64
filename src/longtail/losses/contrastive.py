"""Contrastive losses to compare with: supervised, balanced and parametric.

Legend: B queries, K keys, C classes, D embedding width. s_ij = z_i·k_j/τ with unit-norm z and k; P(i) the keys of
query i's class except itself, A(i) all keys except itself. A key with label −1 is ignored, and so is a query. Queries
and keys in half precision are converted to float32 first; under autocast, all but their product is in float32.

    supervised   −(1/|P|) Σ_{p∈P} s_ip + log Σ_{a∈A} exp(s_ia)                        (Khosla et al., NeurIPS 2020)
    balanced     −(1/|P|) Σ_{p∈P} s_ip + log Σ_c (1/|A_c|) Σ_{a∈A_c} exp(s_ia)        (Zhu et al., CVPR 2022)
    parametric   one softmax over class scores and keys; both kinds of positives weighted  (Cui et al., ICCV 2021)

The last sum of the balanced loss is the mixture likelihood of :mod:`longtail.losses.mixture` under a uniform prior, so
the loss is a posterior too. It differs from GML in the numerator, where the logarithm is inside the mean.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from longtail.losses.checks import check_norms, check_pairs, valid_labels, values_are_known
from longtail.losses.reduction import check_reduction, reduce_losses, to_full_precision


def _similarities(
    queries: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, temperature: float, self_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, K) similarities, −inf at ignored keys, the mask of the positives, and that of the keys not ignored."""
    mask = (key_labels >= 0)[None].expand(len(queries), -1)
    if self_mask is not None:
        mask = mask & ~self_mask
    positive = mask & (labels[:, None] == key_labels[None])
    # keys in the precision of the queries, as the mixture loss has them
    queries = to_full_precision(queries)
    # again after the product, which autocast computes in half precision
    products = to_full_precision(queries @ keys.to(queries.dtype).t())
    return (products / temperature).masked_fill(~mask, -math.inf), positive, mask


def _mean_of_positives(values: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B,) means over the positives, 0 where there is none, and the mask of the queries that have one."""
    number = positive.sum(dim=1)
    return torch.where(positive, values, 0.0).sum(dim=1) / number.clamp(min=1), number > 0


def supcon_loss(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    temperature: float = 0.1,
    self_mask: Tensor | None = None,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Return the supervised contrastive loss, a scalar.

    A query without a positive is left out of the mean; if no query has one, the loss is 0. Labels are only compared
    with one another, so any number of classes will do.

    Source: Khosla et al., *Supervised Contrastive Learning*, NeurIPS 2020, arXiv 2004.11362, equation 2 (L_out).

    Args:
        queries: (B, D), unit norm.
        labels: (B,) int64 of at least 0; a negative one is ignored.
        keys: (K, D), unit norm.
        key_labels: (K,) int64 of at least 0; a negative one is ignored.
        temperature: τ > 0.
        self_mask: (B, K) bool, True where a key is the query itself; None if no key is.
        reduction: ``mean`` over the queries that have a positive, ``sum`` or ``none``, (B,).
    """
    similarities, positive, _ = _similarities(queries, labels, keys, key_labels, temperature, self_mask)
    mean, has_positive = _mean_of_positives(similarities, positive)
    # a query that is compared with no key has a row of −inf, which would give NaN
    rows = torch.where(has_positive[:, None], similarities, 0.0)
    return reduce_losses(torch.where(has_positive, rows.logsumexp(dim=1) - mean, 0.0), has_positive, reduction)


def balanced_contrastive_loss(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    num_classes: int,
    temperature: float = 0.1,
    self_mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """Return the balanced contrastive loss, a scalar: every class has the same share of the denominator.

    Source: Zhu et al., *Balanced Contrastive Learning for Long-Tailed Visual Recognition*, CVPR 2022, arXiv 2207.09052,
    equation 7. With a class centre among the keys of every class, as in the paper, every query has a positive.

    Args:
        queries: (B, D), unit norm.
        labels: (B,) int64 in [0, C); −1 is ignored.
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 is ignored.
        num_classes: C.
        temperature: τ > 0.
        self_mask: (B, K) bool, True where a key is the query itself; None if no key is.
        reduction: ``mean`` over the queries that count, ``sum`` or ``none``, (B,).
        validate: see :func:`longtail.losses.posterior_cross_entropy`.

    Raises:
        ValueError: a label is out of range, or not an int64.
    """
    labels = valid_labels(labels, num_classes, validate=validate)
    key_labels = valid_labels(key_labels, num_classes, "key_labels", validate=validate)
    similarities, positive, key_mask = _similarities(queries, labels, keys, key_labels, temperature, self_mask)
    mean, has_positive = _mean_of_positives(similarities, positive)
    column = key_labels.clamp(min=0)
    # |A_c|: a query is not among its own keys, so its class has one fewer
    class_size = similarities.new_zeros(len(queries), num_classes)
    class_size = class_size.index_add(1, column, key_mask.to(similarities.dtype))
    log_size = class_size.clamp(min=1).log().gather(1, column[None].expand(len(queries), -1))
    rows = torch.where(has_positive[:, None], similarities - log_size, 0.0)
    return reduce_losses(torch.where(has_positive, rows.logsumexp(dim=1) - mean, 0.0), has_positive, reduction)


def parametric_contrastive_loss(
    scores: Tensor,
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    temperature: float = 0.05,
    sample_weight: float = 0.05,
    self_mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    validate: bool = False,
) -> Tensor:
    """Return the parametric contrastive loss, a scalar.

    A query is compared with all class centres and all keys in one softmax; the centre of its class is a positive of
    weight 1, every key of its class a positive of weight α. A query of a class without training images, whose score is
    −inf by the log prior, is left out of the mean.

    Source: Cui et al., *Parametric Contrastive Learning*, ICCV 2021, arXiv 2107.12028, equation 5.

    Args:
        scores: (B, C) class scores of the queries' images, log prior included; they stand for the class centres.
        queries: (B, D), unit norm.
        labels: (B,) int64 in [0, C); −1 is ignored.
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 is ignored.
        temperature: τ > 0.
        sample_weight: α ≥ 0; with 0, keys occur in the denominator only.
        self_mask: (B, K) bool, True where a key is the query itself; None if no key is.
        reduction: ``mean`` over the queries that count, ``sum`` or ``none``, (B,).
        validate: see :func:`longtail.losses.posterior_cross_entropy`.

    Raises:
        ValueError: a label is out of range, or not an int64.
    """
    scores = to_full_precision(scores)
    labels = valid_labels(labels, scores.shape[1], validate=validate)
    key_labels = valid_labels(key_labels, scores.shape[1], "key_labels", validate=validate)
    similarities, positive, _ = _similarities(queries, labels, keys, key_labels, temperature, self_mask)
    log_sum = torch.logaddexp(scores.logsumexp(dim=1), similarities.logsumexp(dim=1))
    weights = sample_weight * positive.to(scores.dtype)
    total = 1 + weights.sum(dim=1)
    own = scores.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    mask = (labels >= 0) & (own > -math.inf)
    positive_sum = own.where(mask, 0.0) + (weights * similarities.masked_fill(~positive, 0.0)).sum(1)
    losses = log_sum - positive_sum / total
    return reduce_losses(losses.where(mask, 0.0), mask, reduction)


class _ContrastiveLoss(nn.Module, ABC):
    """A loss of queries and keys, called as :class:`longtail.losses.GMLLoss` is."""

    def __init__(self, temperature: float, reduction: str, validate: bool) -> None:
        super().__init__()
        check_reduction(reduction)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a positive value, got {temperature}")
        self.temperature, self.reduction, self.validate = temperature, reduction, validate

    def forward(
        self,
        queries: Tensor,
        labels: Tensor,
        keys: Tensor,
        key_labels: Tensor,
        ids: Tensor | None = None,
        key_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar, or (B,) for the reduction ``none``.

        Args:
            queries: (B, D), unit norm.
            labels: (B,) int64 class indices; −1 is ignored.
            keys: (K, D), unit norm.
            key_labels: (K,) int64; −1 marks an unfilled slot, which is ignored.
            ids: (B,) int64; with ``key_ids``, a query is not compared with keys of its own id. Where other views of an
                image are positives, give every view an id of its own.
            key_ids: (K,) int64.

        Raises:
            ValueError: shapes, types or devices are not as above; labels are probabilities, which do not tell which
                keys are of a query's class; or, where they are checked, values are not.
        """
        check_pairs(queries, labels, keys, key_labels, ids, key_ids)
        if self.validate and all(values_are_known(tensor) for tensor in (queries, keys, key_labels)):
            check_norms(queries, keys, key_labels)
        self_mask = None if ids is None or key_ids is None else ids[:, None] == key_ids[None]
        return self.loss(queries, labels, keys, key_labels, self_mask)

    @abstractmethod
    def loss(
        self, queries: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, self_mask: Tensor | None
    ) -> Tensor:
        """Return the loss; ``self_mask`` (B, K) is True where a key is the query itself."""

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


class SupConLoss(_ContrastiveLoss):
    """The supervised contrastive loss: −(1/|P|) Σ_{p∈P} log softmax(s)_p over all keys, P those of the query's class.

    Called as ``loss(queries, labels, keys, key_labels, ids, key_ids)``. A query without a positive is left out. Labels
    are compared with one another only, so any number of classes will do.

    Source: Khosla et al., *Supervised Contrastive Learning*, NeurIPS 2020, arXiv 2004.11362, equation 2 (L_out).

    Args:
        temperature: τ > 0.
        reduction: ``mean`` over the queries that have a positive, ``sum`` or ``none``.
        validate: check that queries and keys have norm 1, for which an accelerator has to be waited for.

    Raises:
        ValueError: a temperature that is not positive, or another reduction.

    Example:
        >>> z, labels, ids = torch.nn.functional.normalize(torch.eye(4, 8)), torch.tensor([0, 0, 1, 1]), torch.arange(4)
        >>> round(SupConLoss()(z, labels, z, labels, ids, ids).item(), 4)  # log 3: all keys are equally far
        1.0986
    """

    def __init__(self, temperature: float = 0.1, *, reduction: str = "mean", validate: bool = False) -> None:
        super().__init__(temperature, reduction, validate)

    def loss(
        self, queries: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, self_mask: Tensor | None
    ) -> Tensor:
        """Return the loss; ``self_mask`` (B, K) is True where a key is the query itself."""
        return supcon_loss(queries, labels, keys, key_labels, self.temperature, self_mask, reduction=self.reduction)


class BalancedContrastiveLoss(_ContrastiveLoss):
    """The balanced contrastive loss: supervised, with the mean over each class's keys in the denominator.

    Called as ``loss(queries, labels, keys, key_labels, ids, key_ids)``. In the paper a learned centre of every class is
    among the keys, so every query has a positive; one without is left out.

    Source: Zhu et al., *Balanced Contrastive Learning for Long-Tailed Visual Recognition*, CVPR 2022, arXiv 2207.09052,
    equation 7.

    Args:
        num_classes: C.
        temperature: τ > 0.
        reduction: ``mean`` over the queries that have a positive, ``sum`` or ``none``.
        validate: check norms and labels on an accelerator too, which has to be waited for; without, queries and keys
            with a label out of range are ignored there.

    Raises:
        ValueError: a temperature that is not positive, or another reduction.
    """

    def __init__(
        self, num_classes: int, temperature: float = 0.1, *, reduction: str = "mean", validate: bool = False
    ) -> None:
        super().__init__(temperature, reduction, validate)
        self.num_classes = num_classes

    def loss(
        self, queries: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, self_mask: Tensor | None
    ) -> Tensor:
        """Return the loss; ``self_mask`` (B, K) is True where a key is the query itself."""
        return balanced_contrastive_loss(
            queries,
            labels,
            keys,
            key_labels,
            self.num_classes,
            self.temperature,
            self_mask,
            reduction=self.reduction,
            validate=self.validate,
        )
