"""scikit-learn's own checks, and long-tailed digits."""

from __future__ import annotations

import pickle
import threading
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from longtail import LongTailClassifier
from longtail.estimator.learner import Learner

Array = np.ndarray[Any, Any]


def estimators(*methods: str) -> list[LongTailClassifier]:
    return [LongTailClassifier(method, hidden=32, epochs=5, learning_rate=1e-2) for method in methods]


def known_failures(_: LongTailClassifier) -> dict[str, str]:
    return {
        "check_sample_weight_equivalence_on_dense_data": "a weight of k and k equal samples have the same expected "
        "loss, but other random batches and statistics of BatchNorm"
    }


def run_check(estimator: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtail.estimator.classifier.MIN_STEPS", 60)  # enough for the checks, in a fifth of the time
    with warnings.catch_warnings():
        # the checks draw a random state of their own, with which 60 steps may be too few to converge
        warnings.simplefilter("ignore", ConvergenceWarning)
        check(estimator)


@parametrize_with_checks(estimators("la"), expected_failed_checks=known_failures)  # type: ignore[untyped-decorator]
def test_scikit_learn_estimator_checks(estimator: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_check(estimator, check, monkeypatch)


@pytest.mark.slow
@parametrize_with_checks(estimators("ce", "gml"), expected_failed_checks=known_failures)  # type: ignore[untyped-decorator]
def test_scikit_learn_checks_of_the_other_methods(estimator: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_check(estimator, check, monkeypatch)


def long_tailed(seed: int, imbalance: float = 40.0) -> tuple[Array, Array, Array, Array]:
    """Digits of which 9 has forty times fewer than 0; and balanced ones to be tested on."""
    X, y = load_digits(return_X_y=True)  # noqa: N806
    rng = np.random.default_rng(seed)
    train, test = [], []
    for digit in range(10):
        indices = rng.permutation(np.flatnonzero(y == digit))
        test.append(indices[:50])
        train.append(indices[50 : 50 + max(2, int(120 * imbalance ** (-digit / 9)))])
    a, b = np.concatenate(train), np.concatenate(test)
    return X[a], y[a], X[b], y[b]


@pytest.mark.slow
def test_logit_adjustment_improves_the_tail() -> None:
    gains = []
    for seed in range(3):
        X, y, X_test, truth = long_tailed(seed)  # noqa: N806
        ce = LongTailClassifier("ce", hidden=128, prior="train", random_state=seed).fit(X, y)
        la = LongTailClassifier("la", hidden=128, random_state=seed).fit(X, y)
        scores = [balanced_accuracy_score(truth, model.predict(X_test)) for model in (ce, la)]
        gains.append(100 * (scores[1] - scores[0]))
    assert np.mean(gains) > 2


@pytest.mark.slow
def test_gml_fits() -> None:
    X, y, X_test, truth = long_tailed(0)  # noqa: N806
    model = LongTailClassifier("gml", hidden=64, random_state=0).fit(X, y)
    la = LongTailClassifier("la", hidden=64, random_state=0).fit(X, y)
    gml, other = (balanced_accuracy_score(truth, fitted.predict(X_test)) for fitted in (model, la))
    assert gml > other - 0.05
    assert model.class_counts_.tolist() == np.bincount(y).tolist()


@pytest.mark.slow
def test_slots_that_were_never_filled_do_not_count_in_the_statistics_of_the_keys() -> None:
    parameters = LongTailClassifier(method="gml", hidden=8, embedding_dim=4).get_params()
    learner = Learner(parameters, width=3, queue_counts=np.array([30, 10]), queue_size=40, seed=0)
    passed: list[torch.Tensor] = []
    learner.key.register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0]))
    labels = torch.tensor([0, 0, 0, 1])
    learner.step(torch.randn(4, 3), labels, torch.ones(4), torch.arange(4), torch.zeros(2), 1e-3, 1.0)
    assert learner.queues is not None
    rows, repeats = passed[0].unique(dim=0, return_counts=True)
    assert torch.equal(rows, learner.queues.features.unique(dim=0))
    assert repeats.tolist() == [10] * 4


def test_without_a_hidden_layer() -> None:
    X, y, X_test, truth = long_tailed(0)  # noqa: N806
    for method in ("ce", "la", "gml"):
        model = LongTailClassifier(method, hidden=0, random_state=0).fit(X, y)
        assert balanced_accuracy_score(truth, model.predict(X_test)) > 0.7


def test_labels_may_be_words_and_a_model_can_be_pickled() -> None:
    X, y, X_test, _ = long_tailed(0)  # noqa: N806
    words = np.array([f"digit {label}" for label in y])
    model = LongTailClassifier(hidden=32, random_state=0).fit(X, words)
    assert model.predict(X_test)[0] in set(words)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(X_test), model.predict_proba(X_test))
    assert clone(model).get_params() == model.get_params()


@pytest.mark.slow
def test_in_a_pipeline_and_a_search() -> None:
    X, y, *_ = long_tailed(0, 5)  # noqa: N806
    pipeline = make_pipeline(StandardScaler(), LongTailClassifier(hidden=32, epochs=3, random_state=0))
    search = GridSearchCV(pipeline, {"longtailclassifier__method": ["ce", "la"]}, cv=3, scoring="balanced_accuracy")
    search.fit(X, y)
    assert search.best_score_ > 0.8
    assert cross_val_score(search.best_estimator_, X, y, cv=3).min() > 0.8


def test_priors() -> None:
    X, y, X_test, _ = long_tailed(0)  # noqa: N806
    model = LongTailClassifier("la", hidden=64, random_state=0).fit(X, y)
    uniform = model.predict_log_proba(X_test)
    model.set_params(prior="train")
    logs = uniform + np.log(model.class_counts_ / model.class_counts_.sum())
    expected = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))
    assert np.allclose(model.predict_log_proba(X_test), expected)
    model.set_params(prior=[1e-9] * 9 + [1])
    assert (model.predict(X_test) == 9).mean() > 0.9
    by_label = dict(zip(range(10), [1e-9] * 9 + [1], strict=True))
    last = model.predict_proba(X_test)
    model.set_params(prior=by_label)
    assert np.array_equal(model.predict_proba(X_test), last)
    model.set_params(prior={str(label): frequency for label, frequency in by_label.items()} | {"11": 1})
    assert np.array_equal(model.predict_proba(X_test), last)  # a class that is not here is left out
    for prior in ("even", [1, 2], [0] * 10, [np.nan] * 10, {**by_label, 3: 0}):
        model.set_params(prior=prior)
        with pytest.raises(ValueError, match=r"prior.*: .*expected"):
            model.predict(X_test)


def test_a_prior_by_class_name_in_a_fold_without_some_classes() -> None:
    X, y, X_test, _ = long_tailed(0)  # noqa: N806
    words = np.array([f"digit {label}" for label in range(10)])
    prior = dict(zip(words, range(1, 11), strict=True))
    chosen = y != 4
    model = LongTailClassifier(hidden=32, prior=prior, random_state=0).fit(X[chosen], words[y[chosen]])
    expected = np.delete(np.arange(1, 11), 4)
    plain = LongTailClassifier(hidden=32, prior=expected / expected.sum(), random_state=0)
    plain.fit(X[chosen], words[y[chosen]])
    assert np.array_equal(model.predict_proba(X_test), plain.predict_proba(X_test))
    scores = cross_val_score(model, X, words[y], cv=GroupKFold(n_splits=2), groups=y, error_score="raise")
    assert len(scores) == 2  # each fold lacks half of the classes
    with pytest.raises(ValueError, match=r"^prior: class 'digit 0' is missing, .*; is it 'digt 0', which is no class"):
        model.set_params(prior={name.replace("digit 0", "digt 0"): 1 for name in words}).predict(X_test)


def test_a_seed_determines_the_model_and_global_random_states_stay() -> None:
    X, y, X_test, _ = long_tailed(0)  # noqa: N806
    np.random.seed(7)
    torch.manual_seed(7)
    before = np.random.get_state(legacy=False)["state"]["key"].copy(), torch.get_rng_state()
    position = np.random.get_state(legacy=False)["state"]["pos"]
    a, b, c = (LongTailClassifier(hidden=32, epochs=2, random_state=seed).fit(X, y) for seed in (1, 1, 2))
    assert np.array_equal(before[0], np.random.get_state(legacy=False)["state"]["key"])
    assert torch.equal(before[1], torch.get_rng_state())
    assert np.array_equal(a.predict_proba(X_test), b.predict_proba(X_test))
    assert not np.array_equal(a.predict_proba(X_test), c.predict_proba(X_test))
    LongTailClassifier(hidden=32).fit(X, y)
    assert np.array_equal(before[0], np.random.get_state(legacy=False)["state"]["key"])
    assert position == np.random.get_state(legacy=False)["state"]["pos"]


def test_a_seed_determines_the_model_in_threads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtail.estimator.classifier.MIN_STEPS", 60)
    X, y, *_ = long_tailed(0)  # noqa: N806
    model = LongTailClassifier(hidden=32, epochs=1, random_state=0, learning_rate=1e-2)
    expected = clone(model).fit(X, y).predict_proba(X)
    stop = threading.Event()

    def draw() -> None:  # as another library does
        while not stop.wait(0.001):
            torch.rand(10)

    other = threading.Thread(target=draw)
    other.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            fits = list(pool.map(lambda _: clone(model).fit(X, y).predict_proba(X), range(3)))
    finally:
        stop.set()
        other.join()
    for probabilities in fits:
        assert np.allclose(probabilities, expected, atol=1e-6)


@pytest.mark.parametrize("hidden", [0, 32])
def test_a_prediction_needs_little_memory_besides_its_input(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.random((4000, 256), dtype=np.float32), np.arange(4000) % 3  # noqa: N806
    model = LongTailClassifier(hidden=hidden, epochs=1, random_state=0).fit(X[:200], y[:200])
    whole = model.predict_proba(X)
    monkeypatch.setattr("longtail.estimator.classifier.ENTRIES_AT_A_TIME", 2**14)
    tracemalloc.start()
    parts = model.predict_proba(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < X.nbytes / 4
    assert np.allclose(parts, whole, rtol=1e-9)
    assert np.allclose(model.predict_proba(X.astype(np.float64)), whole, rtol=1e-9)


def test_a_constant_feature_is_ignored() -> None:
    X, y, X_test, _ = long_tailed(0)  # noqa: N806
    wide = np.c_[X, np.full(len(X), 123456.7)]  # whose standard deviation is not quite 0 in NumPy
    model = LongTailClassifier(hidden=32, random_state=0).fit(wide, y)
    same = model.predict_proba(np.c_[X_test, np.full(len(X_test), 123456.7)])
    for by in (1e-3, 1, 1e3):
        assert np.array_equal(same, model.predict_proba(np.c_[X_test, np.full(len(X_test), 123456.7 + by)]))
    plain = LongTailClassifier(hidden=32, random_state=0).fit(X, y).predict(X_test)
    small = LongTailClassifier(hidden=32, random_state=0).fit(X * 1e-14, y).predict(X_test * 1e-14)
    assert (small == plain).mean() > 0.99  # a feature of small scale counts as much as any


@pytest.mark.parametrize("method", ["la", "gml"])
def test_a_feature_that_varies_for_the_first_time_changes_no_prediction(method: str) -> None:
    X, y, X_test, _ = long_tailed(0)  # noqa: N806
    constant, noise = np.zeros((len(X), 20)), np.random.default_rng(0).standard_normal((len(X), 20))
    model = LongTailClassifier(method, hidden=32, random_state=0)
    for _ in range(3):
        model.partial_fit(np.c_[X, constant], y, classes=np.unique(y))
    before = model.predict(np.c_[X_test, np.zeros((len(X_test), 20))])
    model.set_params(learning_rate=1e-12).partial_fit(np.c_[X, noise], y)
    after = model.predict(np.c_[X_test, np.random.default_rng(1).standard_normal((len(X_test), 20))])
    # the statistics of BatchNorm still move a little
    assert (before == after).mean() > 0.97


def test_scores_add_up() -> None:
    X, y, X_test, _ = long_tailed(0)  # noqa: N806
    for chosen in (y < 10, y < 2):
        for prior in ("uniform", "train"):
            model = LongTailClassifier("ce", hidden=32, prior=prior, random_state=0).fit(X[chosen], y[chosen])
            scores, probabilities = model.decision_function(X_test), model.predict_proba(X_test)
            assert np.allclose(np.log(probabilities), model.predict_log_proba(X_test))
            assert np.array_equal(model.predict(X_test), probabilities.argmax(axis=1))
            if scores.ndim == 1:
                assert np.allclose(1 / (1 + np.exp(-scores)), probabilities[:, 1])
            else:
                assert np.array_equal(scores.argmax(axis=1), probabilities.argmax(axis=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "svm"}, "method: expected one of ce, la, gml, got 'svm'"),
        ({"hidden": -1}, "hidden: expected an integer of at least 0"),
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"batch_size": 1}, "batch_size: expected an integer of at least 2"),
        ({"learning_rate": 0}, "learning_rate: expected a number above 0"),
        ({"learning_rate": "a"}, "learning_rate: expected a number above 0, got 'a'"),
        ({"temperature": None}, "temperature: expected a number above 0, got None"),
        ({"weight_decay": "a"}, "weight_decay: expected a number of at least 0, got 'a'"),
        ({"weight_decay": -1}, "weight_decay: expected a number of at least 0"),
        ({"method": "gml", "queue_size": 0}, "queue_size: expected an integer of at least 1"),
        ({"method": "gml", "queue_size": 3}, "queue_size: expected at least 10 classes × 2 slots, got 3"),
        ({"prior": "none"}, "prior 'none': expected uniform, train, or a file"),
    ],
)
def test_parameters_out_of_range(change: dict[str, Any], message: str) -> None:
    X, y, *_ = long_tailed(0)  # noqa: N806
    with pytest.raises(ValueError, match=message):
        LongTailClassifier(**change).fit(X, y)


def test_wrong_embeddings_raise() -> None:
    X, y, X_test, _ = long_tailed(0)  # noqa: N806
    model = LongTailClassifier(hidden=16, epochs=1, random_state=0).fit(X, y)
    with pytest.raises(ValueError, match="X has 3 features, but LongTailClassifier is expecting 64"):
        model.predict(X_test[:, :3])
    X[3, 4] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        model.fit(X, y)
    with pytest.raises(ValueError, match="y: expected samples of at least two classes"):
        model.fit(X_test, np.zeros(len(X_test)))


@pytest.mark.slow
def test_tiny_data_sets() -> None:
    for X, y in (  # noqa: N806
        (np.array([[1.0], [2.0]]), [0, 1]),
        (np.ones((5, 3)), [0, 0, 1, 1, 1]),
        (np.random.default_rng(0).normal(size=(7, 4)), list("aabbccc")),
    ):
        for method in ("ce", "la", "gml"):
            model = LongTailClassifier(method, hidden=8, epochs=1, batch_size=2, random_state=0).fit(X, y)
            assert np.isfinite(model.predict_proba(X)).all()


def clusters(classes: int, samples: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Return training samples, test samples, and the labels of both: each class is a Gaussian around a random point."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, 64)) / 8
    labels = np.repeat(np.arange(classes), samples)
    train, test = (centers[labels] + 0.12 * rng.normal(size=(len(labels), 64)) for _ in range(2))
    return train, test, labels


@pytest.mark.slow
def test_a_thousand_classes() -> None:
    X, X_test, y = clusters(1000, 2)  # noqa: N806
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = LongTailClassifier(hidden=256, epochs=1, random_state=0).fit(X, y)
    # nearest centroid has 0.99, and this classifier, from random class vectors, 0.2
    assert balanced_accuracy_score(y, model.predict(X_test)) > 0.9
    assert model.n_iter_ == -(-300 // 8)


def test_the_number_of_steps_follows_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtail.estimator.classifier.MIN_STEPS", 1)
    X, _, y = clusters(100, 2)  # noqa: N806
    model = LongTailClassifier(hidden=8, epochs=1, batch_size=50, random_state=0, learning_rate=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert model.fit(X, y).n_iter_ == 25  # 100 steps of 50 show each of 100 classes 50 times


def test_a_fit_that_has_not_converged_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    X, _, y = clusters(50, 4)  # noqa: N806
    monkeypatch.setattr("longtail.estimator.classifier.MIN_STEPS", 1)
    model = LongTailClassifier(hidden=2, epochs=1, random_state=0)  # two units are too few for 50 classes
    with pytest.warns(
        ConvergenceWarning, match=r"epochs \d+ % of the training samples are .*100 % by the nearest class"
    ):
        model.fit(X, y)


def test_a_fit_that_fails_leaves_the_last_one() -> None:
    X, y = load_digits(return_X_y=True)  # noqa: N806
    model = LongTailClassifier(epochs=1, hidden=0, random_state=0)
    model.set_params(prior={"a": 1.0})
    with pytest.raises(ValueError, match="prior"):
        model.fit(X, y)
    with pytest.raises(NotFittedError):
        model.predict(X)
    model.set_params(prior="uniform").fit(X[:500], y[:500])
    before = model.predict(X)
    with pytest.raises(ValueError, match="prior"):
        model.set_params(prior={"a": 1.0}).fit(-3 * X[:, :7], np.array(list("abcdefghij"))[y])
    assert (model.set_params(prior="uniform").predict(X) == before).all()
    with pytest.raises(ValueError, match=r"queue_size: expected at least 10 classes × 2 slots, got 5"):
        LongTailClassifier("gml", queue_size=5).fit(X, y)


def test_a_fit_of_a_table_warns_of_no_feature_names() -> None:
    pandas = pytest.importorskip("pandas")
    X, _, y = clusters(5, 4)  # noqa: N806
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        LongTailClassifier(random_state=0).fit(pandas.DataFrame(X).add_prefix("f"), y)


@pytest.mark.parametrize("change", [{"scale": 1.0}, {"method": "ce"}])
def test_predictions_are_those_of_the_fitted_parameters(change: dict[str, Any]) -> None:
    X, _, y = clusters(5, 4)  # noqa: N806
    model = LongTailClassifier(hidden=32, random_state=0).fit(X[3:], y[3:])
    before = model.predict_proba(X)
    assert (model.set_params(**change).predict_proba(X) == before).all()


@pytest.mark.parametrize("method", ["la", "gml"])
def test_the_callers_state_of_torch_does_not_matter(method: str) -> None:
    X, y = load_digits(return_X_y=True)  # noqa: N806
    X, y = X[:200], y[:200]  # noqa: N806
    expected = LongTailClassifier(method, epochs=1, hidden=16, random_state=0).fit(X, y).predict_proba(X)
    with torch.inference_mode():
        model = LongTailClassifier(method, epochs=1, hidden=16, random_state=0).fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), expected)
    with torch.no_grad():
        model.partial_fit(X, y)
    torch.set_default_dtype(torch.float64)
    try:
        model = LongTailClassifier(method, epochs=1, hidden=16, random_state=0).fit(X, y)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.predict_proba(X).argmax(axis=1).tolist() != [0] * len(X)
    assert (model.predict(X) == y).mean() > 0.5
