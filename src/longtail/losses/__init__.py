"""Losses as pure functions and thin modules; besides torch they import :mod:`longtail.distributed` only."""

from longtail.losses.mixture import GMLLoss, GMLTerms, class_log_likelihood, gml_loss
from longtail.losses.posterior import (
    ClassPrior,
    compute_log_prior,
    distillation,
    posterior,
    posterior_cross_entropy,
)

__all__ = [
    "ClassPrior",
    "GMLLoss",
    "GMLTerms",
    "class_log_likelihood",
    "compute_log_prior",
    "distillation",
    "gml_loss",
    "posterior",
    "posterior_cross_entropy",
]
