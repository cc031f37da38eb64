"""What the studies share: variants of one recipe × seeds, trained run by run, written down as they end.

What is done is not done again, so a study can be stopped at any time and the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longtail.config import Config, load_recipe
from longtail.data.dataset import LongTailedData
from longtail.data.sources import load_data
from longtail.engine.choices import resolve
from longtail.engine.finished import finished, record
from longtail.engine.fit import Run, fit
from longtail.evaluation.comparison import Record, markdown

Variant = Mapping[str, Any]
"""Changes of a recipe: fields, and sections as dicts."""


def cifar(root: str | None, epochs: int = 16, imbalance: float = 100) -> Config:
    """Return the budget for two cores on CIFAR-100-LT: ResNet-8 student, ResNet-14 teacher, one student view.

    Crop and mirror alone, a one-cycle schedule: AutoAugment and a multi-step schedule need longer trainings than two
    cores allow.
    """
    config = load_recipe("cifar100-lt").config.replace(
        network="resnet8",
        epochs=epochs,
        data={"root": root, "augment": "cifar-plain", "imbalance": imbalance},
        schedule={"name": "one-cycle", "warmup": 0.0},
        gml={"share_query": True, "distillation_weight": 0.0},
    )
    return config.replace(teacher={"network": "resnet14", "epochs": epochs, "cache": 4})


def digits(epochs: int = 200) -> Config:
    """Return digits-lt as it is, without distillation where a variant has none."""
    config = load_recipe("digits-lt").config.replace(epochs=epochs, teacher={"epochs": epochs})
    return config.replace(gml={"distillation_weight": 0.0})


def changed(config: Config, variant: Variant) -> Config:
    """Return a recipe with a variant's changes."""
    return config.replace(**variant)


def parser(doc: str) -> argparse.ArgumentParser:
    """Return the options that all studies have."""
    options = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path, required=True, help="folder of the runs")
    options.add_argument("--json", type=Path, help="file of the results")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--root", help="folder of CIFAR-100, for the studies that use it")
    options.add_argument("--only", help="variants, with commas between them; the others are left for another time")
    return options


def train(config: Config, folder: Path, teachers: Path, data: LongTailedData) -> Run:
    """Return a run, trained now or found."""
    config = resolve(config, data)
    return finished(folder, config) or fit(config, folder, resume=True, quiet=True, teachers=teachers, data=data)


def study(
    base: Config,
    variants: Mapping[str, Variant],
    given: argparse.Namespace,
    *,
    command: str,
    budget: str,
    baseline: str | None = None,
    factors: Mapping[float, Variant] | None = None,
    further: Callable[[str, Run, LongTailedData], Sequence[Record]] = lambda _name, _run, _data: (),
) -> list[Record]:
    """Train every variant with every seed, seed by seed, and print the table.

    Args:
        base: the recipe.
        variants: by name.
        given: the options of :func:`parser`.
        command: what makes this table, as it stands in the results.
        budget: what every run was given, as it stands under the table.
        baseline: the variant that the others are compared with; every pair if not given.
        factors: imbalance factors, with what else changes under each.
        further: makes more records of a run.
    """
    torch.set_num_threads(given.threads)
    names = given.only.split(",") if given.only else list(variants)
    records: list[Record] = []
    data, loaded = None, None
    settings: dict[float | None, Variant] = {None: {}} if factors is None else dict(factors.items())
    cells = itertools.product(settings, range(given.seeds), names)
    for factor, seed, name in cells:
        config = changed(base, variants[name]).replace(seed=seed)
        if factor is not None:
            config = changed(config, settings[factor]).replace(data={"imbalance": factor})
        if data is None or (config.data, seed) != loaded:
            data, loaded = load_data(config.data, seed), (config.data, seed)
        where = "" if factor is None else f"-imbalance{factor:g}"
        folder = given.out / (re.sub(r"\W+", "-", name) + f"{where}-seed{seed}")
        run = train(config, folder, given.out / "teachers", data)
        made = [dataclasses.replace(record(run), method=name), *further(name, run, data)]
        records += [dataclasses.replace(entry, imbalance=factor) for entry in made]
        print(f"{name}{where} seed {seed}: {made[0].balanced_accuracy:.2f}", file=sys.stderr, flush=True)
        if given.json and not given.only:
            write(given.json, command, budget, records, baseline)
    print("\n".join(markdown(records, baseline)))
    return records


def write(path: Path, command: str, budget: str, records: Sequence[Record], baseline: str | None) -> None:
    """Write a study's results: the command, the budget, and a record a run."""
    made = {
        "command": command,
        "budget": budget,
        "hardware": f"2 CPU cores, torch {torch.__version__.partition('+')[0]}",
        "baseline": baseline,
        "records": [dataclasses.asdict(entry) for entry in records],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n")
