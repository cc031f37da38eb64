"""Several methods, several seeds, one recipe: trained run by run; what is done is not done again."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from longtail.config import Config, read_config
from longtail.data.dataset import LongTailedData
from longtail.data.sources import load_data
from longtail.engine.books import read_metrics
from longtail.engine.choices import resolve
from longtail.engine.files import FORMAT
from longtail.engine.fit import Run, fit
from longtail.errors import LongtailError, nearest
from longtail.evaluation.comparison import Record
from longtail.files import write_json
from longtail.methods import METHODS, method_class
from longtail.recognizer import Recognizer

Match = Literal["passes", "epochs"]


def plan(config: Config, methods: Sequence[str], seeds: Sequence[int], match: Match) -> list[Config]:
    """Return the settings of every run, seed by seed.

    Args:
        config: the recipe.
        methods: names of the methods.
        seeds: seeds, the same for every method, so that their differences are paired.
        match: ``passes`` gives every method as many student passes as the hungriest of them has in the recipe's epochs;
            ``epochs`` gives all the recipe's epochs.

    Raises:
        LongtailError: an unknown method, or one named twice.
    """
    for name in methods:
        if name not in METHODS:
            raise LongtailError(f"--methods: '{name}' is not known{nearest(name, METHODS)}")
    if len(set(methods)) < len(methods) or not methods:
        raise LongtailError(f"--methods: expected different names, got {','.join(methods)}")
    assert isinstance(config.epochs, int)
    views = {name: method_class(name).student_views(config) for name in methods}
    most = max(views.values())
    epochs = {
        name: round(config.epochs * most / views[name]) if match == "passes" else config.epochs for name in methods
    }
    runs = []
    for seed in seeds:
        for name in methods:
            run = config.replace(method=name, seed=seed, epochs=epochs[name])
            # the teacher is the recipe's, whatever its student's epochs become
            runs.append(run.replace(teacher={"epochs": config.teacher.epochs or config.epochs}))
    return runs


def compare(
    config: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    match: Match = "passes",
    overwrite: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = lambda _line: None,
) -> list[Record]:
    """Train every method with every seed and return one record a run.

    Args:
        config: the recipe.
        methods: names of the methods.
        seeds: seeds.
        out: folder that holds the runs, ``METHOD-seedN`` each; what is finished there is read, not trained again.
        match: see :func:`plan`.
        overwrite: train everything anew.
        quiet: show no progress bars.
        say: told of every run that ends.

    Raises:
        LongtailError: an input cannot be used, or ``out`` holds runs with other settings.
    """
    data: LongTailedData | None = None
    if config.epochs == "auto":
        data = load_data(config.data, seeds[0])
        config = config.replace(epochs=resolve(config, data).epochs)
    runs = plan(config, methods, seeds, match)
    data = load_data(config.data, seeds[0]) if data is None else data  # before anything is removed
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LongtailError("compare: is run by one process; give every training torchrun of its own")
    if overwrite and out.exists():
        if any(out.iterdir()) and not (out / "comparison.json").is_file():
            raise LongtailError(f"{out}: is not empty and no comparison of longtail; choose another --out")
        shutil.rmtree(out)
    if out.exists() and any(out.iterdir()) and not (out / "comparison.json").is_file():
        raise LongtailError(f"{out}: is not empty and no comparison of longtail; choose another --out")
    records: list[Record] = []
    for position, planned in enumerate(runs):
        folder = out / f"{planned.method}-seed{planned.seed}"
        if data is None or (position > 0 and planned.seed != runs[position - 1].seed):
            data = load_data(planned.data, planned.seed)
        if position == 0:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LongtailError(f"{out}: cannot be made: {error.strerror}") from None
            write_json(out / "comparison.json", {"format": FORMAT, "recipe": config.to_dict()})
        run = resolve(planned, data)
        done = finished(folder, run) or fit(run, folder, resume=True, quiet=quiet, teachers=out / "teachers", data=data)
        records.append(record(done))
        say(f"{position + 1}/{len(runs)} {run.method} seed {run.seed}: balanced accuracy {_percent(records[-1])}")
    return records


def _percent(record: Record) -> str:
    return f"{record.balanced_accuracy:.1f} %, {record.seconds:.0f} s"


def finished(folder: Path, config: Config) -> Run | None:
    """Return a run that ended with these very settings."""
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines or lines[-1]["kind"] != "test" or read_config(folder / "config.yaml") != config:
        return None
    card = Recognizer.load(folder).card
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
    values = {name: run.metrics[name] for name in ("balanced_accuracy", "top1", "many", "medium", "few")}
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


def as_json(records: Sequence[Record]) -> list[dict[str, object]]:
    """Return the records as plain values."""
    return [dataclasses.asdict(entry) for entry in records]
