"""Seesaw loss against loops written from the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longtail.losses.seesaw import SeesawLoss, seesaw_loss


def seesaw_loop(
    scores: Tensor, labels: Tensor, counts: list[float], p: float, q: float, least: float, background: bool
) -> float:
    """Equations 2 to 7 of Wang et al., CVPR 2021, one sample and one class after the other."""
    total, number = 0.0, 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        if label < 0 or (label < len(counts) and counts[label] == 0):
            continue
        exponentials = [math.exp(score) for score in row]
        sigma = [value / sum(exponentials) for value in exponentials]
        bottom = exponentials[label]
        for other, value in enumerate(exponentials):
            if other == label:
                continue
            factor = 1.0
            if not (background and len(counts) in (label, other)):
                n_i, n_j = max(1.0, counts[label]), max(1.0, counts[other])
                mitigation = 1.0 if n_i <= n_j else (n_j / n_i) ** p
                own = max(sigma[label], least)
                compensation = 1.0 if sigma[other] <= own else (sigma[other] / own) ** q
                factor = mitigation * compensation
            bottom += factor * value
        total -= math.log(exponentials[label] / bottom)
        number += 1
    return total / number


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("p", "q"), [(0.8, 2.0), (0.0, 2.0), (0.8, 0.0), (1.5, 0.5)])
def test_equals_the_loop(p: float, q: float, background: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([900.0, 40.0, 40.0, 3.0, 0.0])
    columns = len(counts) + background
    scores = 3 * torch.randn(64, columns, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, columns, (64,), generator=generator)
    expected = seesaw_loop(scores, labels, counts.tolist(), p, q, 0.01, background)
    assert seesaw_loss(scores, labels, counts, p, q).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("background", [False, True])
def test_samples_of_a_class_without_training_samples_are_left_out(background: bool) -> None:
    counts, scores = torch.tensor([4, 1, 0]), torch.randn(4, 3 + background, requires_grad=True)
    labels = torch.tensor([2, 0, 1, 3 if background else -1])
    losses = seesaw_loss(scores, labels, counts, reduction="none")
    assert (losses > 0).tolist() == [False, True, True, background]
    loss = seesaw_loss(scores, labels, counts)
    assert torch.equal(loss, losses.sum() / (2 + background))
    loss.backward()
    assert scores.grad is not None
    assert not scores.grad[0].any()
    if not background:
        assert torch.equal(SeesawLoss([4, 1, 0], reduction="none")(scores, labels), losses)


def test_without_exponents_it_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(1)
    scores, labels = torch.randn(9, 4, generator=generator), torch.randint(0, 4, (9,), generator=generator)
    loss = seesaw_loss(scores, labels, torch.tensor([9, 5, 2, 1]), 0.0, 0.0)
    assert torch.equal(loss, torch.nn.functional.cross_entropy(scores, labels, reduction="none").mean())


def test_the_factors_are_constants_of_the_gradient() -> None:
    """The gradient with respect to another class is its part of the denominator, as in the paper's equation 8."""
    scores = torch.tensor([[0.2, 1.1, -0.4]], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([100.0, 10.0, 1.0])
    seesaw_loss(scores, torch.tensor([0]), counts).backward()
    values = scores.detach()[0].exp()
    sigma = values / values.sum()
    factors = torch.ones(3, dtype=torch.float64)
    for other in (1, 2):
        factors[other] = (counts[other] / 100) ** 0.8 * max(1.0, float(sigma[other] / sigma[0])) ** 2
    expected = factors * values / (factors * values).sum()
    expected[0] -= 1
    assert scores.grad is not None
    assert torch.allclose(scores.grad[0], expected, atol=1e-12)


def test_a_rare_class_is_pushed_down_less() -> None:
    scores = torch.zeros(1, 3, requires_grad=True)
    seesaw_loss(scores, torch.tensor([0]), torch.tensor([100, 100, 1])).backward()
    assert scores.grad is not None
    assert scores.grad[0, 2] < 0.1 * scores.grad[0, 1]


def test_the_module_equals_the_function_and_refuses_what_has_no_meaning() -> None:
    scores, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, -1, 0])
    assert torch.equal(SeesawLoss([9, 3, 1])(scores, labels), seesaw_loss(scores, labels, torch.tensor([9, 3, 1])))
    with pytest.raises(ValueError, match=r"labels: expected class indices"):
        SeesawLoss([9, 3, 1])(scores, scores.softmax(dim=1))
    with pytest.raises(ValueError, match=r"mitigation: expected an exponent of at least 0, got -1"):
        SeesawLoss([9, 3, 1], mitigation=-1)


@pytest.mark.parametrize("background", [False, True])
def test_every_pixel_is_a_sample_also_where_a_side_has_as_many_as_there_are_classes(background: bool) -> None:
    counts = torch.tensor([900.0, 40.0, 40.0, 3.0])
    columns = len(counts) + background
    scores = 3 * torch.randn(2, columns, 3, columns, dtype=torch.float64)
    labels = torch.randint(-1, columns, (2, 3, columns))
    rows = scores.movedim(1, -1).reshape(-1, columns)
    expected = seesaw_loop(rows, labels.flatten(), counts.tolist(), 0.8, 2.0, 0.01, background)
    assert seesaw_loss(scores, labels, counts).item() == pytest.approx(expected, rel=1e-12)


def test_counts_survive_half_precision() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = SeesawLoss([200_000, 10, 100_000])(scores, labels)
    assert torch.equal(SeesawLoss([200_000, 10, 100_000]).half()(scores, labels), expected)


def test_frequencies_are_no_counts() -> None:
    with pytest.raises(ValueError, match="class_counts: expected whole numbers"):
        SeesawLoss([0.9, 0.1])
