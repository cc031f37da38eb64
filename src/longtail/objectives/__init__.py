"""The mathematics: pure functions and thin modules that import torch and nothing else of longtail."""

from longtail.objectives.mixture import GMLLoss, GMLTerms, class_log_likelihood, gml_loss
from longtail.objectives.posterior import ClassPrior, distillation, log_prior, posterior, posterior_cross_entropy

__all__ = [
    "ClassPrior",
    "GMLLoss",
    "GMLTerms",
    "class_log_likelihood",
    "distillation",
    "gml_loss",
    "log_prior",
    "posterior",
    "posterior_cross_entropy",
]
