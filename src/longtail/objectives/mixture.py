"""The Gaussian-mixture likelihood of GML (Suh & Seo, ICML 2023, arXiv 2305.01160).

Legend: B queries, K keys, C classes, D embedding width. z_i a query with label y_i, k_j a key with label c_j,
all of unit norm; N_c the keys of class c; τ the temperature.

    log p(z|c) = log[ (1/N_c) Σ_{j: c_j = c} exp(z·k_j / τ) ]                       a likelihood,
    b_j        = log p(c_j) − log N_{c_j}                                            a prior,
    L_i        = log Σ_j exp(s_ij) − log Σ_{j: c_j = y_i} exp(s_ij)                 a posterior,

with s_ij = z_i·k_j/τ + b_j. Keys of one class share one bias, so two sums over one B × K similarity are all there is:
the cost does not grow with C.

The biases keep the sums tame: Σ_j exp(b_j) ≤ 1, so with |z·k| ≤ 1 every sum lies between p(y)·exp(−1/τ) and exp(1/τ).
Above :data:`LEAST_TEMPERATURE` that is inside float32's range, and no maximum has to be found first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.objectives.checks import LEAST_TEMPERATURE, check_mixture
from longtail.objectives.posterior import ClassPrior
from longtail.objectives.reduction import batch_mean

TEMPERATURE_BOUNDS = (LEAST_TEMPERATURE, 1.0)
"""The learned temperature stays inside these bounds."""

_CPU_BLOCK, _BLOCK = 2**19, 2**24  # entries of B × K at a time: a core's cache, and what an accelerator does not notice
_KEPT = 2**22  # entries of B × K that are kept for backward; of more, backward computes them again


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

    Gradients reach queries, keys and a temperature that is a tensor. Half precision is welcome: products and sums
    are made in float32 whatever the inputs, under autocast too.

    Args:
        queries: (B, D), unit norm.
        labels: (B,) int64 in [0, C); a query of label −1 does not count.
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 marks a slot that was never filled and does not count.
        log_prior: (C,) log class frequencies.
        temperature: τ, at least :data:`LEAST_TEMPERATURE`.
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
        check_mixture(queries, labels, keys, key_labels, log_prior, temperature, ids, key_ids)
    if reduction not in {"mean", "sum", "none"}:
        raise ValueError(f"reduction: expected mean, sum or none, got '{reduction}'")
    losses, _, counts, _ = _mixture(
        queries, labels, keys, key_labels, log_prior, temperature, ids, key_ids, split=False
    )
    if reduction == "none":
        return losses
    return batch_mean(losses, counts) if reduction == "mean" else losses.sum()


def class_log_likelihood(
    queries: Tensor, keys: Tensor, key_labels: Tensor, num_classes: int, temperature: Tensor | float
) -> Tensor:
    """Return log p(z|c) of every class under the mixture of its keys, up to a constant a row.

    For prediction and analysis: :func:`~longtail.objectives.posterior` of it is the mixture's own posterior, and of
    its sum with a classifier's scores the product of both. It is B × C and B × K large; training needs neither.

    Args:
        queries: (B, D), unit norm.
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 marks a slot that was never filled.
        num_classes: C.
        temperature: τ, at least :data:`LEAST_TEMPERATURE`.

    Returns:
        (B, C) float32 (float64 for float64); −inf for a class without keys, whose posterior is then 0.
    """
    kind = torch.promote_types(queries.dtype, torch.float32)
    with _full_precision(queries.device.type):
        exponentials = (queries.to(kind) @ keys.to(kind).t() / temperature).exp()
    # a column more than there are classes takes what was never filled
    column = torch.where(key_labels < 0, num_classes, key_labels)
    # shape, not len: an export keeps it open
    sums = exponentials.new_zeros(queries.shape[0], num_classes + 1).index_add(1, column, exponentials)
    counts = exponentials.new_zeros(num_classes + 1).index_add(0, column, torch.ones_like(column, dtype=kind))
    return sums[:, :num_classes].log() - counts[:num_classes].clamp(min=1).log()


def _mixture(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    log_prior: Tensor,
    temperature: Tensor | float,
    ids: Tensor | None,
    key_ids: Tensor | None,
    *,
    split: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each query's loss, its loss without its own image, and whether it counts in either, all (B,).

    With ``split`` the first loss keeps a query's own image and trains the embeddings alone, the second leaves it out
    and trains τ alone. Without, both are the one that leaves it out, and the first trains all.
    """
    kind = torch.promote_types(queries.dtype, torch.float32)
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=kind, device=queries.device)
    # a class of prior 0 takes no part, as one without keys does not
    key_labels = torch.where(log_prior[key_labels.clamp(min=0)] > -math.inf, key_labels, -1)
    filled, key_class = key_labels >= 0, key_labels.clamp(min=0)
    keys_of_class = torch.zeros_like(log_prior).scatter_add_(0, key_class, filled.to(log_prior.dtype))
    # exp(b_j): the prior's share of every key
    key_weights = (log_prior - keys_of_class.clamp(min=1).log()).exp()[key_class].to(kind) * filled
    # a query without a label has no keys, and does not count: −2 is no key's label
    labelled = labels >= 0
    key_counts = torch.where(labelled, keys_of_class[labels.clamp(min=0)], 0.0).to(kind)
    labels = torch.where(labelled, labels, -2)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _Mixture.apply(
        queries, keys, temperature, labels, key_labels, key_weights, key_counts, ids, key_ids, split
    )
    return outputs


class _Same(Protocol):
    """The entries of a block (some keys, B) whose key and query share their class: a list or a full block of values."""

    def take(self, block: Tensor) -> Tensor:
        """Return the block's values at these entries."""
        ...

    def put(self, block: Tensor, values: Tensor) -> Tensor:
        """Return the block with these values at these entries; it may be the same tensor."""
        ...

    def of_queries(self, values: Tensor) -> Tensor:
        """Return, for every entry, the value of its query."""
        ...

    def of_keys(self, values: Tensor) -> Tensor:
        """Return, for every entry, the value of its key."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Return (B,) sums over the entries of a query."""
        ...


class _Pairs:
    """The entries by their indices: little work where they are few, but the host must know their number."""

    def __init__(self, counts: Tensor, keys: Tensor) -> None:
        self.counts, self.keys = counts, keys
        self.queries = torch.repeat_interleave(counts, output_size=len(keys))
        self.flat = keys * len(counts) + self.queries

    def take(self, block: Tensor) -> Tensor:
        return block.view(-1).index_select(0, self.flat)

    def put(self, block: Tensor, values: Tensor) -> Tensor:
        block.view(-1).scatter_(0, self.flat, values)
        return block

    def of_queries(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.queries)

    def of_keys(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.keys)

    def sum(self, values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", lengths=self.counts, unsafe=True, initial=0)


class _Mask:
    """The entries by a mask: fixed shapes, so that no host waits and a compiler can trace it."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def take(self, block: Tensor) -> Tensor:
        return block

    def put(self, block: Tensor, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, block)

    def of_queries(self, values: Tensor) -> Tensor:
        return values[None]

    def of_keys(self, values: Tensor) -> Tensor:
        return values[:, None]

    def sum(self, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, 0.0).sum(dim=0)


def _same(labels: Tensor, key_labels: Tensor) -> _Same:
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or type(labels) is not Tensor:
        return _Mask(key_labels[:, None] == labels[None])
    # in the order of their labels, the keys of a query's class are a run
    ordered, order = torch.sort(key_labels, stable=True)
    first = torch.searchsorted(ordered, labels)
    counts = torch.searchsorted(ordered, labels, right=True) - first
    pairs = int(counts.sum())
    if 8 * pairs > len(labels) * len(key_labels):
        return _Mask(key_labels[:, None] == labels[None])
    run = torch.arange(pairs) + torch.repeat_interleave(first - counts.cumsum(0) + counts, counts, output_size=pairs)
    return _Pairs(counts, order.index_select(0, run))


class _Side(NamedTuple):
    """What a loss knows of its query's class: sums over its keys, those that count in this loss. All (B,)."""

    inverse: Tensor
    """1 / Σ exp(s); 0 where there is nothing to sum."""
    cosine: Tensor
    """Mean of z·k, each key with its share of the sum."""
    weight: Tensor
    """1 − p(y|z): the derivative of the loss by every score is ± this times a share; 0 where it does not count."""


class _Mixture(torch.autograd.Function):
    """Both losses and all gradients from one product of queries and keys, a block of keys at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        temperature: Tensor,
        labels: Tensor,
        key_labels: Tensor,
        key_weights: Tensor,
        key_counts: Tensor,
        ids: Tensor | None,
        key_ids: Tensor | None,
        split: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        given = (queries, keys, temperature, labels, key_labels, key_weights)
        own_ids = None if ids is None or key_ids is None else (ids, key_ids)
        problem = _Problem(*given, own_ids)
        batch = len(queries)
        keep = any(ctx.needs_input_grad[:3]) and batch * len(keys) <= _KEPT
        other = key_weights.new_zeros(batch)
        # Σ e and Σ e z·k over the class's keys, the same without the query's own image, and how many are its own
        sums = key_weights.new_zeros(5, batch)
        kept: list[tuple[Tensor, _Same, Tensor]] = []
        with _full_precision(queries.device.type):
            for part in problem.parts():
                exponentials, same, cosine, inside, own = problem.block(part)
                others = inside if own is None else inside.masked_fill(own, 0.0)
                sums[0] += same.sum(inside)
                sums[1] += same.sum(inside * cosine)
                if own is not None:
                    sums[2] += same.sum(others)
                    sums[3] += same.sum(others * cosine)
                    sums[4] += same.sum(own.to(sums.dtype))
                other += exponentials.sum(dim=0)
                if keep:
                    kept.append((exponentials, same, inside if split else others))
        if own_ids is None:
            sums[2:4] = sums[:2]
        left = key_counts - sums[4]
        log_other = other.log()
        whole, whole_losses, whole_counts = _side(sums[0], sums[1], log_other, key_counts, key_counts)
        held, held_losses, held_counts = _side(sums[2], sums[3], log_other, key_counts, left)
        side, losses, counts = (whole, whole_losses, whole_counts) if split else (held, held_losses, held_counts)
        inverse_other = _inverse(other)
        weights = [_weights(block, same, values, inverse_other, side.inverse) for block, same, values in kept]
        ctx.save_for_backward(*given, ids, key_ids, inverse_other, *side, *held, *weights)
        ctx.split = split
        ctx.mark_non_differentiable(counts, held_counts)
        return losses, held_losses if split else losses.clone(), counts, held_counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, held_gradient: Tensor, *_counts: Tensor) -> tuple[Tensor | None, ...]:
        given: tuple[Tensor, ...] = ctx.saved_tensors[:6]
        ids, key_ids, inverse_other, *rest = ctx.saved_tensors[6:]
        side, held, weights = _Side(*rest[:3]), _Side(*rest[3:6]), rest[6:]
        split = ctx.split
        queries, keys, temperature, labels, key_labels, key_weights = given
        own_ids = None if split or ids is None or key_ids is None else (ids, key_ids)
        problem = _Problem(queries, keys, temperature, labels, key_labels, key_weights, own_ids)
        kind = key_weights.dtype
        by_query = torch.zeros_like(queries, dtype=kind)
        by_key = torch.empty_like(keys) if ctx.needs_input_grad[1] else None
        slope = gradient * side.weight / temperature
        with _full_precision(queries.device.type):
            sloped = problem.queries * slope[:, None]
            for index, part in enumerate(problem.parts()):
                if weights:
                    weight = weights[index]
                else:
                    exponentials, same, _, inside, own = problem.block(part)
                    inside = inside if own is None else inside.masked_fill(own, 0.0)
                    weight = _weights(exponentials, same, inside, inverse_other, side.inverse)
                by_query.addmm_(weight.t(), keys[part].to(kind))
                if by_key is not None:
                    by_key[part] = weight @ sloped
            by_temperature = None
            if ctx.needs_input_grad[2]:
                # Σ over other classes of share × z·k, from the product that the queries' gradient needs anyway
                other_cosine = (problem.queries * by_query).sum(dim=1) + side.cosine
                slope_held = (held_gradient if split else gradient) * held.weight
                by_temperature = -(slope_held * (other_cosine - held.cosine)).sum() / temperature**2
                by_temperature = by_temperature.to(temperature.dtype)
        by_query = (by_query * slope[:, None]).to(queries.dtype)
        return by_query, by_key, by_temperature, None, None, None, None, None, None, None


class _Problem:
    """Queries and keys with what their scores depend on, taken a block of keys at a time."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        temperature: Tensor,
        labels: Tensor,
        key_labels: Tensor,
        key_weights: Tensor,
        own: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.queries = queries.to(key_weights.dtype)
        self.keys, self.temperature, self.labels, self.key_labels = keys, temperature, labels, key_labels
        self.key_weights, self.own = key_weights, own

    def parts(self) -> Iterator[slice]:
        entries = _CPU_BLOCK if self.queries.device.type == "cpu" else _BLOCK
        step = max(64, entries // max(1, len(self.queries)))
        for start in range(0, len(self.keys), step):
            yield slice(start, start + step)

    def block(self, part: slice) -> tuple[Tensor, _Same, Tensor, Tensor, Tensor | None]:
        """Return a block's exponentials.

        Those of other classes' keys, (part, B), with 0 at the entries of the query's class; which these are; and of
        these z·k, exp(s), and where they are the query's own image.
        """
        # keys down and queries across: on a CPU all three products are faster that way
        scores = self.keys[part].to(self.queries.dtype) @ (self.queries / self.temperature).t()
        weights = self.key_weights[part]
        same = _same(self.labels, self.key_labels[part])
        inside = same.take(scores)
        cosine = inside * self.temperature
        inside = inside.exp() * same.of_keys(weights)
        own = None
        if self.own is not None:
            ids, key_ids = self.own
            own = same.of_queries(ids) == same.of_keys(key_ids[part])
        # after the entries were taken: from here on the scores' memory is the exponentials'
        exponentials = same.put(scores.exp_().mul_(weights[:, None]), torch.zeros_like(inside))
        return exponentials, same, cosine, inside, own


def _side(
    total: Tensor, cosines: Tensor, log_other: Tensor, key_counts: Tensor, left: Tensor
) -> tuple[_Side, Tensor, Tensor]:
    """Return a loss's side, its values and where it counts, from sums over the ``left`` of a class's keys."""
    counts = left > 0
    # N_c is what is left of the query's class: the bias was made with all of its keys
    margin = torch.where(counts, total, 1.0).log() + (key_counts.clamp(min=1) / left.clamp(min=1)).log() - log_other
    inverse = _inverse(total)
    # not softplus, which gives up the last digits beyond 20
    losses = torch.where(counts, -F.logsigmoid(margin), 0.0)
    return _Side(inverse, cosines * inverse, torch.where(counts, torch.sigmoid(-margin), 0.0)), losses, counts


def _inverse(total: Tensor) -> Tensor:
    return torch.where(total > 0, 1 / torch.where(total > 0, total, 1.0), 0.0)


def _weights(block: Tensor, same: _Same, inside: Tensor, inverse_other: Tensor, inverse: Tensor) -> Tensor:
    """Return the shares of other classes' keys in their sum, and less the shares of the class's own keys in theirs."""
    return same.put(block.mul_(inverse_other), -inside * same.of_queries(inverse))


def _full_precision(device: str) -> AbstractContextManager[object]:
    """Return a context without autocast: half-precision inputs are welcome, half-precision log-sum-exps are not."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


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
        *,
        self_pairs: bool = True,
    ) -> GMLTerms:
        """Return both terms apart; the temperature's is 0 where τ is not learned.

        Without ``self_pairs`` a query does not meet its own image in the mixture's term either. One loss then trains
        queries, keys and τ at once, and is the first of the two.
        """
        if self.validate:
            check_mixture(queries, labels, keys, key_labels, self.prior.log, None, ids, key_ids)
        learned = self.temperature_logit.requires_grad
        if not self_pairs:
            losses, _, counts, _ = _mixture(
                queries, labels, keys, key_labels, self.prior.log, self.temperature, ids, key_ids, split=False
            )
            mixture = batch_mean(losses, counts)
            return GMLTerms(mixture, torch.zeros_like(mixture))
        losses, held, counts, held_counts = _mixture(
            queries,
            labels,
            keys,
            key_labels,
            self.prior.log,
            self.temperature,
            ids if learned else None,
            key_ids if learned else None,
            split=learned,
        )
        mixture = batch_mean(losses, counts)
        return GMLTerms(mixture, batch_mean(held, held_counts) if learned else torch.zeros_like(mixture))

    def log_likelihood(self, queries: Tensor, keys: Tensor, key_labels: Tensor) -> Tensor:
        """Return (B, C) log p(z|c) at the learned temperature: see :func:`class_log_likelihood`."""
        return class_log_likelihood(queries, keys, key_labels, len(self.prior.log), self.temperature)
