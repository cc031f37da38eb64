"""Accuracy under label shift with the true class frequencies and with estimated ones.

Logit adjustment on CIFAR-100-LT with 50 validation images per class. The test set is weighted to other class
frequencies, and accuracy is computed under the uniform prior, the true one, and every estimate: maximum a posteriori
(``--prior estimate``), EM and black-box shift estimation, with the validation images and without.

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
from longtail.evaluation.class_frequencies import resolve_class_frequencies
from longtail.experiments.evaluate import evaluate

BUDGET = "ResNet-20, logit adjustment, 40 epochs, batch 128, crop and mirror, one-cycle; 50 validation images a class."
COLUMNS = {
    "uniform": "uniform",
    "target": "true frequencies",
    "target, corrected": "true frequencies, scores corrected",
    "estimate": "map",
    "em": "em",
    "bbse": "bbse",
}


def test_priors(names: tuple[str, ...], counts: list[int], seed: int) -> dict[str, list[float]]:
    """Return class frequencies of the test set by their title in the table."""

    def frequencies(spec: str, imbalance: float) -> list[float]:
        return resolve_class_frequencies(spec, names, counts, imbalance=imbalance)

    forward = torch.tensor(frequencies("forward", 100))
    shuffled = forward[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    return {
        "the training set's tail, 100": forward.tolist(),
        "all classes alike": [1 / len(names)] * len(names),
        "its reverse, 10": frequencies("backward", 10),
        "its reverse, 100": frequencies("backward", 100),
        "a tail in another order, 100": shuffled.tolist(),
    }


def measure(run: Path, seed: int, names: tuple[str, ...], counts: list[int]) -> dict[str, dict[str, float]]:
    """Return accuracies for every test prior under every prior, and how often intervals contain the true frequency."""
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # the same model without the statistics of its validation images
        without_validation = Path(folder) / "without-validation"
        shutil.copytree(run, without_validation, ignore=shutil.ignore_patterns("last.ckpt", "validation.safetensors"))
        for title, frequencies in test_priors(names, counts, seed).items():
            file = Path(folder) / "target.json"
            file.write_text(json.dumps(dict(zip(names, frequencies, strict=True))))
            metrics = evaluate(run, "estimate", test_prior=str(file))
            results[title] = {column: metrics["priors"][prior]["target_accuracy"] for prior, column in COLUMNS.items()}
            uncorrected = evaluate(without_validation, "estimate", test_prior=str(file))
            for prior in ("estimate", "em"):
                results[title][f"{COLUMNS[prior]}, no validation"] = uncorrected["priors"][prior]["target_accuracy"]
            for method, entry in metrics["estimates"].items():
                bounds = zip(frequencies, entry["low"], entry["high"], strict=True)
                contained = [low <= frequency <= high for frequency, low, high in bounds]
                results[title][f"held by {method}"] = 100 * sum(contained) / len(contained)
    return results


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    base = load_recipe("cifar100-lt").config.replace(
        method="la",
        network="resnet20",
        epochs=40,
        validate_every=10,
        data={"root": args.root, "augment": "cifar-plain", "val_fraction": 0.1},
        schedule={"name": "one-cycle", "warmup": 0.0},
    )
    seeds = []
    for seed in range(args.seeds):
        config = base.replace(seed=seed)
        data = load_data(config.data, seed)
        run = train(config, args.out / f"la-seed{seed}", args.out / "teachers", data)
        seeds.append({"recogniser": {"balanced accuracy": run.metrics["balanced_accuracy"]}})
        seeds[-1] |= measure(run.folder, seed, data.class_names, data.class_counts)
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
    results = {
        "command": f"python benchmarks/studies/priors.py --seeds {args.seeds}",
        "budget": BUDGET,
        "mean and deviation": summary,
        "seeds": seeds,
    }
    print(json.dumps(results["mean and deviation"], indent=1, ensure_ascii=False))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
