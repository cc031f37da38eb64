"""Long-tailed recognition by mutual information between features and ground-truth labels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtail.estimator import LongTailClassifier
    from longtail.memory import ClassQueues
    from longtail.nn.heads import CosineClassifier
    from longtail.objectives import ClassPrior, GMLLoss
    from longtail.recognizer import Recognizer
    from longtail.segmenter import Segmenter

__version__ = "0.1.0"
__all__ = ["ClassPrior", "ClassQueues", "CosineClassifier", "GMLLoss", "LongTailClassifier", "Recognizer", "Segmenter"]

_HOMES = {
    "ClassPrior": "longtail.objectives",
    "ClassQueues": "longtail.memory",
    "CosineClassifier": "longtail.nn.heads",
    "GMLLoss": "longtail.objectives",
    "LongTailClassifier": "longtail.estimator",
    "Recognizer": "longtail.recognizer",
    "Segmenter": "longtail.segmenter",
}


def __getattr__(name: str) -> Any:
    # the command line imports this package too, and must not wait seconds for torch
    if name not in _HOMES:
        raise AttributeError(f"module 'longtail' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
