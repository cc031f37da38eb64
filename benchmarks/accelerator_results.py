"""The results of ``accelerator.py``: ``runs.json`` and ``predictions.npz``, and one file of several calls for the page.

The merged file is what ``benchmarks/refresh.py`` makes a table of (``<!-- runs: PATH -->``), with the differences
of pairs of runs below it.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerator_context import write_json
from accelerator_variants import BASELINE, PAIRS, VARIANTS

from longtail.errors import LongtailError

_RESAMPLES = 2000
_ORDER = {name: position for position, name in enumerate(VARIANTS)}
Predictions = dict[str, np.ndarray[Any, Any]]
"""(N,) uint8 classes of the test images by the key of a run, and their ``labels``."""


def _position(entry: Mapping[str, Any]) -> tuple[int, str, int]:
    return _ORDER.get(entry["run"], len(_ORDER)), entry["run"], entry["seed"]


def _key(entry: Mapping[str, Any]) -> str:
    return f"{entry['run']}, seed {entry['seed']}"


@dataclasses.dataclass
class Results:
    """The runs of all phases of a call."""

    out: Path
    origin: Mapping[str, Any]
    """Command, hardware and commit."""
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unfinished: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    predictions: Predictions = dataclasses.field(default_factory=dict)
    budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gains: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Measured, by the number of trainings side by side."""
    alone: dict[str, float] = dataclasses.field(default_factory=dict)
    """Measured seconds of a training that runs alone."""

    @classmethod
    def read(cls, out: Path, origin: Mapping[str, Any]) -> Results:
        """Return the results that a folder has already, of other phases."""
        results = cls(out, origin)
        if (out / "runs.json").is_file():
            there = json.loads((out / "runs.json").read_text(encoding="utf-8"))
            results.runs, results.unfinished = there["runs"], there["unfinished"]
            results.alone = there["seconds_alone"]
            results.predictions = read_predictions(out)
        return results

    def add(
        self,
        entry: dict[str, Any],
        predictions: np.ndarray[Any, Any] | None,
        labels: np.ndarray[Any, Any] | None,
    ) -> None:
        """Add a finished run in place of an earlier one of its name and seed."""
        self.runs = sorted([*(run for run in self.runs if _key(run) != _key(entry)), entry], key=_position)
        self.unfinished = [run for run in self.unfinished if _key(run) != _key(entry)]
        if predictions is not None and labels is not None:
            self.predictions |= {_key(entry): predictions, "labels": labels}

    def add_unfinished(self, name: str, seed: int, phase: str, state: str, epochs: int, error: str) -> None:
        """Note a run that has not been trained to its end, and why."""
        entry = {"run": name, "seed": seed, "phase": phase, "state": state, "epochs": epochs, "error": error}
        if _key(entry) not in {_key(run) for run in self.runs}:
            self.unfinished = [*(run for run in self.unfinished if _key(run) != _key(entry)), entry]

    def write(self, seconds: float) -> None:
        """Write both files.

        Args:
            seconds: since the call began.
        """
        if self.predictions:
            part = self.out / "predictions.part"
            with part.open("wb") as file:
                np.savez_compressed(file, **self.predictions)  # type: ignore[arg-type]
            part.replace(self.out / "predictions.npz")
        values = {
            **self.origin,
            "seconds": round(seconds, 1),
            "baseline": BASELINE,
            "runs": self.runs,
            "unfinished": self.unfinished,
            "gains": self.gains,
            "seconds_alone": self.alone,
            "budget": self.budget,
        }
        write_json(self.out / "runs.json", values)

    def summary(self, phase: str) -> Iterator[str]:
        """Yield the mean and the seeds of every variant of a phase."""
        for name in dict.fromkeys(run["run"] for run in self.runs if run["phase"] == phase):
            values = [run["balanced_accuracy"] for run in self.runs if run["run"] == name]
            yield f"{name}: {statistics.fmean(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"


def _baseline_of(name: str) -> str:
    """Return the baseline at the imbalance factor of a run."""
    return BASELINE + "".join(name.partition(", imbalance ")[1:])


def read_predictions(out: Path) -> Predictions:
    """Return the predictions of a folder of results; none where there are none."""
    if not (out / "predictions.npz").is_file():
        return {}
    with np.load(out / "predictions.npz") as stored:
        return {name: stored[name] for name in stored.files}


def merge(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the results of several calls as one file of ``benchmarks/results``.

    Args:
        folders: what each call wrote under its ``--out``; of runs of one name and seed the last is taken.

    Raises:
        LongtailError: a folder has no results, or they are of other test images.
    """
    for folder in folders:
        if not (folder / "runs.json").is_file():
            raise LongtailError(f"--merge {folder}: has no runs.json; give what --out was")
    runs: dict[str, dict[str, Any]] = {}
    predictions: Predictions = {}
    calls = [json.loads((folder / "runs.json").read_text(encoding="utf-8")) for folder in folders]
    for folder, call in zip(folders, calls, strict=True):
        runs |= {_key(entry): entry for entry in call["runs"]}
        predictions |= read_predictions(folder)
    ordered = sorted(runs.values(), key=_position)
    if len({entry["test_images"] for entry in ordered}) > 1:
        raise LongtailError("--merge: the folders have results of several sets of test images; merge those of one set")
    last = calls[-1]
    return {
        "command": [call["command"] for call in calls],
        "commit": list(dict.fromkeys(call["commit"] for call in calls)),
        "hardware": last["hardware"],
        "seconds": [call["seconds"] for call in calls],
        "settings": last["budget"].get("settings", {}),
        "gains": last["gains"],
        "seconds_alone": {name: value for call in calls for name, value in call["seconds_alone"].items()},
        "baseline": BASELINE,
        "columns": {"views": "student views a step", "paper": "paper"},
        "runs": ordered,
        "differences": paired_differences(ordered, predictions),
    }


def paired_differences(runs: Sequence[Mapping[str, Any]], predictions: Predictions) -> list[dict[str, Any]]:
    """Return the differences in accuracy of runs of the same seeds, with 95 % intervals over test images.

    The interval is that of a bootstrap that draws test images; the spread of the seeds is not in it.
    """
    names = list(dict.fromkeys(run["run"] for run in runs))
    pairs = [(name, baseline) for name in names if name != (baseline := _baseline_of(name))] + list(PAIRS)
    seeds = {name: [run["seed"] for run in runs if run["run"] == name] for name in names}
    found: list[dict[str, Any]] = []
    for name, other in pairs:
        common = [
            seed
            for seed in seeds.get(name, [])
            if seed in seeds.get(other, []) and {f"{name}, seed {seed}", f"{other}, seed {seed}"} <= predictions.keys()
        ]
        if not common:
            continue
        right = [
            predictions[f"{each}, seed {seed}"] == predictions["labels"] for each in (name, other) for seed in common
        ]
        gaps = np.array(right[: len(common)], dtype=float) - np.array(right[len(common) :], dtype=float)
        by_image = 100 * gaps.mean(axis=0)
        random = np.random.default_rng(0)
        drawn = [by_image[random.integers(0, len(by_image), len(by_image))].mean() for _ in range(_RESAMPLES)]
        low, high = np.percentile(drawn, [2.5, 97.5])
        found.append(
            {
                "run": name,
                "baseline": other,
                "mean": round(float(by_image.mean()), 2),
                "low": round(float(low), 2),
                "high": round(float(high), 2),
                "by_seed": [round(float(100 * gap.mean()), 2) for gap in gaps],
            }
        )
    return found
