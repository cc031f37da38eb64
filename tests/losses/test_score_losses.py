"""The modules of scores and labels: one contract for all, against loops in float64 and identities from their papers.

Legend: B samples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtail.losses import (
    AsymmetricLoss,
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    ScoreLoss,
    focal_loss,
    ldam_margins,
    posterior_cross_entropy,
    weighted_cross_entropy,
)
from longtail.losses.margin import with_margin
from tests.losses.host import TensorsOfTheHost

COUNTS = [60, 0, 25, 15]
"""Class 1 has no training image."""
B, C = 24, len(COUNTS)
G = torch.Generator().manual_seed(0)
SCORES = 2 * torch.randn(B, C, generator=G, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, -1, 0, 2, 3]).repeat(3)
SOFT = torch.rand(B, C, generator=G, dtype=torch.float64) * (torch.rand(B, C, generator=G) < 0.7)
SOFT = F.normalize(SOFT, p=1, dim=1)
SOFT[3] = 0
REDUCTIONS = ("mean", "sum", "none")

Make = Callable[..., ScoreLoss]
LOSSES: dict[str, Make] = {
    "logit_adjusted": lambda counts, **options: LogitAdjustedLoss(counts, 0.7, **options),
    "focal": lambda counts, **options: FocalLoss(1.5, "auto", counts, beta=0.9, **options),
    "class_balanced": lambda counts, **options: ClassBalancedLoss(counts, "inverse", **options),
    "ldam": lambda counts, **options: LDAMLoss(counts, 0.4, 10.0, "root", **options),
    "asymmetric": lambda counts, **options: AsymmetricLoss(3.0, 0.5, 0.05, "root", counts, **options),
}
SOFTMAX = sorted(set(LOSSES) - {"asymmetric"})
WITH_SOFT = sorted(set(LOSSES) - {"ldam"})


def log_softmax(row: list[float], label: int) -> float:
    return row[label] - math.log(sum(math.exp(score) for score in row))


def scaled(raw: list[float]) -> list[float]:
    return [weight * len(raw) / sum(raw) for weight in raw]


def loop_logit_adjusted(row: list[float], label: int) -> float:
    parts = [math.pow(n, 0.7) * math.exp(s) for n, s in zip(COUNTS, row, strict=True)]
    return -math.log(parts[label] / sum(parts))


def loop_focal(row: list[float], label: int) -> float:
    weights = scaled([0.1 / (1 - 0.9**n) if n else 0 for n in COUNTS])
    log_p = log_softmax(row, label)
    return -weights[label] * math.pow(1 - math.exp(log_p), 1.5) * log_p


def loop_class_balanced(row: list[float], label: int) -> float:
    return -scaled([1 / n if n else 0 for n in COUNTS])[label] * log_softmax(row, label)


def loop_ldam(row: list[float], label: int) -> float:
    mean = sum(n**0.5 for n in COUNTS) / sum(COUNTS)  # of n^(−½), over the images
    weights = [n**-0.5 / mean if n else 0 for n in COUNTS]
    margin = 0.4 * (15 / COUNTS[label]) ** 0.25
    return -weights[label] * log_softmax([s - 10 * margin * (c == label) for c, s in enumerate(row)], label)


LOOPS: dict[str, Callable[[list[float], int], float]] = {
    "logit_adjusted": loop_logit_adjusted,
    "focal": loop_focal,
    "class_balanced": loop_class_balanced,
    "ldam": loop_ldam,
}


def loop(name: str, probabilities: list[list[float]]) -> tuple[list[float], float]:
    """Return the losses of the samples, and how many samples count, as a sum of the probabilities that do."""
    losses, counted = [], 0.0
    for row, label in zip(SCORES.tolist(), probabilities, strict=True):
        present = [c for c in range(C) if label[c] > 0 and COUNTS[c] > 0]
        losses.append(sum(label[c] * LOOPS[name](row, c) for c in present))
        counted += sum(label[c] for c in present)
    return losses, counted


def check(name: str, labels: Tensor, losses: list[float], counted: float) -> None:
    """Compare with the results of a loop, in every reduction."""
    mean, total, each = (LOSSES[name](COUNTS, reduction=reduction)(SCORES, labels) for reduction in REDUCTIONS)
    assert each.tolist() == pytest.approx(losses, rel=1e-6)
    assert total.item() == pytest.approx(sum(losses), rel=1e-6)
    assert mean.item() == pytest.approx(sum(losses) / counted, rel=1e-6)


@pytest.mark.parametrize("name", SOFTMAX)
def test_class_indices_against_a_loop(name: str) -> None:
    one_hot = [[float(c == label) for c in range(C)] for label in LABELS.tolist()]
    losses, counted = loop(name, one_hot)
    assert counted == 18
    assert losses.count(0) == 6
    check(name, LABELS, losses, counted)


@pytest.mark.parametrize("name", sorted(set(SOFTMAX) & set(WITH_SOFT)))
def test_probabilities_against_a_loop(name: str) -> None:
    losses, counted = loop(name, SOFT.tolist())
    assert 10 < counted < B - 2  # some of the probability is on the class without images
    assert losses[3] == 0
    check(name, SOFT, losses, counted)


def loop_asymmetric(labels: list[list[float]]) -> tuple[list[float], float]:
    weights = scaled([n**-0.5 if n else 0 for n in COUNTS])
    losses, counted = [], 0
    for row, label in zip(SCORES.tolist(), labels, strict=True):
        loss = 0.0
        for score, weight, y in zip(row, weights, label, strict=True):
            p = 1 / (1 + math.exp(-score))
            shifted = max(p - 0.05, 0)
            if y >= 0:
                loss -= weight * y * (1 - p) ** 0.5 * math.log(p)
                loss -= weight * (1 - y) * shifted**3 * math.log(1 - shifted)
        losses.append(loss)
        counted += any(y >= 0 for y in label)
    return losses, counted


def test_asymmetric_against_a_loop() -> None:
    one_hot = [[-1.0] * C if label < 0 else [float(c == label) for c in range(C)] for label in LABELS.tolist()]
    losses, counted = loop_asymmetric(one_hot)
    assert counted == B - 3
    check("asymmetric", LABELS, losses, counted)
    # several classes in one image, classes of which nothing is known, and labels between
    several = torch.randint(-1, 2, (B, C), generator=G)
    several[5] = -1
    losses, counted = loop_asymmetric(several.tolist())
    assert counted < B
    check("asymmetric", several, losses, counted)
    check("asymmetric", several.double(), losses, counted)
    check("asymmetric", SOFT, *loop_asymmetric(SOFT.tolist()))
    bools = several == 1
    check("asymmetric", bools, *loop_asymmetric(bools.double().tolist()))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 4.0])
def test_negatives_below_the_clip_have_no_loss(gamma: float) -> None:
    scores = torch.tensor([[-4.0, -50.0, 1e-3]], dtype=torch.float64, requires_grad=True)
    loss = AsymmetricLoss(gamma, 0.0, 0.05, reduction="none")(scores, torch.zeros(1, 3))
    (gradient,) = torch.autograd.grad(loss, scores)
    q = 1 / (1 + math.exp(-1e-3)) - 0.05
    assert loss.item() == pytest.approx(-math.pow(q, gamma) * math.log(1 - q), rel=1e-9)
    assert gradient[0, :2].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert gradient[0, 2].item() > 0.02


@pytest.mark.parametrize("name", LOSSES)
def test_pixels_are_samples(name: str) -> None:
    scores = torch.randn(2, C, 5, 6, generator=G, dtype=torch.float64)
    labels = torch.randint(-1, C, (2, 5, 6), generator=G)
    rows = scores.permute(0, 2, 3, 1).reshape(-1, C)
    for reduction in REDUCTIONS:
        loss = LOSSES[name](COUNTS, reduction=reduction)
        got, expected = loss(scores, labels), loss(rows, labels.flatten())
        assert got.shape == (labels.shape if reduction == "none" else ())
        assert torch.allclose(got.flatten(), expected.flatten(), rtol=1e-10)
        if name in WITH_SOFT:
            soft = torch.randn(2, C, 5, 6, generator=G, dtype=torch.float64).softmax(dim=1)
            got, expected = loss(scores, soft), loss(rows, soft.permute(0, 2, 3, 1).reshape(-1, C))
            assert torch.allclose(got.flatten(), expected.flatten(), rtol=1e-10)


def one_hot(labels: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return (B, C, …) labels with a row of zeros where a label is −1."""
    rows = F.one_hot(labels.clamp(min=0), C) * (labels >= 0)[..., None]
    return rows.movedim(-1, 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WITH_SOFT)
def test_one_hot_probabilities_equal_class_indices(name: str, dtype: torch.dtype) -> None:
    pixels = torch.randint(-1, C, (2, 5, 6), generator=G)
    for labels, scores in ((LABELS, SCORES), (pixels, torch.randn(2, C, 5, 6, generator=G))):
        for reduction in REDUCTIONS:
            loss, leaf = LOSSES[name](COUNTS, reduction=reduction), scores.to(dtype, copy=True).requires_grad_()
            soft = one_hot(labels, dtype)
            if name == "asymmetric":  # where a row of zeros is an image without any of the classes
                soft.masked_fill_((labels < 0).unsqueeze(1), -1)
            expected, got = loss(leaf, labels), loss(leaf, soft)
            assert torch.allclose(expected, got, rtol=1e-5 if dtype != torch.float64 else 1e-12)
            expected, got = (torch.autograd.grad(value.sum(), leaf)[0] for value in (expected, got))
            assert bool(expected.isfinite().all())
            assert torch.allclose(expected, got, rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_SOFT)
def test_the_loss_of_mixed_labels_is_the_mixed_loss(name: str) -> None:
    """Mixup: λ · loss(a) + (1 − λ) · loss(b)."""
    loss = LOSSES[name]([60, 30, 25, 15], reduction="none")
    a, b = torch.randint(0, C, (2, B), generator=G)
    mixed = loss(SCORES, 0.3 * one_hot(a) + 0.7 * one_hot(b))
    assert torch.allclose(mixed, 0.3 * loss(SCORES, a) + 0.7 * loss(SCORES, b), rtol=1e-10)


def test_the_margin_of_a_mixed_label_has_no_meaning() -> None:
    loss, scores = LDAMLoss(COUNTS), SCORES.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"^labels: expected int64 class indices, got probabilities, .*for mixup"):
        loss(scores, SOFT)
    # what the message proposes
    a, b = torch.tensor([0, 2, 3] * 8), torch.tensor([2, 2, 0] * 8)
    (0.3 * loss(scores, a) + 0.7 * loss(scores, b)).backward()
    assert scores.grad is not None
    assert bool(scores.grad.isfinite().all())


def test_deferred_weights_of_ldam_leave_the_size_of_the_gradient() -> None:
    counts = [500, 200, 50, 5]
    labels = torch.repeat_interleave(torch.arange(C), torch.tensor(counts))
    scores = torch.zeros(len(labels), C, requires_grad=True)
    sizes = []
    for weights in (None, "auto", "root", "inverse"):
        (gradient,) = torch.autograd.grad(LDAMLoss(counts, 0.0, class_weights=weights)(scores, labels), scores)
        sizes.append(gradient.abs().sum().item())  # equal for all samples but for their weights
    assert sizes == pytest.approx([sizes[0]] * 4, rel=1e-5)


def test_identities() -> None:
    a, counts = torch.randint(0, C, (B,), generator=G), [60, 30, 25, 15]
    cross_entropy = F.cross_entropy(SCORES, a).item()
    frequencies = torch.tensor(counts, dtype=torch.float64)
    balanced = -(frequencies * SCORES.exp() / (SCORES.exp() @ frequencies)[:, None]).log().gather(1, a[:, None]).mean()
    assert BalancedSoftmaxLoss is LogitAdjustedLoss
    assert BalancedSoftmaxLoss(counts)(SCORES, a).item() == pytest.approx(balanced.item(), rel=1e-6)
    for loss in (
        LogitAdjustedLoss(counts, 0.0),
        LogitAdjustedLoss([1] * C),
        FocalLoss(0.0),
        ClassBalancedLoss([7] * C),
        LDAMLoss(counts, 0.0),
    ):
        assert loss(SCORES, a).item() == pytest.approx(cross_entropy, rel=1e-6)
    soft = torch.randn(B, C, generator=G, dtype=torch.float64).softmax(1)
    assert LogitAdjustedLoss([1] * C)(SCORES, soft).item() == pytest.approx(F.cross_entropy(SCORES, soft).item())
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    for labels in (a, soft):
        expected = F.cross_entropy(SCORES, labels, weights, reduction="sum").item()
        assert ClassBalancedLoss(class_weights=weights, reduction="sum")(SCORES, labels).item() == pytest.approx(
            expected
        )
    binary = F.binary_cross_entropy_with_logits(SCORES, soft, reduction="none").sum(dim=1).mean()
    assert AsymmetricLoss(0.0, 0.0, 0.0)(SCORES, soft).item() == pytest.approx(binary.item())


def test_modules_and_functions_are_the_same() -> None:
    """Bit by bit: a method calls the functions."""
    scores, labels = SCORES.float(), LABELS.clamp(min=0)
    log_prior, margins = LogitAdjustedLoss(COUNTS).log_prior, ldam_margins(COUNTS)
    balanced, ldam = ClassBalancedLoss(COUNTS), LDAMLoss(COUNTS, class_weights="auto")
    expected = weighted_cross_entropy(with_margin(scores, labels, margins, 30.0), labels, ldam.weights)
    assert torch.equal(ldam(scores, labels), expected)
    assert torch.equal(balanced(scores, labels), weighted_cross_entropy(scores, labels, balanced.weights))
    assert torch.equal(FocalLoss()(scores, labels), focal_loss(scores, labels))
    expected = posterior_cross_entropy(scores, labels, log_prior)
    assert torch.equal(LogitAdjustedLoss(COUNTS)(scores, labels), expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ignored", [255, -100, 2])
def test_ignore_index(name: str, ignored: int) -> None:
    labels = torch.randint(0, C, (B,), generator=G)
    labels[:5] = ignored
    expected = LOSSES[name](COUNTS)(SCORES, labels.masked_fill(labels == ignored, -1))
    loss = LOSSES[name](COUNTS, ignore_index=ignored)
    assert loss(SCORES, labels).item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss(SCORES, torch.full_like(labels, ignored)).item() == 0
    for wrong in (C, -1, -3):
        labels[7] = wrong
        name_of_ignored = str(ignored).replace("-", "−")
        with pytest.raises(
            ValueError, match=rf"^labels: expected values in \[0, {C}\), or {name_of_ignored} to ignore"
        ):
            loss(SCORES, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_on_an_accelerator_labels_out_of_range_are_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code runs here when it is told that values cannot be read."""
    loss = LOSSES[name](COUNTS, ignore_index=255)
    labels = torch.randint(0, C, (B,), generator=G)
    expected = loss(SCORES[4:], labels[4:])
    labels[:4] = torch.tensor([C, -1, 255, 2**40])
    monkeypatch.setattr("longtail.losses.checks.values_are_known", lambda _: False)
    assert loss(SCORES, labels).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_learn_from_is_zero(name: str) -> None:
    loss, scores = LOSSES[name](COUNTS), SCORES.clone().requires_grad_()
    for labels in (torch.full_like(LABELS, -1), torch.full_like(SOFT, -1 if name == "asymmetric" else 0)):
        if name == "ldam" and labels.is_floating_point():
            continue
        value = loss(scores, labels)
        (gradient,) = torch.autograd.grad(value, scores)
        assert value.item() == 0
        assert not bool(gradient.any())
    assert loss(SCORES[:0], LABELS[:0]).item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    scores, loss = SCORES[:6].clone().requires_grad_(), LOSSES[name](COUNTS).double()
    assert torch.autograd.gradcheck(lambda s: loss(s, LABELS[:6]), (scores,))
    if name in WITH_SOFT:
        assert torch.autograd.gradcheck(lambda s: loss(s, SOFT[:6]), (scores,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_certain_scores_have_finite_losses_and_gradients(name: str, dtype: torch.dtype) -> None:
    scores = torch.tensor([[3e4, -3e4, 0.0, 0.0], [-3e4, 3e4, 0.0, 0.0]]).to(dtype).requires_grad_()
    labels = torch.tensor([0, 0])
    for each in (labels, one_hot(labels, dtype)):
        if name == "ldam" and each is not labels:
            continue
        for loss in (LOSSES[name](COUNTS), AsymmetricLoss(0.5, 0.5, 0.0), FocalLoss(0.5)):
            value = loss(scores, each)
            (gradient,) = torch.autograd.grad(value, scores)
            assert 1e3 < value.item() < math.inf
            assert bool(gradient.isfinite().all())


SIZES = {"rows": (70_001, 3), "classes": (3, 70_001), "pixels": (1, 3, 265, 265)}
"""Shapes of the scores, beyond 65,504 samples or classes."""
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=2, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 2**16), soft=st.booleans(), reduction=st.sampled_from(["mean", "sum"]))
def test_every_precision(name: str, size: str, seed: int, soft: bool, reduction: str) -> None:
    """The value is that of float64 at the same, rounded, inputs, and the gradients are finite."""
    g, shape = torch.Generator().manual_seed(seed), SIZES[size]
    scores = 2 * torch.randn(shape, generator=g)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=g)
    if soft and name != "ldam":
        others = torch.randint(0, shape[1], labels.shape, generator=g).unsqueeze(1)
        zeros = torch.zeros(shape)
        labels = 0.75 * zeros.scatter(1, labels.unsqueeze(1), 1.0) + 0.25 * zeros.scatter(1, others, 1.0)
    loss = LOSSES[name](torch.arange(1, shape[1] + 1).flip(0) * 1000, reduction=reduction)
    for dtype, tolerance in TOLERANCES.items():
        results = []
        for precision in (dtype, torch.float64):
            leaf = scores.to(dtype).to(precision, copy=True).requires_grad_()
            value = loss(leaf, labels.to(precision) if labels.is_floating_point() else labels)
            (gradient,) = torch.autograd.grad(value, leaf)
            assert bool(gradient.isfinite().all()), dtype
            assert value.dtype == (torch.float64 if precision == torch.float64 else torch.float32)
            results.append(value.item())
        assert results[0] == pytest.approx(results[1], rel=tolerance), dtype
        assert results[0] > 1e-3


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_read_on_the_host(name: str, soft: bool) -> None:
    """A step on the device meta, whose tensors have no values, makes and reads no tensor of the host."""
    if soft and name not in WITH_SOFT:
        pytest.skip("takes class indices only")
    with TensorsOfTheHost() as host:
        torch.zeros(3, device="meta") + torch.ones(())
    assert host.operations  # it notices them
    for reduction, shape in (("mean", (B, C)), ("sum", (2, C, 3, 3)), ("none", (B, C))):
        loss = LOSSES[name](COUNTS, ignore_index=255, reduction=reduction).to("meta")
        scores = torch.zeros(shape, device="meta", requires_grad=True)
        labels = torch.zeros(shape if soft else (shape[0], *shape[2:]), device="meta")
        with TensorsOfTheHost() as host:
            loss(scores, labels if soft else labels.long()).sum().backward()
        assert not host.operations


WRONG_LABELS: dict[str, tuple[Tensor, str]] = {
    "type": (LABELS.int(), r"^labels: expected int64, got torch.int32; use labels.long\(\)$"),
    "number": (LABELS[:3], r"^labels: expected class indices of shape \(24,\)"),
    "shape": (SOFT[:3], r"^labels: expected .*shape \(24, 4\)"),
    "sum": (SOFT * 1.5, r"^labels: expected probabilities of at least 0 that sum to 1 .* to 1.5$"),
    "negative": (SOFT + torch.tensor([0.5, -0.5, 0, 0]), "^labels: expected probabilities of at least 0"),
    "not a number": (SOFT * math.nan, "^labels: expected probabilities of at least 0"),
}


@pytest.mark.parametrize("wrong", WRONG_LABELS)
@pytest.mark.parametrize("name", SOFTMAX)
def test_wrong_labels_are_named(name: str, wrong: str) -> None:
    labels, message = WRONG_LABELS[wrong]
    if labels.is_floating_point() and name == "ldam":
        message = "^labels: expected int64 class indices, got probabilities"
    with pytest.raises(ValueError, match=message):
        LOSSES[name](COUNTS)(SCORES, labels)


def test_wrong_labels_of_the_asymmetric_loss_are_named() -> None:
    loss = LOSSES["asymmetric"](COUNTS)
    for labels, message in (
        (LABELS.int(), r"^labels: expected int64, got torch.int32; use labels.long\(\)$"),
        (LABELS[:3], r"^labels: expected class indices of shape \(24,\), or one value for each class of shape"),
        (LABELS.double(), r"^labels: expected class indices of shape \(24,\), .* of torch.float64$"),
        (2 * SOFT, r"^labels: expected values in \[0, 1\] for every class, or -1 where it is not known"),
        (SOFT * math.nan, r"^labels: expected values in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(SCORES, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_scores_are_named(name: str) -> None:
    loss = LOSSES[name](COUNTS)
    with pytest.raises(ValueError, match=r"^scores: expected 4 classes in dimension 1, as the loss was made for"):
        loss(SCORES[:, :3], LABELS)
    for scores in (SCORES[:, 0], SCORES.long()):
        with pytest.raises(ValueError, match=r"^scores: expected floats of shape \(B, C, …\)"):
            loss(scores, LABELS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FocalLoss(reduction="max"), "^reduction: expected mean, sum or none, got 'max'"),
        (lambda: FocalLoss(-1.0), "^gamma: "),
        (lambda: FocalLoss(math.nan), "^gamma: "),
        (lambda: LogitAdjustedLoss(COUNTS, -0.5), "^strength: "),
        (lambda: LogitAdjustedLoss([0, 0]), "^class_counts: "),
        (lambda: LDAMLoss(COUNTS, 2.0), "^max_margin: "),
        (lambda: LDAMLoss(COUNTS, scale=0.0), "^scale: "),
        (lambda: AsymmetricLoss(-1.0), "^gamma_negative: "),
        (lambda: AsymmetricLoss(gamma_positive=-1.0), "^gamma_positive: "),
        (lambda: AsymmetricLoss(clip=1.0), "^clip: "),
        (lambda: FocalLoss(class_counts=COUNTS), "^class_counts: have no effect without class_weights"),
        (lambda: AsymmetricLoss(class_counts=COUNTS), "^class_counts: have no effect without class_weights"),
        (lambda: ClassBalancedLoss(), "^class_weights: 'auto' needs class_counts"),
        (lambda: ClassBalancedLoss(COUNTS, beta=1.0), "^beta: "),
    ],
)
def test_wrong_options_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_has_buffers_alone_which_follow_the_model() -> None:
    for make in LOSSES.values():
        loss = make(COUNTS)
        assert set(loss.state_dict()) == {name for name, _ in loss.named_buffers()}
        assert list(loss.parameters()) == []
        assert {buffer.device.type for buffer in loss.to("meta").buffers()} == {"meta"}
        assert "reduction='mean'" in repr(loss)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_masked_class_has_no_asymmetric_loss(clip: float) -> None:
    scores = torch.randn(3, 4, dtype=torch.float64)
    masked = scores.clone()
    masked[:, 1] = -math.inf
    masked.requires_grad_()
    labels = torch.tensor([0, 2, 3])
    loss = AsymmetricLoss(gamma_positive=1.0, clip=clip)(masked, labels)
    loss.backward()
    kept = [0, 2, 3]
    assert loss.item() == pytest.approx(
        AsymmetricLoss(gamma_positive=1.0, clip=clip)(scores[:, kept], torch.tensor([0, 1, 2])).item(), rel=1e-12
    )
    assert masked.grad is not None
    assert masked.grad[:, 1].abs().max() == 0
    assert masked.grad.isfinite().all()
