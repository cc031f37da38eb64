"""scikit-learn's own checks, the mathematics against loops, and long-tailed digits."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from sklearn import config_context, model_selection
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    GradientBoostingClassifier,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import SelectFromModel
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.metrics import accuracy_score, balanced_accuracy_score, cohen_kappa_score, f1_score, log_loss, make_scorer
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import BernoulliNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted

from longtail import LongTailClassifier
from longtail.prior_correction import PriorCorrectedClassifier, TunedThresholdsClassifierCV

Array = np.ndarray[Any, Any]


@parametrize_with_checks(  # type: ignore[untyped-decorator]
    [
        PriorCorrectedClassifier(LogisticRegression()),
        PriorCorrectedClassifier(LogisticRegression(), training_frequencies="uniform"),
        TunedThresholdsClassifierCV(LogisticRegression(), cv=2),
    ],
    expected_failed_checks=lambda estimator: (
        {"check_classifiers_train": "tuned thresholds are not those of the largest probability"}
        if isinstance(estimator, TunedThresholdsClassifierCV)
        else {}
    ),
)
def test_scikit_learn_estimator_checks(estimator: Any, check: Any) -> None:
    check(estimator)


CENTERS = np.array([-1.0, 0.5, 2.0])


class Posterior(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The exact posterior of three Gaussians on a line, under given class frequencies; nothing is fitted."""

    def __init__(self, frequencies: Any = (1, 1, 1)) -> None:
        self.frequencies = frequencies

    def fit(self, X: Any, y: Any) -> Posterior:  # noqa: N803
        self.classes_ = np.unique(y)
        return self

    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        likelihood = np.exp(-((np.asarray(X) - CENTERS) ** 2) / 2) * np.array(self.frequencies)
        result: Array = likelihood / likelihood.sum(axis=1, keepdims=True)
        return result


def draw(counts: list[int], seed: int = 0) -> tuple[Array, Array]:
    y = np.repeat(np.arange(3), counts)
    return CENTERS[y][:, None] + np.random.default_rng(seed).normal(size=(len(y), 1)), y


TRAINED, USED = [0.7, 0.2, 0.1], [0.05, 0.15, 0.8]


def test_the_correction_gives_the_posterior_of_the_other_frequencies() -> None:
    X, y = draw([7, 2, 1])  # noqa: N806
    model = PriorCorrectedClassifier(Posterior(TRAINED), TRAINED, USED).fit(X, y)
    assert np.allclose(model.predict_proba(X), Posterior(USED).predict_proba(X))
    assert np.allclose(np.exp(model.predict_log_proba(X)), model.predict_proba(X))
    assert np.array_equal(model.predict(X), model.predict_proba(X).argmax(axis=1))
    # by default the frequencies of the labels, to equal classes
    default = PriorCorrectedClassifier(Posterior(TRAINED)).fit(X, y)
    assert np.allclose(default.training_frequencies_, TRAINED)
    assert np.allclose(default.predict_proba(X), Posterior().predict_proba(X))
    assert np.allclose(default.set_params(target="train").predict_proba(X), Posterior(TRAINED).predict_proba(X))
    default.set_params(target={0: 5, 1: 15, 2: 80})
    assert np.allclose(default.predict_proba(X), Posterior(USED).predict_proba(X))


def test_a_class_without_weight_has_no_probability() -> None:
    X, y = draw([20, 20, 20])  # noqa: N806
    weights = (y != 1) * np.where(y == 0, 3.0, 1.0)
    model = PriorCorrectedClassifier(LongTailClassifier(hidden=8, prior="train", random_state=0))
    model.fit(X, y, weights)
    assert np.allclose(model.training_frequencies_, [0.75, 0, 0.25])
    probabilities = model.predict_proba(X)
    assert np.allclose(probabilities[:, 1], 0)
    assert np.allclose(probabilities.sum(axis=1), 1)
    uniform = model.estimator_.set_params(prior="uniform").predict_proba(X)
    assert np.allclose(probabilities[:, [0, 2]], uniform)


def test_the_target_is_estimated_from_the_samples() -> None:
    X, y = draw([700, 200, 100])  # noqa: N806
    X_used, _ = draw([250, 750, 4000], seed=1)  # noqa: N806
    model = PriorCorrectedClassifier(Posterior(TRAINED), TRAINED, "estimate").fit(X, y)
    estimate = model.estimate_target(X_used)
    assert np.abs(np.array(estimate.frequencies) - USED).max() < 0.03
    assert (np.array(estimate.low) < USED).all()
    assert (np.array(estimate.high) > USED).all()
    fixed = clone(model).set_params(target=estimate.frequencies).fit(X, y)
    assert np.allclose(model.predict_proba(X_used), fixed.predict_proba(X_used))


def test_probabilities_of_zero() -> None:
    class Certain(Posterior):
        def predict_proba(self, X: Any) -> Array:  # noqa: N803
            return np.eye(3)[np.arange(len(X)) % 3]

    X, y = draw([7, 2, 1])  # noqa: N806
    for target in ("uniform", "estimate"):
        model = PriorCorrectedClassifier(Certain(), target=target).fit(X, y)
        assert np.array_equal(model.predict_proba(X), np.eye(3)[np.arange(10) % 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isneginf(model.predict_log_proba(X)).sum() == 20
    # a class without weight was never seen
    weighted = PriorCorrectedClassifier(LogisticRegression()).fit(X, y, sample_weight=(y != 1) + 0.0)
    assert weighted.training_frequencies_[1] == 0
    assert np.array_equal(weighted.predict_proba(X)[:, 1], np.zeros(10))


def test_training_frequencies_in_effect() -> None:
    X, y = draw([70, 20, 10])  # noqa: N806
    uniform = [1 / 3] * 3

    def frequencies(estimator: Any, **arguments: Any) -> Array:
        fitted: Array = PriorCorrectedClassifier(estimator).fit(X, y, **arguments).training_frequencies_
        return fitted

    assert np.allclose(frequencies(LogisticRegression()), TRAINED)
    assert np.allclose(frequencies(LogisticRegression(class_weight="balanced")), uniform)
    assert np.allclose(frequencies(LogisticRegression(class_weight={0: 2, 2: 4})), np.array([14, 2, 4]) / 20)
    forest = RandomForestClassifier(5, class_weight="balanced_subsample", random_state=0)
    assert np.allclose(frequencies(forest), uniform)
    assert np.allclose(frequencies(make_pipeline(StandardScaler(), clone(forest))), uniform)
    search = GridSearchCV(LogisticRegression(), {"class_weight": ["balanced"]}, cv=2)
    assert np.allclose(frequencies(search), uniform)
    weights = np.array([1.0, 1.0, 9.0])[y]
    expected = np.array([7, 2, 9]) / 18
    assert np.allclose(frequencies(LogisticRegression(), sample_weight=weights), expected)
    assert np.allclose(frequencies(make_pipeline(StandardScaler(), GaussianNB()), sample_weight=weights), expected)
    # calibrated on the labels as they are
    assert np.allclose(frequencies(CalibratedClassifierCV(LogisticRegression(class_weight="balanced"), cv=2)), TRAINED)
    assert np.allclose(frequencies(CalibratedClassifierCV(Resampling(), cv=2)), TRAINED)
    # models that state the frequencies themselves
    assert np.allclose(frequencies(LinearDiscriminantAnalysis(priors=USED)), USED)
    assert np.allclose(frequencies(GaussianNB(priors=USED)), USED)
    assert np.allclose(frequencies(LongTailClassifier(hidden=8, random_state=0)), uniform)
    assert np.allclose(frequencies(LongTailClassifier(hidden=8, prior="train", random_state=0)), TRAINED)


class Weighted(Posterior):
    """With the parameters of XGBoost and LightGBM that change class frequencies."""

    def __init__(self, scale_pos_weight: Any = None, is_unbalance: bool = False) -> None:
        super().__init__()
        self.scale_pos_weight, self.is_unbalance = scale_pos_weight, is_unbalance


BALANCED = LogisticRegression(class_weight="balanced")


@pytest.mark.filterwarnings("ignore:The `probability` parameter:FutureWarning")
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (BaggingClassifier(BALANCED, 3, random_state=0), "uniform"),
        (BaggingClassifier(GaussianNB(), 3, random_state=0), TRAINED),
        (
            VotingClassifier([("a", BALANCED), ("b", make_pipeline(StandardScaler(), BALANCED))], voting="soft"),
            "uniform",
        ),
        (VotingClassifier([("a", BALANCED), ("b", "drop")], voting="soft"), "uniform"),
        (VotingClassifier([("a", GaussianNB()), ("b", LogisticRegression())], voting="soft"), TRAINED),
        (OneVsRestClassifier(LogisticRegression()), TRAINED),
        (StackingClassifier([("a", BALANCED)], LogisticRegression(), cv=2), TRAINED),
        (StackingClassifier([("a", LogisticRegression())], BALANCED, cv=2), "uniform"),
        (make_pipeline(SelectFromModel(BALANCED, threshold=-1), LogisticRegression()), TRAINED),
        (TunedThresholdsClassifierCV(BALANCED, cv=2), "uniform"),
        (PriorCorrectedClassifier(LogisticRegression()), "uniform"),
        (PriorCorrectedClassifier(BALANCED, target=USED), USED),
        (SVC(probability=True, class_weight="balanced"), TRAINED),  # a sigmoid is fitted to the labels as they are
        (MultinomialNB(), TRAINED),
        (MultinomialNB(fit_prior=False), "uniform"),
        (BernoulliNB(class_prior=USED), USED),
        (BaggingClassifier(MultinomialNB(fit_prior=False), 3, random_state=0), "uniform"),
        (GradientBoostingClassifier(n_estimators=2), TRAINED),
        (Weighted(1.0), TRAINED),
    ],
    ids=str,
)
def test_training_frequencies_of_what_contains_a_classifier(estimator: Any, expected: Any) -> None:
    X, y = draw([70, 20, 10])  # noqa: N806
    # labels that are no indices, which ensembles give their members in place of labels
    model = PriorCorrectedClassifier(estimator).fit(np.abs(X), np.array(["a", "b", "c"])[y])
    assert np.allclose(model.training_frequencies_, [1 / 3] * 3 if expected == "uniform" else expected)


def test_training_frequencies_of_two_classes() -> None:
    X, y = draw([80, 20, 0])  # noqa: N806

    def frequencies(estimator: Any) -> Array:
        fitted: Array = PriorCorrectedClassifier(estimator).fit(np.abs(X), y).training_frequencies_
        return fitted

    assert np.allclose(frequencies(OneVsRestClassifier(BALANCED)), [0.5, 0.5])
    assert np.allclose(frequencies(Weighted(4)), [0.5, 0.5])
    assert np.allclose(frequencies(VotingClassifier([("a", Weighted(2.0))], voting="soft")), [2 / 3, 1 / 3])
    assert np.allclose(frequencies(SGDClassifier(loss="log_loss", class_weight="balanced")), [0.5, 0.5])
    assert np.allclose(frequencies(ComplementNB()), [0.5, 0.5])
    if hasattr(model_selection, "FixedThresholdClassifier"):  # scikit-learn 1.5
        assert np.allclose(frequencies(model_selection.FixedThresholdClassifier(BALANCED)), [0.5, 0.5])
    with pytest.raises(ValueError, match=r"training_frequencies: expected those .* Weighted has is_unbalance"):
        frequencies(VotingClassifier([("a", Weighted(is_unbalance=True))], voting="soft"))


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (Weighted(4), "Weighted has scale_pos_weight"),
        (VotingClassifier([("a", BALANCED), ("b", GaussianNB())], voting="soft"), "in VotingClassifier have different"),
        (OneVsRestClassifier(BALANCED), "OneVsRestClassifier weighs each class against all others"),
        (OneVsRestClassifier(MultinomialNB(fit_prior=False)), "OneVsRestClassifier weighs each class against all"),
        (SGDClassifier(loss="log_loss", class_weight="balanced"), "SGDClassifier weighs each class against all others"),
        (AdaBoostClassifier(DecisionTreeClassifier(class_weight="balanced")), "has estimator__class_weight"),
        (ComplementNB(), "ComplementNB has none for more than two classes"),
        (PriorCorrectedClassifier(BALANCED, target="estimate"), "PriorCorrectedClassifier estimates those of"),
    ],
    ids=str,
)
def test_training_frequencies_that_cannot_be_told_are_asked_for(estimator: Any, message: str) -> None:
    X, y = draw([70, 20, 10])  # noqa: N806
    with pytest.raises(ValueError, match=f"training_frequencies: expected those that .*, such as uniform.*{message}"):
        PriorCorrectedClassifier(estimator).fit(np.abs(X), y)
    given = PriorCorrectedClassifier(estimator, "uniform").fit(np.abs(X), y)
    assert np.allclose(given.training_frequencies_, 1 / 3)


class Resampling(LogisticRegression):  # type: ignore[misc]
    def fit_resample(self, X: Any, y: Any) -> Any:  # noqa: N803
        raise AssertionError


class Sampler(BaseEstimator):  # type: ignore[misc]
    def fit_resample(self, X: Any, y: Any) -> Any:  # noqa: N803
        raise AssertionError

    def fit(self, X: Any, y: Any) -> Any:  # noqa: N803
        raise AssertionError

    def transform(self, X: Any) -> Any:  # noqa: N803
        raise AssertionError


class BalancedForest(RandomForestClassifier):  # type: ignore[misc]
    def __init__(self, sampling_strategy: str = "auto") -> None:
        super().__init__()
        self.sampling_strategy = sampling_strategy


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (PriorCorrectedClassifier(RidgeClassifier()), "estimator: expected a classifier with predict_proba, got Ridge"),
        (PriorCorrectedClassifier(Resampling()), "training_frequencies: Resampling re-samples within the estimator"),
        (PriorCorrectedClassifier(BalancedForest()), "training_frequencies: BalancedForest re-samples"),
        (
            PriorCorrectedClassifier(
                GridSearchCV(make_pipeline(Sampler(), GaussianNB()), {"gaussiannb__priors": [None]})
            ),
            "training_frequencies: Sampler re-samples within the estimator",
        ),
        (PriorCorrectedClassifier(BaggingClassifier(Resampling())), "training_frequencies: Resampling re-samples"),
        (PriorCorrectedClassifier(GaussianNB(), [1, 2]), "training_frequencies: expected 3 frequencies above 0, got 2"),
        (PriorCorrectedClassifier(GaussianNB(), target="equal"), "target 'equal': expected uniform, train"),
        (PriorCorrectedClassifier(GaussianNB(), target={0: 1, 1: 1}), "target: class '2' is missing"),
        (TunedThresholdsClassifierCV(RidgeClassifier()), "estimator: expected a classifier with predict_proba"),
        (TunedThresholdsClassifierCV(GaussianNB(), scoring="f2"), "scoring: expected balanced_accuracy, f1_macro, acc"),
        (TunedThresholdsClassifierCV(GaussianNB(), cv=1), "cv: expected at least 2 folds, got 1"),
    ],
)
def test_wrong_parameters_raise(model: Any, message: str) -> None:
    X, y = draw([7, 2, 5])  # noqa: N806
    with pytest.raises(ValueError, match=message):
        model.fit(X, y)


def test_class_weight_with_sample_weight_raises() -> None:
    X, y = draw([7, 2, 5])  # noqa: N806
    model = PriorCorrectedClassifier(LogisticRegression(class_weight="balanced"))
    with pytest.raises(ValueError, match="training_frequencies: class_weight balanced together with sample_weight"):
        model.fit(X, y, sample_weight=np.ones(14))


def test_one_sample_weight_for_all_and_too_few() -> None:
    X, y = draw([7, 2, 5])  # noqa: N806
    model = PriorCorrectedClassifier(GaussianNB())
    expected = model.fit(X, y).predict_proba(X)
    assert np.allclose(model.fit(X, y, sample_weight=2.0).predict_proba(X), expected)
    with pytest.raises(ValueError, match=r"^sample_weight: expected shape \(14,\), one weight .*, got \(3"):
        model.fit(X, y, sample_weight=[1, 2, 3])


def test_a_weighted_pipeline_with_metadata_routing() -> None:
    X, y = draw([7, 2, 5])  # noqa: N806
    weights = np.linspace(1, 2, len(y))
    pipeline = make_pipeline(StandardScaler(), GaussianNB())
    expected = PriorCorrectedClassifier(pipeline).fit(X, y, sample_weight=weights)
    with config_context(enable_metadata_routing=True):
        routed = make_pipeline(
            StandardScaler().set_fit_request(sample_weight=False), GaussianNB().set_fit_request(sample_weight=True)
        )
        model = PriorCorrectedClassifier(routed).fit(X, y, sample_weight=weights)
        assert np.allclose(model.predict_proba(X), expected.predict_proba(X))
        assert np.allclose(model.training_frequencies_, expected.training_frequencies_)


def test_a_fitted_model() -> None:
    frozen = pytest.importorskip("sklearn.frozen")
    X, y = draw([70, 20, 10])  # noqa: N806
    fitted = LogisticRegression().fit(X, y)
    X_valid, y_valid = draw([5, 20, 0], seed=1)  # noqa: N806
    model = PriorCorrectedClassifier(frozen.FrozenEstimator(fitted), TRAINED, USED).fit(X_valid, y_valid)
    expected = fitted.predict_proba(X) * np.array(USED) / TRAINED
    assert np.allclose(model.predict_proba(X), expected / expected.sum(axis=1, keepdims=True))
    assert model.class_counts_.tolist() == [5, 20, 0]
    with pytest.raises(ValueError, match="training_frequencies: expected those that the fitted estimator was trained"):
        PriorCorrectedClassifier(frozen.FrozenEstimator(fitted)).fit(X_valid, y_valid)
    with pytest.raises(ValueError, match="training_frequencies: expected those that the fitted estimator was trained"):
        PriorCorrectedClassifier(make_pipeline(frozen.FrozenEstimator(fitted))).fit(X, y)
    wrong = {"3": y_valid + 2, "100, 101": y_valid + 100, "50, 100, 150 and 2 more": np.arange(25) % 6 * 50}
    for unknown, labels in wrong.items():
        message = f"y: expected the classes of the fitted estimator, such as 0, got {unknown}, which it does not know"
        with pytest.raises(ValueError, match=f"^{message}$"):
            PriorCorrectedClassifier(frozen.FrozenEstimator(fitted), TRAINED).fit(X_valid, labels)


def digits(seed: int, imbalance: float = 20.0) -> tuple[Array, Array, Array, Array]:
    """Digits with a long tail from 0 to 9, and as many test samples of each."""
    X, y = load_digits(return_X_y=True)  # noqa: N806
    rng = np.random.default_rng(seed)
    train, test = [], []
    for digit in range(10):
        indices = rng.permutation(np.flatnonzero(y == digit))
        test.append(indices[:80])
        train.append(indices[80 : 80 + max(2, int(90 * imbalance ** (-digit / 9)))])
    a, b = np.concatenate(train), np.concatenate(test)
    return X[a] / 16, y[a], X[b] / 16, y[b]


def test_probabilities_after_class_weights_are_right_again() -> None:
    X, y, X_test, truth = digits(0)  # noqa: N806
    weights = (np.bincount(y) / len(y))[truth]  # a test set with the tail of the training set

    def nll(model: Any) -> float:
        return float(log_loss(truth, model.predict_proba(X_test), sample_weight=weights))

    natural, balanced = (LogisticRegression(C=0.3, class_weight=name) for name in (None, "balanced"))
    wrong = nll(clone(balanced).fit(X, y))
    corrected = nll(PriorCorrectedClassifier(balanced, target="train").fit(X, y))
    right = nll(natural.fit(X, y))
    assert wrong > 1.1 * right
    assert corrected < 1.03 * right


def test_in_a_pipeline() -> None:
    X, y, X_test, truth = digits(0)  # noqa: N806
    inside = make_pipeline(StandardScaler(), PriorCorrectedClassifier(LogisticRegression(max_iter=500))).fit(X, y)
    around = PriorCorrectedClassifier(make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))).fit(X, y)
    assert np.allclose(inside.predict_proba(X_test), around.predict_proba(X_test))
    plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(X, y)
    gain = balanced_accuracy_score(truth, inside.predict(X_test)) - balanced_accuracy_score(
        truth, plain.predict(X_test)
    )
    assert gain > 0.01
    own = make_pipeline(StandardScaler(), LongTailClassifier(hidden=64, random_state=0))
    estimated = PriorCorrectedClassifier(own, target="estimate").fit(X, y)
    assert balanced_accuracy_score(truth, estimated.predict(X_test)) > 0.8


def macro_f1(truth: Array, predicted: Array) -> float:
    return float(f1_score(truth, predicted, average="macro"))


def test_tuned_thresholds_of_many_classes() -> None:
    gains = []
    for seed in range(3):
        X, y, X_test, truth = digits(seed)  # noqa: N806
        model = TunedThresholdsClassifierCV(LogisticRegression(C=0.1)).fit(X, y)
        plain = model.estimator_.predict(X_test)
        gains.append(balanced_accuracy_score(truth, model.predict(X_test)) - balanced_accuracy_score(truth, plain))
        assert model.best_thresholds_.sum() == pytest.approx(1)
        assert (model.best_thresholds_ > 0).all()
        assert np.array_equal(model.predict_proba(X_test), model.estimator_.predict_proba(X_test))
    assert np.mean(gains) > 0.05


def test_the_score_of_the_thresholds_is_that_of_their_predictions() -> None:
    X, y, X_valid, truth = digits(0)  # noqa: N806
    fitted = LogisticRegression(C=0.1).fit(X, y)
    metrics: list[tuple[Any, Any]] = [
        ("balanced_accuracy", balanced_accuracy_score),
        ("f1_macro", macro_f1),
        ("accuracy", accuracy_score),
        (cohen_kappa_score, cohen_kappa_score),
    ]
    for scoring, metric in metrics:
        model = TunedThresholdsClassifierCV(fitted, scoring=scoring, cv="prefit").fit(X_valid, truth)
        assert model.estimator_ is fitted
        assert model.best_score_ == pytest.approx(metric(truth, model.predict(X_valid)))
        assert model.best_score_ > metric(truth, fitted.predict(X_valid)) + 0.01


class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Probabilities that are given as samples."""

    def fit(self, X: Array, y: Array) -> Given:  # noqa: N803
        self.classes_ = np.unique(y)
        return self

    def predict_proba(self, X: Array) -> Array:  # noqa: N803
        return X


def searched(logs: Array, labels: Array) -> Array:
    """Return (C,) biases by the search of the thresholds written plainly, for macro-F1 and few samples of a class."""
    frequencies = np.bincount(labels) / len(labels)
    starts = (np.zeros(len(frequencies)), -np.log(frequencies))
    bias = max(starts, key=lambda start: macro_f1(labels, (logs + start).argmax(axis=1))).copy()
    best, rose = macro_f1(labels, (logs + bias).argmax(axis=1)), True
    for _ in range(10):
        if not rose:
            break
        rose = False
        for c in range(len(bias)):
            others = logs + bias
            others[:, c] = -np.inf
            gaps = others.max(axis=1) - logs[:, c]
            trials = []
            for own in gaps[labels == c]:
                above = gaps[gaps > own]
                candidate = min((own + above.min()) / 2, own + 1) if len(above) else own + 0.5
                value = macro_f1(labels, np.where(candidate > gaps, c, others.argmax(axis=1)))
                trials.append((value, -abs(candidate - bias[c]), candidate))
            if max(trials)[0] > best + 1e-12:
                best, _, bias[c] = max(trials)
                rose = True
    return bias


@pytest.mark.parametrize("seed", range(3))
def test_the_search_for_thresholds_written_plainly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(6), rng.integers(0, 6, 54)]
    probabilities = rng.dirichlet(np.full(6, 0.5), 60)
    model = TunedThresholdsClassifierCV(Given().fit(probabilities, labels), scoring="f1_macro", cv="prefit")
    found = -np.log(model.fit(probabilities, labels).best_thresholds_)
    expected = searched(np.log(probabilities.clip(min=1e-12)), labels)
    assert found - found.min() == pytest.approx(expected - expected.min())


def test_two_classes_have_the_best_threshold_there_is() -> None:
    X, y, *_ = digits(0, 4)  # noqa: N806
    y = np.where(y > 6, "tail", "head")
    fitted = LogisticRegression(C=0.01).fit(X, y)
    model = TunedThresholdsClassifierCV(fitted, cv="prefit", scoring="f1_macro").fit(X, y)
    probability = fitted.predict_proba(X)[:, 1]
    best = max(macro_f1(y, np.where(probability > t, "tail", "head")) for t in np.linspace(0, 1, 401))
    assert model.best_score_ > best - 0.01
    assert np.array_equal(model.predict(X), np.where(probability > model.best_thresholds_[1], "tail", "head"))


def test_thresholds_of_classes_with_one_sample() -> None:
    X, y, X_test, _ = digits(0)  # noqa: N806
    few = np.concatenate([np.flatnonzero(y < 8), np.flatnonzero(y == 8)[:3], np.flatnonzero(y == 9)[:1]])
    model = TunedThresholdsClassifierCV(LogisticRegression(C=0.1)).fit(X[few], y[few])
    assert model.class_counts_[-2:].tolist() == [3, 1]
    assert np.isfinite(model.best_thresholds_).all()
    assert len(model.predict(X_test)) == len(X_test)


def test_a_splitter_and_a_pipeline_for_the_thresholds() -> None:
    X, y, X_test, truth = digits(0, 5)  # noqa: N806
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
    model = TunedThresholdsClassifierCV(pipeline, cv=StratifiedKFold(3, shuffle=True, random_state=0)).fit(X, y)
    plain = balanced_accuracy_score(truth, model.estimator_.predict(X_test))
    assert balanced_accuracy_score(truth, model.predict(X_test)) > plain


@pytest.mark.parametrize("pipeline", [False, True])
def test_a_stack_has_probabilities_after_its_fit(pipeline: bool) -> None:
    X, y = load_digits(return_X_y=True)  # noqa: N806
    X, y = X[:300, 10:14], y[:300] % 3  # noqa: N806
    stack: Any = StackingClassifier([("tree", DecisionTreeClassifier(max_depth=3, random_state=0))], cv=2)
    model = PriorCorrectedClassifier(make_pipeline(stack) if pipeline else stack, training_frequencies="train")
    assert model.fit(X, y).predict_proba(X).shape == (300, 3)
    with pytest.raises(ValueError, match="give the StackingClassifier its final_estimator"):
        TunedThresholdsClassifierCV(make_pipeline(stack) if pipeline else stack, cv=2).fit(X, y)
    without = StackingClassifier([("tree", DecisionTreeClassifier(max_depth=3))], final_estimator=RidgeClassifier())
    with pytest.raises(ValueError, match="estimator: expected a classifier with predict_proba, got StackingClassifier"):
        PriorCorrectedClassifier(without).fit(X, y)


def test_a_scorer_in_place_of_a_metric_raises() -> None:
    model = TunedThresholdsClassifierCV(LogisticRegression(), scoring=make_scorer(f1_score))
    with pytest.raises(ValueError, match=r"scoring: expected .*give the metric itself, without make_scorer"):
        model.fit([[0.0], [1.0]] * 5, [0, 1] * 5)


@pytest.mark.parametrize(
    "model",
    [PriorCorrectedClassifier(LogisticRegression(), target="train"), TunedThresholdsClassifierCV(LogisticRegression())],
)
def test_a_fit_that_fails_changes_nothing(model: Any) -> None:
    X, y = draw([70, 20, 10])  # noqa: N806
    unusable = np.where(np.arange(100)[:, None] == 3, np.nan, X)
    model = clone(model)
    with pytest.raises(ValueError, match="NaN"):
        model.fit(unusable, y)
    with pytest.raises(NotFittedError):
        check_is_fitted(model)
    expected = model.fit(X, y).predict(X)
    with pytest.raises(ValueError, match="NaN"):
        model.fit(unusable, np.array(["z", "y", "x"])[y][::-1])
    assert model.predict(X).tolist() == expected.tolist()
    assert model.class_counts_.tolist() == [70, 20, 10]


def test_names_of_features_are_those_of_the_last_fit() -> None:
    pandas = pytest.importorskip("pandas")
    X, y = draw([70, 20, 10])  # noqa: N806
    model = PriorCorrectedClassifier(LogisticRegression()).fit(pandas.DataFrame(X, columns=["width"]), y)
    assert model.feature_names_in_.tolist() == ["width"]
    assert not hasattr(model.fit(X, y), "feature_names_in_")


def test_thresholds_of_a_frozen_model() -> None:
    frozen = pytest.importorskip("sklearn.frozen")
    X, y = draw([70, 20, 10])  # noqa: N806
    fitted = LogisticRegression().fit(X, y)
    X_valid, y_valid = draw([0, 20, 5], seed=1)  # noqa: N806
    model = TunedThresholdsClassifierCV(frozen.FrozenEstimator(fitted)).fit(X_valid, y_valid)
    expected = TunedThresholdsClassifierCV(fitted, cv="prefit").fit(X_valid, y_valid)
    assert model.best_thresholds_.tolist() == expected.best_thresholds_.tolist()
    assert model.classes_.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="expected the classes of the fitted estimator, such as 0, got 6, 7"):
        TunedThresholdsClassifierCV(frozen.FrozenEstimator(fitted)).fit(X_valid, y_valid + 5)
