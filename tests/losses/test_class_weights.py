"""What ``class_weights`` means, the same wherever weights are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtail.losses import (
    AsymmetricLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    compute_class_weights,
    effective_number_weights,
    frequency_weights,
)

COUNTS = [900, 100, 0, 4]


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("auto", [(1 - 0.99) / (1 - 0.99**n) if n else 0 for n in COUNTS]),
        ("effective_number", [(1 - 0.99) / (1 - 0.99**n) if n else 0 for n in COUNTS]),
        ("root", [1 / math.sqrt(n) if n else 0 for n in COUNTS]),
        ("inverse", [1 / n if n else 0 for n in COUNTS]),
    ],
)
def test_named_weights(name: str, raw: list[float]) -> None:
    weights = compute_class_weights(name, COUNTS, beta=0.99)
    assert weights.tolist() == pytest.approx([weight * 4 / sum(raw) for weight in raw], rel=1e-6)
    assert weights.dtype == torch.float32


def test_powers_of_the_frequency_and_the_limits_of_the_effective_number() -> None:
    assert frequency_weights(COUNTS, 0.0).tolist() == pytest.approx([4 / 3, 4 / 3, 0, 4 / 3])
    assert effective_number_weights(COUNTS, 0.0).tolist() == frequency_weights(COUNTS, 0.0).tolist()
    assert effective_number_weights(COUNTS, 1 - 1e-9).tolist() == pytest.approx(
        frequency_weights(COUNTS).tolist(), rel=1e-5
    )
    # frequencies give the same weights as counts
    frequencies = torch.tensor(COUNTS) / sum(COUNTS)
    assert frequency_weights(frequencies).tolist() == pytest.approx(frequency_weights(COUNTS).tolist(), rel=1e-5)


def test_a_mapping_names_some_classes() -> None:
    assert compute_class_weights({3: 5, 0: 0.5}, COUNTS).tolist() == [0.5, 1, 0, 5]
    assert compute_class_weights({np.int64(1): 2.0}, COUNTS).tolist() == [1, 2, 0, 1]
    assert compute_class_weights({}, COUNTS).tolist() == [1, 1, 0, 1]


def test_no_weight_brings_a_class_without_images_back() -> None:
    assert compute_class_weights({2: 2.0}, COUNTS).tolist() == [1, 1, 0, 1]
    assert compute_class_weights([1, 2, 3, 4], COUNTS).tolist() == [1, 2, 0, 4]
    scores, labels = torch.zeros(1, 4), torch.tensor([2])
    for loss in (ClassBalancedLoss(COUNTS, [1.0] * 4), FocalLoss(0.0, [1.0] * 4, COUNTS), LDAMLoss(COUNTS)):
        assert loss(scores, labels) == 0


def test_a_sequence_is_taken_as_it_is() -> None:
    for weights in ([1, 2, 0, 4], (1.0, 2.0, 0.0, 4.0), np.array([1, 2, 0, 4]), torch.tensor([1, 2, 0, 4])):
        for counts in (None, COUNTS, torch.tensor(COUNTS)):
            assert compute_class_weights(weights, counts).tolist() == [1, 2, 0, 4]


@pytest.mark.parametrize(
    ("weights", "counts", "message"),
    [
        ("balanced", COUNTS, "expected auto, effective_number, root or inverse, got 'balanced'"),
        ("auto", None, "'auto' needs class_counts"),
        ({0: 1.0}, None, "a mapping needs class_counts"),
        ({4: 1.0}, COUNTS, r"expected class indices in \[0, 4\), got 4"),
        ({-1: 1.0}, COUNTS, r"expected class indices in \[0, 4\), got -1"),
        ({0: -1.0}, COUNTS, "expected weights of at least 0, got -1 for class 0"),
        ([1, 2, 3], COUNTS, "expected 4 weights, one for each class, got 3"),
        ([1, 2, math.nan, 3], COUNTS, "expected weights of at least 0, got nan for class 2"),
        ([0, 0, 0, 0], None, "expected weights of at least 0, one of them positive; all are 0"),
        ([[1, 2]], None, r"expected shape \(C,\), one weight for each class"),
    ],
)
def test_wrong_weights_are_named(weights: Any, counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^class_weights: {message}"):
        compute_class_weights(weights, counts)


MODULES: dict[str, Callable[[Any], Tensor | None]] = {
    "FocalLoss": lambda weights: FocalLoss(2.0, weights, COUNTS).weights,
    "ClassBalancedLoss": lambda weights: ClassBalancedLoss(COUNTS, weights).weights,
    "LDAMLoss": lambda weights: LDAMLoss(COUNTS, class_weights=weights).weights,
    "AsymmetricLoss": lambda weights: AsymmetricLoss(class_weights=weights, class_counts=COUNTS).weights,
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("weights", ["auto", "root", "inverse", {1: 3.0}, [1.0, 2.0, 0.0, 4.0]])
def test_all_modules_understand_the_same(name: str, weights: Any) -> None:
    got = MODULES[name](weights)
    assert got is not None
    expected = compute_class_weights(weights, COUNTS)
    if name == "LDAMLoss" and isinstance(weights, str):  # a mean of 1 over the images
        assert torch.dot(got, torch.tensor(COUNTS).float()).item() == pytest.approx(sum(COUNTS), rel=1e-5)
        got = got * (expected.mean() / got.mean())
    assert got.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_without_weights_all_classes_that_have_images_count_alike() -> None:
    assert FocalLoss().weights is None
    assert AsymmetricLoss().weights is None
    margins = MODULES["LDAMLoss"]
    expected = ([1, 1, 0, 1], [1, 2, 0, 4])  # a class without images has no margin, whatever its weight
    assert tuple(margins(weights).tolist() for weights in (None, [1, 2, 3, 4])) == expected  # type: ignore[union-attr]
