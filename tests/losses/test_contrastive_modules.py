"""The contrastive losses as modules, called as GMLLoss is: loss(queries, labels, keys, key_labels, ids, key_ids).

Legend: B queries, K keys, C classes, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.losses import (
    BalancedContrastiveLoss,
    GMLLoss,
    SupConLoss,
    balanced_contrastive_loss,
    supcon_loss,
)
from tests.losses.host import TensorsOfTheHost

B, K, C, D, TAU = 9, 30, 4, 16, 0.2
G = torch.Generator().manual_seed(0)
QUERIES, KEYS = (F.normalize(torch.randn(n, D, generator=G, dtype=torch.float64), dim=1) for n in (B, K))
LABELS, KEY_LABELS = torch.tensor([0, 1, 1, 2, 0, -1, 3, 2, 0]), torch.randint(-1, 3, (K,), generator=G)
IDS, KEY_IDS = torch.arange(B) % 7, torch.randint(0, 7, (K,), generator=G)

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "supcon": lambda **options: SupConLoss(TAU, **options),
    "balanced": lambda **options: BalancedContrastiveLoss(C, TAU, **options),
}


def loop(name: str, with_ids: bool) -> list[float | None]:
    """Return the loss of every query, None where it has no positive."""
    losses: list[float | None] = []
    for i in range(B):
        by_class: dict[int, list[float]] = {}
        for j in range(K):
            if KEY_LABELS[j] >= 0 and not (with_ids and KEY_IDS[j] == IDS[i]):
                exponential = math.exp(float(QUERIES[i] @ KEYS[j]) / TAU)
                by_class.setdefault(int(KEY_LABELS[j]), []).append(exponential)
        positives = by_class.get(int(LABELS[i]), [])
        if name == "supcon":
            denominator = sum(sum(values) for values in by_class.values())
        else:
            denominator = sum(sum(values) / len(values) for values in by_class.values())
        logs = [-math.log(value / denominator) for value in positives]
        losses.append(sum(logs) / len(logs) if logs else None)
    return losses


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_against_a_loop(name: str, with_ids: bool) -> None:
    losses = loop(name, with_ids)
    counted = [loss for loss in losses if loss is not None]
    assert 3 < len(counted) < B  # the query without a label, and that of the class without keys
    arguments = (QUERIES, LABELS, KEYS, KEY_LABELS, *((IDS, KEY_IDS) if with_ids else ()))
    mean, total, each = (LOSSES[name](reduction=reduction)(*arguments) for reduction in ("mean", "sum", "none"))
    assert each.tolist() == pytest.approx([loss or 0 for loss in losses], rel=1e-10)
    assert total.item() == pytest.approx(sum(counted), rel=1e-10)
    assert mean.item() == pytest.approx(sum(counted) / len(counted), rel=1e-10)


def test_modules_and_functions_are_the_same() -> None:
    own = IDS[:, None] == KEY_IDS[None]
    queries, keys = QUERIES.float(), KEYS.float()
    arguments = (queries, LABELS, keys, KEY_LABELS)
    assert torch.equal(SupConLoss(TAU)(*arguments, IDS, KEY_IDS), supcon_loss(*arguments, TAU, own))
    got = BalancedContrastiveLoss(C, TAU)(*arguments, IDS, KEY_IDS)
    assert torch.equal(got, balanced_contrastive_loss(*arguments, C, TAU, own))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(70_001, 5), (5, 70_001)])
@pytest.mark.parametrize("name", LOSSES)
def test_every_precision(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    queries, keys = (F.normalize(torch.randn(n, 8, generator=G), dim=1).to(dtype) for n in size)
    labels, key_labels = (torch.arange(n) % C for n in size)
    results = []
    for precision in (dtype, torch.float64):
        leaves = [tensor.to(precision, copy=True).requires_grad_() for tensor in (queries, keys)]
        value = LOSSES[name]()(leaves[0], labels, leaves[1], key_labels)
        assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(value, leaves))
        results.append(value.item())
    assert results[0] == pytest.approx(results[1], rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert results[0] > 1e-3


@pytest.mark.parametrize("name", [*LOSSES, "gml"])
def test_wrong_arguments_are_named(name: str) -> None:
    """The same messages as those of GMLLoss."""
    loss = GMLLoss([1] * C) if name == "gml" else LOSSES[name](validate=True)
    soft = torch.full((B, C), 1 / C)
    wrong: tuple[tuple[tuple[Tensor, ...], str], ...] = (
        ((QUERIES[0], LABELS, KEYS, KEY_LABELS), "^queries: expected shape"),
        ((QUERIES, LABELS, KEYS[:, :3], KEY_LABELS), "^keys: expected shape"),
        ((QUERIES, LABELS[:3], KEYS, KEY_LABELS), "^labels: expected shape"),
        (
            (QUERIES, soft, KEYS, KEY_LABELS),
            "^labels: expected .*; probabilities do not tell which keys are of a query's",
        ),
        ((QUERIES, LABELS, KEYS, KEY_LABELS, IDS), "^ids and key_ids: expected both or neither"),
        ((QUERIES, LABELS, KEYS, KEY_LABELS, IDS, KEY_IDS[:3]), "^key_ids: expected shape"),
        ((2 * QUERIES, LABELS, KEYS, KEY_LABELS), "^queries: expected rows of norm 1"),
        ((QUERIES, LABELS, 2 * KEYS, KEY_LABELS), "^keys: expected rows of norm 1"),
    )
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            loss(*arguments)
    if name != "supcon":
        with pytest.raises(ValueError, match=r"^key_labels: expected values in \[0, 4\)"):
            loss(QUERIES, LABELS, KEYS, KEY_LABELS + C)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"^temperature: expected a positive value, got 0"):
        SupConLoss(0.0)
    with pytest.raises(ValueError, match=r"^reduction: expected mean, sum or none"):
        BalancedContrastiveLoss(C, reduction="max")


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_read_on_the_host(name: str, validate: bool) -> None:
    """On the device meta tensors have no values to validate."""
    queries, keys = (tensor.float().to("meta").requires_grad_() for tensor in (QUERIES, KEYS))
    labels = (LABELS.to("meta"), keys, KEY_LABELS.to("meta"), IDS.to("meta"), KEY_IDS.to("meta"))
    with TensorsOfTheHost() as host:
        LOSSES[name](validate=validate)(queries, *labels).backward()
    assert not host.operations


@pytest.mark.parametrize("name", LOSSES)
def test_keys_may_have_another_precision_than_queries(name: str) -> None:
    loss = LOSSES[name]()
    expected = loss(QUERIES.float(), LABELS, KEYS.float(), KEY_LABELS)
    for queries, keys in ((QUERIES.float(), KEYS), (QUERIES, KEYS.float())):
        mixed = loss(queries, LABELS, keys, KEY_LABELS)
        assert mixed.dtype == queries.dtype
        assert mixed.item() == pytest.approx(expected.item(), rel=1e-5)
