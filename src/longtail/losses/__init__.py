"""Losses as pure functions and thin modules. Of the packages that longtail requires, only torch is imported.

Modules on scores are called as ``loss(scores, labels)``, see :class:`ScoreLoss`; those on embeddings as
``loss(queries, labels, keys, key_labels, ids, key_ids)``. Two contrastive losses have no such form: parametric
contrastive learning (PaCo) needs the class scores beside the embeddings, :func:`parametric_contrastive_loss`; ProCo has
no keys, but the mean embeddings of the classes, :func:`vmf_scores`.
"""

from longtail.losses.asymmetric import AsymmetricLoss, asymmetric_loss
from longtail.losses.contrastive import (
    BalancedContrastiveLoss,
    SupConLoss,
    balanced_contrastive_loss,
    parametric_contrastive_loss,
    supcon_loss,
)
from longtail.losses.margin import LDAMLoss, ldam_loss, ldam_margins
from longtail.losses.mixture import GMLLoss, GMLTerms, class_log_likelihood, gml_loss
from longtail.losses.posterior import (
    BalancedSoftmaxLoss,
    ClassPrior,
    LogitAdjustedLoss,
    agreement,
    compute_log_prior,
    distillation,
    posterior,
    posterior_cross_entropy,
)
from longtail.losses.reweighting import (
    ClassBalancedLoss,
    FocalLoss,
    compute_class_weights,
    effective_number_weights,
    focal_loss,
    frequency_weights,
    weighted_cross_entropy,
)
from longtail.losses.score_loss import ScoreLoss
from longtail.losses.seesaw import SeesawLoss, seesaw_loss
from longtail.losses.von_mises_fisher import vmf_scores

__all__ = [
    "AsymmetricLoss",
    "BalancedContrastiveLoss",
    "BalancedSoftmaxLoss",
    "ClassBalancedLoss",
    "ClassPrior",
    "FocalLoss",
    "GMLLoss",
    "GMLTerms",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "ScoreLoss",
    "SeesawLoss",
    "SupConLoss",
    "agreement",
    "asymmetric_loss",
    "balanced_contrastive_loss",
    "class_log_likelihood",
    "compute_class_weights",
    "compute_log_prior",
    "distillation",
    "effective_number_weights",
    "focal_loss",
    "frequency_weights",
    "gml_loss",
    "ldam_loss",
    "ldam_margins",
    "parametric_contrastive_loss",
    "posterior",
    "posterior_cross_entropy",
    "seesaw_loss",
    "supcon_loss",
    "vmf_scores",
    "weighted_cross_entropy",
]
