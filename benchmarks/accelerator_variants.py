"""What ``accelerator.py`` trains: the rows of every phase, by name, the most worth first.

Milliseconds are those of a step alone on an H200: measured for la and gml, estimated from their networks for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerator_plan import Variant

TWO_VIEWS: dict[str, Any] = {"views": 2, "distillation_weight": 1.0, "distill_every_view": True}
EVERY_VIEW: dict[str, Any] = {"every_view": True, "distill_every_view": True}

TEACHER = "teacher: la, ResNet-56"
SECOND_TEACHER = "teacher: la on two views, ResNet-56"
LA, LA_DISTILLED, GML = "la", "la, distilled", "gml, distilled"
LA_TWO_VIEWS = "la on two views, both classified and distilled"
GML_TWO_VIEWS = "gml on two views, both classified and distilled"
BY_TWO = "la on two views, taught by two"
EXPERTS_BY_TWO = "three experts on two views, taught by two"
BY_SECOND = "la on two views, taught by the second generation"
WIDE, WIDE_TWO_VIEWS = "la, four times as wide", "la on two views, four times as wide"

BASELINE = LA_TWO_VIEWS
"""All others are compared with it, and besides these pairs with one another."""
PAIRS = ((LA_DISTILLED, LA), (GML, LA_DISTILLED), (WIDE_TWO_VIEWS, WIDE))
PAPER = {LA: 49.4, GML: 53.0}
"""Published, for CIFAR-100-LT at imbalance 100."""

_OWN, _BOTH = ((TEACHER, None),), ((TEACHER, 0), (TEACHER, 1))


def _la(
    milliseconds: float, name: str, taught_by: tuple[tuple[str, int | None], ...] = _OWN, **changes: Any
) -> Variant:
    return Variant(name, {"method": "la", **changes}, milliseconds, taught_by)


_PARTS: dict[str, dict[str, Any]] = {
    "gml without the mixture": {"mixture_weight": 0.0},
    "gml, not distilled": {"distillation_weight": 0.0},
    "gml, fixed temperature": {"learn_temperature": False},
    "gml, one shared queue": {"queues": "shared"},
    "gml, keys of the batch": {"queues": "batch"},
    "gml, one student view": {"share_query": True},
}
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _la(6.0, TEACHER, (), network="resnet56"),
        _la(3.79, LA, ()),
        _la(4.5, LA_DISTILLED, classifier={"distillation_weight": 1.0}),
        Variant(GML, {}, 9.3, _OWN),
        _la(8.3, LA_TWO_VIEWS, classifier=TWO_VIEWS),
        Variant(GML_TWO_VIEWS, {"classifier": EVERY_VIEW}, 9.9, _OWN),
        _la(8.9, BY_TWO, _BOTH, classifier=TWO_VIEWS),
        Variant(EXPERTS_BY_TWO, {"method": "experts", "classifier": TWO_VIEWS}, 19.0, _BOTH),
        _la(13.0, SECOND_TEACHER, network="resnet56", classifier=TWO_VIEWS),
        _la(8.3, BY_SECOND, ((SECOND_TEACHER, None),), classifier=TWO_VIEWS),
        _la(10.0, WIDE, (), network="resnet32x4"),
        _la(
            21.0,
            WIDE_TWO_VIEWS,
            ((WIDE, None),),
            network="resnet32x4",
            teacher={"network": "resnet32x4"},
            classifier=TWO_VIEWS,
        ),
        *(Variant(name, {"gml": change}, 9.0, _OWN) for name, change in _PARTS.items()),
    )
}
PHASES: dict[str, tuple[str, ...]] = {
    "core": (LA_TWO_VIEWS, GML_TWO_VIEWS, LA, GML, LA_DISTILLED),
    "best": (BY_TWO, EXPERTS_BY_TWO, BY_SECOND),
    "wide": (WIDE_TWO_VIEWS, WIDE),
    "parts": tuple(_PARTS),
}


def further_variants(epochs: int, imbalances: Mapping[float, float]) -> tuple[dict[str, Variant], dict[str, list[str]]]:
    """Return the variants of the phases ``longer`` and ``rows``, and their names by phase.

    Args:
        epochs: of the recipe; ``longer`` has twice as many.
        imbalances: imbalance factors but 100, and how many times more steps an epoch has.
    """
    variants = {
        f"{name}, {2 * epochs} epochs": Variant(
            f"{name}, {2 * epochs} epochs",
            {**VARIANTS[name].changes, "epochs": 2 * epochs},
            VARIANTS[name].milliseconds,
            _OWN,
        )
        for name in (LA_TWO_VIEWS, GML)
    }
    phases: dict[str, list[str]] = {"longer": list(variants), "rows": []}
    for factor, steps in imbalances.items():
        where, data = f", imbalance {factor:g}", {"data": {"imbalance": factor}}
        for name in (TEACHER, LA_TWO_VIEWS, GML):
            known = VARIANTS[name]
            taught_by = tuple((f"{teacher}{where}", seed) for teacher, seed in known.taught_by)
            changes = {**known.changes, **data}
            variants[name + where] = Variant(name + where, changes, known.milliseconds * steps, taught_by)
            phases["rows"] += [] if name == TEACHER else [name + where]
    return variants, phases
