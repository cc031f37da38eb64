"""Which gains of a short training are left in one as long as the recipe for CIFAR-100-LT: weight decay, mixed images.

With momentum m, weight decay λ and learning rates η, a weight without gradient shrinks by the factor exp(−D) in a
training, D = λ Σ η / (1 − m): is the best weight decay that of one D, so that longer trainings need less? The study
trains logit adjustment with few steps, with as many as the recipe has, in its network, augmentation and schedule, and
with AdamW. Images as in search.py: every fourth class, a fifth of the training images held out, which alone are read.

Command:
    python benchmarks/studies/training_length.py --out RUNS --root DATA      (--only "A;B", --seeds, --json FILE)
"""

from __future__ import annotations

import dataclasses
import sys

import torch
from common import Variant, parser, train, write
from search import base, load, run_name

from longtail.allocator import reuse_freed_memory
from longtail.config import Config, load_recipe
from longtail.experiments.records import Record, markdown, run_record

BUDGET = (
    "every 4th class of CIFAR-100-LT, 20% of the images held out, la, precision 32-true; short: ResNet-8, 60 epochs, "
    "batch 64, crop and mirror, cosine; recipe: cifar100-lt (ResNet-32, 200 epochs, AutoAugment and Cutout, multistep)"
    ", batch 32; adamw: as short, optimizer and head of the recipe folder"
)
DECAYS = {
    "short": (0.0005, 0.002, 0.005, 0.01, 0.02),
    "recipe": (0.0002, 0.0005, 0.00125, 0.005),
    "adamw": (0.05, 0.5, 2.0, 5.0),
}
VARIANTS: dict[str, tuple[str, Variant]] = {
    f"{budget}, weight decay {decay:g}": (budget, {"optimizer": {"weight_decay": decay}})
    for budget in DECAYS
    for decay in DECAYS[budget]
} | {f"recipe, {kind}": ("recipe", {"mixing": {"kind": kind}}) for kind in ("mixup", "remix")}
"""Budget and changes of its recipe by name of the row."""


def config(budget: str, variant: Variant, root: str | None) -> Config:
    """Return the recipe of a row; 72 steps an epoch of the batch of 32, as the whole set has 85 of 128."""
    short = base(root, 100, "32-true")
    recipes = {
        "short": short,
        "adamw": dataclasses.replace(load_recipe("folder").config, data=short.data).replace(
            method="la",
            network="resnet8",
            pretrained="none",
            tune="full",
            epochs=short.epochs,
            precision="32-true",
        ),
        "recipe": load_recipe("cifar100-lt").config.replace(
            method="la",
            batch_size=32,
            precision="32-true",
            data={"root": root, "val_fraction": 0.2},
        ),
    }
    return recipes[budget].replace(**variant)


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    torch.set_num_threads(args.threads)
    reuse_freed_memory()
    names = args.only.split(";") if args.only else list(VARIANTS)
    records: list[Record] = []
    for seed in range(args.seeds):
        for name in names:
            recipe = config(*VARIANTS[name], args.root).replace(seed=seed)
            data, _ = load(recipe)
            run = train(recipe, args.out / run_name(name, seed), args.out / "teachers", data)
            entry = dataclasses.replace(run_record(run), method=name)
            records.append(entry)
            shown = {key: round(value, 1) for key, value in entry.metrics.items() if value is not None}
            print(name, seed, shown, f"{entry.seconds:.0f} s", file=sys.stderr, flush=True)
            if args.json:
                write(args.json, "python benchmarks/studies/training_length.py", BUDGET, records, names[0])
    print("\n".join(markdown(records, names[0])))


if __name__ == "__main__":
    main()
