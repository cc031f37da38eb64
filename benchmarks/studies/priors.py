"""Class frequencies where they are not the training set's: what is an estimate of them worth?

Logit adjustment on CIFAR-100-LT with 50 validation images a class. The test set is weighed to other frequencies, and
the accuracy there told under the uniform prior, the true one, and every estimate: maximum a posteriori (what
``--prior estimate`` does), EM and black-box, with the validation images and without.

Command:
    python benchmarks/studies/priors.py --seeds 3      (--out FOLDER of the runs, --root DATA, --json FILE)
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import parser, train

from longtail.config import load_recipe
from longtail.data.sources import load_data
from longtail.engine.evaluate import evaluate
from longtail.evaluation.priors import long_tailed_prior

BUDGET = "ResNet-20, logit adjustment, 40 epochs, batch 128, crop and mirror, one-cycle; 50 validation images a class."
COLUMNS = {
    "uniform": "uniform",
    "target": "the truth",
    "target, corrected": "the truth, scores corrected",
    "estimate": "map",
    "em": "em",
    "bbse": "bbse",
}


def targets(names: tuple[str, ...], counts: list[int], seed: int) -> dict[str, list[float]]:
    """Return class frequencies by a name that says what they are."""
    forward = torch.tensor(long_tailed_prior(counts, "forward", 100))
    shuffled = forward[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    return {
        "the training set's tail, 100": forward.tolist(),
        "all classes alike": [1 / len(names)] * len(names),
        "its reverse, 10": long_tailed_prior(counts, "backward", 10),
        "its reverse, 100": long_tailed_prior(counts, "backward", 100),
        "a tail in another order, 100": shuffled.tolist(),
    }


def look(run: Path, seed: int, names: tuple[str, ...], counts: list[int]) -> dict[str, dict[str, float]]:
    """Return the accuracy at every target under every prior, and how well the estimates' intervals hold the truth."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # the same recogniser without what it made of its validation images
        bare = Path(folder) / "bare"
        shutil.copytree(run, bare, ignore=shutil.ignore_patterns("last.ckpt", "validation.safetensors"))
        for title, wanted in targets(names, counts, seed).items():
            file = Path(folder) / "target.json"
            file.write_text(json.dumps(dict(zip(names, wanted, strict=True))))
            judged = evaluate(run, "estimate", target=str(file))
            found[title] = {column: judged["priors"][prior]["target_accuracy"] for prior, column in COLUMNS.items()}
            without = evaluate(bare, "estimate", target=str(file))
            for prior in ("estimate", "em"):
                found[title][f"{COLUMNS[prior]}, no validation"] = without["priors"][prior]["target_accuracy"]
            for method, entry in judged["estimates"].items():
                held = [low <= q <= high for q, low, high in zip(wanted, entry["low"], entry["high"], strict=True)]
                found[title][f"held by {method}"] = 100 * sum(held) / len(held)
    return found


def main() -> None:
    given = parser(__doc__).parse_args()
    torch.set_num_threads(given.threads)
    base = load_recipe("cifar100-lt").config.replace(
        method="la",
        network="resnet20",
        epochs=40,
        validate_every=10,
        data={"root": given.root, "augment": "cifar-plain", "val_fraction": 0.1},
        schedule={"name": "one-cycle", "warmup": 0.0},
    )
    seeds = []
    for seed in range(given.seeds):
        config = base.replace(seed=seed)
        data = load_data(config.data, seed)
        run = train(config, given.out / f"la-seed{seed}", given.out / "teachers", data)
        seeds.append({"recogniser": {"balanced accuracy": run.metrics["balanced_accuracy"]}})
        seeds[-1] |= look(run.folder, seed, data.class_names, data.class_counts)
    summary: dict[str, Any] = {
        title: {
            name: [
                round(statistics.fmean(values), 2),
                round(statistics.stdev(values), 2) if len(values) > 1 else None,
            ]
            for name in seeds[0][title]
            for values in [[seed[title][name] for seed in seeds]]
        }
        for title in seeds[0]
    }
    made = {
        "command": f"python benchmarks/studies/priors.py --seeds {given.seeds}",
        "budget": BUDGET,
        "mean and deviation": summary,
        "seeds": seeds,
    }
    print(json.dumps(made["mean and deviation"], indent=1, ensure_ascii=False))
    if given.json:
        given.json.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
