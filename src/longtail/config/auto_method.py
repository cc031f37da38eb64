"""``method auto``: the method that measured best for a network's initial weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from longtail.config.schema import Classifier, Config

_FROM_RANDOM_WEIGHTS: dict[str, Any] = {"views": 2, "distillation_weight": 1.0, "distill_every_view": True}


def choose_method(config: Config) -> tuple[Config, list[str]]:
    """Return ``config`` with ``method auto`` replaced by a method and its settings, and the reason.

    Logit adjustment in every case: for a network with random weights on two views of every image, both classified and
    distilled from a teacher that is trained first, which was best at full length; for a pretrained one, and for a
    network KIND:ENCODER of labels of pixels or boxes, on one view without a teacher. Settings of the classifier that
    are not the defaults are kept. The evidence: docs/evidence.

    Args:
        config: settings of the run; with any other method they are returned as they are.
    """
    if config.method != "auto":
        return config, []
    config = config.replace(method="la")
    kind, named, _ = config.network.partition(":")
    if named and kind not in {"hf-hub", "local-dir"}:
        return config, [f"method la: logit adjustment, for a network {kind}:ENCODER"]
    has_weights = config.pretrained != "none" or config.init is not None
    if has_weights or config.tune not in {"auto", "full"}:
        kind = "pretrained weights" if has_weights else f"tune {config.tune}"
        return config, [f"method la: logit adjustment, for a network with {kind}"]
    plain = Classifier()
    changes = {
        name: value
        for name, value in _FROM_RANDOM_WEIGHTS.items()
        if getattr(config.classifier, name) == getattr(plain, name)
    }
    config = config.replace(classifier=dataclasses.replace(config.classifier, **changes))
    own = config.classifier
    distilled = f", distilled with weight {own.distillation_weight:g}" if own.distillation_weight else ""
    return config, [f"method la: logit adjustment on {own.views} views{distilled}, for a network with random weights"]
