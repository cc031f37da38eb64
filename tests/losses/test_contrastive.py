"""Contrastive losses against loops in float64 and identities from their papers.

Legend: B queries, K keys, C classes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import ive
from torch import Tensor

from longtail.losses import class_log_likelihood, posterior_cross_entropy
from longtail.losses.contrastive import balanced_contrastive_loss, parametric_contrastive_loss, supcon_loss
from longtail.losses.von_mises_fisher import MAX_CONCENTRATION, concentration, log_bessel_ratio, vmf_scores

B, C, D, TAU = 7, 4, 16, 0.2
G = torch.Generator().manual_seed(0)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=G, dtype=torch.float64), dim=-1)


Z = unit(B, D)
LABELS = torch.tensor([0, 1, 1, 2, 0, 0, 3])  # class 3 has a single sample, so no positive
OTHERS, OTHER_LABELS = unit(6, D), torch.tensor([0, 0, 2, -1, 1, -1])
SCORES = torch.randn(B, C, generator=G, dtype=torch.float64)
KEYS, KEY_LABELS = torch.cat([Z, OTHERS]), torch.cat([LABELS, OTHER_LABELS])
SELF_MASK = torch.eye(B, B + 6, dtype=torch.bool)


def compared(i: int) -> list[tuple[float, int]]:
    """Return exp(s) and label of every key that query i is compared with."""
    pairs = []
    for j in range(len(KEYS)):
        if j != i and KEY_LABELS[j] >= 0:
            pairs.append((math.exp(float(Z[i] @ KEYS[j]) / TAU), int(KEY_LABELS[j])))
    return pairs


def test_supcon() -> None:
    losses = []
    for i in range(B):
        keys = compared(i)
        positives = [e for e, label in keys if label == LABELS[i]]
        if positives:
            total = sum(e for e, _ in keys)
            losses.append(-sum(math.log(e / total) for e in positives) / len(positives))
    assert len(losses) == B - 1
    got = supcon_loss(Z, LABELS, KEYS, KEY_LABELS, TAU, SELF_MASK)
    assert got.item() == pytest.approx(sum(losses) / len(losses), rel=1e-10)


def test_supcon_of_one_positive_is_info_nce() -> None:
    labels = torch.arange(3)
    loss = supcon_loss(Z[:3], labels, OTHERS[:3], labels, TAU)
    assert loss.item() == pytest.approx(F.cross_entropy(Z[:3] @ OTHERS[:3].t() / TAU, labels).item(), rel=1e-10)


@pytest.mark.parametrize("loss", ["supcon", "balanced"])
def test_a_batch_without_positives_is_zero_with_zero_gradients(loss: str) -> None:
    z = Z[:4].clone().requires_grad_()
    labels, self_mask = torch.arange(4), torch.eye(4, dtype=torch.bool)
    if loss == "supcon":
        got = supcon_loss(z, labels, z, labels, TAU, self_mask)
    else:
        got = balanced_contrastive_loss(z, labels, z, labels, 4, TAU, self_mask)
    got.backward()
    assert got.item() == 0
    assert z.grad is not None
    assert z.grad.abs().max() == 0


def test_balanced() -> None:
    centres = unit(C, D)
    keys, labels = torch.cat([KEYS, centres]), torch.cat([KEY_LABELS, torch.arange(C)])
    losses = []
    for i in range(B):
        by_class: dict[int, list[float]] = {c: [] for c in range(C)}
        for j in range(len(keys)):
            if j != i and labels[j] >= 0:
                by_class[int(labels[j])].append(math.exp(float(Z[i] @ keys[j]) / TAU))
        denominator = sum(sum(v) / len(v) for v in by_class.values())
        positives = by_class[int(LABELS[i])]
        losses.append(-sum(math.log(e / denominator) for e in positives) / len(positives))
    self_mask = torch.eye(B, len(keys), dtype=torch.bool)
    got = balanced_contrastive_loss(Z, LABELS, keys, labels, C, TAU, self_mask)
    assert got.item() == pytest.approx(sum(losses) / B, rel=1e-10)


def test_balanced_with_one_key_a_class_is_the_mixtures_posterior_under_the_uniform_prior() -> None:
    centres, classes = unit(C, D), torch.arange(C)
    likelihood = class_log_likelihood(Z, centres, classes, C, TAU)
    got = balanced_contrastive_loss(Z, LABELS, centres, classes, C, TAU)
    assert got.item() == pytest.approx(posterior_cross_entropy(likelihood, LABELS).item(), rel=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 1.0])
def test_parametric(alpha: float) -> None:
    losses = []
    for i in range(B):
        keys = compared(i)
        centres = [math.exp(s) for s in SCORES[i].tolist()]
        total = sum(centres) + sum(e for e, _ in keys)
        positives = [e for e, label in keys if label == LABELS[i]]
        weighted = math.log(centres[int(LABELS[i])] / total) + alpha * sum(math.log(e / total) for e in positives)
        losses.append(-weighted / (1 + alpha * len(positives)))
    got = parametric_contrastive_loss(SCORES, Z, LABELS, KEYS, KEY_LABELS, TAU, alpha, SELF_MASK)
    assert got.item() == pytest.approx(sum(losses) / B, rel=1e-10)


def test_parametric_without_keys_is_cross_entropy() -> None:
    got = parametric_contrastive_loss(SCORES, Z, LABELS, OTHERS, torch.full((6,), -1), TAU)
    assert got.item() == pytest.approx(F.cross_entropy(SCORES, LABELS).item(), rel=1e-10)


def test_gradients() -> None:
    centres = unit(C, D)
    self_mask, classes = torch.eye(B, B + C, dtype=torch.bool), torch.cat([LABELS, torch.arange(C)])
    z, s = Z.clone().requires_grad_(), SCORES.clone().requires_grad_()
    c = centres.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, c: balanced_contrastive_loss(z, LABELS, torch.cat([z, c]), classes, C, TAU, self_mask), (z, c)
    )
    assert torch.autograd.gradcheck(
        lambda z, c: supcon_loss(z, LABELS, torch.cat([z, c]), classes, TAU, self_mask), (z, c)
    )
    assert torch.autograd.gradcheck(
        lambda s, z: parametric_contrastive_loss(s, z, LABELS, KEYS.detach(), KEY_LABELS, TAU, 0.05, SELF_MASK), (s, z)
    )
    mean = 0.6 * unit(C, D)
    assert torch.autograd.gradcheck(lambda z: vmf_scores(z, mean, TAU), (z,))


@pytest.mark.parametrize(("dim", "tolerance"), [(8, 1e-4), (16, 3e-6), (32, 1e-7), (64, 1e-9), (128, 1e-10)])
def test_the_bessel_function(dim: int, tolerance: float) -> None:
    order = dim / 2 - 1
    x = np.concatenate([np.geomspace(1e-1, 1e5, 200)])
    with np.errstate(divide="ignore"):
        exact = np.log(ive(order, x)) + x - order * np.log(x)
    finite = np.isfinite(exact)  # scipy's function underflows at large orders and small arguments
    got = log_bessel_ratio(torch.from_numpy(x), order).numpy()
    assert finite.sum() > 100
    assert np.abs(got - exact)[finite].max() < tolerance * (1 + np.abs(exact)[finite].max() * 1e-6)


def test_the_bessel_ratio_at_zero() -> None:
    # I_ν(x)/x^ν → 1 / (2^ν Γ(ν + 1))
    for order in (15.0, 63.0):
        expected = -order * math.log(2) - math.lgamma(order + 1)
        got = log_bessel_ratio(torch.zeros((), dtype=torch.float64), order).item()
        assert got == pytest.approx(expected, abs=1e-7)


def test_the_closed_form_is_the_limit_of_many_keys() -> None:
    """ProCo's score is the mixture's likelihood as the keys of a class become infinitely many."""
    generator = torch.Generator().manual_seed(1)
    dim, tau = 8, 0.5
    # tangent-normal sampling of a von Mises–Fisher by weights: uniform keys, weighted by its density
    mean = torch.zeros(1, dim, dtype=torch.float64)
    mean[0, 0] = 0.5
    kappa = concentration(mean)
    uniform = F.normalize(torch.randn(400_000, dim, generator=generator, dtype=torch.float64))
    weights = torch.softmax(uniform @ F.normalize(mean)[0] * kappa, dim=0)
    z = F.normalize(torch.randn(5, dim, generator=generator, dtype=torch.float64))
    expected = ((z @ uniform.t() / tau).exp() @ weights).log()
    got = vmf_scores(z, mean, tau)[:, 0]
    # κ is an approximation of the maximum-likelihood one, which shifts nothing here: the same κ is on both sides
    assert torch.allclose(got, expected, atol=0.02)


def test_a_class_without_samples_is_uniform_and_one_with_a_single_sample_is_finite() -> None:
    mean = torch.stack([torch.zeros(D), F.normalize(torch.ones(D), dim=0)])
    z = Z.float().requires_grad_()
    scores = vmf_scores(z, mean, 0.1)
    assert concentration(mean).tolist() == [0, MAX_CONCENTRATION]
    assert torch.allclose(scores[:, 0], scores[0, 0].expand(B), atol=1e-5)
    scores.sum().backward()
    assert z.grad is not None
    assert bool(torch.isfinite(z.grad).all())
    # for a class at one point exp(z·μ/τ), except for the upper bound of κ
    assert torch.allclose(scores[:, 1].detach(), (Z.float() @ mean[1]) / 0.1, atol=1e-2)
