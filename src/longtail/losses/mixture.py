"""The Gaussian-mixture likelihood loss, GML (Suh & Seo, ICML 2023, arXiv 2305.01160).

Legend: B queries, K keys, C classes, D embedding width. z_i a query with label y_i, k_j a key with label c_j,
all of unit norm; N_c the number of keys of class c; τ the temperature.

    log p(z|c) = log[ (1/N_c) Σ_{j: c_j = c} exp(z·k_j / τ) ]                       likelihood,
    b_j        = log p(c_j) − log N_{c_j}                                            prior,
    L_i        = log Σ_j exp(s_ij) − log Σ_{j: c_j = y_i} exp(s_ij)                 negative log posterior,

with s_ij = z_i·k_j/τ + b_j. All keys of a class have the same bias, so the loss needs two sums over one B × K matrix
of similarities: the cost does not grow with C.

The biases bound the sums: Σ_j exp(b_j) ≤ 1, so with |z·k| ≤ 1 every sum lies between p(y)·exp(−1/τ) and exp(1/τ).
Above :data:`MIN_TEMPERATURE` this is inside float32's range, and no maximum has to be subtracted first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longtail.losses.checks import MIN_TEMPERATURE, Counts, check_mixture, valid_labels
from longtail.losses.mixture_autograd import full_precision, mixture_losses
from longtail.losses.posterior import ClassPrior
from longtail.losses.reduction import batch_mean, check_reduction, reduce_losses

TEMPERATURE_BOUNDS = (MIN_TEMPERATURE, 1.0)
"""The learned temperature stays inside these bounds."""


class GMLTerms(NamedTuple):
    """The two terms of the GML loss, unweighted scalars."""

    mixture: Tensor
    """Trains queries and keys; τ is held constant."""
    temperature: Tensor
    """Trains τ by leave-one-out maximum likelihood; queries and keys are held constant."""


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
    """Return −log p(y|z), where p(z|c) is a mixture with one component at each key of class c.

    Gradients reach queries, keys and a temperature that is a tensor. Second derivatives (``create_graph=True``) need
    memory for several B × K matrices; first ones do not. Inputs may be in half precision: products and sums are
    computed in float32, under autocast too.

    Args:
        queries: (B, D), unit norm.
        labels: (B,) int64 in [0, C); a query with label −1 is ignored.
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 marks an unfilled slot, which is ignored.
        log_prior: (C,) log class frequencies.
        temperature: τ, at least :data:`MIN_TEMPERATURE`.
        ids: (B,) int64 image ids; with ``key_ids``, keys from a query's own image are excluded from its class's keys.
        key_ids: (K,) int64 image ids of the keys.
        reduction: ``mean`` (over the queries that count), ``sum`` or ``none``.
        validate: check shapes, types and values first; False avoids the synchronisation with an accelerator that the
            values need: labels are then checked on a CPU only, and ignored elsewhere if they are out of range.

    Returns:
        A scalar, or (B,) for ``none``. A query whose class has no key (other than from its own image) or no training
        image (a log prior of −inf) does not count: it is left out of the mean, and 0 otherwise.

    Raises:
        ValueError: an argument's shape, type or values are not as above.
    """
    if validate:
        check_mixture(queries, labels, keys, key_labels, log_prior, temperature, ids, key_ids)
    check_reduction(reduction)
    losses, _, mask, _ = mixture_losses(
        queries, labels, keys, key_labels, log_prior, temperature, ids, key_ids, separate_temperature=False
    )
    return reduce_losses(losses, mask, reduction)


def class_log_likelihood(
    queries: Tensor, keys: Tensor, key_labels: Tensor, num_classes: int, temperature: Tensor | float
) -> Tensor:
    """Return log p(z|c) of every class under the mixture of its keys, up to a constant for each query.

    For prediction and analysis: :func:`~longtail.losses.posterior` of it is the mixture's posterior, and of its sum
    with a classifier's scores that of the product of both likelihoods. It needs memory for B × C and B × K entries;
    training needs neither.

    Args:
        queries: (B, D), unit norm.
        keys: (K, D), unit norm.
        key_labels: (K,) int64 in [0, C); −1 marks an unfilled slot.
        num_classes: C.
        temperature: τ, at least :data:`MIN_TEMPERATURE`.

    Returns:
        (B, C) float32 (float64 for float64); −inf for a class without keys, whose posterior is then 0.

    Raises:
        ValueError: a label is out of range, or not an int64; on an accelerator such a key is ignored.
    """
    key_labels = valid_labels(key_labels, num_classes, "key_labels")
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with full_precision(queries.device.type):
        exponentials = (queries.to(dtype) @ keys.to(dtype).t() / temperature).exp()
    # unfilled slots are added to an extra column
    column = torch.where(key_labels < 0, num_classes, key_labels)
    # shape[0], not len(), which an export would turn into a constant
    sums = exponentials.new_zeros(queries.shape[0], num_classes + 1).index_add(1, column, exponentials)
    counts = exponentials.new_zeros(num_classes + 1).index_add(0, column, torch.ones_like(column, dtype=dtype))
    return sums[:, :num_classes].log() - counts[:num_classes].clamp(min=1).log()


class GMLLoss(nn.Module):
    """The GML loss with its learned temperature, for any training loop.

    Args:
        class_counts: (C,) training images of each class: a sequence, array or tensor. A query or key of a class
            without any is left out.
        temperature: initial τ, inside :data:`TEMPERATURE_BOUNDS`.
        learn_temperature: learn τ; otherwise it is constant.
        validate: see :func:`gml_loss`.

    Raises:
        ValueError: ``temperature`` is outside the bounds, or the counts are not counts.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> loss = GMLLoss(class_counts=[90, 9, 1])
        >>> z, k = F.normalize(torch.eye(3, 8)), F.normalize(torch.eye(6, 8))
        >>> loss(z, torch.tensor([0, 1, 2]), k, torch.tensor([0, 1, 2, 0, 0, 1])).ndim
        0
    """

    def __init__(
        self,
        class_counts: Counts,
        temperature: float = 0.1,
        learn_temperature: bool = True,
        *,
        validate: bool = True,
    ) -> None:
        super().__init__()
        low, high = TEMPERATURE_BOUNDS
        if not low < temperature < high:
            raise ValueError(f"temperature: expected a value between {low} and {high}, got {temperature}")
        self.class_prior = ClassPrior(class_counts)
        self.validate = validate
        # a sigmoid between the logarithms of the bounds: τ cannot leave them, and always has a gradient
        fraction = (math.log(temperature) - math.log(low)) / (math.log(high) - math.log(low))
        self.temperature_logit = nn.Parameter(
            torch.tensor(math.log(fraction / (1 - fraction))), requires_grad=learn_temperature
        )

    @property
    def temperature(self) -> Tensor:
        """τ, a scalar with gradient."""
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
        """Return the sum of both terms, a scalar; the arguments are those of :func:`gml_loss`."""
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
        """Return the two terms separately; the temperature term is 0 where τ is not learned.

        Args:
            queries: (B, D), unit norm.
            labels: (B,) int64 in [0, C), or −1.
            keys: (K, D), unit norm.
            key_labels: (K,) int64 in [0, C), or −1.
            ids: (B,) int64 image ids.
            key_ids: (K,) int64 image ids of the keys.
            self_pairs: compare a query with keys from its own image in the mixture term. Without, one loss trains
                queries, keys and τ at once; it is the mixture term, and the temperature term is 0.
        """
        log_prior = self.class_prior.log_prior
        if self.validate:
            check_mixture(queries, labels, keys, key_labels, log_prior, None, ids, key_ids)
        learned = self.temperature_logit.requires_grad
        if not self_pairs:
            losses, _, mask, _ = mixture_losses(
                queries,
                labels,
                keys,
                key_labels,
                log_prior,
                self.temperature,
                ids,
                key_ids,
                separate_temperature=False,
            )
            mixture = batch_mean(losses, mask)
            return GMLTerms(mixture, torch.zeros_like(mixture))
        losses, loo_losses, mask, loo_mask = mixture_losses(
            queries,
            labels,
            keys,
            key_labels,
            log_prior,
            self.temperature,
            ids if learned else None,
            key_ids if learned else None,
            separate_temperature=learned,
        )
        mixture = batch_mean(losses, mask)
        return GMLTerms(mixture, batch_mean(loo_losses, loo_mask) if learned else torch.zeros_like(mixture))

    def log_likelihood(self, queries: Tensor, keys: Tensor, key_labels: Tensor) -> Tensor:
        """Return (B, C) log p(z|c) at the learned temperature; see :func:`class_log_likelihood`."""
        return class_log_likelihood(queries, keys, key_labels, len(self.class_prior.log_prior), self.temperature)
