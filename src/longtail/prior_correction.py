"""Class frequencies after the fact: probabilities of any classifier for other class frequencies, and tuned thresholds.

Legend: N samples, C classes. A classifier trained where class c has the frequency π_c, by its data, by re-sampling or
by class weights, estimates p(c|x) ∝ π_c p(x|c). Where class c has the frequency q_c,

    q(c|x) = p(c|x) q_c / π_c / Σ_k p(k|x) q_k / π_k,

without training again (Saerens et al., Neural Computation 14(1), 2002; Elkan, IJCAI 2001). Imports no torch.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from sklearn import get_config
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.model_selection import check_cv, cross_val_predict
from sklearn.pipeline import Pipeline
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_consistent_length, check_is_fitted, column_or_1d

from longtail.errors import LongtailError
from longtail.evaluation.class_frequencies import ClassFrequencies, resolve_class_frequencies
from longtail.evaluation.effective_frequencies import check_resampling, effective_frequencies
from longtail.evaluation.label_shift import EstimatedPrior, estimate_em
from longtail.rollback import all_or_nothing

Array = np.ndarray[Any, Any]

_SMALLEST_PROBABILITY = 1e-12
_MAX_CANDIDATES = 25  # thresholds of a class that are tried in each round
_MAX_ROUNDS = 10
_SHOWN = 3  # classes in a message


def _check_probabilities(estimator: Any) -> None:
    if hasattr(estimator, "predict_proba"):
        return
    advice = "sklearn.calibration.CalibratedClassifierCV adds it to others"
    if _is_known_after_fit(estimator):
        advice = "give the StackingClassifier its final_estimator, LogisticRegression() by default"
    raise LongtailError(
        f"estimator: expected a classifier with predict_proba, got {type(estimator).__name__}; {advice}"
    )


def _is_frozen(estimator: Any) -> bool:
    """Return whether an estimator is scikit-learn's ``FrozenEstimator``, which 1.6 is the first to have."""
    return type(estimator).__name__ == "FrozenEstimator"


def _is_known_after_fit(estimator: Any) -> bool:
    """Return whether an estimator ends with a StackingClassifier, which has no ``predict_proba`` before its fit."""
    while True:
        if isinstance(estimator, Pipeline):
            estimator = estimator.steps[-1][1]
        elif hasattr(estimator, "estimator"):
            estimator = estimator.estimator
        else:
            return getattr(estimator, "final_estimator", estimator) is None


class _ProbabilityClassifier(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):  # type: ignore[misc]
    """What both classifiers around another classifier share."""

    estimator: Any
    estimator_: Any
    classes_: Array

    def _check_labels(self, X: Any, y: Any, fitted: bool) -> Array:  # noqa: N803
        """Return (N,) labels, and set ``classes_`` and ``class_counts_``; those of a fitted estimator are its own."""
        if fitted or not _is_known_after_fit(self.estimator):
            _check_probabilities(self.estimator)
        if np.asarray(y).dtype.kind == "f":
            assert_all_finite(y, input_name="y")
        check_classification_targets(y)
        checked: Array = column_or_1d(y, warn=True)
        check_consistent_length(X, checked)
        labels = np.unique(checked)
        if fitted:
            check_is_fitted(self.estimator)
            self.classes_ = self.estimator.classes_
            unknown = labels[~np.isin(labels, self.classes_)].tolist()
            if unknown:
                more = f" and {len(unknown) - _SHOWN:,} more" if len(unknown) > _SHOWN else ""
                raise LongtailError(
                    f"y: expected the classes of the fitted estimator, such as {self.classes_[0]}, got "
                    f"{', '.join(map(str, unknown[:_SHOWN]))}{more}, which it does not know"
                )
        else:
            self.classes_ = labels
            if len(labels) < 2:
                raise LongtailError(
                    f"y: expected samples of at least two classes, got {len(labels)} class{'es' * (len(labels) != 1)}"
                )
        self.class_counts_ = np.bincount(np.searchsorted(self.classes_, checked), minlength=len(self.classes_))
        return checked

    def _set_estimator(self, fitted: Any) -> None:
        """Set ``estimator_`` and what scikit-learn expects of its attributes."""
        _check_probabilities(fitted)
        self.estimator_ = fitted
        for name in ("n_features_in_", "feature_names_in_"):
            self.__dict__.pop(name, None)  # of an earlier fit
            if hasattr(fitted, name):
                setattr(self, name, getattr(fitted, name))

    def _probabilities(self, X: Any) -> Array:  # noqa: N803
        """Return (N, C) probabilities of the estimator."""
        check_is_fitted(self)
        return self._of_all_classes(np.asarray(self.estimator_.predict_proba(X), dtype=np.float64))

    @property
    def _fitted_classes(self) -> Array:
        """Labels that the estimator knows, which may leave out those whose samples all have weight 0."""
        own: Array = getattr(self.estimator_, "classes_", self.classes_)
        return own if len(own) < len(self.classes_) else self.classes_

    def _of_all_classes(self, values: Array) -> Array:
        """Return (…, C) values of all classes, 0 for those that the estimator does not know."""
        result = np.zeros((*values.shape[:-1], len(self.classes_)))
        result[..., np.searchsorted(self.classes_, self._fitted_classes)] = values
        return result

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import get_tags

        tags, inner = super().__sklearn_tags__(), get_tags(self.estimator)
        for name in ("sparse", "allow_nan", "categorical", "string", "pairwise"):
            setattr(tags.input_tags, name, getattr(inner.input_tags, name))
        return tags


class PriorCorrectedClassifier(_ProbabilityClassifier):
    """A classifier with ``predict_proba``, whose probabilities are corrected for other class frequencies.

    For a model whose training frequencies are not those it is used on: trained on re-sampled data or with class
    weights, or on a long tail and used on balanced classes, or used where the frequencies have changed. Only the class
    frequencies may differ; within a class, samples must be distributed as in training (label shift). The correction is
    as good as the estimator's probabilities. Where a model fits every training sample, weights and repeated samples
    hardly change it, and a correction for them goes too far: compare both on validation data.

    Args:
        estimator: a classifier with ``predict_proba``, or a pipeline that ends with one. A fitted model is kept by
            :class:`sklearn.frozen.FrozenEstimator` (scikit-learn 1.6) around it; then ``training_frequencies`` is
            required.
        training_frequencies: the class frequencies that the estimator's training effectively had: ``uniform``, such as
            after re-sampling to equal classes, ``train`` (those of the labels given to :meth:`fit`), C frequencies in
            the order of ``classes_``, a mapping from label to frequency, or a file; see
            :func:`~longtail.evaluation.class_frequencies.resolve_class_frequencies`. If not given, they are the sums of
            the sample weights of each class times the estimator's ``class_weight``, of two classes also times
            ``scale_pos_weight``, or what the fitted estimator was given itself (``priors``, ``class_prior`` and
            ``fit_prior`` of scikit-learn, ``prior`` of :class:`~longtail.LongTailClassifier`); inside pipelines,
            searches and averages too. After a calibration, they are those of the labels. Where they cannot be told, an
            error asks for them, such as of an estimator that re-samples within.
        target: the class frequencies that predictions assume: one of the above, or ``estimate``: estimated from all
            samples that a method gets, see :meth:`estimate_target`; a sample's probabilities then depend on the others,
            and there should be hundreds of them. May be changed after the fit.

    Attributes:
        estimator_: the fitted estimator.
        classes_: (C,) labels.
        class_counts_: (C,) samples of each class in :meth:`fit`.
        training_frequencies_: (C,) π_c, with sum 1.
        n_features_in_: number of features, if the estimator says it.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.linear_model import LogisticRegression
        >>> X, y = load_iris(return_X_y=True)
        >>> model = PriorCorrectedClassifier(LogisticRegression(class_weight="balanced", max_iter=500), target="train")
        >>> model.fit(X[:120], y[:120]).training_frequencies_.round(2).tolist()  # in effect; 50, 50 and 20 samples
        [0.33, 0.33, 0.33]
    """

    def __init__(
        self,
        estimator: Any,
        training_frequencies: ClassFrequencies | None = None,
        target: ClassFrequencies = "uniform",
    ) -> None:
        self.estimator = estimator
        self.training_frequencies = training_frequencies
        self.target = target

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PriorCorrectedClassifier:  # noqa: N803
        """Fit the estimator.

        Args:
            X: (N, …) samples, as the estimator takes them.
            y: (N,) labels.
            sample_weight: (N,) weights, or one number for all samples, for the estimator and for the training
                frequencies; for a pipeline, they are given to its last step, or with scikit-learn's metadata routing
                to the steps that request them (``set_fit_request(sample_weight=True)``).

        Raises:
            LongtailError: frequencies or weights are not as above, or the training frequencies cannot be read from the
                estimator.
        """
        with all_or_nothing(self):
            self._fit(X, y, sample_weight)
        return self

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> None:  # noqa: N803
        frozen = _is_frozen(self.estimator)
        y = self._check_labels(X, y, fitted=frozen)
        if self.training_frequencies is not None:
            self._resolve(self.training_frequencies, "training_frequencies")
        elif frozen:
            raise LongtailError(
                "training_frequencies: expected those that the fitted estimator was trained with, such as uniform"
            )
        else:
            check_resampling(self.estimator)  # before the training
        if not self._estimates:
            self._resolve(self.target, "target")  # raises for a wrong one before the training
        arguments = {}
        if sample_weight is not None:
            if isinstance(sample_weight, numbers.Real):
                sample_weight = np.full(len(y), float(sample_weight))
            elif (shape := np.asarray(sample_weight).shape) != y.shape:
                raise LongtailError(
                    f"sample_weight: expected shape ({len(y)},), one weight for each sample, got {shape}"
                )
            # with metadata routing a pipeline finds the steps that ask for the weights itself, and takes no step's name
            routed = get_config().get("enable_metadata_routing", False)
            step = "" if routed or not isinstance(self.estimator, Pipeline) else f"{self.estimator.steps[-1][0]}__"
            arguments[f"{step}sample_weight"] = sample_weight
        self._set_estimator(clone(self.estimator).fit(X, y, **arguments))
        if self.training_frequencies is not None:
            self.training_frequencies_ = self._resolve(self.training_frequencies, "training_frequencies")
        else:
            known = np.isin(y, self._fitted_classes)
            weights = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)[known]
            self.training_frequencies_ = self._of_all_classes(
                effective_frequencies(self.estimator_, y[known], self._fitted_classes, weights)
            )

    @property
    def _estimates(self) -> bool:
        return isinstance(self.target, str) and self.target == "estimate"

    def _resolve(self, frequencies: ClassFrequencies, where: str) -> Array:
        """Return (C,) class frequencies."""
        return np.array(
            resolve_class_frequencies(
                frequencies, self.classes_.tolist(), self.class_counts_.tolist(), where=where, ignore_unknown=True
            )
        )

    def estimate_target(self, X: Any) -> EstimatedPrior:  # noqa: N803
        """Return the class frequencies of unlabelled samples, estimated by maximum likelihood, with 95 % intervals.

        ``set_params(target=estimate.frequencies)`` makes later predictions independent of one another. See
        :func:`~longtail.evaluation.label_shift.estimate_em`.

        Args:
            X: (N, …) samples, as many as there are: with N below some tens per class, the frequencies of rare classes
                are mostly noise, as the intervals say.
        """
        return self._estimate(self._probabilities(X))

    def _estimate(self, probabilities: Array) -> EstimatedPrior:
        known = self.training_frequencies_ > 0
        logs = np.log(probabilities.clip(min=_SMALLEST_PROBABILITY))
        scores = np.where(known, logs - np.log(np.where(known, self.training_frequencies_, 1.0)), -1e3)
        return estimate_em(scores)

    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """Return (N, C) class probabilities under ``target``."""
        probabilities = self._probabilities(X)
        if self._estimates:
            target = np.array(self._estimate(probabilities).frequencies)
        else:
            target = self._resolve(self.target, "target")
        known = self.training_frequencies_ > 0
        # a class without weight in the training has no likelihood
        ratio = np.where(known, target / np.where(known, self.training_frequencies_, 1.0), 0.0)
        corrected: Array = probabilities * (ratio / ratio.max())
        total = corrected.sum(axis=1, keepdims=True)
        normalized: Array = np.where(total > 0, corrected / np.where(total > 0, total, 1.0), probabilities)
        return normalized

    def predict_log_proba(self, X: Any) -> Array:  # noqa: N803
        """Return (N, C) logarithms of the class probabilities under ``target``; −inf for a probability of 0."""
        with np.errstate(divide="ignore"):
            logs: Array = np.log(self.predict_proba(X))
        return logs

    def predict(self, X: Any) -> Array:  # noqa: N803
        """Return the most probable class of each sample under ``target``, (N,)."""
        best: Array = self.predict_proba(X).argmax(axis=1)
        return np.take(self.classes_, best)


class TunedThresholdsClassifierCV(_ProbabilityClassifier):
    """A classifier with ``predict_proba``, and one decision threshold for each of many classes.

    It predicts the class with the largest p(c|x) / t_c. The thresholds t_c are tuned on predictions for samples that
    the estimator was not fitted on, for a metric of the predicted classes. They sum to 1: for two classes, t_1 is the
    threshold of p(1|x), and :class:`sklearn.model_selection.TunedThresholdClassifierCV`, which knows two classes only,
    does the same. ``predict_proba`` remains that of the estimator.

    For balanced accuracy and calibrated probabilities the best thresholds are the class frequencies, which
    :class:`PriorCorrectedClassifier` uses without tuning; tuned ones are for other metrics, such as F1, and for
    probabilities that are not calibrated. A class with few samples has a threshold that is mostly noise.

    The search starts from equal thresholds and from the class frequencies, whichever scores better, and changes one
    threshold after another, as long as the score rises (as Fan & Lin, *A Study on Threshold Selection for Multi-label
    Classification*, 2007, do for labels that do not exclude one another).

    Args:
        estimator: a classifier with ``predict_proba``, or a pipeline that ends with one.
        scoring: ``balanced_accuracy``, ``f1_macro``, ``accuracy``, or a function of (y_true, y_pred) whose larger
            values are better, such as :func:`sklearn.metrics.cohen_kappa_score`.
        cv: number of folds (5 if not given), in which the samples of each class are spread over as many folds as there
            are samples; a scikit-learn splitter whose test folds are a partition; or ``prefit``: the estimator is
            fitted, as every ``FrozenEstimator`` is, and the samples given to :meth:`fit` are validation samples.
        n_jobs: processes of the cross-validation.

    Attributes:
        estimator_: the estimator, fitted on all samples.
        classes_: (C,) labels.
        class_counts_: (C,) samples of each class in :meth:`fit`.
        best_thresholds_: (C,) t_c, with sum 1.
        best_score_: the metric of the predictions that the thresholds were tuned on, which is optimistic.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.linear_model import LogisticRegression
        >>> X, y = load_iris(return_X_y=True)
        >>> model = TunedThresholdsClassifierCV(LogisticRegression(max_iter=500), scoring="f1_macro")
        >>> model.fit(X[:120], y[:120]).best_thresholds_.shape
        (3,)
    """

    def __init__(
        self,
        estimator: Any,
        *,
        scoring: str | Callable[[Array, Array], float] = "balanced_accuracy",
        cv: Any = None,
        n_jobs: int | None = None,
    ) -> None:
        self.estimator = estimator
        self.scoring = scoring
        self.cv = cv
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any) -> TunedThresholdsClassifierCV:  # noqa: N803
        """Tune the thresholds, and fit the estimator on all samples.

        Args:
            X: (N, …) samples, as the estimator takes them.
            y: (N,) labels.

        Raises:
            LongtailError: ``scoring`` is unknown, or the estimator has no probabilities.
        """
        with all_or_nothing(self):
            self._fit(X, y)
        return self

    def _fit(self, X: Any, y: Any) -> None:  # noqa: N803
        scorer = hasattr(self.scoring, "_score_func")  # of make_scorer, which takes an estimator
        if scorer or (not callable(self.scoring) and self.scoring not in _METRICS):
            raise LongtailError(
                f"scoring: expected {', '.join(_METRICS)} or a function of (y_true, y_pred), got {self.scoring!r}"
                f"{'; give the metric itself, without make_scorer' if scorer else ''}"
            )
        prefit = _is_frozen(self.estimator) or (isinstance(self.cv, str) and self.cv == "prefit")
        _check_probabilities(self.estimator)  # which cross_val_predict asks for before the fit
        y = self._check_labels(X, y, fitted=prefit)
        if prefit:
            self._set_estimator(self.estimator)
            probabilities = self._probabilities(X)
        else:
            with warnings.catch_warnings():
                # a class with one sample is missing from one training fold: its threshold stays where it was
                warnings.filterwarnings("ignore", "Number of classes in training fold", RuntimeWarning)
                probabilities = cross_val_predict(
                    clone(self.estimator), X, y, cv=self._splits(X, y), n_jobs=self.n_jobs, method="predict_proba"
                )
            self._set_estimator(clone(self.estimator).fit(X, y))
        labels = np.searchsorted(self.classes_, y)

        def score(predicted: Array) -> float:
            if callable(self.scoring):
                return float(self.scoring(y, self.classes_[predicted]))
            return _METRICS[self.scoring](labels, predicted, len(self.classes_))

        logs = np.log(probabilities.clip(min=_SMALLEST_PROBABILITY))
        frequencies = self.class_counts_.clip(min=1) / self.class_counts_.clip(min=1).sum()
        starts = [np.zeros(len(frequencies)), -np.log(frequencies)]
        bias = max(starts, key=lambda start: score((logs + start).argmax(axis=1)))
        bias, self.best_score_ = _tune(logs, labels, bias, score)
        thresholds = np.exp(bias.min() - bias)
        self.best_thresholds_ = thresholds / thresholds.sum()

    def _splits(self, X: Any, y: Array) -> Iterable[tuple[Array, Array]]:  # noqa: N803
        folds = 5 if self.cv is None else self.cv
        if not isinstance(folds, int | np.integer):
            splits: Iterable[tuple[Array, Array]] = check_cv(folds, y, classifier=True).split(X, y)
            return list(splits)
        if folds < 2:
            raise LongtailError(f"cv: expected at least 2 folds, got {folds}")
        # StratifiedKFold refuses, or warns of, classes with fewer samples than folds
        fold = np.empty(len(y), dtype=np.int64)
        fold[np.argsort(y, kind="stable")] = np.arange(len(y)) % folds
        return [(np.flatnonzero(fold != part), np.flatnonzero(fold == part)) for part in np.unique(fold)]

    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """Return (N, C) class probabilities of the estimator."""
        return self._probabilities(X)

    def predict(self, X: Any) -> Array:  # noqa: N803
        """Return the class of each sample by the tuned thresholds, (N,)."""
        logs = np.log(self._probabilities(X).clip(min=_SMALLEST_PROBABILITY))
        predicted: Array = self.classes_[(logs - np.log(self.best_thresholds_)).argmax(axis=1)]
        return predicted


def _tune(logs: Array, labels: Array, bias: Array, score: Callable[[Array], float]) -> tuple[Array, float]:
    """Return (C,) biases of the log probabilities with a higher score, and the score.

    Args:
        logs: (N, C) log probabilities.
        labels: (N,) true class indices.
        bias: (C,) to start from.
        score: of (N,) predicted class indices.
    """
    bias, rows = bias.copy(), np.arange(len(logs))
    shifted = logs + bias
    # the two best classes of each sample, so that the best other one than any class is known without a search
    first, second = _two_best(shifted)
    best = score(first)
    for _ in range(_MAX_ROUNDS):
        previous = best
        for index in range(len(bias)):
            rival = np.where(first == index, second, first)
            # a sample is predicted as this class if the bias is above its gap
            gaps = shifted[rows, rival] - logs[:, index]
            trials = []
            for candidate in _candidates(gaps, gaps[labels == index]):
                value = score(np.where(candidate > gaps, index, rival))
                trials.append((value, -abs(candidate - bias[index]), candidate))
            if trials and max(trials)[0] > best + 1e-12:
                best, _, bias[index] = max(trials)
                of_two = (first == index) | (second == index)
                shifted[:, index] = logs[:, index] + bias[index]
                changed = np.flatnonzero(of_two | (shifted[:, index] >= shifted[rows, second]))
                first[changed], second[changed] = _two_best(shifted[changed])
        if best - previous < 1e-9:
            break
    return bias, best


def _two_best(values: Array) -> tuple[Array, Array]:
    """Return the columns of the largest and of the second largest value in each row; of equal ones the first."""
    first = values.argmax(axis=1)
    rest = values.copy()
    rest[np.arange(len(rest)), first] = -np.inf
    return first, rest.argmax(axis=1)


def _candidates(gaps: Array, own: Array) -> Array:
    """Return biases at which a further sample of the class is recognised: in the middle before the next sample."""
    if len(own) == 0:
        return own
    if len(own) > _MAX_CANDIDATES:
        own = np.quantile(own, np.linspace(0, 1, _MAX_CANDIDATES), method="nearest")
    values = np.unique(gaps)
    above = np.minimum(np.searchsorted(values, own, side="right"), len(values) - 1)
    following = np.where(values[above] > own, values[above], own + 1.0)
    # no further above than a factor e, where samples are far apart
    middle: Array = np.minimum((own + following) / 2, own + 1.0)
    return middle


def _balanced_accuracy(labels: Array, predicted: Array, classes: int) -> float:
    counts = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[labels == predicted], minlength=classes)
    return float((hits[counts > 0] / counts[counts > 0]).mean())


def _macro_f1(labels: Array, predicted: Array, classes: int) -> float:
    total = np.bincount(labels, minlength=classes) + np.bincount(predicted, minlength=classes)
    hits = np.bincount(labels[labels == predicted], minlength=classes)
    return float((2 * hits[total > 0] / total[total > 0]).mean())


_METRICS: dict[str, Callable[[Array, Array, int], float]] = {
    "balanced_accuracy": _balanced_accuracy,
    "f1_macro": _macro_f1,
    "accuracy": lambda labels, predicted, _: float((labels == predicted).mean()),
}
