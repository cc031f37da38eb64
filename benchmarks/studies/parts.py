"""What is each part of GML worth, and what is left of its lead once the rivals have its teacher and its views?

One part at a time is taken away or exchanged; every variant makes the same steps and student passes. Rivals are given
the distillation from the same teacher, and, in the variants named so, a second student view with a classifier term.

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
    """Return GML with distillation and these settings of its own changed."""
    return {"method": "gml", "gml": {**DISTILLED, **changes}}


PARTS: dict[str, Variant] = {
    "la": {"method": "la"},
    "la distilled": {"method": "la", "classifier": DISTILLED},
    "bcl distilled": {"method": "bcl", "classifier": DISTILLED},
    "gml": {"method": "gml"},
    "gml distilled": FULL,
    "gml: no logit adjustment": {**FULL, "classifier": {"adjust": False}},
    "gml: plain queue": gml(queues="plain"),
}

# ideas for a way past logit adjustment with distillation
IDEAS: dict[str, Variant] = {
    "gml: borrowed spread": gml(borrow=4),
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

# the set of digits is small enough to ask it more
SMALL: dict[str, Variant] = {
    "gml: self-pairs for τ": gml(self_pairs="both"),
    "gml: 16 keys a class": gml(queue_minimum=16),
}

# at half the epochs: two student views a step, the classifier's term on both
TWO_VIEWS: dict[str, Variant] = {
    "two views: la distilled": {"method": "la", "classifier": {**DISTILLED, "views": 2}},
    "two views: gml distilled": {**gml(share_query=False), "classifier": {"every_view": True}},
    "two views: gml on both": {**gml(share_query=False, mix_all=True), "classifier": {"every_view": True}},
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("study", choices=["digits", "cifar"])
    given = options.parse_args()
    small = given.study == "digits"
    base = digits() if small else cifar(given.root)
    assert isinstance(base.epochs, int)
    two_views = {name: {**variant, "epochs": base.epochs // 2} for name, variant in TWO_VIEWS.items()}
    variants = PARTS | MORE | (SMALL if small else {}) | IDEAS | two_views
    nets = "conv8 student and teacher, batch 64" if small else "ResNet-8 student, ResNet-14 teacher, batch 128"
    budget = f"{nets}, {base.epochs} epochs of one student view, or half as many of two"
    command = f"python benchmarks/studies/parts.py {given.study} --seeds {given.seeds}"
    study(base, variants, given, command=command, budget=budget, baseline="la distilled")


if __name__ == "__main__":
    main()
