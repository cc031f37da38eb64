"""LongTailClassifier: samples that have weights, and samples that come in parts."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import balanced_accuracy_score

from longtail import LongTailClassifier
from longtail.estimator.learner import Learner, Standardization
from tests.test_estimator import long_tailed

Array = np.ndarray[Any, Any]
METHODS = ("ce", "la", "gml")
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # most trainings are short
SMALL: dict[str, Any] = {"hidden": 16, "embedding_dim": 8, "queue_size": 64, "random_state": 0}


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``fit`` make as many passes as it is told to, and no more."""
    monkeypatch.setattr("longtail.estimator.classifier.MIN_STEPS", 1)
    monkeypatch.setattr("longtail.estimator.classifier.MIN_VIEWS_PER_CLASS", 0)


def digits() -> tuple[Array, Array, Array, Array]:
    return long_tailed(0)


def gain_of(model: LongTailClassifier, X: Array, truth: Array) -> float:  # noqa: N803
    return 100 * float(balanced_accuracy_score(truth, model.predict(X)))


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_one_and_other_equal_weights_change_nothing(few_steps: None, method: str) -> None:
    X, y, X_test, _ = digits()  # noqa: N806
    model = LongTailClassifier(method, epochs=3, **SMALL)
    expected = clone(model).fit(X, y).predict_proba(X_test)
    for weight in (1.0, 2.0, 0.25):
        weighted = clone(model).fit(X, y, sample_weight=[weight] * len(y))
        assert np.array_equal(weighted.predict_proba(X_test), expected)
        assert np.array_equal(weighted.class_counts_, weight * np.bincount(y))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_sample_of_weight_zero_is_as_if_it_were_not_there(few_steps: None, method: str, weighted: bool) -> None:
    X, y, X_test, _ = digits()  # noqa: N806
    rng = np.random.default_rng(0)
    weights = (rng.uniform(0.5, 2, len(y)) if weighted else np.ones(len(y))) * (rng.random(len(y)) < 0.7) * (y != 9)
    kept = weights > 0
    model = LongTailClassifier(method, epochs=3, **SMALL)
    one = clone(model).fit(X, y, sample_weight=weights)
    other = clone(model).fit(X[kept], y[kept], sample_weight=weights[kept])
    assert one.classes_.tolist() == list(range(9))
    for name in ("classes_", "class_counts_"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert np.array_equal(one.predict_proba(X_test), other.predict_proba(X_test))
    one, other = (clone(model).partial_fit(X[rows], y[rows], range(10), weights[rows]) for rows in (slice(None), kept))
    assert np.array_equal(one.predict_proba(X_test), other.predict_proba(X_test))


def test_whole_weights_are_like_repeated_samples() -> None:
    """Batches differ, so the models are close rather than equal; closer than to the model without weights."""
    X, y, X_test, _ = digits()  # noqa: N806
    weights = np.random.default_rng(0).integers(0, 5, len(y)) * np.where(y % 2, 4, 1)
    model = LongTailClassifier(hidden=0, random_state=0, prior="train")
    weighted = clone(model).fit(X, y, sample_weight=weights)
    repeated = clone(model).fit(X.repeat(weights, axis=0), y.repeat(weights))
    plain = clone(model).fit(X[weights > 0], y[weights > 0])
    assert np.array_equal(weighted.class_counts_, repeated.class_counts_)
    probabilities = [fitted.predict_proba(X_test) for fitted in (weighted, repeated, plain)]
    near, far = (np.abs(probabilities[0] - other).mean() for other in probabilities[1:])
    assert near < far / 2


@pytest.mark.slow
def test_weights_multiply_the_losses() -> None:
    X, y, X_test, truth = digits()  # noqa: N806
    wrong = np.random.default_rng(0).random(len(y)) < 0.5
    noisy = np.where(wrong, (y + 1) % 10, y)
    for method in METHODS:
        model = LongTailClassifier(method, hidden=32, epochs=3, random_state=0)
        plain, weighted = (
            clone(model).fit(X, noisy, sample_weight=weights) for weights in (None, np.where(wrong, 1e-3, 1.0))
        )
        assert gain_of(weighted, X_test, truth) > gain_of(plain, X_test, truth) + 10


def test_weights_that_balance_the_classes_replace_the_adjustment() -> None:
    X, y, X_test, truth = digits()  # noqa: N806
    weights = 1 / np.bincount(y)[y]
    models = [LongTailClassifier(method, hidden=32, random_state=0).fit(X, y, weights) for method in ("ce", "la")]
    assert np.allclose(models[0].class_counts_, 1)
    # their log prior is uniform, so cross-entropy and logit adjustment are the same up to rounding
    assert np.allclose(models[0].predict_proba(X_test), models[1].predict_proba(X_test), atol=0.05)
    uniform = models[1].predict_proba(X_test)
    assert np.allclose(models[1].set_params(prior="train").predict_proba(X_test), uniform)
    assert gain_of(models[1], X_test, truth) > 70


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), r"sample_weight: expected shape \(\d+,\), one weight for each sample, got \(3,\)"),
        (-1.0, r"sample_weight: expected weights of at least 0, got -1"),
        (0.0, "sample_weight: expected a weight above 0, all weights are zero"),
        (np.nan, "Input sample_weight contains NaN"),
        (np.inf, "Input sample_weight contains infinity"),
    ],
)
def test_weights_that_cannot_be_used(weights: Any, message: str) -> None:
    X, y, *_ = digits()  # noqa: N806
    if np.ndim(weights) == 0:
        weights = np.full(len(y), weights)
    with pytest.raises(ValueError, match=message):
        LongTailClassifier(**SMALL).fit(X, y, sample_weight=weights)
    with pytest.raises(ValueError, match=message):
        LongTailClassifier(**SMALL).partial_fit(X, y, range(10), sample_weight=weights)


def test_one_class_with_weights_above_zero_is_not_enough() -> None:
    X, y, *_ = digits()  # noqa: N806
    with pytest.raises(ValueError, match=r"y: expected samples of at least two classes, got 1 class, .*3"):
        LongTailClassifier(**SMALL).fit(X, y, sample_weight=y == 3)


def parts(X: Array, y: Array, count: int) -> list[tuple[Array, Array]]:  # noqa: N803
    order = np.random.default_rng(1).permutation(len(y))
    return [(X[rows], y[rows]) for rows in np.array_split(order, count)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hidden", [0, 16])
def test_a_first_call_is_a_fit_of_one_step(few_steps: None, method: str, hidden: int) -> None:
    X, y, X_test, _ = digits()  # noqa: N806
    model = LongTailClassifier(method, epochs=1, batch_size=1000, **(SMALL | {"hidden": hidden}))
    if method == "gml":  # fit divides the slots by the frequencies of the classes, which a first part does not know
        X, y = (array[np.isin(y, [0, 9])][-6:] for array in (X, y))  # noqa: N806
        X, y = X[[0, 1, -2, -1]], np.array([0, 0, 1, 1])  # noqa: N806
    fitted = clone(model).fit(X, y)
    part = clone(model).partial_fit(X, y, classes=np.unique(y)[::-1])
    assert np.array_equal(part.predict_proba(X_test), fitted.predict_proba(X_test))
    assert (part.n_iter_, fitted.n_iter_) == (1, 1)
    # and a call after a fit continues it as a call after a call
    assert np.array_equal(part.partial_fit(X, y).predict_proba(X_test), fitted.partial_fit(X, y).predict_proba(X_test))
    assert fitted.n_iter_ == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_training_goes_on_as_if_it_had_not_been_saved(method: str) -> None:
    X, y, X_test, _ = digits()  # noqa: N806
    first, *rest = parts(X, y, 4)
    one = LongTailClassifier(method, batch_size=32, **SMALL).partial_fit(*first, classes=range(10))
    two = pickle.loads(pickle.dumps(one))
    for part in rest:
        torch.manual_seed(5)  # other random numbers in between
        one.partial_fit(*part)
    for part in rest:
        two = pickle.loads(pickle.dumps(two.partial_fit(*part)))
    assert np.array_equal(one.predict_proba(X_test), two.predict_proba(X_test))
    # the optimizer's state and the random numbers are part of it: another start from the same weights is another model
    three = LongTailClassifier(method, batch_size=32, **SMALL).partial_fit(*rest[-1], classes=range(10))
    assert not np.array_equal(one.predict_proba(X_test), three.predict_proba(X_test))


def test_statistics_are_those_of_all_samples_so_far() -> None:
    X, y, *_ = digits()  # noqa: N806
    weights = np.random.default_rng(0).uniform(0.1, 3, len(y))
    fitted = LongTailClassifier(epochs=1, **SMALL).fit(X, y, weights)
    model = LongTailClassifier(**SMALL)
    for rows in np.array_split(np.argsort(y, kind="stable"), 7):  # one class after the other
        model.partial_fit(X[rows], y[rows], range(10), weights[rows])
    assert np.allclose(model.class_counts_, fitted.class_counts_, rtol=1e-12)
    assert model.n_iter_ == 7


def test_the_mean_and_standard_deviation_of_parts() -> None:
    rng = np.random.default_rng(0)
    X = np.c_[rng.normal(3, 2, (50, 4)), np.full(50, 123456.7), 1e-14 * rng.normal(size=50)]  # noqa: N806
    weights = rng.uniform(0.1, 3, 50)
    whole, divided = Standardization(6), Standardization(6)
    whole.add(X, weights)
    for rows in (slice(0, 1), slice(1, 20), slice(20, 50)):
        divided.add(X[rows], weights[rows])
    mean = np.average(X, axis=0, weights=weights)
    std = np.sqrt(np.average((X - mean) ** 2, axis=0, weights=weights))
    std[4] = 1
    assert np.allclose(whole(X), (X - mean) / std, atol=1e-9)
    assert np.allclose(divided(X), whole(X), atol=1e-9)
    assert divided.samples == 50
    assert divided.weight == pytest.approx(weights.sum())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_passes_over_parts_are_about_as_good_as_a_fit(method: str) -> None:
    X, y, X_test, truth = digits()  # noqa: N806
    settings: dict[str, Any] = {"hidden": 64, "random_state": 0, "batch_size": 64}
    fitted = LongTailClassifier(method, **settings).fit(X, y)
    model = LongTailClassifier(method, **settings)
    for passes in range(25):
        model.set_params(learning_rate=2e-3 if passes < 15 else 4e-4)
        for part in parts(X, y, 3):
            model.partial_fit(*part, classes=range(10))
    assert gain_of(model, X_test, truth) > gain_of(fitted, X_test, truth) - 4


def test_a_class_is_predicted_once_it_has_come() -> None:
    X, y, X_test, truth = digits()  # noqa: N806
    words = np.array([f"digit {label}" for label in range(10)])
    for method in METHODS:
        for prior in ("uniform", "train"):
            model = LongTailClassifier(method, hidden=32, random_state=0, prior=prior)
            for _ in range(5):
                model.partial_fit(X[y < 8], words[y[y < 8]], classes=words[::-1])
            probabilities = model.predict_proba(X_test)
            assert not probabilities[:, 8:].any()
            assert np.allclose(probabilities.sum(axis=1), 1)
            assert model.class_counts_[8:].tolist() == [0, 0]
            assert (model.decision_function(X_test)[:, 8:] == -np.inf).all()
            for _ in range(20):
                model.partial_fit(X, words[y])
            recall = (model.predict(X_test[truth == 8]) == "digit 8").mean()
            assert recall > (0.5 if prior == "uniform" else 0.2)
            assert model.class_counts_[9] == 20 * (y == 9).sum()


def test_a_fit_begins_again() -> None:
    X, y, X_test, _ = digits()  # noqa: N806
    model = LongTailClassifier(epochs=1, **SMALL)
    expected = clone(model).fit(X, y).predict_proba(X_test)
    model.partial_fit(X[:, :3], np.array(list("ab"))[y % 2], classes=["a", "b"])
    assert np.array_equal(model.fit(X, y).predict_proba(X_test), expected)


def test_a_small_step_after_a_fit_changes_little() -> None:
    X, y, X_test, _ = digits()  # noqa: N806
    rows = np.random.default_rng(0).permutation(len(y))[:20]
    model = LongTailClassifier(hidden=32, random_state=0).fit(X, y)
    expected = model.predict_proba(X_test)
    model.set_params(learning_rate=1e-6).partial_fit(X[rows], y[rows])
    assert 0 < np.abs(model.predict_proba(X_test) - expected).mean() < 1e-3


def test_other_statistics_do_not_change_the_hidden_features() -> None:
    X = np.random.default_rng(0).normal(size=(40, 5))  # noqa: N806
    X[:20, 4] = 7  # constant at first
    learner = Learner(LongTailClassifier(hidden=8).get_params(), 5, np.ones(2, np.int64), 8, seed=0)
    statistics = Standardization(5)
    statistics.add(X[:20], np.ones(20))

    def features() -> torch.Tensor:
        hidden: torch.Tensor = learner.layers(torch.from_numpy(statistics(X[:20])).float())
        return hidden

    learner.train()
    features()  # running statistics that are not those of the start
    learner.eval()
    before = features()
    for other in (X[20:], 3 * X[20:] - 2):
        other[:, 4] = 7
        ratio, shift, begins_to_vary = map(torch.from_numpy, statistics.add(other, np.ones(20)))
        learner.keep_features(ratio.float(), shift.float(), begins_to_vary)
        assert torch.allclose(features(), before, atol=1e-5)
    # nothing has been learned about a feature that begins to vary: it has no weight until it is
    linear = learner.layers[0]
    assert isinstance(linear, torch.nn.Linear)
    weights = linear.weight.detach().clone()
    change = statistics.add(X[20:] + 1e-6 * np.arange(20)[:, None], np.ones(20))
    ratio, shift, begins_to_vary = map(torch.from_numpy, change)
    learner.keep_features(ratio.float(), shift.float(), begins_to_vary)
    assert begins_to_vary.tolist() == [False, False, False, False, True]
    assert not linear.weight[:, 4].any()
    assert not torch.equal(linear.weight[:, 3], weights[:, 3])


@pytest.mark.parametrize("hidden", [0, 8])
def test_kept_samples_follow_the_statistics(hidden: int) -> None:
    rng = np.random.default_rng(0)
    parts = [(rng.normal(0, 1, (20, 3)), np.arange(20) % 2), (rng.normal(5, 4, (30, 3)), np.zeros(30, np.int64))]
    model = LongTailClassifier("gml", **(SMALL | {"hidden": hidden, "queue_size": 128}))
    for X, y in parts:  # noqa: N806
        model.partial_fit(X, y, classes=[0, 1])
    assert model._learner is not None
    assert model._learner.queues is not None
    kept = model._learner.queues.features.numpy()
    expected = model._standardization(np.concatenate([X for X, _ in parts]))
    assert np.sort(kept, axis=0) == pytest.approx(np.sort(expected, axis=0), abs=1e-5)


def test_a_sample_has_one_id_in_all_passes() -> None:
    X, y = np.random.default_rng(0).normal(size=(12, 4)), np.arange(12) % 3  # noqa: N806
    model = LongTailClassifier("gml", **SMALL)
    for rows in (slice(None), slice(None), slice(3, 9)):
        model.partial_fit(np.asfortranarray(X[rows]), y[rows], classes=range(3))
    assert model._learner is not None
    queues = model._learner.queues
    assert queues is not None
    assert len(queues) == 30
    pairs = torch.cat([queues.ids[:, None].double(), queues.features.double().round(decimals=4)], dim=1)
    assert len(queues.ids.unique()) == len(pairs.unique(dim=0)) == 12
    assert queues.ids.min() >= 0


def test_parts_of_any_size() -> None:
    X, y, X_test, _ = digits()  # noqa: N806
    for method in METHODS:
        for hidden in (0, 16):
            model = LongTailClassifier(method, **(SMALL | {"hidden": hidden}))
            for rows in (slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 300), slice(300, 301)):
                model.partial_fit(X[rows], y[rows], classes=range(10))
                assert np.isfinite(model.predict_proba(X_test)).all()


def test_the_global_random_states_stay() -> None:
    X, y, *_ = digits()  # noqa: N806
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = LongTailClassifier(**SMALL).partial_fit(X, y, range(10)).partial_fit(X, y)
    assert torch.equal(before, torch.get_rng_state())
    again = LongTailClassifier(**SMALL).partial_fit(X, y, range(10)).partial_fit(X, y)
    assert np.array_equal(model.predict_proba(X), again.predict_proba(X))


@pytest.mark.parametrize("method", ["la", "gml"])
def test_a_part_that_fails_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y, *_ = digits()  # noqa: N806
    model, undisturbed = (LongTailClassifier(method, **SMALL).partial_fit(X, y, range(10)) for _ in range(2))
    before = model.predict_proba(X)
    step, steps = Learner.step, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal steps
        step(*arguments)
        steps += 1
        if steps == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.partial_fit(5 * X + 3, y)
    with pytest.raises(ValueError, match="device"):
        model.set_params(device="none").partial_fit(5 * X + 3, y)
    model.set_params(device="auto")
    assert np.array_equal(model.class_counts_, np.bincount(y))
    assert np.array_equal(model.predict_proba(X), before)
    # the training goes on as if there had been none
    assert np.array_equal(model.partial_fit(X, y).predict_proba(X), undisturbed.partial_fit(X, y).predict_proba(X))


def test_one_weight_for_all_samples(few_steps: None) -> None:
    X, y, *_ = digits()  # noqa: N806
    one, none = (LongTailClassifier(epochs=1, **SMALL).fit(X, y, weight) for weight in (2.0, None))
    assert np.allclose(one.predict_proba(X), none.predict_proba(X))
    assert np.array_equal(one.class_counts_, 2 * none.class_counts_)
    with pytest.raises(ValueError, match="sample_weight: expected weights of at least 0, got -1"):
        LongTailClassifier(**SMALL).fit(X, y, -1)


def test_parts_that_do_not_fit() -> None:
    X, y, *_ = digits()  # noqa: N806
    model = LongTailClassifier(**SMALL)
    with pytest.raises(
        ValueError, match="classes: expected the labels of all classes in the first call of partial_fit"
    ):
        model.partial_fit(X, y)
    with pytest.raises(ValueError, match="classes: expected at least two classes, got 1"):
        model.partial_fit(X, y, classes=[1])
    with pytest.raises(ValueError, match=r"y: .*9.* is not among the 9 classes of the first call"):
        model.partial_fit(X, y, classes=range(9))
    with pytest.raises(ValueError, match="prior 'none': expected"):
        model.set_params(prior="none").partial_fit(X, y, classes=range(10))
    model.set_params(prior="uniform").partial_fit(X, y, classes=range(10))  # nothing was left of the failed calls
    model.partial_fit(X, y, classes=range(10))
    with pytest.raises(ValueError, match="classes: expected the 10 classes of the first call, or none, got 3"):
        model.partial_fit(X, y, classes=range(3))
    with pytest.raises(ValueError, match="X has 3 features, but LongTailClassifier is expecting 64"):
        model.partial_fit(X[:, :3], y)
    with pytest.raises(ValueError, match="prior 'none': expected"):
        model.set_params(prior="none").partial_fit(X, y)
    model.set_params(prior="uniform")
    with pytest.raises(ValueError, match="hidden: expected 16, as when the training began, got 8; fit begins another"):
        model.set_params(hidden=8).partial_fit(X, y)
    assert np.array_equal(model.class_counts_, 2 * np.bincount(y))
