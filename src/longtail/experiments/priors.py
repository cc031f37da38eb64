"""What a table of methods does not show of those that predict under the training prior."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from longtail.experiments.records import Record, imbalances_of, methods_of, summarize
from longtail.registry import TASKS
from longtail.training.run_io import read_finished


def training_prior_lines(records: Sequence[Record], folders: Sequence[Path]) -> list[str]:
    """Return a line for each method whose metrics are under the training prior, with its main one under the uniform.

    Args:
        records: of finished runs.
        folders: of the same runs.
    """
    uniform = []
    for record, folder in zip(records, folders, strict=True):
        if record.predicts_under == "train":
            name, title = TASKS[record.task].columns[0]
            value = read_finished(folder).test_metrics["uniform"][name]
            uniform.append(dataclasses.replace(record, metrics={name: value}))
    lines = []
    for factor in imbalances_of(uniform):
        here = [record for record in uniform if record.imbalance == factor]
        where = "" if factor is None else f"imbalance {factor:g}, "
        lines += [
            f"{where}{method}: under the training prior, as it was trained; under the uniform prior, which longtail "
            f"predict assumes, {title} {summarize(here, method, name) or 'n/a'}"
            for method in methods_of(here)
        ]
    return lines
