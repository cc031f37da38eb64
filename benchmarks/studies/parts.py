"""Ablation of GML, and comparison with other methods that have its teacher and its views.

One part at a time is removed or replaced; every variant has the same steps and student passes. The other methods are
distilled from the same teacher and, in the variants "two views", have a second student view with a classification loss.

Commands:
    python benchmarks/studies/parts.py digits --seeds 5
    python benchmarks/studies/parts.py cifar --seeds 3      (--root DATA)
each with --out FOLDER and --json FILE.
"""

from __future__ import annotations

from typing import Any

from common import Variant, cifar, digits, parser, study

DISTILLED: dict[str, Any] = {"distillation_weight": 1.0}
FULL: dict[str, Any] = {"method": "gml", "gml": DISTILLED}


def gml(**changes: Any) -> dict[str, Any]:
    """Return GML with distillation and with changes of its own settings."""
    return {"method": "gml", "gml": {**DISTILLED, **changes}}


PARTS: dict[str, Variant] = {
    "la": {"method": "la"},
    "la distilled": {"method": "la", "classifier": DISTILLED},
    "bcl distilled": {"method": "bcl", "classifier": DISTILLED},
    "gml": {"method": "gml"},
    "gml distilled": FULL,
    "gml: no logit adjustment": {**FULL, "classifier": {"logit_adjustment": False}},
    "gml: shared queue": gml(queues="shared"),
}

# extensions, to improve on logit adjustment with distillation
IDEAS: dict[str, Variant] = {
    "gml: feature transfer": gml(feature_transfer=4),
    "gml: both keys": {**gml(keys="both"), "teacher": {"cache": 0}},
}

MORE: dict[str, Variant] = {
    "ce distilled": {"method": "ce", "classifier": DISTILLED},
    "proco distilled": {"method": "proco", "classifier": DISTILLED},
    "gml: batch alone": gml(queues="batch"),
    "gml: momentum keys": {**gml(keys="momentum"), "teacher": {"cache": 0}},
    "gml: τ fixed": gml(learn_temperature=False),
    "gml: no self-pairs": gml(self_pairs="none"),
}

# digits-lt is small enough for more variants
SMALL: dict[str, Variant] = {
    "gml: self-pairs for τ": gml(self_pairs="both"),
    "gml: 16 keys a class": gml(queue_minimum=16),
}

# half the epochs: two student views per step, with the classification loss on both
TWO_VIEWS: dict[str, Variant] = {
    "two views: la distilled": {"method": "la", "classifier": {**DISTILLED, "views": 2}},
    "two views: gml distilled": {**gml(share_query=False), "classifier": {"every_view": True}},
    "two views: gml on both": {**gml(share_query=False, query_all_views=True), "classifier": {"every_view": True}},
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("study", choices=["digits", "cifar"])
    args = options.parse_args()
    small = args.study == "digits"
    base = digits() if small else cifar(args.root)
    assert isinstance(base.epochs, int)
    two_views = {name: {**variant, "epochs": base.epochs // 2} for name, variant in TWO_VIEWS.items()}
    variants = PARTS | MORE | (SMALL if small else {}) | IDEAS | two_views
    nets = "conv8 student and teacher, batch 64" if small else "ResNet-8 student, ResNet-14 teacher, batch 128"
    budget = f"{nets}, {base.epochs} epochs of one student view, or half as many of two"
    command = f"python benchmarks/studies/parts.py {args.study} --seeds {args.seeds}"
    study(base, variants, args, command=command, budget=budget, baseline="la distilled")


if __name__ == "__main__":
    main()
