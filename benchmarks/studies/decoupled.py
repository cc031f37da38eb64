"""What do the methods that touch only a trained encoder's head make of cross-entropy, and of gml?

Post-hoc logit adjustment, τ-normalisation (τ = 1: CIFAR-100-LT has no validation images to choose it with), learnable
weight scaling and classifier re-training, on finished runs of benchmarks/studies/methods.py. No encoder is trained.

Command:
    python benchmarks/studies/decoupled.py --seeds 3      (--out FOLDER of those runs, --root DATA)
with --json FILE.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from common import parser, write

from longtail.config import read_config
from longtail.engine.books import read_metrics
from longtail.engine.compare import finished, record
from longtail.engine.rebalance import Settings, rebalance
from longtail.evaluation.comparison import Record, markdown

HEADS = {"τ-normalisation": "tau", "LWS": "lws", "cRT": "crt"}


def judged_by(entry: Record, judged: dict[str, Any], method: str) -> Record:
    """Return a run's record with the metrics of another head or prior."""
    values = {name: judged[name] for name in ("balanced_accuracy", "top1", "many", "medium", "few")}
    return dataclasses.replace(entry, method=method, predicts_under="uniform", **values)


def main() -> None:
    given = parser(__doc__).parse_args()
    torch.set_num_threads(given.threads)
    records: list[Record] = []
    for seed in range(given.seeds):
        for method in ("ce", "la", "gml"):
            folder: Path = given.out / f"{method}-seed{seed}"
            run = finished(folder, read_config(folder / "config.yaml"))
            assert run is not None, folder
            plain = record(run)
            records.append(plain)
            if method == "ce":
                records.append(judged_by(plain, run.judged["uniform"], "ce + post-hoc la"))
            if method == "la":
                continue
            for name, how in HEADS.items():
                out = given.out / f"{method}-seed{seed}-{how}"
                if not (out / "metrics.jsonl").is_file():
                    shutil.rmtree(out, ignore_errors=True)
                    rebalance(folder, out, Settings(how), given.root)  # type: ignore[arg-type]
                judged = read_metrics(out / "metrics.jsonl")[-1]["uniform"]
                records.append(judged_by(plain, judged, f"{method} + {name}"))
                print(
                    f"{records[-1].method} seed {seed}: {records[-1].balanced_accuracy:.2f}",
                    file=sys.stderr,
                    flush=True,
                )
    command = f"python benchmarks/studies/decoupled.py --seeds {given.seeds}"
    budget = "the encoders of the methods' study; heads: 4 augmented views of every image, 10 passes or 2,000 steps"
    print("\n".join(markdown(records, "la")))
    if given.json:
        write(given.json, command, budget, records, "la")


if __name__ == "__main__":
    main()
