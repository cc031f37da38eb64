"""Long-tailed recognition by mutual information between features and ground-truth labels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtail.data.dataset import from_arrays
    from longtail.data.samplers import ClassAwareSampler
    from longtail.detector_calibration import calibrate_detector
    from longtail.estimator import LongTailClassifier
    from longtail.inference.recognizer import Recognizer
    from longtail.losses import ClassPrior, GMLLoss, gml_loss
    from longtail.memory import ClassQueues
    from longtail.nn import CosineClassifier, ProjectionMLP
    from longtail.prior_correction import PriorCorrectedClassifier, TunedThresholdsClassifierCV
    from longtail.splitters import LongTailKFold, LongTailSplit
    from longtail.tasks.detection.detector import Detector
    from longtail.tasks.segmentation.segmenter import Segmenter
    from longtail.training.trainer import fit

__version__ = "0.1.0"
__all__ = [
    "ClassAwareSampler",
    "ClassPrior",
    "ClassQueues",
    "CosineClassifier",
    "Detector",
    "GMLLoss",
    "LongTailClassifier",
    "LongTailKFold",
    "LongTailSplit",
    "PriorCorrectedClassifier",
    "ProjectionMLP",
    "Recognizer",
    "Segmenter",
    "TunedThresholdsClassifierCV",
    "calibrate_detector",
    "fit",
    "from_arrays",
    "gml_loss",
]

_MODULES = {
    "ClassAwareSampler": "longtail.data.samplers",
    "ClassPrior": "longtail.losses",
    "ClassQueues": "longtail.memory",
    "CosineClassifier": "longtail.nn",
    "Detector": "longtail.tasks.detection.detector",
    "GMLLoss": "longtail.losses",
    "LongTailClassifier": "longtail.estimator",
    "LongTailKFold": "longtail.splitters",
    "LongTailSplit": "longtail.splitters",
    "PriorCorrectedClassifier": "longtail.prior_correction",
    "ProjectionMLP": "longtail.nn",
    "Recognizer": "longtail.inference.recognizer",
    "Segmenter": "longtail.tasks.segmentation.segmenter",
    "TunedThresholdsClassifierCV": "longtail.prior_correction",
    "calibrate_detector": "longtail.detector_calibration",
    "fit": "longtail.training.trainer",
    "from_arrays": "longtail.data.dataset",
    "gml_loss": "longtail.losses",
}
_SUBMODULES = frozenset(
    {
        "config",
        "data",
        "detector_calibration",
        "errors",
        "estimator",
        "evaluation",
        "experiments",
        "inference",
        "integrations",
        "losses",
        "memory",
        "methods",
        "nn",
        "prior_correction",
        "registry",
        "splitters",
        "tasks",
        "training",
    }
)


def __getattr__(name: str) -> Any:
    # lazy: the command line imports this package too and must not wait seconds for torch
    if name in _SUBMODULES:
        return importlib.import_module(f"longtail.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'longtail' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])
