"""What adds to distilled logit adjustment on two views: each setting alone, then the best of them together.

The data are every fourth class of CIFAR-100-LT, so that a small network sees each image as often as at full length in a
time that two cores have: 16 epochs of the whole set, the budget of the other studies, end long before a network has
learned its training images, and there whatever regularises can only lose.

A fifth of CIFAR-100's training images is held out before the tail is made; runs are compared on these alone
(``choose``). ``confirm`` then evaluates the runs that are named with ``--only`` on the test images, once.

With ``--pretrained`` the network is EfficientNet-Lite0 with ImageNet weights, all of it tuned on the same photographs
by the recipe for one's own images, and the question is what adds to plain logit adjustment.

Command:
    python benchmarks/studies/search.py choose --out RUNS --root DATA      (--seeds, --only, --precision, --json FILE)
    python benchmarks/studies/search.py choose --imbalance 10 --epochs 35 --only "A;B" --out RUNS --root DATA
    python benchmarks/studies/search.py choose --pretrained --weights FILE --out RUNS --root DATA --json FILE
    python benchmarks/studies/search.py confirm --only "A;B" --out RUNS --root DATA --json FILE
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import torch
from common import parser, train, write

from longtail.allocator import reuse_freed_memory
from longtail.config import Config, load_recipe
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.images import ArrayImages
from longtail.data.sources import load_data
from longtail.experiments.records import Record, markdown, run_record
from longtail.inference.recognizer import Recognizer
from longtail.tasks.evaluate import evaluate_split

CLASS_STEP, HELD_OUT, EPOCHS = 4, 0.2, 60
BUDGET = (
    f"every {CLASS_STEP}th class of CIFAR-100-LT, {HELD_OUT:.0%} of the images held out; ResNet-8, {EPOCHS} epochs, "
    "batch 64, crop and mirror, cosine; teacher: ResNet-8 twice as wide, its scores of 120 views cached"
)
ON_PHOTOGRAPHS_BUDGET = (
    f"every {CLASS_STEP}th class of CIFAR-100-LT, {HELD_OUT:.0%} of the images held out; EfficientNet-Lite0 with "
    "ImageNet weights, all of it tuned where the name says nothing else, 64 pixels, 8 epochs, batch 64, recipe folder"
)
Variant = dict[str, Any]


def merged(*parts: Variant) -> Variant:
    """Return settings one upon the other, section by section."""
    result: Variant = {}
    for name, value in (item for part in parts for item in part.items()):
        result[name] = {**result.get(name, {}), **value} if isinstance(value, dict) else value
    return result


GML: Variant = {"method": "gml", "gml": {"share_query": False, "distillation_weight": 0.0}}
DISTILLED: Variant = {"classifier": {"distillation_weight": 1.0}}
GML_DISTILLED: Variant = merged(GML, {"gml": {"distillation_weight": 1.0}})
TWO_VIEWS: Variant = {"classifier": {"views": 2, "distillation_weight": 1.0, "distill_every_view": True}}
GML_TWO_VIEWS: Variant = merged(GML_DISTILLED, {"classifier": {"every_view": True, "distill_every_view": True}})
BASELINE = "la distilled, two views"
KNOWN: dict[str, Variant] = {
    "la": {},
    "gml": GML,
    "la distilled": DISTILLED,
    "gml distilled": GML_DISTILLED,
    BASELINE: TWO_VIEWS,
}
"""Those whose order at full length is known."""
PRETRAINED_TEACHER: Variant = {"network": "tf_efficientnet_lite0", "tune": "head", "network_size": 96, "epochs": 8}
"""Its weights are those of ``--weights``; they know ImageNet."""
ADDED: dict[str, Variant] = {
    "re-trained classifier (cRT)": {"second_stage": "crt"},
    "learned scales (LWS)": {"second_stage": "lws"},
    "re-weighted second stage": {"second_stage": "reweight"},
    "two teachers": {"teacher": {"count": 2}},
    "second generation": {"teacher": {"generations": 2}},
    "teacher on two views": {"teacher": {"views": 2}},
    "mixup": {"mixing": {"kind": "mixup"}},
    "CutMix": {"mixing": {"kind": "cutmix"}},
    "Remix": {"mixing": {"kind": "remix"}},
    "agreement": {"classifier": {"agreement_weight": 1.0}},
    "weight decay 0.001": {"optimizer": {"weight_decay": 1e-3}},
    "weight decay 0.002": {"optimizer": {"weight_decay": 2e-3}},
    "weight decay 0.005": {"optimizer": {"weight_decay": 5e-3}},
    "MaxNorm of the head": {"optimizer": {"head_max_norm": 1.0}},
    "average of the weights": {"optimizer": {"ema_decay": 0.995}},
    "distillation 3": {"classifier": {"distillation_weight": 3.0}},
    "Mean Teacher": {"teacher": {"source": "ema", "cache": 0}},
    "three experts": {"method": "experts"},
    "three experts, equal operations": {"method": "experts", "epochs": 28},
    "pretrained teacher": {"teacher": PRETRAINED_TEACHER},
    "SAM, half the epochs": {"optimizer": {"sharpness": "sam"}, "epochs": EPOCHS // 2},
    "ImbSAM, a third of the epochs": {"optimizer": {"sharpness": "imbsam"}, "epochs": EPOCHS // 3},
    "Focal-SAM, a third of the epochs": {"optimizer": {"sharpness": "focal"}, "epochs": EPOCHS // 3},
}
"""Each alone on the baseline."""
TOGETHER: dict[str, Variant] = {
    "two teachers, weight decay 0.001, average of the weights": merged(
        ADDED["two teachers"], ADDED["weight decay 0.001"], ADDED["average of the weights"]
    ),
    "weight decay 0.001, average of the weights": merged(ADDED["weight decay 0.001"], ADDED["average of the weights"]),
    "two teachers, three experts": merged(ADDED["two teachers"], ADDED["three experts"]),
}
"""Those that gained alone, on the baseline."""
ONE_VIEW = "la distilled, one view, twice the epochs"
ON_ONE_VIEW: dict[str, Variant] = {
    **{name: variant for name, variant in ADDED.items() if name not in {"agreement", "pretrained teacher"}},
    **TOGETHER,
    "weight decay 0.01": {"optimizer": {"weight_decay": 1e-2}},
    "weight decay 0.005, mixup": merged(ADDED["weight decay 0.005"], ADDED["mixup"]),
    "weight decay 0.005, Remix": merged(ADDED["weight decay 0.005"], ADDED["Remix"]),
    "three experts, equal operations": {"method": "experts", "epochs": 55},
    "SAM, half the epochs": {"optimizer": {"sharpness": "sam"}, "epochs": EPOCHS},
    "ImbSAM, a third of the epochs": {"optimizer": {"sharpness": "imbsam"}, "epochs": 2 * EPOCHS // 3},
    "Focal-SAM, a third of the epochs": {"optimizer": {"sharpness": "focal"}, "epochs": 2 * EPOCHS // 3},
}
"""Each alone, and those that gained together, on one view with twice the epochs: the operations of the baseline."""
TWICE_THE_OPERATIONS: dict[str, Variant] = {
    "la distilled, two views, twice the epochs": merged(TWO_VIEWS, {"epochs": 2 * EPOCHS}),
    "la distilled, one view, four times the epochs": merged(DISTILLED, {"epochs": 4 * EPOCHS}),
}
"""Whether a longer training changes which of the two is better."""
TAUGHT_BY: dict[str, str] = {
    "taught by three experts": "three experts",
    "taught by two teachers, three experts": "two teachers, three experts",
}
"""The baseline with the run of another variant as its teacher: one network to deploy."""
ON_PHOTOGRAPHS: dict[str, Variant] = {
    "la": {},
    "two views, half the epochs": {"classifier": {"views": 2}, "epochs": 4},
    "learning rate 0.0003": {"optimizer": {"learning_rate": 3e-4}},
    "learning rate 0.002": {"optimizer": {"learning_rate": 2e-3}},
    "lora": {"tune": "lora"},
    "adapter": {"tune": "adapter"},
    "lora, learning rate 0.003": {"tune": "lora", "optimizer": {"learning_rate": 3e-3}},
    "last two stages": {"tune": "last:2"},
    "distilled": {"classifier": {"distillation_weight": 1.0}},
    "mixup": {"mixing": {"kind": "mixup"}},
    "re-trained classifier (cRT)": {"second_stage": "crt"},
    "three experts": {"method": "experts", "experts": {"stages": 1}},
    "gml": merged(GML, {"gml": {"share_query": True}}),
    "SAM, half the epochs": {"optimizer": {"sharpness": "sam"}, "epochs": 4},
}
"""Each alone on plain logit adjustment, with a pretrained network that is tuned."""
VARIANTS: dict[str, Variant] = {
    **KNOWN,
    "gml distilled, two views": GML_TWO_VIEWS,
    "gml distilled, two views, product": merged(GML_TWO_VIEWS, {"gml": {"ensemble_weight": 1.0}}),
    "gml distilled, two views, two experts": merged(GML_TWO_VIEWS, {"gml": {"ensemble_weight": 1.0, "stages": 1}}),
    ONE_VIEW: merged(DISTILLED, {"epochs": 2 * EPOCHS}),
    **{name: merged(TWO_VIEWS, variant) for name, variant in {**ADDED, **TOGETHER}.items()},
    **dict.fromkeys(TAUGHT_BY, TWO_VIEWS),
    **{
        f"{ONE_VIEW}, {name}": merged(DISTILLED, {"epochs": 2 * EPOCHS}, variant)
        for name, variant in ON_ONE_VIEW.items()
    },
    **{
        name: merged(variant, {"teacher": {"cache": 4 * EPOCHS}})  # no view twice here either
        for name, variant in TWICE_THE_OPERATIONS.items()
    },
}


def base(root: str | None, imbalance: float, precision: str = "bf16-mixed") -> Config:
    """Return the recipe of the study."""
    return load_recipe("cifar100-lt").config.replace(
        method="la",
        network="resnet8",
        epochs=EPOCHS,
        batch_size=64,
        precision=precision,
        data={"root": root, "augment": "cifar-plain", "val_fraction": HELD_OUT, "imbalance": imbalance},
        schedule={"name": "cosine", "warmup": 0.05},
        # as many views as any variant shows: a student whose views repeat would learn less for another reason
        teacher={"network": "resnet8x2", "epochs": EPOCHS, "cache": 2 * EPOCHS},
    )


def pretrained_base(root: str | None, weights: str, imbalance: float, epochs: int) -> Config:
    """Return the recipe for one's own images, with a network that is tuned on them, on the images of the study."""
    teacher = {"network": "tf_efficientnet_lite0", "pretrained": weights, "epochs": epochs, "cache": epochs}
    config = load_recipe("folder").config.replace(network="tf_efficientnet_lite0", pretrained=weights)
    config = dataclasses.replace(config, data=base(root, imbalance).data)
    return config.replace(method="la", tune="full", network_size=64, epochs=epochs, teacher=teacher)


def shortened(config: Config, epochs: int) -> Config:
    """Return the recipe of a variant, and of its teacher, with ``epochs`` in place of the 60 of the baseline."""
    share = epochs / EPOCHS
    teacher = config.teacher
    assert isinstance(config.epochs, int)
    assert isinstance(teacher.epochs, int)
    return config.replace(
        epochs=round(config.epochs * share),
        teacher={"epochs": round(teacher.epochs * share), "cache": round(teacher.cache * share)},
    )


def some_classes(images: ImageSet) -> ImageSet:
    """Return the images of every fourth class."""
    kept = (images.labels % CLASS_STEP == 0).nonzero().flatten()
    return ImageSet(ArrayImages(images.images.take(kept)), images.labels[kept] // CLASS_STEP, images.ids[kept])


def load(config: Config) -> tuple[LongTailedData, ImageSet]:
    """Return the data, whose test images are the held-out ones, and the real test images."""
    data = load_data(config.data, config.seed)
    assert data.val is not None
    names = data.class_names[::CLASS_STEP]
    held_out = dataclasses.replace(
        data, train=some_classes(data.train), val=None, test=some_classes(data.val), class_names=names
    )
    return held_out, some_classes(data.test)


def run_name(variant: str, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"{re.sub(r'[^0-9A-Za-z]+', '-', variant)}-seed{seed}"


def on_test_images(run_folder: Path, entry: Record, test: ImageSet, config: Config) -> Record:
    """Return the record of a run with the metrics of its saved model on the test images."""
    model = Recognizer.load(run_folder)
    metrics = evaluate_split(model, test, config)[entry.predicts_under]
    shown = {name: metrics[name] for name in entry.metrics}
    return dataclasses.replace(entry, metrics=shown, test_images=None, num_test_images=None, half_widths={})


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("step", choices=["choose", "confirm"])
    options.add_argument("--weights", help="weights of EfficientNet-Lite0, for a pretrained teacher or network")
    options.add_argument("--pretrained", action="store_true", help="what adds to a pretrained network")
    options.add_argument("--epochs", type=int, help=f"of the baseline and its teacher: {EPOCHS}, pretrained 8")
    options.add_argument("--precision", default="bf16-mixed", help="of random weights; where slow, 32-true")
    options.add_argument("--imbalance", type=float, default=100, help="imbalance factor of CIFAR-100-LT")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    reuse_freed_memory()
    if args.pretrained:
        variants, baseline, budget, kind = ON_PHOTOGRAPHS, "la", ON_PHOTOGRAPHS_BUDGET, "pretrained-"
        recipe = pretrained_base(args.root, args.weights, args.imbalance, args.epochs or 8)
        if args.epochs:
            budget, kind = budget.replace("8 epochs", f"{args.epochs} epochs"), f"pretrained{args.epochs}-"
    else:
        variants, baseline, budget, kind = VARIANTS, BASELINE, BUDGET, ""
        recipe = base(args.root, args.imbalance, args.precision)
        if args.epochs:
            budget, kind = budget.replace(f"{EPOCHS} epochs", f"{args.epochs} epochs"), f"epochs{args.epochs}-"
            budget = budget.replace(f"{2 * EPOCHS} views", f"{2 * args.epochs} views")
        if args.precision != "bf16-mixed":
            budget = f"{budget}; precision {args.precision}"
    if args.imbalance != 100:
        budget, kind = f"imbalance {args.imbalance:g}; {budget}", f"imbalance{args.imbalance:g}-{kind}"
    names = args.only.split(";") if args.only else list(variants)
    baseline = next((name for name in (baseline, ONE_VIEW) if name in names), names[0])
    data, test = load(recipe)
    records: list[Record] = []
    for seed in range(args.seeds):
        for name in names:
            config = recipe.replace(seed=seed, **variants[name])
            if args.epochs and not args.pretrained:
                config = shortened(config, args.epochs)
            if config.teacher.tune is not None:
                config = config.replace(teacher={"pretrained": args.weights})
            if name in TAUGHT_BY:
                source = args.out / run_name(kind + TAUGHT_BY[name], seed)
                config = config.replace(teacher={"source": str(source), "network": "auto", "epochs": None})
            folder = args.out / run_name(kind + name, seed)
            run = train(config, folder, args.out / "teachers", data)
            entry = dataclasses.replace(run_record(run), method=name)
            if args.step == "confirm":
                entry = on_test_images(folder, entry, test, config)
            records.append(entry)
            shown = {key: round(value, 1) for key, value in entry.metrics.items() if value is not None}
            print(name, seed, shown, f"{entry.seconds:.0f} s", file=sys.stderr, flush=True)
            if args.json:
                command = f"python benchmarks/studies/search.py {args.step}"
                write(args.json, command, budget, records, baseline)
    print("\n".join(markdown(records, baseline)))


if __name__ == "__main__":
    main()
