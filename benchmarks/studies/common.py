"""Shared by the studies: train variants of one recipe with several seeds, and write the results after every run.

Finished runs are not repeated, so a study can be stopped at any time and continued with the same command.
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
from longtail.experiments.records import Record, markdown, run_record
from longtail.registry import TASKS
from longtail.training.auto_config import auto_config
from longtail.training.run_io import Run, find_finished
from longtail.training.trainer import fit

Variant = Mapping[str, Any]
"""Changes of a recipe: fields, and sections as dicts."""
SeedVariant = Callable[[int], Variant]
"""Changes that depend on the seed."""


def cifar(root: str | None, epochs: int = 16, imbalance: float = 100) -> Config:
    """Return CIFAR-100-LT on a budget for two cores: ResNet-8 student, ResNet-14 teacher, one student view.

    Only crop and flip, and a one-cycle schedule: AutoAugment and a multi-step schedule need longer trainings than two
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
    """Return digits-lt, without distillation unless a variant sets it."""
    config = load_recipe("digits-lt").config.replace(epochs=epochs, teacher={"epochs": epochs})
    return config.replace(gml={"distillation_weight": 0.0})


def changed(config: Config, variant: Variant) -> Config:
    """Return a recipe with the changes of a variant."""
    return config.replace(**variant)


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all studies."""
    options = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path, required=True, help="folder of the runs")
    options.add_argument("--json", type=Path, help="file of the results")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--root", help="folder of CIFAR-100, for the studies that use it")
    options.add_argument("--only", help="names of the variants to train, separated by commas; all if not given")
    return options


def train(config: Config, folder: Path, teachers: Path, data: LongTailedData) -> Run:
    """Return a run: the finished one of the folder, or trained now."""
    config, _ = auto_config(config, data)
    return find_finished(folder, config) or fit(config, folder, resume=True, quiet=True, teachers=teachers, data=data)


def study(
    base: Config,
    variants: Mapping[str, Variant | SeedVariant],
    args: argparse.Namespace,
    *,
    command: str,
    budget: str,
    baseline: str | None = None,
    factors: Mapping[float, Variant] | None = None,
    record: Callable[[Run], Record] = run_record,
    further: Callable[[str, Run, LongTailedData], Sequence[Record]] = lambda _name, _run, _data: (),
) -> list[Record]:
    """Train every variant with every seed, seed by seed, and print the table.

    Args:
        base: the recipe.
        variants: by name; functions of the seed, if another run with the same seed is a part of them.
        args: the options of :func:`parser`.
        command: the command of this study, for the results file.
        budget: network, epochs and batch size of the runs, for the results file.
        baseline: the variant that the others are compared with; every pair if None.
        factors: imbalance factors, with further changes of the recipe for each.
        record: returns the record of a run.
        further: returns additional records of a run.
    """
    torch.set_num_threads(args.threads)
    names = args.only.split(",") if args.only else list(variants)
    records: list[Record] = []
    data, loaded = None, None
    settings: dict[float | None, Variant] = {None: {}} if factors is None else dict(factors.items())
    cells = itertools.product(settings, range(args.seeds), names)
    for factor, seed, name in cells:
        variant = variants[name]
        config = changed(base, variant(seed) if callable(variant) else variant).replace(seed=seed)
        if factor is not None:
            config = changed(config, settings[factor]).replace(data={"imbalance": factor})
        if data is None or (config.data, seed) != loaded:
            data, loaded = load_data(config.data, seed), (config.data, seed)
        where = "" if factor is None else f"-imbalance{factor:g}"
        folder = args.out / (re.sub(r"\W+", "-", name) + f"{where}-seed{seed}")
        run = train(config, folder, args.out / "teachers", data)
        entry = dataclasses.replace(record(run), method=name)
        records += [dataclasses.replace(each, imbalance=factor) for each in (entry, *further(name, run, data))]
        main = TASKS[entry.task].columns[0][0]
        print(f"{name}{where} seed {seed}: {entry.metrics[main]:.2f}", file=sys.stderr, flush=True)
        if args.json:
            write(args.json, command, budget, records, baseline)
    print("\n".join(markdown(records, baseline)))
    return records


def write(path: Path, command: str, budget: str, records: Sequence[Record], baseline: str | None) -> None:
    """Write the results of a study: command, budget, and one record per run."""
    results = {
        "command": command,
        "budget": budget,
        "hardware": f"2 CPU cores, torch {torch.__version__.partition('+')[0]}",
        "baseline": baseline,
        "records": [entry.to_dict() for entry in records],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
