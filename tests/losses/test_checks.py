"""Labels out of range, ignored samples, classes without training images, and every kind of counts, for every loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.losses import (
    AsymmetricLoss,
    ClassBalancedLoss,
    ClassPrior,
    FocalLoss,
    GMLLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    ScoreLoss,
    SeesawLoss,
    class_log_likelihood,
    compute_log_prior,
    gml_loss,
    posterior_cross_entropy,
)
from longtail.losses.contrastive import balanced_contrastive_loss, parametric_contrastive_loss, supcon_loss
from longtail.losses.margin import ldam_margins, with_margin
from longtail.losses.reweighting import (
    compute_class_weights,
    effective_number_weights,
    focal_loss,
    weighted_cross_entropy,
)
from longtail.losses.von_mises_fisher import vmf_scores
from longtail.memory import ClassQueues

COUNTS = [60, 0, 25, 15]
"""Class 1 has no training image."""
LOG_PRIOR = compute_log_prior(COUNTS).double()
G = torch.Generator().manual_seed(0)
B, K, C, D = 12, 20, len(COUNTS), 8
SCORES = torch.randn(B, C, generator=G, dtype=torch.float64)
QUERIES, KEYS = (F.normalize(torch.randn(n, D, generator=G, dtype=torch.float64), dim=1) for n in (B, K))
KEY_LABELS = torch.tensor([0, 2, 3, -1]).repeat(5)
LABELS = torch.tensor([0, 2, 3]).repeat(4)

Loss = Callable[[Tensor], Tensor]


def scored(loss: Callable[..., Tensor], *values: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss of rows and labels from one of scores and labels."""
    return lambda rows, labels: loss(SCORES[rows], labels, *values)


def ldam(rows: Tensor, labels: Tensor) -> Tensor:
    margins, weights = ldam_margins(COUNTS), effective_number_weights(COUNTS)
    return weighted_cross_entropy(with_margin(SCORES[rows], labels, margins, 10.0), labels, weights)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "posterior_cross_entropy": scored(posterior_cross_entropy, LOG_PRIOR),
    "half the prior": scored(posterior_cross_entropy, LOG_PRIOR, 0.5),
    "none of the prior": scored(posterior_cross_entropy, LOG_PRIOR, 0.0),
    "cross_entropy": scored(posterior_cross_entropy),
    "focal": scored(focal_loss),
    "class balanced": scored(weighted_cross_entropy, effective_number_weights(COUNTS)),
    "ldam": ldam,
    "gml": lambda rows, labels: gml_loss(QUERIES[rows], labels, KEYS, KEY_LABELS, LOG_PRIOR, 0.3),
    "gml unchecked": lambda rows, labels: gml_loss(
        QUERIES[rows], labels, KEYS, KEY_LABELS, LOG_PRIOR, 0.3, validate=False
    ),
    "GMLLoss": lambda rows, labels: GMLLoss(COUNTS).double()(QUERIES[rows], labels, KEYS, KEY_LABELS),
    "supcon": lambda rows, labels: supcon_loss(QUERIES[rows], labels, KEYS, KEY_LABELS),
    "balanced": lambda rows, labels: balanced_contrastive_loss(QUERIES[rows], labels, KEYS, KEY_LABELS, C),
    "parametric": lambda rows, labels: parametric_contrastive_loss(
        SCORES[rows] + LOG_PRIOR, QUERIES[rows], labels, KEYS, KEY_LABELS
    ),
    "proco": lambda rows, labels: posterior_cross_entropy(
        vmf_scores(QUERIES[rows], F.normalize(torch.ones(C, D).double()) / 2), labels, LOG_PRIOR
    ),
}
ALL = torch.arange(B)
WITHOUT_CLASSES, WITHOUT_COUNTS = {"supcon"}, {"supcon", "cross_entropy", "focal", "balanced"}
"""Losses that do not know C, and those that know nothing of the training set."""


@pytest.mark.parametrize("name", sorted(set(LOSSES) - WITHOUT_CLASSES))
@pytest.mark.parametrize("wrong", [C, 255, -2, -100])
def test_a_label_out_of_range_is_named(name: str, wrong: int) -> None:
    labels = LABELS.clone()
    labels[3] = wrong
    with pytest.raises(ValueError, match=rf"^labels: expected values in \[0, {C}\), or −1 to ignore it, got .*{wrong}"):
        LOSSES[name](ALL, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_where_labels_are_not_known_samples_out_of_range_are_left_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator; the same code runs here when it is told that values cannot be read."""
    if name in {"gml", "GMLLoss"}:
        pytest.skip("checked on every device unless validate is False")
    kept = LOSSES[name](ALL[3:], LABELS[3:])
    monkeypatch.setattr("longtail.losses.checks.values_are_known", lambda _: False)
    for wrong in (C, 2**40, -2):
        labels = torch.cat([torch.full((3,), wrong), LABELS[3:]])
        assert LOSSES[name](ALL, labels).item() == pytest.approx(kept.item(), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_an_ignored_sample_is_left_out_of_the_mean(name: str) -> None:
    labels = LABELS.clone()
    labels[:5] = -1
    assert LOSSES[name](ALL, labels).item() == pytest.approx(LOSSES[name](ALL[5:], LABELS[5:]).item(), rel=1e-12)
    assert LOSSES[name](ALL, torch.full_like(LABELS, -1)).item() == 0


@pytest.mark.parametrize("name", sorted(set(LOSSES) - WITHOUT_COUNTS))
def test_a_sample_of_a_class_without_training_images_is_left_out_of_the_mean(name: str) -> None:
    labels = LABELS.clone()
    labels[:5] = 1
    assert LOSSES[name](ALL, labels).item() == pytest.approx(LOSSES[name](ALL[5:], LABELS[5:]).item(), rel=1e-12)
    assert LOSSES[name](ALL, torch.ones_like(LABELS)).item() == 0


def test_the_gradient_of_an_absent_class_is_zero() -> None:
    scores, labels = SCORES.clone().requires_grad_(), LABELS.clone()
    labels[:5] = 1
    for strength in (1.0, 0.0):
        (gradient,) = torch.autograd.grad(posterior_cross_entropy(scores, labels, LOG_PRIOR, strength), scores)
        assert bool(gradient.isfinite().all())
        assert not bool(gradient[:, 1].any())
        assert not bool(gradient[:5].any())
    (gradient,) = torch.autograd.grad(
        parametric_contrastive_loss(scores + LOG_PRIOR, QUERIES, labels, KEYS, KEY_LABELS), scores
    )
    assert bool(gradient.isfinite().all())
    assert not bool(gradient[:5].any())


def test_the_labels_of_keys_are_checked_too() -> None:
    keys = KEY_LABELS.clone()
    keys[0] = C
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: balanced_contrastive_loss(QUERIES, LABELS, KEYS, keys, C),
        lambda: parametric_contrastive_loss(SCORES, QUERIES, LABELS, KEYS, keys),
        lambda: gml_loss(QUERIES, LABELS, KEYS, keys, LOG_PRIOR, 0.3, validate=False),
        lambda: class_log_likelihood(QUERIES, KEYS, keys, C, 0.3),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"^key_labels: expected values in \[0, {C}\)"):
            call()


def test_labels_of_another_type_are_named() -> None:
    for loss in (posterior_cross_entropy, focal_loss):
        with pytest.raises(ValueError, match=r"^labels: expected int64, got torch.int32; use labels.long\(\)$"):
            loss(SCORES, LABELS.int())


def test_labels_of_an_accelerator_are_not_read() -> None:
    """A tensor on the meta device has no values: reading one would raise."""
    scores, labels, queries = SCORES.to("meta"), LABELS.to("meta"), QUERIES.to("meta")
    keys, key_labels, prior = KEYS.to("meta"), KEY_LABELS.to("meta"), LOG_PRIOR.to("meta")
    weights = torch.ones(C, device="meta")
    for loss in (
        posterior_cross_entropy(scores, labels, prior),
        focal_loss(scores, labels),
        weighted_cross_entropy(with_margin(scores, labels, weights, 3.0), labels, weights),
        balanced_contrastive_loss(queries, labels, keys, key_labels, C),
        parametric_contrastive_loss(scores, queries, labels, keys, key_labels),
    ):
        assert loss.shape == ()


TAKERS: dict[str, Callable[[Any], Tensor]] = {
    "compute_log_prior": compute_log_prior,
    "ClassPrior": lambda counts: ClassPrior(counts).log_prior,
    "GMLLoss": lambda counts: GMLLoss(counts).class_prior.log_prior,
    "ldam_margins": ldam_margins,
    "effective_number_weights": effective_number_weights,
}


@pytest.mark.parametrize("name", TAKERS)
def test_all_take_the_same_kinds_of_counts(name: str) -> None:
    take, counts = TAKERS[name], [70_000, 5, 0]
    expected = take(torch.tensor(counts))
    assert bool(expected[:2].isfinite().all())
    kinds = (counts, tuple(counts), np.array(counts), np.array(counts, np.uint32), np.array(counts, float))
    for kind in (*kinds, torch.tensor(counts, dtype=torch.int32), torch.tensor(counts).double()):
        assert torch.equal(take(kind), expected)
    for wrong, message in (
        ([5, -1], "got -1 for class 1"),
        ([math.nan, 5], "got nan for class 0"),
        ([5, math.inf], "got inf for class 1"),
        ([0, 0], "all are 0"),
        ([], "expected shape"),
        ([[1, 2]], "expected shape"),
        ({2: 50, 0: 10, 1: 3}, "in order, got a mapping"),
        (None, "a list of one count for each class, got None"),
        (5, "a list of one count for each class, got 5"),
        ("12", "a list of one count for each class, got '12'"),
        (np.array(5), "got the single number 5"),
        (["1", "2"], "a number for each class, got '1' for class 0"),
        ([1, None], "a number for each class, got None for class 1"),
        ([[1], [2, 3]], "numbers, got .*"),
        (iter(()), "got a used-up tuple_iterator; give a list"),
    ):
        with pytest.raises(ValueError, match=f"^class_counts: .*{message}"):
            take(wrong)


class OnMPS(Tensor):
    """Stands for a tensor on MPS."""

    device = torch.device("mps")

    def cpu(self, *_: Any) -> Tensor:
        return self.as_subclass(Tensor)

    def double(self) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")


@pytest.mark.parametrize(
    "take",
    [
        compute_log_prior,
        lambda counts: ClassPrior(counts).finite_log_prior,
        lambda counts: ClassPrior(counts).class_counts,
        effective_number_weights,
        lambda counts: compute_class_weights("root", counts),
        lambda counts: compute_class_weights({1: 2.0}, counts),
        lambda counts: compute_class_weights(counts),
        ldam_margins,
        lambda counts: LDAMLoss(counts).margins,
        lambda counts: LDAMLoss(counts, class_weights="auto").weights,
        lambda counts: SeesawLoss(counts).class_counts,
    ],
)
def test_counts_on_a_device_without_float64(take: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def move(tensor: Tensor, *target: Any) -> Tensor:
        if target != (torch.device("mps"),):
            return original(tensor, *target)
        assert tensor.dtype != torch.float64
        return tensor.as_subclass(OnMPS)

    counts, original = torch.tensor([70_000, 5, 0]), Tensor.to
    expected = take(counts)
    monkeypatch.setattr(Tensor, "to", move)
    taken = take(counts.as_subclass(OnMPS))
    assert isinstance(taken, OnMPS)
    assert torch.equal(taken.cpu(), expected)


def test_counts_are_whole_and_frequencies_are_not() -> None:
    assert compute_log_prior([0.75, 0.25]).exp().tolist() == [0.75, 0.25]
    with pytest.raises(
        ValueError, match=r"^class_counts: expected whole numbers; for frequencies use compute_log_prior"
    ):
        ClassPrior([0.75, 0.25])


def test_a_series_is_read_by_its_index() -> None:
    pandas = pytest.importorskip("pandas")
    labels = pandas.Series([1] * 90 + [0] * 9 + [2])
    in_order = compute_log_prior([9, 90, 1])
    assert torch.equal(compute_log_prior(labels.value_counts()), in_order)
    assert ClassQueues(labels.value_counts(), 100).class_counts == [9, 90, 1]
    for wrong in (pandas.Series([5, 3], index=["cat", "dog"]), pandas.Series([5, 3], index=[1, 2])):
        for use in (compute_log_prior, ClassQueues):
            with pytest.raises(ValueError, match=r"a series whose index.*0 to 1, got the index.*give a list"):
                use(wrong)
    for use in (compute_log_prior, ClassQueues):
        with pytest.raises(ValueError, match=r"^class_counts: .* got a DataFrame; give one of its columns"):
            use(pandas.DataFrame({"n": [5, 3]}))


SCORE_LOSSES: dict[str, ScoreLoss] = {
    "logit adjusted": LogitAdjustedLoss(COUNTS),
    "focal": FocalLoss(2.0, "inverse", COUNTS),
    "class balanced": ClassBalancedLoss(COUNTS),
    "ldam": LDAMLoss(COUNTS, class_weights="auto"),
    "asymmetric": AsymmetricLoss(),
    "seesaw": SeesawLoss(COUNTS),
}


@pytest.mark.parametrize("name", SCORE_LOSSES)
def test_gradients_of_each_sample_by_vmap(name: str) -> None:
    loss, scores, labels = SCORE_LOSSES[name], SCORES.float(), LABELS.clone()
    labels[:2] = torch.tensor([-1, 1])  # ignored, and of a class without images
    per_sample = torch.func.vmap(torch.func.grad(lambda row, label: loss(row[None], label[None])))(scores, labels)
    for row, label, gradient in zip(scores, labels, per_sample, strict=True):
        row = row[None].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(row, label[None]), row)
        assert torch.allclose(gradient, expected[0], atol=1e-6)


def test_the_closed_form_of_few_dimensions_raises() -> None:
    with pytest.raises(ValueError, match="queries: expected at least 8 columns, got 4"):
        vmf_scores(torch.ones(2, 4), torch.ones(3, 4))
