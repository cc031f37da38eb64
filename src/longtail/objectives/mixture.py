"""The Gaussian-mixture likelihood of GML (Suh & Seo, ICML 2023, arXiv 2305.01160).

Legend: B queries, K keys, C classes, D embedding width. z_i a query with label y_i, k_j a key with label c_j,
all of unit norm; N_c the keys of class c; τ the temperature.

    log p(z|c) = log[ (1/N_c) Σ_{j: c_j = c} exp(z·k_j / τ) ]                       a likelihood,
    b_j        = log p(c_j) − log N_{c_j}                                            a prior,
    L_i        = logsumexp_j(z_i·k_j/τ + b_j) − logsumexp_{j: c_j = y_i}(z_i·k_j/τ + b_j)   a posterior.

Keys of one class share one bias, so two log-sum-exps over one B × K similarity are all there is: the cost
does not grow with C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.objectives.posterior import ClassPrior

TEMPERATURE_BOUNDS = (0.005, 4.0)
"""The learned temperature stays inside these bounds."""

# Finite, so that a row without any key has finite values and zero gradients instead of NaN; far below any score,
# which is at most 1/τ = 200 plus a log prior.
_NOTHING = -1e9


class GMLTerms(NamedTuple):
    """The two halves of the GML loss, scalars before any weight."""

    mixture: Tensor
    """Trains queries and keys; τ held constant."""
    temperature: Tensor
    """Trains τ by leave-one-out maximum likelihood; queries and keys held constant."""


def gml_loss(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    log_prior: Tensor,
    temperature: Tensor | float,
    *,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    reduction: str = "mean",
    validate: bool = True,
) -> Tensor:
    """Return −log p(y|z) under the mixture of each class's keys.

    Args:
        queries: (B, D), unit norm.
        labels: (B,) int64 in [0, C).
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 marks a slot that was never filled and does not count.
        log_prior: (C,) log class frequencies.
        temperature: τ > 0.
        ids: (B,) int64 image ids; with ``key_ids``, a query's own image is left out of its class's keys.
        key_ids: (K,) int64 image ids of the keys.
        reduction: mean (over the queries that count), sum, or none.
        validate: look at shapes, types and values first; False spares an accelerator the wait for the values.

    Returns:
        A scalar, or (B,) for none. A query whose class has no key (but perhaps its own image) does not count:
        it is left out of the mean, and 0 in the others.

    Raises:
        ValueError: an argument's shape, type or values are not as above.
    """
    if validate:
        _validate(queries, labels, keys, key_labels, log_prior, ids, key_ids)
    if reduction not in {"mean", "sum", "none"}:
        raise ValueError(f"reduction: expected mean, sum or none, got '{reduction}'")
    similarity = _similarity(queries, keys)
    own = None if ids is None or key_ids is None else ids[:, None] == key_ids[None]
    losses, counts = _losses(similarity / temperature, labels, key_labels, log_prior, own)
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum().clamp(min=1) if reduction == "mean" else losses.sum()


def _similarity(queries: Tensor, keys: Tensor) -> Tensor:
    # half-precision products are welcome, half-precision log-sum-exps are not
    return torch.mm(queries, keys.t()).to(torch.promote_types(queries.dtype, torch.float32))


def _losses(
    scores: Tensor, labels: Tensor, key_labels: Tensor, log_prior: Tensor, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each query's loss and whether it counts, both (B,), from scores z·k/τ (B, K)."""
    filled = key_labels >= 0
    key_class = key_labels.clamp(min=0)
    keys_of_class = torch.zeros_like(log_prior).scatter_add_(0, key_class, filled.to(log_prior.dtype))
    bias = (log_prior - keys_of_class.clamp(min=1).log())[key_class].to(scores.dtype)
    scores = torch.where(filled, scores + bias, _NOTHING)
    same = labels[:, None] == key_labels[None]
    of_other = scores.masked_fill(same, _NOTHING)
    count = keys_of_class[labels]
    if own is None:
        of_class, left = scores.masked_fill(~same, _NOTHING), count
    else:
        own = own & same
        left = count - own.sum(dim=1)
        of_class = scores.masked_fill(~same | own, _NOTHING)
    # N_c is what is left of the query's class: the bias was made with all of its keys
    correction = (count.clamp(min=1) / left.clamp(min=1)).log().to(scores.dtype)
    counts = left > 0
    margin = torch.logsumexp(of_class, dim=1) + correction - torch.logsumexp(of_other, dim=1)
    # not softplus, which gives up the last digits beyond 20
    return torch.where(counts, -F.logsigmoid(margin), 0.0), counts


class GMLLoss(nn.Module):
    """The GML loss with its learned temperature, for any training loop.

    Args:
        class_counts: (C,) training images a class.
        temperature: τ at the start, inside :data:`TEMPERATURE_BOUNDS`.
        learn_temperature: learn τ; otherwise it stays.
        validate: see :func:`gml_loss`.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> loss = GMLLoss(class_counts=[90, 9, 1])
        >>> z, k = F.normalize(torch.eye(3, 8)), F.normalize(torch.eye(6, 8))
        >>> loss(z, torch.tensor([0, 1, 2]), k, torch.tensor([0, 1, 2, 0, 0, 1])).ndim
        0
    """

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        temperature: float = 0.1,
        learn_temperature: bool = True,
        *,
        validate: bool = True,
    ) -> None:
        super().__init__()
        low, high = TEMPERATURE_BOUNDS
        if not low < temperature < high:
            raise ValueError(f"temperature: expected a value between {low} and {high}, got {temperature}")
        self.prior = ClassPrior(class_counts)
        self.validate = validate
        # a sigmoid between the logarithms of the bounds: τ cannot leave them, nor be stuck at one
        share = (math.log(temperature) - math.log(low)) / (math.log(high) - math.log(low))
        self.temperature_logit = nn.Parameter(
            torch.tensor(math.log(share / (1 - share))), requires_grad=learn_temperature
        )

    @property
    def temperature(self) -> Tensor:
        """τ, a scalar that carries the gradient."""
        low, high = (math.log(bound) for bound in TEMPERATURE_BOUNDS)
        return torch.exp(low + (high - low) * torch.sigmoid(self.temperature_logit))

    def forward(
        self,
        queries: Tensor,
        labels: Tensor,
        keys: Tensor,
        key_labels: Tensor,
        ids: Tensor | None = None,
        key_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of both terms, a scalar; the arguments are :func:`gml_loss`'s."""
        terms = self.terms(queries, labels, keys, key_labels, ids, key_ids)
        return terms.mixture + terms.temperature

    def terms(
        self,
        queries: Tensor,
        labels: Tensor,
        keys: Tensor,
        key_labels: Tensor,
        ids: Tensor | None = None,
        key_ids: Tensor | None = None,
    ) -> GMLTerms:
        """Return both terms apart; the temperature's is 0 where τ is not learned."""
        if self.validate:
            _validate(queries, labels, keys, key_labels, self.prior.log, ids, key_ids)
        similarity = _similarity(queries, keys)
        temperature = self.temperature
        losses, counts = _losses(similarity / temperature.detach(), labels, key_labels, self.prior.log, None)
        mixture = losses.sum() / counts.sum().clamp(min=1)
        if not self.temperature_logit.requires_grad:
            return GMLTerms(mixture, torch.zeros_like(mixture))
        own = None if ids is None or key_ids is None else ids[:, None] == key_ids[None]
        losses, counts = _losses(similarity.detach() / temperature, labels, key_labels, self.prior.log, own)
        return GMLTerms(mixture, losses.sum() / counts.sum().clamp(min=1))


def _validate(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    log_prior: Tensor,
    ids: Tensor | None,
    key_ids: Tensor | None,
) -> None:
    if queries.ndim != 2:
        raise ValueError(f"queries: expected shape (B, D), got {tuple(queries.shape)}")
    if keys.ndim != 2 or keys.shape[1] != queries.shape[1]:
        raise ValueError(f"keys: expected shape (K, {queries.shape[1]}), got {tuple(keys.shape)}")
    if log_prior.ndim != 1:
        raise ValueError(f"log_prior: expected shape (C,), got {tuple(log_prior.shape)}")
    rows = {"labels": (labels, len(queries)), "key_labels": (key_labels, len(keys))}
    if (ids is None) != (key_ids is None):
        raise ValueError("ids and key_ids: expected both or neither")
    if ids is not None and key_ids is not None:
        rows |= {"ids": (ids, len(queries)), "key_ids": (key_ids, len(keys))}
    for name, (tensor, length) in rows.items():
        if tensor.shape != (length,) or tensor.dtype != torch.int64:
            raise ValueError(
                f"{name}: expected shape ({length},) of int64, got {tuple(tensor.shape)} of {tensor.dtype}"
            )
    for name, tensor in {"keys": keys, "labels": labels, "key_labels": key_labels, "log_prior": log_prior}.items():
        if tensor.device != queries.device:
            raise ValueError(f"{name}: expected device {queries.device}, as queries have, got {tensor.device}")
    for name, tensor, least in (("labels", labels, 0), ("key_labels", key_labels, -1)):
        if tensor.numel() and (int(tensor.min()) < least or int(tensor.max()) >= len(log_prior)):
            raise ValueError(
                f"{name}: expected values in [{least}, {len(log_prior)}), "
                f"got {int(tensor.min())} to {int(tensor.max())}"
            )
    filled = keys[key_labels >= 0] if bool((key_labels < 0).any()) else keys
    for name, tensor in (("queries", queries), ("keys", filled)):
        tolerance = 1e-3 if tensor.dtype in {torch.float32, torch.float64} else 2e-2
        norms = tensor.detach().to(torch.float32).norm(dim=1)
        if norms.numel() and not bool(((norms - 1).abs() < tolerance).all()):
            raise ValueError(
                f"{name}: expected rows of norm 1, got norms from {float(norms.min()):.3g} to "
                f"{float(norms.max()):.3g}; use torch.nn.functional.normalize"
            )
