"""Class frequencies that the training of a scikit-learn classifier had in effect, read from the fitted classifier.

They are those of the training data, by sample weights, times the class weights. An average of classifiers has those of
its members, if all have the same. Whatever fits probabilities to the labels again, such as a calibration, has those of
the labels. Where they cannot be told, an error asks for them. Imports no torch.

Legend: N samples, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.pipeline import Pipeline
from sklearn.utils.class_weight import compute_class_weight

from longtail.errors import LongtailError
from longtail.evaluation.class_frequencies import resolve_class_frequencies

Array = np.ndarray[Any, Any]

_NEUTRAL: dict[str, object] = {
    "class_weight": None,
    "class_weights": None,
    "auto_class_weights": "None",
    "scale_pos_weight": 1,
    "is_unbalance": False,
    "unbalance": False,
    "unbalanced_sets": False,
    "pos_bagging_fraction": 1,
    "neg_bagging_fraction": 1,
}
"""Parameters that change class frequencies, of scikit-learn, XGBoost, LightGBM and CatBoost, and the value that does
not."""

_RECALIBRATED = {"CalibratedClassifierCV"}
_SIGMOID = {"SVC", "NuSVC"}  # on decision values of folds, and without weights
_INNER = {
    "FixedThresholdClassifier": "estimator_",
    "TunedThresholdClassifierCV": "estimator_",
    "TunedThresholdsClassifierCV": "estimator_",
    "RFE": "estimator_",
    "RFECV": "estimator_",
}
"""Classifiers whose probabilities are another's, and the attribute that has it."""


def check_resampling(estimator: Any) -> None:
    """Raise LongtailError if a part of an estimator re-samples, in imbalanced-learn's conventions.

    What is inside a calibration may re-sample: the calibration has the labels as they are.
    """
    parts = {"": estimator, **_parameters(estimator)}
    calibrated = [path for path, part in parts.items() if _kinds(part) & _RECALIBRATED]
    for path, part in parts.items():
        inside = any(path.startswith(f"{outer}__" if outer else "") for outer in calibrated)
        if inside or isinstance(part, type) or not hasattr(part, "get_params"):
            continue
        # a pipeline of imbalanced-learn has the method without samplers too
        own = hasattr(part, "fit_resample") and not isinstance(part, Pipeline)
        if own or "sampling_strategy" in part.get_params(deep=False):
            raise LongtailError(
                f"training_frequencies: {type(part).__name__} re-samples within the estimator, so they are not those "
                "of y; give those after it, such as uniform"
            )


def effective_frequencies(model: Any, labels: Array, classes: Array, weights: Array | None) -> Array:
    """Return (C,) class frequencies that the training of a fitted classifier had in effect, with sum 1.

    Args:
        model: classifier with ``predict_proba``, or what contains one.
        labels: (N,) that it was fitted on.
        classes: (C,) labels in ascending order.
        weights: (N,) sample weights, or None.

    Raises:
        LongtailError: the frequencies cannot be told, or the weights are none.
    """
    kinds, indices = _kinds(model), np.searchsorted(classes, labels)
    if "FrozenEstimator" in kinds:
        raise LongtailError(
            "training_frequencies: expected those that the fitted estimator was trained with, such as uniform"
        )
    check_resampling(model)
    if kinds & _RECALIBRATED:
        return _shares(indices, len(classes), weights)
    if kinds & _SIGMOID:
        return _shares(indices, len(classes), None if weights is None else (weights > 0).astype(np.float64))
    inner = next((getattr(model, name) for kind, name in _INNER.items() if kind in kinds), None)
    if isinstance(model, Pipeline):
        inner = model.steps[-1][1]
    elif hasattr(model, "best_estimator_"):
        inner = model.best_estimator_
    if inner is not None:
        return effective_frequencies(inner, labels, classes, weights)
    # these give their members indices in place of labels
    numbers = np.arange(len(classes))
    if "StackingClassifier" in kinds:
        return effective_frequencies(model.final_estimator_, indices, numbers, weights)
    if "OneVsRestClassifier" in kinds:
        return _one_against_rest(model, indices, numbers, weights)
    if kinds & {"BaggingClassifier", "VotingClassifier"}:
        found = [effective_frequencies(member, indices, numbers, weights) for member in model.estimators_]
        if not all(np.allclose(other, found[0]) for other in found):
            raise _unknown(f"the classifiers in {type(model).__name__} have different ones")
        return found[0]
    return _own(model, labels, classes, weights)


def _one_against_rest(model: Any, indices: Array, numbers: Array, weights: Array | None) -> Array:
    """Return what C classifiers of one class against all others have; of two classes there is one classifier."""
    if len(numbers) == 2:
        return effective_frequencies(model.estimators_[0], indices, numbers, weights)
    for number, member in zip(numbers, model.estimators_, strict=True):
        one = (indices == number).astype(np.int64)
        # with weights each problem assumes other frequencies, which no one factor per class undoes
        if not np.allclose(effective_frequencies(member, one, numbers[:2], weights), _shares(one, 2, weights)):
            raise _unknown(f"{type(model).__name__} weighs each class against all others")
    return _shares(indices, len(numbers), weights)


def _own(model: Any, labels: Array, classes: Array, weights: Array | None) -> Array:
    """Return what a classifier states, or what its weights make of the frequencies of the labels."""
    kinds, name = _kinds(model), type(model).__name__
    parameters = _parameters(model)
    for attribute, marker in (("prior", "class_counts_"), ("target", "training_frequencies_")):
        if hasattr(model, attribute) and hasattr(model, marker):  # LongTailClassifier, PriorCorrectedClassifier
            assumed = getattr(model, attribute)
            if isinstance(assumed, str) and assumed == "estimate":
                raise _unknown(f"{name} estimates those of the samples that it predicts")
            counts = model.class_counts_.tolist()
            return np.array(resolve_class_frequencies(assumed, classes.tolist(), counts, ignore_unknown=True))
    factors, class_weight = np.ones(len(classes)), getattr(model, "class_weight", None)
    for path, value in parameters.items():
        if path == "class_weight" or not _is_set(path, value):
            continue
        if path != "scale_pos_weight" or len(classes) != 2:
            raise _unknown(f"{name} has {path}")
        factors[1] = value
    if "ComplementNB" in kinds:  # compares the likelihoods under all other classes, without a prior
        if len(classes) == 2:
            return np.array([0.5, 0.5])
        raise _unknown("ComplementNB has none for more than two classes")
    stated = _stated(model, parameters)
    if stated is not None:
        if len(stated) != len(classes):
            raise _unknown(f"{name} was fitted on {len(stated)} of {len(classes)} classes")
        return stated
    if class_weight is not None:
        if isinstance(class_weight, str) and weights is not None:
            raise LongtailError(
                f"training_frequencies: class_weight {class_weight} together with sample_weight; give the frequencies "
                "that result from both"
            )
        binary = {getattr(model, "multi_class", None), getattr(model, "solver", None)} & {"ovr", "liblinear"}
        if len(classes) > 2 and (binary or "SGDClassifier" in kinds):
            raise _unknown(f"{name} weighs each class against all others")
        if class_weight == "balanced_subsample":  # of random forests
            class_weight = "balanced"
        factors = factors * compute_class_weight(class_weight, classes=classes, y=labels)
    return _shares(np.searchsorted(classes, labels), len(classes), weights, factors)


def _stated(model: Any, parameters: dict[str, Any]) -> Array | None:
    """Return (C,) frequencies that a discriminant analysis or naive Bayes was given; None if it took the labels'."""
    given = parameters.get("fit_prior") is False
    given |= any(parameters.get(name) is not None for name in ("priors", "class_prior"))
    # a member of an ensemble that took the labels' has those of its own samples, which differ by chance
    if not given and parameters.keys() & {"fit_prior", "priors", "class_prior"}:
        return None
    for attribute in ("priors_", "class_prior_", "class_log_prior_"):
        values = getattr(model, attribute, None)
        if values is not None:
            stated = np.asarray(values, dtype=np.float64)
            stated = np.exp(stated) if attribute == "class_log_prior_" else stated
            normalized: Array = stated / stated.sum()
            return normalized
    return None


def _shares(indices: Array, num_classes: int, weights: Array | None, factors: Array | float = 1.0) -> Array:
    """Return (C,) frequencies of (N,) class indices by sample weights, times factors, with sum 1."""
    sums = np.bincount(indices, weights, minlength=num_classes) * factors
    if not (np.isfinite(sums).all() and (sums >= 0).all() and sums.sum() > 0):
        raise LongtailError("sample_weight: expected weights of at least 0, some of them above 0")
    shares: Array = sums / sums.sum()
    return shares


def _is_set(path: str, value: object) -> bool:
    """Return whether a parameter changes class frequencies."""
    name = path.rpartition("__")[2]
    return name in _NEUTRAL and value is not None and not (np.isscalar(value) and value == _NEUTRAL[name])


def _parameters(model: Any) -> dict[str, Any]:
    """Return all parameters by their path, those of nested estimators too."""
    return dict(model.get_params(deep=True)) if hasattr(model, "get_params") else {}


def _kinds(model: Any) -> set[str]:
    """Return the names of a model's classes, some of which are of libraries or versions that may be absent."""
    return {kind.__name__ for kind in type(model).__mro__}


def _unknown(reason: str) -> LongtailError:
    return LongtailError(
        f"training_frequencies: expected those that the training had in effect, such as uniform, since {reason}"
    )
