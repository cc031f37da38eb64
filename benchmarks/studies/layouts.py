"""Accuracy of GML with different layouts of its views, at equal student passes.

Every layout passes as many images through the student, forward and backward, as the paper's: one with a single student
view trains for twice the epochs. Seeds are paired, and the teacher of a seed is the same for all layouts. Finished runs
are not repeated, so the study can be stopped at any time.

Commands:
    python benchmarks/studies/layouts.py digits --out runs/layouts-digits --json benchmarks/results/layouts-digits.json
    python benchmarks/studies/layouts.py cifar --root DATA --out runs/layouts-cifar \
        --json benchmarks/results/layouts-cifar.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import train

from longtail.config import Config, load_recipe
from longtail.data.sources import load_data
from longtail.experiments.records import markdown, run_record
from longtail.methods.gml import GML

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {"gml": {"share_query": False}},
    "share key": {"gml": {"share_query": False, "share_key": True}},
    "share query": {"gml": {"share_query": True}},
    "share both": {"gml": {"share_key": True, "share_query": True}},
    "classify all": {"classifier": {"every_view": True}, "gml": {"share_query": False}},
    "cache 4": {"teacher": {"cache": 4}, "gml": {"share_query": False}},
    "cache 4, share query": {"teacher": {"cache": 4}, "gml": {"share_query": True}},
}


def base(name: str, root: str | None) -> Config:
    """Return the recipe of the study: digits-lt with fewer epochs, or CIFAR-100-LT on a budget for two cores."""
    if name == "digits":
        return load_recipe("digits-lt").config.replace(epochs=100, gml={"distillation_weight": 0.0})
    config = load_recipe("cifar100-lt").config
    config = config.replace(network="resnet8", epochs=10, data={"root": root}, schedule={"warmup": 0.05})
    return config.replace(teacher={"network": "resnet14", "epochs": 10})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("study", choices=["digits", "cifar"])
    parser.add_argument("--root", help="folder of CIFAR-100")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    config = base(args.study, args.root)
    epochs = config.epochs
    assert isinstance(epochs, int)
    config = config.replace(teacher={"epochs": config.teacher.epochs or epochs})
    records = []
    for seed in range(args.seeds):
        data = load_data(config.data, seed)
        for layout, changes in LAYOUTS.items():
            changed = config.replace(seed=seed, **changes)
            changed = changed.replace(epochs=epochs * 2 // GML.view_plan(changed).num_student)
            folder = args.out / f"{layout.replace(' ', '-').replace(',', '')}-seed{seed}"
            run = train(changed, folder, args.out / "teachers", data)
            records.append(dataclasses.replace(run_record(run), method=layout))
            print(f"{layout} seed {seed}: {records[-1].metrics['balanced_accuracy']:.2f}", file=sys.stderr, flush=True)
    results = {
        "command": f"python benchmarks/studies/layouts.py {args.study} --seeds {args.seeds}",
        "torch": torch.__version__,
        "baseline": "paper",
        "records": [entry.to_dict() for entry in records],
    }
    print("\n".join(markdown(records, results["baseline"])))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
