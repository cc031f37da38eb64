"""Splitters of scikit-learn for classes of few samples: none is lost, and what cannot be had is said.

``StratifiedShuffleSplit`` refuses classes of one sample and leaves rare ones out of the test part, ``StratifiedKFold``
tests classes of one sample without having trained on them, and ``StratifiedGroupKFold`` does either without a word.
Legend: N samples, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import BaseCrossValidator, BaseShuffleSplit
from sklearn.utils import check_random_state, indexable
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from longtail.data.grouped_split import ALWAYS_TRAIN, class_folds, grouped_folds, grouped_split, number_groups
from longtail.data.imbalance import stratified_split
from longtail.errors import LongtailError

Array = np.ndarray[Any, Any]
_NAMED = 10  # names in a warning


class LongTailSplit(BaseShuffleSplit):  # type: ignore[misc]
    """Random splits into a training and a test part, class by class.

    Every class with at least two samples is in both parts; one with a single sample is in the training part. Without
    groups, ``test_size`` of each class is tested, to the nearest sample; with groups approximately.

    Groups (all samples of one bird, patient or camera) stay together as far as that is possible. A group is divided
    where a class would otherwise be missing from one part, because all of its samples are in that group, or because the
    groups of several classes contradict one another; with ``strict_groups`` the class is missing instead. A sample
    whose group is None, NaN or an empty text is a group of its own.

    A ``UserWarning`` names the classes with a single sample, the groups that are divided and the classes that are
    missing from a part.

    Args:
        n_splits: number of splits, drawn independently.
        test_size: fraction of each class in the test part, in (0, 1).
        strict_groups: divide no group.
        random_state: an int for the same splits in every call, a ``RandomState``, or None.

    Raises:
        LongtailError: (by ``split``) an argument is out of range, ``y`` or ``groups`` do not have one value per sample,
            or a part would be empty.

    Example:
        >>> y = ["owl"] * 8 + ["kite"] * 2
        >>> birds = ["a", "a", "b", "b", "c", "c", "d", "d", "e", "f"]
        >>> train, test = next(LongTailSplit(test_size=0.25, random_state=0).split(y, y, groups=birds))
        >>> sorted({y[i] for i in train}), sorted({y[i] for i in test})
        (['kite', 'owl'], ['kite', 'owl'])
        >>> {birds[i] for i in train} & {birds[i] for i in test}
        set()
    """

    __metadata_request__split = {"groups": True}  # noqa: RUF012 - as scikit-learn reads it

    def __init__(
        self, n_splits: int = 1, *, test_size: float = 0.2, strict_groups: bool = False, random_state: Any = None
    ) -> None:
        super().__init__(n_splits, test_size=test_size, random_state=random_state)
        self.strict_groups = strict_groups

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Iterator[tuple[Array, Array]]:  # noqa: N803
        """Yield the indices of the training and of the test part, each ascending.

        Args:
            X: N samples; only their number matters, None takes that of ``y``.
            y: (N,) class of each sample: numbers, texts or truth values.
            groups: (N,) group of each sample, numbers or texts; None for no groups.
        """
        if not 0 < self.test_size < 1:
            raise LongtailError(f"test_size: expected a fraction above 0 and below 1, got {self.test_size}")
        _check_splits(self.n_splits, 1)
        data = _Samples(X, y, groups)
        tests, divided, divided_for, missing = [], set[int](), set[int](), set[int]()
        for seed in _seeds(self.random_state, self.n_splits):
            if data.groups is None:
                parts = stratified_split(data.labels, len(data.classes), 0.0, self.test_size, seed)[0]
            else:
                split = grouped_split(
                    data.labels,
                    data.groups,
                    len(data.classes),
                    val=0.0,
                    test=self.test_size,
                    seed=seed,
                    strict=self.strict_groups,
                )
                parts = split.parts
                divided.update(split.divided)
                divided_for.update(split.divided_for)
                missing.update(split.missing)
            tests.append(parts.numpy() == 2)
        if not all(test.any() and not test.all() for test in tests):
            raise LongtailError("y: no class can be in both parts; expected one with two samples, not all in one group")
        # a group that is not divided may take one to the test part
        trained = data.single - set(data.labels.numpy()[np.any(tests, axis=0)].tolist())
        data.warn("classes with a single sample are in the training part only", trained)
        data.warn("classes are missing from one part, since no group is divided", missing - trained)
        data.warn_divided(divided, divided_for)
        for test in tests:
            yield np.flatnonzero(~test), np.flatnonzero(test)


class LongTailKFold(BaseCrossValidator):  # type: ignore[misc]
    """Folds that are each tested after training on the others, class by class.

    Every class with at least two samples is in the training part of every fold, and in the test parts of as many folds
    as it has samples or groups. Without groups, the samples of a class differ by at most one between folds, and so do
    all samples.

    A class with a single sample is always in the training part and never tested, since a classifier that was not
    trained on it could not predict it; ``test_singletons`` tests it all the same, which ``cross_val_predict`` needs: it
    wants every sample to be tested once.

    Groups, ``strict_groups`` and warnings are as in :class:`LongTailSplit`. A ``UserWarning`` names the classes that
    are not in every test part, too.

    Args:
        n_splits: number of folds, at least 2.
        strict_groups: divide no group; a class may then be tested without training samples, also one with a single
            sample in a group of other classes.
        test_singletons: whether classes with a single sample are tested.
        random_state: an int for the same folds in every call, a ``RandomState``, or None.

    Raises:
        LongtailError: (by ``split``) an argument is out of range, ``y`` or ``groups`` do not have one value per sample,
            or a test part would be empty.

    Example:
        >>> y = [0] * 9 + [1] * 3
        >>> folds = LongTailKFold(3, random_state=0).split(y, y)
        >>> sorted((len(test), sum(y[i] for i in test)) for _, test in folds) == 3 * [(4, 1)]
        True
    """

    __metadata_request__split = {"groups": True}  # noqa: RUF012 - as scikit-learn reads it

    def __init__(
        self,
        n_splits: int = 5,
        *,
        strict_groups: bool = False,
        test_singletons: bool = False,
        random_state: Any = None,
    ) -> None:
        self.n_splits, self.random_state = n_splits, random_state
        self.strict_groups, self.test_singletons = strict_groups, test_singletons

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:  # noqa: ARG002, N803
        """Return the number of folds; the arguments are not used."""
        return self.n_splits

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Iterator[tuple[Array, Array]]:  # noqa: N803
        """Yield the indices of the training and of the test part of each fold, each ascending.

        Args:
            X: N samples; only their number matters, None takes that of ``y``.
            y: (N,) class of each sample: numbers, texts or truth values.
            groups: (N,) group of each sample, numbers or texts; None for no groups.
        """
        _check_splits(self.n_splits, 2)
        data = _Samples(X, y, groups)
        (seed,) = _seeds(self.random_state, 1)
        classes = len(data.classes)
        train_only = torch.zeros(classes, dtype=torch.bool)
        if not self.test_singletons:
            train_only[sorted(data.single)] = True
        if data.groups is not None and self.strict_groups:  # a group that is tested for other classes stays whole
            train_only[data.labels[torch.isin(data.groups, data.groups[~train_only[data.labels]])]] = False
        divided, divided_for = set[int](), set[int]()
        if data.groups is None:
            folds = torch.full_like(data.labels, ALWAYS_TRAIN)
            tested = ~train_only[data.labels]
            folds[tested] = class_folds(data.labels[tested], classes, self.n_splits, seed)
        else:
            split = grouped_folds(
                data.labels,
                data.groups,
                classes,
                self.n_splits,
                seed,
                strict=self.strict_groups,
                train_only=train_only,
            )
            folds, divided, divided_for = split.parts, set(split.divided), set(split.divided_for)
        fold_of = folds.numpy()
        if len(np.unique(fold_of[fold_of >= 0])) < self.n_splits:
            what = "samples" if data.groups is None else "samples or groups"
            raise LongtailError(
                f"n_splits: expected at most the number of {what} that can be tested, got {self.n_splits}"
            )
        self._warn(data, fold_of, train_only)
        data.warn_divided(divided, divided_for)
        for fold in range(self.n_splits):
            test = fold_of == fold
            yield np.flatnonzero(~test), np.flatnonzero(test)

    def _warn(self, data: _Samples, fold_of: Array, train_only: Tensor) -> None:
        tested = fold_of >= 0
        present = np.zeros((self.n_splits, len(data.classes)), dtype=bool)
        present[fold_of[tested], data.labels.numpy()[tested]] = True
        folds = present.sum(axis=0)
        untrained = set(np.flatnonzero(folds == 1).tolist())
        data.warn("classes with a single sample are in the training part of every fold", _where(train_only.numpy()))
        data.warn("classes have no training sample where they are tested", untrained)
        some = set(np.flatnonzero((folds > 1) & (folds < self.n_splits)).tolist())
        data.warn(f"classes are in the test part of some of the {self.n_splits} folds only", some)


class _Samples:
    """Labels and groups as numbers, with their names."""

    def __init__(self, samples: Any, y: Any, groups: Any) -> None:
        if y is None:
            raise LongtailError("y: expected the class of every sample, got None")
        try:
            indexable(samples, y, groups)
            values = column_or_1d(y)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The number of unique classes")  # which is what a long tail has
                check_classification_targets(values)
        except (TypeError, ValueError) as error:
            raise LongtailError(f"X, y and groups: {' '.join(str(error).split())}") from None
        if len(values) == 0:
            raise LongtailError("y: expected the class of every sample, got no sample")
        self.classes, labels = np.unique(values, return_inverse=True)
        self.labels = torch.from_numpy(labels.astype(np.int64).reshape(-1))
        counts = torch.bincount(self.labels)
        self.single = set(torch.nonzero(counts == 1).flatten().tolist())
        self.groups: Tensor | None = None
        self.group_names: Sequence[str] = ()
        if groups is not None:
            self.groups, self.group_names = number_groups(_hashable(groups))

    def warn(self, what: str, classes: set[int]) -> None:
        """Warn of classes, if there are any."""
        if classes:
            names = _listed([str(self.classes[label]) for label in sorted(classes)])
            warnings.warn(f"{what}: {names} ({len(classes):,} of {len(self.classes):,})", UserWarning, stacklevel=3)

    def warn_divided(self, groups: set[int], classes: set[int]) -> None:
        """Warn of groups in both parts, for the sake of classes."""
        if groups:
            names = _listed([self.group_names[group] for group in sorted(groups)])
            reasons = _listed([str(self.classes[label]) for label in sorted(classes)])
            warnings.warn(
                f"groups are in both parts: {names} ({len(groups):,} of {len(self.group_names):,}); without that, "
                f"classes would be missing from one part: {reasons}",
                UserWarning,
                stacklevel=3,
            )


def _hashable(groups: Any) -> list[Hashable]:
    values: list[Hashable] = np.asarray(groups, dtype=object).reshape(-1).tolist()
    return values


def _seeds(random_state: Any, count: int) -> list[int]:
    seeds: list[int] = check_random_state(random_state).randint(np.iinfo(np.int32).max, size=count).tolist()
    return seeds


def _check_splits(count: int, least: int) -> None:
    if not isinstance(count, int | np.integer) or count < least:
        raise LongtailError(f"n_splits: expected an integer of at least {least}, got {count}")


def _where(mask: Array) -> set[int]:
    return set(np.flatnonzero(mask).tolist())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
