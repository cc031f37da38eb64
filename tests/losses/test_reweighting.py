"""Reweighted and margin losses against loops in float64 and identities from their papers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from longtail.losses.margin import ldam_margins, with_margin
from longtail.losses.reweighting import effective_number_weights, focal_loss, weighted_cross_entropy

G = torch.Generator().manual_seed(0)
SCORES = torch.randn(20, 5, generator=G, dtype=torch.float64) * 3
LABELS = torch.randint(0, 5, (20,), generator=G)
COUNTS = torch.tensor([1000, 200, 50, 10, 2])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal(gamma: float) -> None:
    expected = 0.0
    for row, label in zip(SCORES.tolist(), LABELS.tolist(), strict=True):
        p = math.exp(row[label]) / sum(map(math.exp, row))
        expected -= (1 - p) ** gamma * math.log(p) / 20
    assert focal_loss(SCORES, LABELS, gamma).item() == pytest.approx(expected, rel=1e-10)
    if gamma == 0:
        assert expected == pytest.approx(F.cross_entropy(SCORES, LABELS).item())


def test_focal_has_gradients_where_a_sample_is_certain() -> None:
    scores = torch.tensor([[200.0, 0.0]], requires_grad=True)
    focal_loss(scores, torch.tensor([0]), 0.5).backward()
    assert scores.grad is not None
    assert bool(torch.isfinite(scores.grad).all())


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_effective_numbers(beta: float) -> None:
    raw = [(1 - beta) / (1 - beta**n) for n in COUNTS.tolist()]
    expected = [w * 5 / sum(raw) for w in raw]
    got = effective_number_weights(COUNTS, beta)
    assert got.tolist() == pytest.approx(expected, rel=1e-5)
    if beta == 0:
        assert got.tolist() == [1] * 5
    loss = sum(
        expected[label] * -math.log(math.exp(row[label]) / sum(map(math.exp, row))) / 20
        for row, label in zip(SCORES.tolist(), LABELS.tolist(), strict=True)
    )
    assert weighted_cross_entropy(SCORES, LABELS, got.double()).item() == pytest.approx(loss, rel=1e-5)


def test_a_large_beta_is_the_inverse_frequency_and_an_absent_class_has_weight_zero() -> None:
    got = effective_number_weights(COUNTS, 1 - 1e-9)
    assert (got[4] / got[0]).item() == pytest.approx(500, rel=1e-3)
    assert effective_number_weights(torch.tensor([5, 0]), 0.99).tolist() == [2, 0]


def test_ldam() -> None:
    margins = ldam_margins(COUNTS, 0.5)
    assert margins.tolist() == pytest.approx([0.5 * (2 / n) ** 0.25 for n in COUNTS.tolist()], rel=1e-5)
    shifted = with_margin(SCORES, LABELS, margins, 30.0)
    for i, label in enumerate(LABELS.tolist()):
        for c in range(5):
            margin = 30 * margins[c].item() if c == label else 0.0
            assert shifted[i, c].item() == pytest.approx(SCORES[i, c].item() - margin, rel=1e-6)
    # a class without images has no margin, and does not change those of the others
    assert ldam_margins([16, 0, 1], 0.5).tolist() == [0.25, 0, 0.5]
