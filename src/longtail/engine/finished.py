"""Runs that have ended: what they were set to, what came out, and what tells them apart."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtail.config import Config, read_config
from longtail.engine.books import read_metrics
from longtail.engine.files import INCIDENTAL, flatten
from longtail.engine.fit import Run
from longtail.errors import LongtailError
from longtail.evaluation.comparison import DENSE_COLUMNS, Record
from longtail.recognizer import read_card


def finished(folder: Path, config: Config) -> Run | None:
    """Return a run that ended with these very settings."""
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines or lines[-1]["kind"] != "test" or read_config(folder / "config.yaml") != config:
        return None
    card = read_card(folder)
    return Run(
        folder,
        config,
        card,
        {prior: lines[-1][prior] for prior in ("uniform", "train")},
        card.trained["student_passes"],
        card.trained["seconds"],
        card.trained["teacher_seconds"],
    )


def record(run: Run) -> Record:
    """Return what ``--json`` holds of a run."""
    shown = ("balanced_accuracy", "top1", "many", "medium", "few", *(name for name, _ in DENSE_COLUMNS))
    values: dict[str, Any] = {name: run.metrics.get(name) for name in shown}
    return Record(
        method=run.config.method,
        seed=run.config.seed,
        epochs=run.card.trained["epochs"],
        predicts_under=run.card.predicts_under,
        student_passes=run.student_passes,
        seconds=run.seconds,
        teacher_seconds=run.teacher_seconds,
        **values,
    )


def read_finished(folder: Path) -> Run:
    """Return the run of a folder.

    Raises:
        LongtailError: it is no run's, or the run has not ended.
    """
    if not (folder / "config.yaml").is_file():
        raise LongtailError(f"{folder}: has no config.yaml: expected the folder of a run")
    run = finished(folder, read_config(folder / "config.yaml"))
    if run is None:
        raise LongtailError(f"{folder / 'metrics.jsonl'}: has no test metrics; --resume the run")
    return run


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Several runs with what they are called beside one another."""

    runs: Sequence[Run]
    labels: Sequence[str]
    """The method, and what else sets a run apart from the first but for its seed; runs that differ by it alone share
    theirs."""
    settings: Mapping[str, Sequence[str]]
    """The settings that differ, a value a run."""


def labelled(folders: Sequence[Path]) -> Labelled:
    """Return finished runs over the same classes, called by the settings in which they differ from the first.

    Raises:
        LongtailError: one has not ended, or is of other classes than the first, or of another task.
    """
    runs = [read_finished(folder) for folder in folders]
    first = runs[0].card
    for run in runs:
        if (run.card.class_names, run.card.task) != (first.class_names, first.task):
            raise LongtailError(f"{run.folder}: is not of the classes and the task of {runs[0].folder}")
    values = [
        {
            **{name: value for name, value in flatten(run.config.to_dict()).items() if name not in INCIDENTAL},
            "head": run.card.trained.get("rebalanced", "its own"),
        }
        for run in runs
    ]
    names = [name for name in values[0] if len({str(each[name]) for each in values}) > 1]
    settings = {name: [str(each[name]) for each in values] for name in names}
    apart = [name for name in names if name not in {"seed", "data.seed", "recipe"}]
    labels = []
    for each in values:
        plain = {**values[0], "head": "its own"}
        others = [name for name in apart if name != "method" and str(each[name]) != str(plain[name])]
        labels.append(", ".join([each["method"], *(f"{name.rpartition('.')[2]} {each[name]}" for name in others)]))
    twice = collections.Counter(zip(labels, (run.config.seed for run in runs), strict=True)).most_common(1)[0][1] > 1
    return Labelled(runs, [str(run.folder) for run in runs] if twice else labels, settings)
