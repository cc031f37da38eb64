from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from longtail.errors import LongtailError
from longtail.splitters import LongTailKFold, LongTailSplit

Samples = list[tuple[int, int]]
some_samples = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=2, max_size=25)


def splits(splitter: Any, y: Any, groups: Any = None) -> tuple[list[tuple[Any, Any]], list[str]]:
    """Return the splits, and the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = list(splitter.split(np.zeros((len(y), 2)), y, groups))
    assert all(warning.category is UserWarning for warning in caught)
    return parts, [str(warning.message) for warning in caught]


def tail(counts: list[int], seed: int = 0) -> tuple[Any, Any]:
    """Return features and names of classes of these sizes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    return rng.normal(size=(len(labels), 3)) + 4 * rng.normal(size=(len(counts), 3))[labels], np.array(
        [f"class {label}" for label in labels]
    )


@given(some_samples, st.booleans(), st.floats(0.05, 0.9), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_a_class_of_two_is_in_both_parts(samples: Samples, grouped: bool, size: float, seed: int) -> None:
    y, groups = (np.array(column) for column in zip(*samples, strict=True))
    counts = np.bincount(y)
    if counts.max() < 2:
        return
    parts, texts = splits(LongTailSplit(2, test_size=size, random_state=seed), y, groups if grouped else None)
    divided = set[int]()
    for train, test in parts:
        assert sorted([*train, *test]) == list(range(len(y)))
        assert list(train) == sorted(train)
        assert list(test) == sorted(test)
        for label in np.unique(y):
            assert label in y[train]
            assert (label in y[test]) == (counts[label] > 1)
        divided |= set(groups[train]) & set(groups[test])
    said = " ".join(texts)
    assert ("classes with a single sample are in the training part only" in said) == bool((counts == 1).any())
    assert ("groups are in both parts" in said) == (grouped and bool(divided))
    if grouped and divided:
        named = re.search(r"groups are in both parts: ([\d, ]+) \(", said)
        assert named is not None
        assert {int(name) for name in named[1].split(",")} == divided


@given(some_samples, st.booleans(), st.integers(2, 4), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_every_class_is_trained_in_every_fold(samples: Samples, grouped: bool, folds: int, seed: int) -> None:
    y, groups = (np.array(column) for column in zip(*samples, strict=True))
    counts = np.bincount(y)
    try:
        parts, _ = splits(LongTailKFold(folds, random_state=seed), y, groups if grouped else None)
    except LongtailError as error:
        assert "n_splits: expected at most the number of samples" in str(error)  # noqa: PT017
        return
    tested = np.concatenate([test for _, test in parts])
    assert sorted(tested) == np.flatnonzero(counts[y] > 1).tolist()  # each sample once
    for train, test in parts:
        assert set(train).isdisjoint(test)
        assert len(train) + len(test) == len(y)
        assert set(y[train]) == set(y)
        assert len(test)


def test_names_are_said() -> None:
    y = ["owl"] * 6 + ["kite"] * 2 + ["emu"] + ["rhea"] * 3
    birds = ["a", "a", "b", "b", "c", "c", "d", "e", "f", "g", "g", "g"]
    _, texts = splits(LongTailSplit(random_state=0), y, birds)
    assert texts == [
        "classes with a single sample are in the training part only: emu (1 of 4)",
        "groups are in both parts: g (1 of 7); without that, classes would be missing from one part: rhea",
    ]
    parts, texts = splits(LongTailSplit(random_state=0, strict_groups=True), y, birds)
    assert "classes are missing from one part, since no group is divided: rhea (1 of 4)" in texts
    train, test = parts[0]
    assert not {birds[i] for i in train} & {birds[i] for i in test}
    _, texts = splits(LongTailKFold(3, random_state=0), y, birds)
    assert texts == [
        "classes with a single sample are in the training part of every fold: emu (1 of 4)",
        "classes are in the test part of some of the 3 folds only: kite (1 of 4)",
        "groups are in both parts: g (1 of 7); without that, classes would be missing from one part: rhea",
    ]
    _, texts = splits(LongTailKFold(3, random_state=0, strict_groups=True), y, birds)
    assert texts == [
        "classes with a single sample are in the training part of every fold: emu (1 of 4)",
        "classes have no training sample where they are tested: rhea (1 of 4)",
        "classes are in the test part of some of the 3 folds only: kite (1 of 4)",
    ]
    assert splits(LongTailSplit(random_state=0), y[:8], birds[:8])[1] == []
    # one of two groups is tested, and with it a class that is nowhere else
    y, birds = ["owl", "owl", "kite", "emu"], ["a", "b", "b", "a"]
    parts, texts = splits(LongTailSplit(test_size=0.5, random_state=0, strict_groups=True), y, birds)
    trained, tested = ("kite", "emu") if 2 in parts[0][0] else ("emu", "kite")
    assert texts == [
        f"classes with a single sample are in the training part only: {trained} (1 of 3)",
        f"classes are missing from one part, since no group is divided: {tested} (1 of 3)",
    ]
    _, texts = splits(LongTailKFold(2, random_state=0, strict_groups=True), y, birds)
    assert texts == ["classes have no training sample where they are tested: emu, kite (2 of 3)"]


def test_many_names_are_cut() -> None:
    y = [0, 0, *range(1, 31)]
    _, (text,) = splits(LongTailSplit(random_state=0), y)
    assert text.endswith("in the training part only: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 20 more (30 of 31)")


def test_sizes_and_repeatability() -> None:
    y = np.repeat([0, 1, 2], [100, 50, 10])
    parts, _ = splits(LongTailSplit(3, test_size=0.3, random_state=1), y)
    assert [np.bincount(y[test]).tolist() for _, test in parts] == [[30, 15, 3]] * 3
    assert len({tuple(test) for _, test in parts}) == 3
    again, _ = splits(LongTailSplit(3, test_size=0.3, random_state=1), y)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(parts, again, strict=True))
    folds, _ = splits(LongTailKFold(5, random_state=1), y)
    assert [np.bincount(y[test]).tolist() for _, test in folds] == [[20, 10, 2]] * 5
    other, _ = splits(LongTailKFold(5, random_state=2), y)
    assert not np.array_equal(folds[0][1], other[0][1])


def test_a_single_sample_is_tested_if_it_is_asked_for() -> None:
    y = [0] * 6 + [1] * 4 + [2]
    parts, texts = splits(LongTailKFold(2, test_singletons=True, random_state=0), y)
    assert sorted(np.concatenate([test for _, test in parts])) == list(range(11))
    assert texts == ["classes have no training sample where they are tested: 2 (1 of 3)"]


@pytest.mark.filterwarnings("ignore:classes")
def test_inside_scikit_learn() -> None:
    X, y = tail([60, 30, 12, 4, 2, 1])  # noqa: N806
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    folds = LongTailKFold(4, random_state=0)
    assert cross_val_score(model, X, y, cv=folds).shape == (4,)
    # labels with gaps would be an error in some classifiers: here none has any
    fitted = cross_validate(model, X, y, cv=folds, return_estimator=True)["estimator"]
    assert all(len(estimator.classes_) == 6 for estimator in fitted)
    search = GridSearchCV(model, {"logisticregression__C": [0.1, 10.0]}, cv=LongTailSplit(2, random_state=0))
    assert search.fit(X, y).best_score_ > 0.5
    assert LongTailSplit(3).get_n_splits() == LongTailKFold(3).get_n_splits(X, y) == 3
    assert repr(LongTailKFold(3)) == (
        "LongTailKFold(n_splits=3, random_state=None, strict_groups=False,\n       test_singletons=False)"
    )
    assert "test_size=0.2" in repr(LongTailSplit())
    with pytest.raises(ValueError, match="partitions"):
        cross_val_predict(model, X, y, cv=folds)
    assert len(cross_val_predict(model, X, y, cv=LongTailKFold(4, random_state=0, test_singletons=True))) == len(y)


def test_groups_are_passed_on_by_scikit_learn() -> None:
    X, y = tail([60, 30, 12])  # noqa: N806
    groups = np.arange(len(y)) // 3
    scores = cross_val_score(LogisticRegression(), X, y, groups=groups, cv=LongTailKFold(3, random_state=0))
    assert len(scores) == 3
    with sklearn.config_context(enable_metadata_routing=True):
        for splitter in (LongTailKFold(3, random_state=0), LongTailSplit(2, random_state=0)):
            assert splitter.get_metadata_routing().consumes("split", ["groups"]) == {"groups"}
            result = cross_validate(
                LogisticRegression(), X, y, params={"groups": groups}, cv=splitter, return_indices=True
            )
            for train, test in zip(result["indices"]["train"], result["indices"]["test"], strict=True):
                assert not set(groups[train]) & set(groups[test])


@pytest.mark.parametrize(
    ("splitter", "y", "groups", "message"),
    [
        (LongTailSplit(test_size=1.0), [0, 0], None, "test_size: expected a fraction above 0 and below 1, got 1.0"),
        (LongTailSplit(0), [0, 0], None, "n_splits: expected an integer of at least 1, got 0"),
        (LongTailKFold(1), [0, 0], None, "n_splits: expected an integer of at least 2, got 1"),
        (LongTailSplit(), [0, 1], None, "y: no class can be in both parts"),
        (LongTailSplit(strict_groups=True), [0, 0], ["a", "a"], "y: no class can be in both parts"),
        (LongTailSplit(), [], None, "y: expected the class of every sample, got no sample"),
        (LongTailKFold(2), [], None, "y: expected the class of every sample, got no sample"),
        (LongTailSplit(2.0), [0, 0], None, "n_splits: expected an integer of at least 1, got 2.0"),  # type: ignore[arg-type]
        (LongTailKFold(2.0), [0, 0], None, "n_splits: expected an integer of at least 2, got 2.0"),  # type: ignore[arg-type]
        (LongTailKFold(3), [0, 0, 1], None, "n_splits: expected at most the number of samples that can be tested"),
        (LongTailKFold(3, strict_groups=True), [0] * 9, [0, 1, 1] * 3, "n_splits: expected at most the number of"),
        (LongTailSplit(), [0, 0], ["a"], "X, y and groups: Found input variables with inconsistent numbers of samples"),
        (LongTailSplit(), [0.5, 0.7], None, "X, y and groups: Unknown label type: continuous"),
        (LongTailSplit(), [[0, 1], [1, 0]], None, "X, y and groups: y should be a 1d array"),
        (LongTailSplit(), None, None, "y: expected the class of every sample, got None"),
    ],
)
@pytest.mark.filterwarnings("ignore:classes")
def test_what_cannot_be_split(splitter: Any, y: Any, groups: Any, message: str) -> None:
    with pytest.raises(LongtailError, match=re.escape(message)):
        next(splitter.split(np.zeros((2 if y is None else len(y), 1)), y, groups))


def test_samples_may_be_left_out_and_groups_unknown() -> None:
    y = np.repeat(["a", "b"], 10)
    groups = np.array([1.0, 1.0, np.nan, np.nan, np.nan, 2, 2, 2, 3, 3] * 2)
    (parts, texts) = splits(LongTailSplit(random_state=0), y, groups)
    train, test = next(LongTailSplit(random_state=0).split(None, y, groups))
    assert np.array_equal(train, parts[0][0])
    assert not {group for group in groups[train] if group == group} & set(groups[test].tolist())
    assert texts == []
