from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtail.errors import LongtailError
from longtail.evaluation.detector_scores import (
    Background,
    LogitStatistics,
    Normalization,
    class_outputs,
    logn,
    logn_correction,
    norcal,
    norcal_correction,
    norcal_shift,
    scale_scores,
)

COUNTS = [5000.0, 120.0, 7.0, 1.0]
BACKGROUNDS: tuple[Background, ...] = ("first", "last", None)


def logits(background: Background, proposals: int = 40, seed: int = 0) -> Tensor:
    outputs = len(COUNTS) + (background is not None)
    return torch.randn(proposals, outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def probabilities(values: Tensor, background: Background) -> Tensor:
    return values.sigmoid() if background is None else values.softmax(dim=1)


def norcal_loop(p: Tensor, counts: list[float], power: float, background: Background, normalization: str) -> Tensor:
    """The formula of the module, one proposal and one class after another."""
    scale = 1.0
    if normalization == "foreground":
        scale = sum(counts) / sum(count ** (1 - power) for count in counts)
    factors = [scale / count**power for count in counts]
    rows = []
    for row in p.tolist():
        if background is None:
            rows.append([q * f / (q * f + 1 - q) for q, f in zip(row, factors, strict=True)])
            continue
        of_background = row[0] if background == "first" else row[-1]
        classes = row[1:] if background == "first" else row[:-1]
        raised = [q * f for q, f in zip(classes, factors, strict=True)]
        total = sum(raised) + of_background
        corrected = [value / total for value in raised]
        rest = [of_background / total]
        rows.append(rest + corrected if background == "first" else corrected + rest)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("normalization", ["foreground", "paper"])
@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("power", [0.3, 0.6, 1.0, 1.5])
def test_norcal_is_its_formula_on_probabilities_and_on_logits(
    power: float, background: Background, normalization: Normalization
) -> None:
    values = logits(background)
    p = probabilities(values, background)
    expected = norcal_loop(p, COUNTS, power, background, normalization)
    counts = torch.tensor(COUNTS)
    torch.testing.assert_close(norcal(p, counts, power, background, normalization), expected)
    correction = norcal_correction(counts, power, background, normalization)
    torch.testing.assert_close(probabilities(correction.apply(values), background), expected)
    assert not torch.allclose(expected, p, atol=0.01)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("normalization", ["foreground", "paper"])
def test_power_0_changes_no_bit(background: Background, normalization: Normalization) -> None:
    values = logits(background).float()
    values[0, 0] = -0.0
    p = probabilities(values, background)
    counts = torch.tensor(COUNTS)
    same = norcal(p, counts, 0.0, background, normalization)
    assert same.numpy().tobytes() == p.numpy().tobytes()
    assert same is not p
    applied = norcal_correction(counts, 0.0, background, normalization).apply(values)
    assert applied.numpy().tobytes() == values.numpy().tobytes()


def test_arrays_stay_arrays_and_can_be_overwritten() -> None:
    p = probabilities(logits("first"), "first").numpy().astype(np.float32)
    expected = norcal(p, np.array(COUNTS), 0.5, "first")
    assert isinstance(expected, np.ndarray)
    assert expected.dtype == np.float32
    before = p.copy()
    assert np.array_equal(before, p)
    norcal(p, np.array(COUNTS), 0.5, "first", inplace=True)
    assert np.array_equal(p, expected)


def test_foreground_keeps_the_frequency_of_objects_and_depends_on_no_unit() -> None:
    """A detector whose posterior is the prior keeps its background, and its classes get N^(1 − power)."""
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    p = torch.cat([torch.tensor([0.7], dtype=torch.float64), 0.3 * counts / counts.sum()])[None]
    corrected = norcal(p, counts, 0.4, "first")[0]
    assert corrected[0].item() == pytest.approx(0.7)
    torch.testing.assert_close(corrected[1:], 0.3 * counts**0.6 / (counts**0.6).sum())
    torch.testing.assert_close(norcal(p, 1000 * counts, 0.4, "first")[0], corrected)
    paper = norcal(p, counts, 0.4, "first", "paper")
    assert not torch.allclose(norcal(p, 1000 * counts, 0.4, "first", "paper"), paper)
    # ratios between classes are the same
    torch.testing.assert_close(paper[0, 1] / paper[0, 4], corrected[1] / corrected[4])


def test_classes_without_count_are_raised_above_no_other() -> None:
    shift = norcal_shift(torch.tensor([100.0, 0.0, 10.0]), 0.5)
    assert shift[1] == shift[0]
    assert shift[2] > shift[0]
    # and change nothing for the others
    torch.testing.assert_close(shift[[0, 2]], norcal_shift(torch.tensor([100.0, 10.0]), 0.5))


def logn_loop(values: Tensor, over: Tensor, background: Background) -> Tensor:
    rows, number = over.tolist(), len(over)
    outputs = len(rows[0])
    skipped = {"first": 0, "last": outputs - 1, None: -1}[background]
    means = [sum(row[c] for row in rows) / number for c in range(outputs)]
    deviations = [math.sqrt(sum((row[c] - means[c]) ** 2 for row in rows) / number) for c in range(outputs)]
    smallest = min(means[c] for c in range(outputs) if c != skipped)
    return torch.tensor(
        [
            [z if c == skipped else (z - means[c] + smallest) / deviations[c] for c, z in enumerate(row)]
            for row in values.tolist()
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_logn_is_its_formula_over_statistics_in_batches(background: Background) -> None:
    over = logits(background, 101, seed=1) + 1000  # a mean of squares would lose the deviation in float32
    statistics = LogitStatistics(over.shape[1])
    statistics.update(over[:1])
    statistics.update(over[1:30].reshape(29, 1, -1))
    statistics.update(over[:0])
    other = LogitStatistics(over.shape[1])
    other.update(over[30:])
    statistics.merge(other)
    statistics.merge(LogitStatistics(over.shape[1]))
    assert statistics.count == 101
    torch.testing.assert_close(statistics.deviation, over.std(dim=0, correction=0))
    values = logits(background) + 1000
    torch.testing.assert_close(logn(values, statistics, background), logn_loop(values, over, background))
    array = logn(values.numpy(), statistics, background)
    assert isinstance(array, np.ndarray)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_logn_leaves_outputs_without_a_category(background: Background) -> None:
    """They neither say what the smallest mean is nor are raised to it."""
    over = logits(background, 101, seed=1)
    classes = class_outputs(over.shape[1], background)
    over[:, classes][:, 2] -= 1000
    statistics, rest = LogitStatistics(over.shape[1]), LogitStatistics(over.shape[1] - 1)
    statistics.update(over)
    kept = [index for index in range(over.shape[1]) if index != classes.start + 2]
    rest.update(over[:, kept])
    has_category = torch.tensor([index != 2 for index in range(len(COUNTS))])
    correction, expected = logn_correction(statistics, background, has_category), logn_correction(rest, background)
    torch.testing.assert_close(correction.scale[kept], expected.scale)
    torch.testing.assert_close(correction.shift[kept], expected.shift)
    assert [float(part[classes][2]) for part in correction] == [1, 0]
    with pytest.raises(LongtailError, match="LogN: 0 of 4 outputs have a category"):
        logn_correction(statistics, background, torch.zeros(len(COUNTS), dtype=torch.bool))


def test_logn_of_a_constant_logit_is_finite() -> None:
    statistics = LogitStatistics(3)
    statistics.update(torch.zeros(5, 3))
    assert bool(torch.isfinite(logn_correction(statistics, "first").shift).all())


def test_scores_of_a_result_file_are_divided_by_counts() -> None:
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    expected = [s / count**0.5 for s, count in zip(scores.tolist(), COUNTS, strict=True)]
    scaled = scale_scores(scores, labels, torch.tensor(COUNTS), 0.5)
    torch.testing.assert_close(scaled, torch.tensor(expected, dtype=torch.float64))  # the smallest count is 1
    assert scale_scores(scores, labels, torch.tensor(COUNTS) * 7, 0.5).max() <= 1
    assert torch.equal(scale_scores(scores, labels, torch.tensor(COUNTS), 0.0), scores)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, c: norcal(p, c, -0.5, "first"), "power -0.5: expected 0 or more"),
        (lambda p, c: norcal(p, c, float("nan"), "first"), "power nan"),
        (lambda p, c: norcal(p, c, 0.5, None), "5 outputs, but the counts are of 4 classes: expected 4"),
        (lambda p, c: norcal(p, -c, 0.5, "first"), "at least 0"),
        (lambda p, c: norcal(p, 0 * c, 0.5, "first"), "all are 0"),
        (lambda p, c: logn(p, LogitStatistics(3), "first"), "5 outputs, expected the 3"),
        (lambda p, c: logn(p, LogitStatistics(5), "first"), "at least 2 proposals, got 0"),
    ],
)
def test_unusable_input_is_one_line(call: Any, message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        call(probabilities(logits("first"), "first"), torch.tensor(COUNTS))
