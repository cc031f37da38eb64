from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from longtail.losses import (
    ClassPrior,
    GMLLoss,
    LogitAdjustedLoss,
    agreement,
    compute_log_prior,
    distillation,
    posterior,
    posterior_cross_entropy,
)
from longtail.losses.reweighting import focal_loss, weighted_cross_entropy


def test_log_prior_is_the_logarithm_of_frequencies() -> None:
    assert compute_log_prior([3, 1]).exp().tolist() == pytest.approx([0.75, 0.25])
    assert compute_log_prior([1, 0])[1] == -math.inf
    class_prior = ClassPrior([3, 1])
    assert class_prior.class_counts.tolist() == [3, 1]
    assert class_prior.log_prior.exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("counts", [[], [[1, 2]], [0, 0], [1, -1]])
def test_impossible_counts_raise(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="class_counts"):
        compute_log_prior(counts)


def test_posterior_is_bayes_rule() -> None:
    log_likelihood, frequencies = torch.tensor([[0.2, 0.6]]).log(), torch.tensor([0.9, 0.1])
    assert posterior(log_likelihood, frequencies.log()).exp()[0, 0].item() == pytest.approx(0.18 / 0.24)
    assert posterior(log_likelihood).exp()[0, 0].item() == pytest.approx(0.25)


def test_cross_entropy_of_the_posterior() -> None:
    scores, labels, log_prior = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), compute_log_prior([5, 3, 2])
    expected = -posterior(scores, log_prior)[torch.arange(4), labels].mean()
    assert posterior_cross_entropy(scores, labels, log_prior).item() == pytest.approx(expected.item(), abs=1e-6)
    no_prior = posterior_cross_entropy(scores, labels, log_prior, strength=0.0)
    plain = -posterior(scores)[torch.arange(4), labels].mean()
    assert no_prior.item() == pytest.approx(plain.item(), abs=1e-6)


def test_distillation_against_the_definition() -> None:
    student, teacher, t = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True), 4.0
    p, q = (teacher / t).softmax(1), (student / t).softmax(1)
    expected = t**2 * (p * (p / q).log()).sum(1).mean()
    loss = distillation(student, teacher, t)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert teacher.grad is None
    assert distillation(student, student).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("student_too", [False, True])
def test_a_class_that_the_teacher_excludes_has_no_part_in_distillation(student_too: bool) -> None:
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    teacher[:, 2] = -math.inf
    if student_too:
        student[:, 2] = -math.inf
    student.requires_grad_()
    p, q = (teacher[:, :2] / 4).softmax(1), (student / 4).softmax(1)[:, :2]
    loss = distillation(student, teacher, 4.0)
    assert loss.item() == pytest.approx(16 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    loss.backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("views", [2, 3])
def test_agreement_against_the_definition(views: int) -> None:
    torch.manual_seed(0)
    scores = (3 * torch.randn(views, 4, 5, dtype=torch.float64)).requires_grad_()
    log_prior, mask = compute_log_prior([50, 30, 15, 5, 0]).double(), torch.tensor([True, True, False, True])
    expected = []
    for image in (0, 1, 3):
        posteriors = []
        for view in range(views):
            joint = [math.exp(scores[view, image, c].item() + log_prior[c].item()) for c in range(4)]
            posteriors.append([value / sum(joint) for value in joint])
        mean = [sum(column) / views for column in zip(*posteriors, strict=True)]
        terms = [p * math.log(p / m) for row in posteriors for p, m in zip(row, mean, strict=True)]
        expected.append(sum(terms) / views)
    loss = agreement(scores, log_prior, mask)
    assert loss.item() == pytest.approx(sum(expected) / 3, abs=1e-12)
    loss.backward()
    assert scores.grad is not None
    assert bool(scores.grad.isfinite().all())
    assert scores.grad[:, 2].abs().max() == scores.grad[:, :, 4].abs().max() == 0
    assert torch.autograd.gradcheck(lambda s: agreement(s, log_prior, mask), scores)


def test_the_bounds_of_agreement() -> None:
    scores = torch.randn(1, 4, 5, dtype=torch.float64)
    assert agreement(scores.repeat(3, 1, 1)).item() == pytest.approx(0, abs=1e-12)
    apart = torch.tensor([[[90.0, -90.0]], [[-90.0, 90.0]]])
    assert agreement(apart).item() == pytest.approx(math.log(2))
    maps = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    rows = maps.permute(0, 1, 3, 4, 2).reshape(2, -1, 4)
    assert agreement(maps).item() == pytest.approx(agreement(rows).item(), abs=1e-12)


def test_scores_of_pixels_equal_those_of_samples() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randint(-1, 4, (2, 5, 6))
    log_prior = compute_log_prior([50, 30, 15, 5]).double()
    rows, labelled = scores.permute(0, 2, 3, 1).reshape(-1, 4), labels.flatten() >= 0
    expected = posterior_cross_entropy(rows[labelled], labels.flatten()[labelled], log_prior)
    assert posterior_cross_entropy(scores, labels, log_prior).item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.allclose(posterior(scores, log_prior).permute(0, 2, 3, 1).reshape(-1, 4), posterior(rows, log_prior))
    teacher = torch.randn_like(scores)
    expected = distillation(rows[labelled], teacher.permute(0, 2, 3, 1).reshape(-1, 4)[labelled])
    assert distillation(scores, teacher, mask=labels >= 0).item() == pytest.approx(expected.item(), abs=1e-12)
    weights = torch.rand(4, dtype=torch.float64)
    flat = (rows[labelled], labels.flatten()[labelled])
    assert weighted_cross_entropy(scores, labels, weights).item() == pytest.approx(
        weighted_cross_entropy(*flat, weights).item(), abs=1e-12
    )
    assert focal_loss(scores, labels, 1.5).item() == pytest.approx(focal_loss(*flat, 1.5).item(), abs=1e-12)


@pytest.mark.parametrize("kind", [LogitAdjustedLoss, ClassPrior, GMLLoss])
def test_weight_averages_with_buffers_stay_finite(kind: type[torch.nn.Module]) -> None:
    module = kind([3, 1, 0])
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(50):
        averaged.update_parameters(module)
    inner: Any = averaged.module
    inner = inner.class_prior if kind is GMLLoss else inner
    assert all(bool(buffer.isfinite().all()) for buffer in inner.buffers())
    assert inner.log_prior.tolist() == pytest.approx([math.log(0.75), math.log(0.25), -math.inf])
    assert inner.half().log_prior[2] == -math.inf
    if kind is LogitAdjustedLoss:
        scores, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        assert averaged(scores, labels).item() == pytest.approx(module(scores, labels).item(), rel=1e-3)


def test_a_prior_of_an_earlier_version_is_loaded() -> None:
    before = {"log_prior": compute_log_prior([3, 1, 0]), "class_counts": torch.tensor([3, 1, 0])}
    prior = ClassPrior([1, 1, 1])
    torch.nn.ModuleDict({"prior": prior}).load_state_dict({f"prior.{name}": tensor for name, tensor in before.items()})
    assert torch.equal(prior.log_prior, before["log_prior"])
    assert torch.equal(prior.class_counts, before["class_counts"])
    assert bool(prior.finite_log_prior.isfinite().all())


def test_unlabelled_pixels_have_no_gradient() -> None:
    scores = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[0, 2:] = -1
    for loss in (posterior_cross_entropy, focal_loss):
        (gradient,) = torch.autograd.grad(loss(scores, labels), scores)
        assert bool(gradient[0, :, :2].any())
        assert not bool(gradient[0, :, 2:].any())
    assert posterior_cross_entropy(scores, torch.full_like(labels, -1)).item() == 0
