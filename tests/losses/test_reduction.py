"""Every loss in every precision, with more rows, keys and classes than half precision can count (65,504)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtail.losses import (
    class_log_likelihood,
    compute_log_prior,
    distillation,
    gml_loss,
    posterior,
    posterior_cross_entropy,
    reduction,
)
from longtail.losses.contrastive import balanced_contrastive_loss, parametric_contrastive_loss, supcon_loss
from longtail.losses.margin import ldam_margins, with_margin
from longtail.losses.reduction import batch_mean
from longtail.losses.reweighting import effective_number_weights, focal_loss, weighted_cross_entropy
from longtail.losses.von_mises_fisher import vmf_scores

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Scores (B, C), labels (B,), queries (B, D) and keys (K, D) to a scalar."""


def counts(scores: Tensor) -> Tensor:
    return torch.arange(1, scores.shape[1] + 1).flip(0) * 1000


def prior(scores: Tensor) -> Tensor:
    """Return a prior in the precision of the scores, with the same values in all of them."""
    return compute_log_prior(counts(scores)).bfloat16().to(scores.dtype)


def key_labels(scores: Tensor, keys: Tensor) -> Tensor:
    return torch.arange(len(keys)) % scores.shape[1]


def ldam(s: Tensor, y: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
    return weighted_cross_entropy(with_margin(s, y, ldam_margins(counts(s)), 3.0), y, torch.ones(s.shape[1]))


LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda s, y, _q, _k: posterior_cross_entropy(s, y),
    "posterior_cross_entropy": lambda s, y, _q, _k: posterior_cross_entropy(s, y, prior(s)),
    "focal": lambda s, y, _q, _k: focal_loss(s, y, 0.5),
    "class_balanced": lambda s, y, _q, _k: weighted_cross_entropy(s, y, effective_number_weights(counts(s))),
    "ldam": ldam,
    "distillation": lambda s, _y, _q, _k: distillation(s, s.flip(0)),
    "gml": lambda s, y, q, k: gml_loss(q, y, k, key_labels(s, k), prior(s), 0.2, validate=False),
    "supcon": lambda s, y, q, k: supcon_loss(q, y, k, key_labels(s, k)),
    "balanced": lambda s, y, q, k: balanced_contrastive_loss(q, y, k, key_labels(s, k), s.shape[1]),
    "parametric": lambda s, y, q, k: parametric_contrastive_loss(s, q, y, k, key_labels(s, k)),
    "proco": lambda s, y, q, _k: posterior_cross_entropy(
        vmf_scores(q, 0.5 * F.normalize(torch.eye(s.shape[1], q.shape[1]) + 0.1)), y
    ),
    "likelihood": lambda s, y, q, k: posterior_cross_entropy(
        class_log_likelihood(q, k, key_labels(s, k), s.shape[1], 0.2), y
    ),
}
SIZES = {"rows": (70_001, 3, 4), "keys": (4, 3, 70_001), "classes": (3, 70_001, 70_001)}
"""(B, C, K), each beyond 65,504 once."""
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=2, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 2**16))
def test_every_loss_in_every_precision(name: str, size: str, seed: int) -> None:
    """The value is that of float64 at the same, rounded, inputs, and the gradients are finite."""
    batch, classes, num_keys = SIZES[size]
    g = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(batch, classes, generator=g)
    queries, keys = (F.normalize(torch.randn(n, 8, generator=g), dim=1) for n in (batch, num_keys))
    labels = torch.randint(0, min(classes, num_keys), (batch,), generator=g)
    for dtype, tolerance in TOLERANCES.items():
        inputs = [tensor.to(dtype) for tensor in (scores, queries, keys)]
        exact: list[Tensor] = []
        got: list[Tensor] = []
        for values, results in ((inputs, got), ([tensor.double() for tensor in inputs], exact)):
            s, q, k = (tensor.clone().requires_grad_() for tensor in values)
            loss = LOSSES[name](s, labels, q, k)
            gradients = torch.autograd.grad(loss, (s, q, k), allow_unused=True)
            results += [loss.detach(), *(torch.zeros(()) if grad is None else grad for grad in gradients)]
        assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert got[0].item() == pytest.approx(exact[0].item(), rel=tolerance), dtype
        assert got[0].item() > 1e-3
        assert all(bool(gradient.isfinite().all()) for gradient in got[1:]), dtype


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_the_mean_of_more_rows_than_half_precision_counts(dtype: torch.dtype) -> None:
    losses, mask = torch.ones(200_000, dtype=dtype), torch.arange(200_000) % 2 == 0
    assert batch_mean(losses * mask, mask).item() == 1
    assert batch_mean(losses * mask * 60_000, mask).item() == pytest.approx(60_000, rel=4e-3)  # rounded to bfloat16
    assert batch_mean(losses * 0, mask & False).item() == 0


def test_processes_wait_for_each_other_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[Tensor] = []

    def all_reduce_sum(tensor: Tensor) -> Tensor:
        shared.append(tensor)
        return 3 * tensor

    monkeypatch.setattr(reduction, "is_distributed", lambda: True)
    monkeypatch.setattr(reduction, "world_size", lambda: 2)
    monkeypatch.setattr(reduction, "all_reduce_sum", all_reduce_sum)
    losses, mask = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([True, True, False])
    with torch.no_grad():  # a validation, which one process may do alone
        assert batch_mean(losses, mask).item() == 2
    assert shared == []
    assert batch_mean(losses, mask).item() == pytest.approx(4 / (3 * 2 / 2))
    assert len(shared) == 1


def test_the_posterior_of_half_precision_adds_up() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        log_p = posterior(torch.zeros(2, 70_001, dtype=dtype))
        assert log_p.exp().sum(dim=1).tolist() == pytest.approx([1, 1], rel=1e-4)
