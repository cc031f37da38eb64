"""What do the methods that touch only a trained encoder's head make of cross-entropy, of gml, and of distillation?

Post-hoc logit adjustment, τ-normalisation (τ = 1: CIFAR-100-LT has no validation images to choose it with), learnable
weight scaling and classifier re-training, and gml's mixture joined with its classifier (gml.join_weight), on finished
runs of benchmarks/studies/methods.py (plain) and of parts.py (distilled; digits). No encoder is trained.

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

from longtail.config import read_config
from longtail.engine.books import read_metrics
from longtail.engine.evaluate import open_finished
from longtail.engine.finished import finished, record
from longtail.engine.judge import judge
from longtail.engine.rebalance import How, Settings, rebalance
from longtail.evaluation.comparison import Record, markdown
from longtail.recognizer import Recognizer

HEADS: dict[str, dict[str, dict[str, How]]] = {
    "plain": {
        "ce": {"τ-normalisation": "tau", "LWS": "lws", "cRT": "crt"},
        "la": {},
        "gml": {"τ-normalisation": "tau", "LWS": "lws", "cRT": "crt"},
    },
    "distilled": {"la distilled": {"cRT": "crt"}, "gml distilled": {"cRT": "crt"}},
    "digits": {"la distilled": {"cRT": "crt"}, "gml distilled": {"cRT": "crt"}},
}
JOINED = (0.5, 1.0)


def joined(folder: Path, root: str | None, weight: float) -> dict[str, Any]:
    """Return the metrics of a finished run of gml with its mixture joined to its classifier."""
    recognizer, config, data = open_finished(folder, root)
    method = load_gml(folder, data, config.replace(gml={"join_weight": weight}))
    head = method.head(method.classifier)
    return judge(Recognizer(method.encoder, head, recognizer.card), data.test, config)["uniform"]


def judged_by(entry: Record, judged: dict[str, Any], method: str) -> Record:
    """Return a run's record with the metrics of another head or prior."""
    values = {name: judged[name] for name in ("balanced_accuracy", "top1", "many", "medium", "few")}
    return dataclasses.replace(entry, method=method, predicts_under="uniform", **values)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("study", choices=list(HEADS))
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    records: list[Record] = []
    for seed in range(given.seeds):
        for method, heads in HEADS[given.study].items():
            folder: Path = given.out / f"{method.replace(' ', '-')}-seed{seed}"
            run = finished(folder, read_config(folder / "config.yaml"))
            assert run is not None, folder
            plain = dataclasses.replace(record(run), method=method)
            records.append(plain)
            if method == "ce":
                records.append(judged_by(plain, run.judged["uniform"], "ce + post-hoc la"))
            if method.startswith("gml"):
                records += [
                    judged_by(plain, joined(folder, given.root, weight), f"{method}, joined at {weight:g}")
                    for weight in JOINED
                ]
            for name, how in heads.items():
                out = folder.with_name(f"{folder.name}-{how}")
                if not (out / "metrics.jsonl").is_file():
                    shutil.rmtree(out, ignore_errors=True)
                    rebalance(folder, out, Settings(how), given.root)
                judged = read_metrics(out / "metrics.jsonl")[-1]["uniform"]
                records.append(judged_by(plain, judged, f"{method} + {name}"))
                print(f"{method} + {name} seed {seed}: {judged['balanced_accuracy']:.2f}", file=sys.stderr, flush=True)
    command = f"python benchmarks/studies/decoupled.py {given.study} --seeds {given.seeds}"
    budget = "the encoders of the studies above; heads: 4 augmented views of every image, 10 passes or 2,000 steps"
    baseline = "la" if given.study == "plain" else "la distilled"
    print("\n".join(markdown(records, baseline)))
    if given.json:
        write(given.json, command, budget, records, baseline)


if __name__ == "__main__":
    main()
