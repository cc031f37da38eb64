"""Long-tailed recognition by mutual information between features and ground-truth labels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtail.data.dataset import from_arrays
    from longtail.estimator import LongTailClassifier
    from longtail.inference.recognizer import Recognizer
    from longtail.losses import ClassPrior, GMLLoss, gml_loss
    from longtail.memory import ClassQueues
    from longtail.nn import CosineClassifier, ProjectionMLP
    from longtail.tasks.segmentation.segmenter import Segmenter
    from longtail.training.trainer import fit

__version__ = "0.1.0"
__all__ = [
    "ClassPrior",
    "ClassQueues",
    "CosineClassifier",
    "GMLLoss",
    "LongTailClassifier",
    "ProjectionMLP",
    "Recognizer",
    "Segmenter",
    "fit",
    "from_arrays",
    "gml_loss",
]

_MODULES = {
    "ClassPrior": "longtail.losses",
    "ClassQueues": "longtail.memory",
    "CosineClassifier": "longtail.nn",
    "GMLLoss": "longtail.losses",
    "LongTailClassifier": "longtail.estimator",
    "ProjectionMLP": "longtail.nn",
    "Recognizer": "longtail.inference.recognizer",
    "Segmenter": "longtail.tasks.segmentation.segmenter",
    "fit": "longtail.training.trainer",
    "from_arrays": "longtail.data.dataset",
    "gml_loss": "longtail.losses",
}


def __getattr__(name: str) -> Any:
    # lazy: the command line imports this package too and must not wait seconds for torch
    if name not in _MODULES:
        raise AttributeError(f"module 'longtail' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
