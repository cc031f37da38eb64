"""Methods that change only the head of a trained encoder, on encoders of cross-entropy, gml and distilled runs.

Post-hoc logit adjustment, τ-normalisation (τ = 1: CIFAR-100-LT has no validation images to choose it with), learnable
weight scaling and classifier re-training, and the ensemble of gml's mixture and classifier (gml.ensemble_weight), on
finished runs of benchmarks/studies/methods.py (plain) and of parts.py (distilled; digits). No encoder is trained.

Commands:
    python benchmarks/studies/decoupled.py plain --seeds 3          (--out FOLDER of those runs, --root DATA)
    python benchmarks/studies/decoupled.py distilled --seeds 3
    python benchmarks/studies/decoupled.py digits --seeds 3
each with --json FILE.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from common import parser, write
from features import load_gml

from longtail.experiments.rebalance import RebalanceSettings, rebalance
from longtail.experiments.records import Record, markdown, run_record
from longtail.inference.recognizer import Recognizer
from longtail.tasks.evaluate import evaluate_split
from longtail.tasks.loading import load_run
from longtail.training.metric_log import read_metrics
from longtail.training.run_io import read_finished
from longtail.training.second_stage import HeadMethod

HEADS: dict[str, dict[str, dict[str, HeadMethod]]] = {
    "plain": {
        "ce": {"τ-normalisation": "tau", "LWS": "lws", "cRT": "crt"},
        "la": {},
        "gml": {"τ-normalisation": "tau", "LWS": "lws", "cRT": "crt"},
    },
    "distilled": {"la distilled": {"cRT": "crt"}, "gml distilled": {"cRT": "crt"}},
    "digits": {"la distilled": {"cRT": "crt"}, "gml distilled": {"cRT": "crt"}},
}
ENSEMBLE_WEIGHTS = (0.5, 1.0)


def ensemble_metrics(folder: Path, root: str | None, weight: float) -> dict[str, Any]:
    """Return the metrics of a finished run of gml that predicts with the ensemble of mixture and classifier."""
    model, config, data = load_run(folder, root)
    method = load_gml(folder, data, config.replace(gml={"ensemble_weight": weight}))
    head = method.head(method.classifier)
    return evaluate_split(Recognizer(method.encoder, head, model.config), data.test, config)["uniform"]


def with_metrics(entry: Record, metrics: dict[str, Any], method: str) -> Record:
    """Return a record with the metrics of another head or prior."""
    values = {name: metrics[name] for name in ("balanced_accuracy", "top1", "many", "medium", "few")}
    return dataclasses.replace(entry, method=method, predicts_under="uniform", metrics=values)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("study", choices=list(HEADS))
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    records: list[Record] = []
    for seed in range(args.seeds):
        for method, heads in HEADS[args.study].items():
            folder: Path = args.out / f"{method.replace(' ', '-')}-seed{seed}"
            run = read_finished(folder)
            plain = dataclasses.replace(run_record(run), method=method)
            records.append(plain)
            if method == "ce":
                records.append(with_metrics(plain, run.test_metrics["uniform"], "ce + post-hoc la"))
            if method.startswith("gml"):
                records += [
                    with_metrics(
                        plain, ensemble_metrics(folder, args.root, weight), f"{method}, ensemble, weight {weight:g}"
                    )
                    for weight in ENSEMBLE_WEIGHTS
                ]
            for name, rebalance_method in heads.items():
                out = folder.with_name(f"{folder.name}-{rebalance_method}")
                if not (out / "metrics.jsonl").is_file():
                    shutil.rmtree(out, ignore_errors=True)
                    rebalance(folder, out, RebalanceSettings(method=rebalance_method), args.root)
                metrics = read_metrics(out / "metrics.jsonl")[-1]["uniform"]
                records.append(with_metrics(plain, metrics, f"{method} + {name}"))
                accuracy = metrics["balanced_accuracy"]
                print(f"{method} + {name} seed {seed}: {accuracy:.2f}", file=sys.stderr, flush=True)
    command = f"python benchmarks/studies/decoupled.py {args.study} --seeds {args.seeds}"
    budget = "the encoders of that study; heads: 4 augmented views of every image, 10 passes or 2,000 steps"
    baseline = "la" if args.study == "plain" else "la distilled"
    print("\n".join(markdown(records, baseline)))
    if args.json:
        write(args.json, command, budget, records, baseline)


if __name__ == "__main__":
    main()
