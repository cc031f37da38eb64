"""Findings from figures that show them, and none from figures that do not."""

from __future__ import annotations

from typing import Any

import pytest

from longtail.config import Config
from longtail.report.diagnosis import diagnose
from tests.conftest import small_card

GOOD = {"many": 90.0, "medium": 85.0, "few": 70.0, "balanced_accuracy": 82.0, "calibration": {"ece": 3.0}}
LINES = [{"classifier": 0.5, "temperature": 0.1, "queue_fill": 1.0}] * 16


def findings(
    found: dict[str, Any] | None = None,
    lines: list[dict[str, Any]] | None = None,
    under: str = "uniform",
    **config: Any,
) -> list[str]:
    judged = {"uniform": {**GOOD, **(found or {})}, "train": {**GOOD, **(found or {})}}
    told = diagnose(small_card(("a", "b"), (90, 9), predicts_under=under), Config(**config), lines or LINES, judged)
    return [f"{finding.what} {finding.measured} {finding.advice}" for finding in told]


def test_nothing_stands_out_of_a_good_run() -> None:
    assert findings() == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"found": {"few": 5.0}}, ["The tail is hardly recognised", "5.0 %", "gml.queue_minimum above 2", "crt"]),
        ({"found": {"few": 5.0}, "under": "train", "method": "ce"}, ["The tail", "uniform prior (few +0.0 points)"]),
        ({"found": {"many": 30.0}}, ["The head pays for the rest", "30.0 %, in medium 85.0 %"]),
        (
            {"lines": [{"classifier": 2.0 - 0.1 * index} for index in range(16)]},
            ["The training was not finished", "Over its last 2 epochs", "More epochs"],
        ),
        (
            {"lines": [{"classifier": 0.01}] * 9, "found": {"balanced_accuracy": 40.0}},
            ["learned by heart", "0.010", "40.0 %", "data.augment"],
        ),
        ({"lines": [{**LINES[0], "temperature": 0.021}]}, ["temperature went to its bound", "0.021", "narrow"]),
        ({"lines": [{**LINES[0], "temperature": 0.95}]}, ["temperature went to its bound", "0.950", "wide"]),
        ({"lines": [{**LINES[0], "queue_fill": 0.4}]}, ["queues never filled", "40 %"]),
        ({"found": {"calibration": {"ece": 23.0}}}, ["not to be taken at their word", "23 %", "--data.val_fraction"]),
    ],
)
def test_each_signature_is_told_with_its_figure(changes: dict[str, Any], parts: list[str]) -> None:
    told = findings(**changes)
    assert len(told) == 1
    for part in parts:
        assert part in told[0]


def test_groups_that_are_not_there() -> None:
    assert findings({"few": None, "many": None, "medium": None}) == []
