from __future__ import annotations

import math

import pytest
import torch

from longtail.data.samplers import class_shares, epoch_order
from longtail.errors import LongtailError
from longtail.registry import SAMPLERS

COUNTS = torch.tensor([400, 90, 10])
LABELS = torch.repeat_interleave(torch.arange(3), COUNTS)[
    torch.randperm(500, generator=torch.Generator().manual_seed(9))
]


def shares(sampler: str, epoch: int) -> list[float]:
    shown = torch.cat([LABELS[epoch_order(LABELS, sampler, seed, epoch, epochs=11)] for seed in range(40)])
    return [float(value) for value in torch.bincount(shown, minlength=3) / len(shown)]


@pytest.mark.parametrize(
    ("sampler", "epoch", "expected"),
    [
        ("instance", 5, [0.8, 0.18, 0.02]),
        ("class", 5, [1 / 3, 1 / 3, 1 / 3]),
        ("sqrt", 5, [20 / 32.649, 9.487 / 32.649, 3.162 / 32.649]),
        ("progressive", 0, [0.8, 0.18, 0.02]),
        ("progressive", 5, [0.5667, 0.2567, 0.1767]),
        ("progressive", 10, [1 / 3, 1 / 3, 1 / 3]),
        ("deferred", 8, [0.8, 0.18, 0.02]),
        ("deferred", 9, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_classes_are_shown_as_often_as_they_should(sampler: str, epoch: int, expected: list[float]) -> None:
    # 20,000 draws: five standard deviations
    for got, want in zip(shares(sampler, epoch), expected, strict=True):
        assert abs(got - want) < 5 * math.sqrt(want * (1 - want) / 20_000) + 1e-9


@pytest.mark.parametrize("sampler", ["instance", "class", "sqrt", "progressive", "deferred"])
def test_an_epoch_is_a_function_of_seed_and_number(sampler: str) -> None:
    once = epoch_order(LABELS, sampler, 3, 10, epochs=11)
    assert torch.equal(once, epoch_order(LABELS, sampler, 3, 10, epochs=11))
    assert len(once) == len(LABELS)
    assert not torch.equal(once, epoch_order(LABELS, sampler, 3, 9, epochs=11))
    assert not torch.equal(once, epoch_order(LABELS, sampler, 4, 10, epochs=11))


def test_images_of_a_class_are_shown_alike() -> None:
    shown = torch.cat([epoch_order(LABELS, "class", seed, 0) for seed in range(60)])
    tail = torch.bincount(shown, minlength=500)[LABELS == 2].double()
    assert abs(tail.mean().item() - 1000) < 60
    assert tail.std().item() < 4 * math.sqrt(1000)


def test_a_class_without_images_is_left_out() -> None:
    assert class_shares(torch.tensor([5, 0, 5]), 0, 1, 0.8).tolist() == [0.5, 0.0, 0.5]


def test_samplers_are_registered_and_others_are_errors() -> None:
    assert set(SAMPLERS) == {"instance", "class", "sqrt", "progressive", "deferred"}
    with pytest.raises(LongtailError, match=r"data\.sampler 'sqr' is not known; perhaps you meant sqrt"):
        epoch_order(LABELS, "sqr", 0, 0)


def test_labels_that_are_not_classes_are_named() -> None:
    for sampler in ("instance", "class"):
        with pytest.raises(LongtailError, match=r"^labels: expected values of at least 0, got -1 for image 2$"):
            epoch_order(torch.tensor([0, 1, -1]), sampler, 0, 0)
        with pytest.raises(
            LongtailError, match=r"^labels: expected shape \(N,\) of int64, got \(2,\) of torch.float32$"
        ):
            epoch_order(torch.zeros(2), sampler, 0, 0)
        assert epoch_order(torch.zeros(0, dtype=torch.int64), sampler, 0, 0).tolist() == []


@pytest.mark.parametrize("sampler", ["class", "sqrt", "progressive"])
def test_the_images_of_an_absent_class_are_never_shown(sampler: str) -> None:
    labels = torch.tensor([0] * 50 + [3] * 50)  # of classes 1 and 2 there is none
    order = epoch_order(labels, sampler, 0, 1, epochs=2)
    assert set(order.tolist()) <= set(range(100))
    assert 20 < (labels[order] == 0).sum() < 80
