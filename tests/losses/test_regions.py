"""Losses of regions that may be background, against loops in float64 and published identities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longtail.losses import compute_log_prior
from longtail.losses.regions import (
    federated_classes,
    relative_log_odds,
    relative_log_prior,
    sigmoid_focal_loss,
)

COUNTS = [900, 90, 9, 1]


def test_the_relative_prior_is_bayes_rule_with_the_background_as_it_is_drawn() -> None:
    """Densities and a prior give a posterior; without the shift it is that of equally frequent classes."""
    generator = torch.Generator().manual_seed(0)
    density = torch.rand(len(COUNTS) + 1, generator=generator, dtype=torch.float64)
    frequencies = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    for objects in (0.01, 0.25, 0.9):
        uniform = torch.cat([torch.full_like(frequencies, objects / len(COUNTS)), torch.tensor([1 - objects])])
        trained = torch.cat([objects * frequencies, torch.tensor([1 - objects])])
        scores = (density * uniform).log()  # what the network is to learn
        shift = torch.cat([relative_log_prior(frequencies.log()), torch.zeros(1)])
        expected = density * trained / (density * trained).sum()
        assert torch.allclose((scores + shift).softmax(dim=0), expected, atol=1e-12)


def test_the_relative_log_odds_are_bayes_rule_for_one_class_against_the_rest() -> None:
    frequencies = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    for objects in (0.01, 0.5):
        shift = relative_log_odds(frequencies.log(), objects)
        for value, frequency in zip(shift.tolist(), frequencies.tolist(), strict=True):
            trained, uniform = objects * frequency, objects / len(COUNTS)
            expected = math.log(trained / (1 - trained)) - math.log(uniform / (1 - uniform))
            assert value == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(relative_log_odds(frequencies.log(), 1e-6), relative_log_prior(frequencies.log()), atol=1e-5)


def test_equal_counts_add_nothing() -> None:
    log_prior = compute_log_prior([7, 7, 7])
    for shift in (relative_log_prior(log_prior), relative_log_odds(log_prior, 0.01)):
        assert torch.allclose(shift, torch.zeros(3), atol=1e-6)


def test_a_class_without_objects_has_none_and_does_not_count() -> None:
    shift = relative_log_prior(compute_log_prior([6, 0, 2]))
    assert shift[1] == -math.inf
    assert torch.allclose(shift[[0, 2]], torch.tensor([1.5, 0.5]).log())
    assert relative_log_odds(compute_log_prior([6, 0, 2]), 0.1)[1] == -math.inf


def focal_loop(scores: Tensor, labels: Tensor, gamma: float, alpha: float | None, counted: list[bool]) -> float:
    """Equation 5 of Lin et al., ICCV 2017, over all regions and classes, by the number of objects."""
    total, objects, classes = 0.0, 0, scores.shape[1]
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        if label < 0:
            continue
        objects += label < classes
        for index, score in enumerate(row):
            if not counted[index]:
                continue
            probability = 1 / (1 + math.exp(-score))
            right = probability if index == label else 1 - probability
            weight = 1.0 if alpha is None else alpha if index == label else 1 - alpha
            total -= weight * (1 - right) ** gamma * math.log(right)
    return total / max(1, objects)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, None), (0.5, 0.6)])
def test_the_sigmoid_focal_loss_equals_the_loop(gamma: float, alpha: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(80, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 5, (80,), generator=generator)
    shift = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    classes = torch.tensor([True, False, True, True])
    loss = sigmoid_focal_loss(scores, labels, gamma, alpha, shift=shift, classes=classes)
    assert loss.item() == pytest.approx(focal_loop(scores + shift, labels, gamma, alpha, classes.tolist()), rel=1e-12)
    plain = sigmoid_focal_loss(scores, labels, gamma, alpha)
    assert plain.item() == pytest.approx(focal_loop(scores, labels, gamma, alpha, [True] * 4), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_sigmoid_focal_loss_has_a_finite_gradient_at_the_ends(gamma: float) -> None:
    scores = torch.tensor([[-200.0, 200.0], [200.0, -200.0]], requires_grad=True)
    sigmoid_focal_loss(scores, torch.tensor([0, 2]), gamma).backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_no_object_and_no_region_give_a_finite_loss() -> None:
    scores = torch.randn(3, 2, requires_grad=True)
    assert torch.isfinite(sigmoid_focal_loss(scores, torch.tensor([2, 2, -1])))
    assert sigmoid_focal_loss(scores, torch.full((3,), -1)).item() == 0


def test_the_classes_of_a_batch_are_its_own_and_drawn_ones() -> None:
    counts = torch.tensor([400.0, 100.0, 100.0, 25.0, 0.0, 4.0])
    torch.manual_seed(0)
    labels = torch.tensor([3, 3, 6, -1])
    drawn = torch.stack([federated_classes(labels, counts, 2) for _ in range(4000)])
    assert drawn[:, 3].all(), "a class with an object in the batch is always there"
    assert (drawn.sum(dim=1) == 2).all()
    assert not drawn[:, 4].any(), "a class without training images is not drawn"
    weights = counts.sqrt()
    weights[3] = 0
    expected = weights / weights.sum()
    others = [0, 1, 2, 5]
    assert torch.allclose(drawn.double().mean(dim=0)[others], expected[others].double(), atol=0.03)


def test_all_classes_of_a_batch_count_even_if_they_are_more() -> None:
    chosen = federated_classes(torch.tensor([0, 1, 2, 4]), torch.ones(4), 2)
    assert chosen.tolist() == [True, True, True, False]
    assert federated_classes(torch.tensor([4]), torch.ones(4), 9).all()


def test_a_class_without_images_is_not_drawn_where_few_have_some() -> None:
    assert federated_classes(torch.tensor([3]), torch.tensor([10.0, 0.0, 0.0]), 2).tolist() == [True, False, False]
