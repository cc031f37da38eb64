from __future__ import annotations

import math

import pytest
import torch

from longtail.objectives import ClassPrior, distillation, log_prior, posterior, posterior_cross_entropy


def test_log_prior_is_the_logarithm_of_frequencies() -> None:
    assert log_prior([3, 1]).exp().tolist() == pytest.approx([0.75, 0.25])
    assert log_prior([1, 0])[1] == -math.inf
    prior = ClassPrior([3, 1])
    assert prior.counts.tolist() == [3, 1]
    assert prior.log.exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("counts", [[], [[1, 2]], [0, 0], [1, -1]])
def test_impossible_counts_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="class_counts"):
        log_prior(counts)


def test_posterior_is_bayes_rule() -> None:
    likelihood, prior = torch.tensor([[0.2, 0.6]]).log(), torch.tensor([0.9, 0.1])
    assert posterior(likelihood, prior.log()).exp()[0, 0].item() == pytest.approx(0.18 / 0.24)
    assert posterior(likelihood).exp()[0, 0].item() == pytest.approx(0.25)


def test_cross_entropy_of_the_posterior() -> None:
    scores, labels, prior = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), log_prior([5, 3, 2])
    expected = -posterior(scores, prior)[torch.arange(4), labels].mean()
    assert posterior_cross_entropy(scores, labels, prior).item() == pytest.approx(expected.item(), abs=1e-6)
    plain = -posterior(scores)[torch.arange(4), labels].mean()
    assert posterior_cross_entropy(scores, labels, prior, strength=0.0).item() == pytest.approx(plain.item(), abs=1e-6)


def test_distillation_against_the_definition() -> None:
    student, teacher, t = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True), 4.0
    p, q = (teacher / t).softmax(1), (student / t).softmax(1)
    expected = t**2 * (p * (p / q).log()).sum(1).mean()
    loss = distillation(student, teacher, t)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert teacher.grad is None
    assert distillation(student, student).item() == pytest.approx(0, abs=1e-5)
