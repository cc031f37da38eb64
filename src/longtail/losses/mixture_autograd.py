"""Forward and backward pass of the Gaussian-mixture loss; see :mod:`longtail.losses.mixture` for the formulas.

Legend: B queries, K keys, C classes, D embedding width. The positives of a query are the keys of its own class, its
negatives the keys of all other classes; a self pair is a query with a key that comes from the same image. s is a score
z·k/τ + b, with the bias b that the key has from the class prior.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses.checks import valid_labels
from longtail.losses.reduction import to_full_precision

CPU_BLOCK_ENTRIES, BLOCK_ENTRIES = 2**19, 2**24
"""Entries of the B × K similarities computed at a time: what fits a CPU core's cache, or an accelerator's memory."""
MIN_BLOCK_KEYS = 64
"""Smallest number of keys computed at a time."""
MAX_SAVED_ENTRIES = 2**22
"""Up to so many entries of B × K, the forward pass saves the similarities; beyond, backward computes them again."""
SPARSE_FACTOR = 8
"""On a CPU, positives are addressed by indices if fewer than one of so many entries is a positive, else by a mask."""


def mixture_losses(
    queries: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    log_prior: Tensor,
    temperature: Tensor | float,
    ids: Tensor | None,
    key_ids: Tensor | None,
    *,
    separate_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each query's loss, its leave-one-out loss, and the masks of the queries that count in them, all (B,).

    The leave-one-out loss excludes the query's own image from the keys. The arguments are those of
    :func:`longtail.losses.gml_loss`.

    Args:
        queries: (B, D).
        labels: (B,).
        keys: (K, D).
        key_labels: (K,).
        log_prior: (C,).
        temperature: τ.
        ids: (B,).
        key_ids: (K,).
        separate_temperature: the first loss includes self pairs and has gradients by the embeddings only, the second
            is leave-one-out and has a gradient by τ only. Otherwise both are the leave-one-out loss, and the first has
            all gradients.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=dtype, device=queries.device)
    # counts of keys are summed in the type of the prior
    log_prior = to_full_precision(log_prior)
    labels = valid_labels(labels, len(log_prior))
    key_labels = valid_labels(key_labels, len(log_prior), "key_labels")
    # the keys of a class of frequency 0 are left out, like unfilled slots
    key_labels = torch.where(log_prior[key_labels.clamp(min=0)] > -math.inf, key_labels, -1)
    filled, key_class = key_labels >= 0, key_labels.clamp(min=0)
    keys_per_class = torch.zeros_like(log_prior).scatter_add_(0, key_class, filled.to(log_prior.dtype))
    # exp(b_j), from which unfilled slots get 0
    key_weights = (log_prior - keys_per_class.clamp(min=1).log()).exp()[key_class].to(dtype) * filled
    # a query without a label has no positives and does not count: no key has the label −2
    labelled = labels >= 0
    num_positives = torch.where(labelled, keys_per_class[labels.clamp(min=0)], 0.0).to(dtype)
    labels = torch.where(labelled, labels, -2)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _Mixture.apply(
        queries, keys, temperature, labels, key_labels, key_weights, num_positives, ids, key_ids, separate_temperature
    )
    return outputs


def full_precision(device: str) -> AbstractContextManager[object]:
    """Return a context without autocast: a sum of exponentials in half precision would be too inaccurate."""
    # torch 2.6 cannot trace the question, which needs none on devices that always have autocast
    if device in {"cpu", "cuda"} or torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


class _Positives(Protocol):
    """The entries of a block (keys of the block, B) whose key is a positive of the query.

    Values at these entries are a list or, with 0 or anything else at all other entries, a full block.
    """

    def take(self, block: Tensor) -> Tensor:
        """Return the block's values at these entries."""
        ...

    def put(self, block: Tensor, values: Tensor) -> Tensor:
        """Return the block with ``values`` at these entries; it may be the same tensor."""
        ...

    def of_queries(self, values: Tensor) -> Tensor:
        """Return the value of each entry's query."""
        ...

    def of_keys(self, values: Tensor) -> Tensor:
        """Return the value of each entry's key."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Return (B,) sums over the entries of each query."""
        ...


class _PositiveIndices:
    """The entries as indices: little work where they are few, but the host must know their number."""

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


class _PositiveMask:
    """The entries as a mask: fixed shapes, which need no synchronisation with the host and can be traced."""

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


def _find_positives(labels: Tensor, key_labels: Tensor) -> _Positives:
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or type(labels) is not Tensor:
        return _PositiveMask(key_labels[:, None] == labels[None])
    # with the keys sorted by label, the positives of a query are consecutive
    ordered, order = torch.sort(key_labels, stable=True)
    first = torch.searchsorted(ordered, labels)
    counts = torch.searchsorted(ordered, labels, right=True) - first
    pairs = int(counts.sum())
    if SPARSE_FACTOR * pairs > len(labels) * len(key_labels):
        return _PositiveMask(key_labels[:, None] == labels[None])
    run = torch.arange(pairs) + torch.repeat_interleave(first - counts.cumsum(0) + counts, counts, output_size=pairs)
    return _PositiveIndices(counts, order.index_select(0, run))


class _PositiveStats(NamedTuple):
    """Statistics of each query's positives, with or without self pairs, for the backward pass. All (B,)."""

    inverse_sum: Tensor
    """1 / Σ exp(s); 0 where there are no positives."""
    mean_cosine: Tensor
    """Mean of z·k weighted by exp(s)."""
    residual: Tensor
    """1 − p(y|z), which scales the derivative by every score; 0 where the query does not count."""


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
        num_positives: Tensor,
        ids: Tensor | None,
        key_ids: Tensor | None,
        separate_temperature: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = (queries, keys, temperature, labels, key_labels, key_weights)
        image_ids = None if ids is None or key_ids is None else (ids, key_ids)
        similarities = _Similarities(*inputs, image_ids)
        batch = len(queries)
        save = any(ctx.needs_input_grad[:3]) and batch * len(keys) <= MAX_SAVED_ENTRIES
        negative_sum = key_weights.new_zeros(batch)
        # over the positives Σ exp(s) and Σ exp(s) z·k, the same two without self pairs, and the number of self pairs
        sums = key_weights.new_zeros(5, batch)
        saved: list[tuple[Tensor, _Positives, Tensor]] = []
        with full_precision(queries.device.type):
            for block in similarities.blocks():
                negative_exp, positives, cosine, positive_exp, self_pairs = similarities.compute(block)
                loo_exp = positive_exp if self_pairs is None else positive_exp.masked_fill(self_pairs, 0.0)
                sums[0] += positives.sum(positive_exp)
                sums[1] += positives.sum(positive_exp * cosine)
                if self_pairs is not None:
                    sums[2] += positives.sum(loo_exp)
                    sums[3] += positives.sum(loo_exp * cosine)
                    sums[4] += positives.sum(self_pairs.to(sums.dtype))
                negative_sum += negative_exp.sum(dim=0)
                if save:
                    saved.append((negative_exp, positives, positive_exp if separate_temperature else loo_exp))
        if image_ids is None:
            sums[2:4] = sums[:2]
        num_loo = num_positives - sums[4]
        log_negative = negative_sum.log()
        all_stats, all_losses, all_mask = _losses(sums[0], sums[1], log_negative, num_positives, num_positives)
        loo_stats, loo_losses, loo_mask = _losses(sums[2], sums[3], log_negative, num_positives, num_loo)
        if separate_temperature:
            stats, losses, mask = all_stats, all_losses, all_mask
        else:
            stats, losses, mask = loo_stats, loo_losses, loo_mask
        inverse_negative = _safe_inverse(negative_sum)
        weights = [_gradient_weights(*entry, inverse_negative, stats.inverse_sum) for entry in saved]
        ctx.save_for_backward(*inputs, ids, key_ids, inverse_negative, *stats, *loo_stats, *weights)
        ctx.separate_temperature = separate_temperature
        ctx.mark_non_differentiable(mask, loo_mask)
        return losses, loo_losses if separate_temperature else losses.clone(), mask, loo_mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, loo_gradient: Tensor, *_masks: Tensor) -> tuple[Tensor | None, ...]:
        # create_graph=True: below, sums are updated in place, which has no derivative. A compiler traces with gradients
        # enabled too, and raises for second derivatives itself
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_gradients(ctx, gradient, loo_gradient)
        inputs: tuple[Tensor, ...] = ctx.saved_tensors[:6]
        ids, key_ids, inverse_negative, *rest = ctx.saved_tensors[6:]
        stats, loo_stats, weights = _PositiveStats(*rest[:3]), _PositiveStats(*rest[3:6]), rest[6:]
        separate_temperature = ctx.separate_temperature
        queries, keys, temperature, labels, key_labels, key_weights = inputs
        image_ids = None if separate_temperature or ids is None or key_ids is None else (ids, key_ids)
        similarities = _Similarities(queries, keys, temperature, labels, key_labels, key_weights, image_ids)
        dtype = key_weights.dtype
        by_query = torch.zeros_like(queries, dtype=dtype)
        by_key = torch.empty_like(keys) if ctx.needs_input_grad[1] else None
        slope = gradient * stats.residual / temperature
        with full_precision(queries.device.type):
            scaled_queries = similarities.queries * slope[:, None]
            for index, block in enumerate(similarities.blocks()):
                if weights:
                    weight = weights[index]
                else:
                    negative_exp, positives, _, positive_exp, self_pairs = similarities.compute(block)
                    positive_exp = positive_exp if self_pairs is None else positive_exp.masked_fill(self_pairs, 0.0)
                    weight = _gradient_weights(
                        negative_exp, positives, positive_exp, inverse_negative, stats.inverse_sum
                    )
                by_query.addmm_(weight.t(), keys[block].to(dtype))
                if by_key is not None:
                    by_key[block] = weight @ scaled_queries
            by_temperature = None
            if ctx.needs_input_grad[2]:
                # mean of z·k over the negatives, weighted by exp(s), from the product that the queries' gradient needs
                negative_cosine = (similarities.queries * by_query).sum(dim=1) + stats.mean_cosine
                loo_slope = (loo_gradient if separate_temperature else gradient) * loo_stats.residual
                by_temperature = -(loo_slope * (negative_cosine - loo_stats.mean_cosine)).sum() / temperature**2
                by_temperature = by_temperature.to(temperature.dtype)
        by_query = (by_query * slope[:, None]).to(queries.dtype)
        return by_query, by_key, by_temperature, None, None, None, None, None, None, None


def _differentiable_gradients(ctx: Any, gradient: Tensor, loo_gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return what :meth:`_Mixture.backward` does, with a graph for second derivatives; memory for some B × K entries.

    What the losses hold constant, see :func:`mixture_losses`, is constant in the second derivatives too.
    """
    # new views, so that each has a gradient of its own where queries and keys are one tensor
    views = [tensor.view_as(tensor) for tensor in ctx.saved_tensors[:3]]
    labels, key_labels, key_weights, ids, key_ids = ctx.saved_tensors[3:8]
    self_pairs = None if ids is None or key_ids is None else ids[:, None] == key_ids[None]

    def losses(queries: Tensor, keys: Tensor, temperature: Tensor, loo: bool) -> Tensor:
        with full_precision(queries.device.type):
            products = queries.to(key_weights.dtype) @ keys.to(key_weights.dtype).t()
        scores = products / temperature + key_weights.log()
        filled = (key_weights > 0)[None]
        positives = (labels[:, None] == key_labels[None]) & filled
        negatives = filled & ~positives
        used = positives & ~self_pairs if loo and self_pairs is not None else positives
        number, number_used = (mask.sum(dim=1).clamp(min=1).to(scores.dtype) for mask in (positives, used))
        # a row of −inf alone would have a derivative of NaN
        counts = used.any(dim=1) & negatives.any(dim=1)
        total, log_negative = (
            torch.where(counts[:, None], scores.masked_fill(~mask, -math.inf), 0.0).logsumexp(dim=1)
            for mask in (used, negatives)
        )
        return torch.where(counts, -F.logsigmoid(total + (number / number_used).log() - log_negative), 0.0)

    queries, keys, temperature = views
    if ctx.separate_temperature:
        terms = [
            (losses(queries, keys, temperature.detach(), loo=False), gradient),
            (losses(queries.detach(), keys.detach(), temperature, loo=True), loo_gradient),
        ]
    else:
        terms = [(losses(queries, keys, temperature, loo=True), gradient)]
    outputs, incoming = zip(*[term for term in terms if term[0].requires_grad], strict=True)
    needed = ctx.needs_input_grad[:3]
    inputs = [view for view, needs in zip(views, needed, strict=True) if needs]
    found = iter(torch.autograd.grad(outputs, inputs, incoming, create_graph=True, allow_unused=True))
    return (*[next(found) if needs else None for needs in needed], *[None] * 7)


class _Similarities:
    """Exponentials of the scores of queries and keys, computed a block of keys at a time."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        temperature: Tensor,
        labels: Tensor,
        key_labels: Tensor,
        key_weights: Tensor,
        image_ids: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.queries = queries.to(key_weights.dtype)
        self.keys, self.temperature, self.labels, self.key_labels = keys, temperature, labels, key_labels
        self.key_weights, self.image_ids = key_weights, image_ids

    def blocks(self) -> Iterator[slice]:
        """Yield slices of the keys."""
        entries = CPU_BLOCK_ENTRIES if self.queries.device.type == "cpu" else BLOCK_ENTRIES
        step = max(MIN_BLOCK_KEYS, entries // max(1, len(self.queries)))
        for start in range(0, len(self.keys), step):
            yield slice(start, start + step)

    def compute(self, block: slice) -> tuple[Tensor, _Positives, Tensor, Tensor, Tensor | None]:
        """Compute one block.

        Returns:
            exp(s) of the negatives, (keys of the block, B), 0 at the positives; the positives; and at their entries
            z·k, exp(s) and whether it is a self pair (None without image ids).
        """
        # keys in rows and queries in columns: on a CPU all three products are faster that way
        scores = self.keys[block].to(self.queries.dtype) @ (self.queries / self.temperature).t()
        weights = self.key_weights[block]
        positives = _find_positives(self.labels, self.key_labels[block])
        positive_scores = positives.take(scores)
        cosine = positive_scores * self.temperature
        positive_exp = positive_scores.exp() * positives.of_keys(weights)
        self_pairs = None
        if self.image_ids is not None:
            ids, key_ids = self.image_ids
            self_pairs = positives.of_queries(ids) == positives.of_keys(key_ids[block])
        # in place, after the positives were taken: from here on the memory of the scores holds the exponentials
        negative_exp = positives.put(scores.exp_().mul_(weights[:, None]), torch.zeros_like(positive_exp))
        return negative_exp, positives, cosine, positive_exp, self_pairs


def _losses(
    total: Tensor, cosines: Tensor, log_negative: Tensor, num_positives: Tensor, num_used: Tensor
) -> tuple[_PositiveStats, Tensor, Tensor]:
    """Return statistics, losses and the mask of the queries that count, from sums over ``num_used`` positives."""
    mask = num_used > 0
    # the biases were made with all keys of a class; the mean is over those used
    margin = (
        torch.where(mask, total, 1.0).log() + (num_positives.clamp(min=1) / num_used.clamp(min=1)).log() - log_negative
    )
    inverse = _safe_inverse(total)
    # softplus would lose the last digits above 20
    losses = torch.where(mask, -F.logsigmoid(margin), 0.0)
    return _PositiveStats(inverse, cosines * inverse, torch.where(mask, torch.sigmoid(-margin), 0.0)), losses, mask


def _safe_inverse(total: Tensor) -> Tensor:
    return torch.where(total > 0, 1 / torch.where(total > 0, total, 1.0), 0.0)


def _gradient_weights(
    negative_exp: Tensor, positives: _Positives, positive_exp: Tensor, inverse_negative: Tensor, inverse_sum: Tensor
) -> Tensor:
    """Return the softmax weights of the negatives, and minus those of the positives, each normalised on its own."""
    return positives.put(negative_exp.mul_(inverse_negative), -positive_exp * positives.of_queries(inverse_sum))
