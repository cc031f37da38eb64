"""Finished runs side by side: what tells them apart."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from longtail.errors import LongtailError
from longtail.training.run_io import INCIDENTAL, Run, flatten, read_finished


@dataclasses.dataclass(frozen=True)
class LabelledRuns:
    """Several runs with labels that tell them apart."""

    runs: Sequence[Run]
    labels: Sequence[str]
    """The method, and the settings other than the seed in which a run differs from the first; runs that differ in their
    seed only share a label."""
    settings: Mapping[str, Sequence[str]]
    """The settings that differ, with one value per run."""


def label_runs(folders: Sequence[Path]) -> LabelledRuns:
    """Return finished runs over the same classes, labelled by the settings in which they differ from the first.

    Raises:
        LongtailError: one has not finished, or has other classes or another task than the first.
    """
    runs = [read_finished(folder) for folder in folders]
    first = runs[0].model_config
    for run in runs:
        if (run.model_config.class_names, run.model_config.task) != (first.class_names, first.task):
            raise LongtailError(f"{run.folder}: has other classes or another task than {runs[0].folder}")
    values = [
        {
            **{name: value for name, value in flatten(run.config.to_dict()).items() if name not in INCIDENTAL},
            "head": run.model_config.training_info.get("rebalanced", "trained"),
        }
        for run in runs
    ]
    # a method's own settings are compared among the runs that have them
    every = dict.fromkeys(name for each in values for name in each)
    present = {name: [str(each[name]) for each in values if name in each] for name in every}
    names = [name for name, shown in present.items() if len(set(shown)) > 1]
    settings = {name: [str(each.get(name, "")) for each in values] for name in names}
    usual = {name: "trained" if name == "head" else present[name][0] for name in names}
    labels = []
    for each in values:
        others = [
            f"{name.rpartition('.')[2]} {each[name]}"
            for name in names
            if name not in {"seed", "data.seed", "recipe", "method"} and str(each.get(name, usual[name])) != usual[name]
        ]
        labels.append(", ".join([each["method"], *others]))
    twice = collections.Counter(zip(labels, (run.config.seed for run in runs), strict=True)).most_common(1)[0][1] > 1
    return LabelledRuns(runs, [str(run.folder) for run in runs] if twice else labels, settings)
