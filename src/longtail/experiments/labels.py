"""Finished runs side by side: what tells them apart."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from longtail.errors import LongtailError
from longtail.training.run_io import INCIDENTAL, Run, flatten, read_finished

_OTHER_THAN_IMAGES = frozenset(
    {
        *("data.root", "data.train", "data.val", "data.test", "data.workers", "data.cache", "data.seed"),
        *("data.sampler", "data.deferred_from", "data.repeat_threshold", "data.contrast_augment"),
    }
)
"""Settings of the data on which a fingerprint does not depend beside the seed, and the places of the images."""


@dataclasses.dataclass(frozen=True)
class LabelledRuns:
    """Several runs with labels that tell them apart."""

    runs: Sequence[Run]
    labels: Sequence[str]
    """The method, and the settings other than the seed in which a run differs from the first; runs that differ in their
    seed only share a label. Runs of the same settings and seed on other images than the first of them say so."""
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
            "training images": training,
            "test images": test,
        }
        for run, training, test in zip(runs, _numbers_of_training(runs), _numbers_of_test(runs), strict=True)
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


def _numbers_of_training(runs: Sequence[Run]) -> list[str]:
    """Return which set of training images each run had, of those that its settings and seed have stood for."""
    keys = []
    for run in runs:
        settings = flatten({"data": run.config.to_dict()["data"]})
        decide = {name: str(value) for name, value in settings.items() if name not in _OTHER_THAN_IMAGES}
        keys.append((*sorted(decide.items()), _seed(run)))
    return _numbers(keys, [run.model_config.training_info.get("images") for run in runs])


def _numbers_of_test(runs: Sequence[Run]) -> list[str]:
    """Return which set of test images each run had, of those of its seed; most sets have the same for all seeds."""
    keys = [_seed(run) for run in runs]
    return _numbers(keys, [run.model_config.training_info.get("test_images") for run in runs])


def _seed(run: Run) -> int:
    """Return the seed of a run's split and tail."""
    return run.config.seed if run.config.data.seed is None else run.config.data.seed


def _numbers(keys: Sequence[Hashable], fingerprints: Sequence[str | None]) -> list[str]:
    """Return the numbers of fingerprints among those of the same key; of one that is not known, the first's."""
    seen: dict[Hashable, list[str]] = {}
    numbers = []
    for key, fingerprint in zip(keys, fingerprints, strict=True):
        known = seen.setdefault(key, [])
        if fingerprint is not None and fingerprint not in known:
            known.append(fingerprint)
        numbers.append(f"set {1 if fingerprint is None else known.index(fingerprint) + 1}")
    return numbers
