"""Splitting samples that come in groups, such as all images of one bird, patient or camera, which belong together.

Test images of a group that was trained on are no test of anything new, and a class without training or test images is
not learned or not tested. Both cannot always be avoided: if all images of a class are in one group, or if three groups
share three classes pairwise. Then classes come first: such a class's images are divided, and the group with them.

Whether groups can be placed so that all classes are in both parts is NP-complete to decide (set splitting: Garey and
Johnson, *Computers and Intractability*, 1979, SP4). They are placed one after another, those with the rarest classes
first, where they help most; a random local search (WalkSAT: Selman, Kautz and Cohen, AAAI 1994) repairs what is left.

Legend: N samples, C classes, n_c samples of class c, G groups, P parts; part 0 is train, or the parts are folds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtail.data.imbalance import check_labels, permuted_by_class, stratified_split
from longtail.errors import LongtailError
from longtail.randomness import Stream, mix

Array = np.ndarray[Any, Any]

ALWAYS_TRAIN = -1
"""In place of a fold: the sample is in the training part of every fold."""
_GROUPS, _FOLDS = mix(Stream.GROUPED_SPLIT), mix(Stream.FOLDS)
_HARD = 10.0  # a class that is missing from the training or the test part, in parts that are merely desirable
_REPAIR_STEPS = 100  # for each group
_MOST_REPAIR_STEPS = 5000
_TRIED_MOVES = 50


class _Unknown(NamedTuple):
    sample: int


class GroupedSplit(NamedTuple):
    """Parts of samples, and what could not be had."""

    parts: Tensor
    """(N,) int64: 0 for train, 1 for val, 2 for test; or the fold, see :data:`ALWAYS_TRAIN`."""
    missing: list[int]
    """Classes without a sample in one of the parts."""
    divided: list[int]
    """Groups that have samples in several parts."""
    divided_for: list[int]
    """Classes that would have been missing from the training or the test part otherwise."""


def number_groups(values: Iterable[Hashable]) -> tuple[Tensor, list[str]]:
    """Return the (N,) int64 group of each sample, and the names of the groups.

    A sample whose value is None, NaN, NaT or an empty text is a group of its own, named by its number.

    >>> number_groups(["ann", "bob", "ann", None])
    (tensor([0, 1, 0, 2]), ['ann', 'bob', 'sample 3'])
    """
    index: dict[Hashable, int] = {}
    names: list[str] = []
    numbers = []
    for sample, value in enumerate(values):
        # NaN and NaT differ from themselves; pandas.NA does not say
        unknown = value is None or str(value).strip() in {"", "<NA>"} or bool(value != value)
        number = index.setdefault(_Unknown(sample) if unknown else value, len(names))
        if number == len(names):
            names.append(f"sample {sample}" if unknown else str(value))
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.int64), names


def grouped_split(
    labels: Tensor, groups: Tensor, classes: int, val: float, test: float, seed: int, *, strict: bool = False
) -> GroupedSplit:
    """Split samples into train, val and test, groups undivided as far as that is possible.

    Every class with at least 2 samples is in train and in test (in val where no test is asked for), one with a single
    sample in train. As far as its groups allow, it is in all parts and the given fractions of it.

    Args:
        labels: (N,) int64 in [0, C).
        groups: (N,) int64, at least 0.
        classes: C.
        val: fraction of each class for validation, in [0, 1); 0 makes no such part.
        test: fraction of each class for the test, in [0, 1); 0 makes no such part.
        seed: decides which groups.
        strict: divide no group; a class may then be missing from a part.

    Raises:
        LongtailError: a label is not in [0, C), or groups are not (N,) int64.
    """
    order, fractions = [0], [1 - val - test]
    for part, fraction in ((2, test), (1, val)):
        if fraction > 0:
            order.append(part)
            fractions.append(fraction)

    def divide(subset: Tensor) -> Tensor:
        numbers = torch.zeros(3, dtype=torch.int64)
        numbers[torch.tensor(order)] = torch.arange(len(order))
        return numbers[stratified_split(subset, classes, val, test, seed)[0]]

    placement = _Placement(labels, groups, classes, fractions, folds=False)
    parts = placement.run(divide, np.zeros(classes, dtype=bool), seed, strict)
    return placement.result(parts, torch.tensor(order)[parts])


def class_folds(labels: Tensor, classes: int, folds: int, seed: int) -> Tensor:
    """Return the (N,) int64 fold of each sample; the counts of a class differ by at most one between folds, as all do.

    Args:
        labels: (N,) int64 in [0, C).
        classes: C.
        folds: their number.
        seed: decides which samples.

    Raises:
        LongtailError: a label is not in [0, C).
    """
    parts = torch.zeros(len(labels), dtype=torch.int64)
    parts[torch.cat(permuted_by_class(labels, classes, mix(seed, _FOLDS)))] = torch.arange(len(labels)) % folds
    return parts


def grouped_folds(
    labels: Tensor,
    groups: Tensor,
    classes: int,
    folds: int,
    seed: int,
    *,
    strict: bool = False,
    train_only: Tensor | None = None,
) -> GroupedSplit:
    """Divide samples into folds, each of which is tested after training on the others.

    Groups are undivided as far as that is possible: every class with at least 2 samples is in at least 2 folds, so that
    it is in the training part wherever it is tested; as far as its groups allow, it is in all folds alike.

    Args:
        labels: (N,) int64 in [0, C).
        groups: (N,) int64, at least 0.
        classes: C.
        folds: their number, at least 2.
        seed: decides which groups.
        strict: divide no group; a class may then be in one fold alone.
        train_only: (C,) bool, classes whose samples are in no fold but always in the training part, although that may
            divide their groups.

    Returns:
        The folds; ``missing`` are the classes that are not in every fold.

    Raises:
        LongtailError: a label is not in [0, C), or groups are not (N,) int64.
    """
    untested = np.zeros(classes, dtype=bool) if train_only is None else train_only.numpy()
    placement = _Placement(labels, groups, classes, [1 / folds] * folds, folds=True)
    parts = placement.run(lambda subset: class_folds(subset, classes, folds, seed), untested, seed, strict)
    return placement.result(parts, parts)


class _Placement:
    """Where groups go.

    Args:
        labels: (N,) int64 in [0, C).
        groups: (N,) int64, at least 0.
        classes: C.
        fractions: (P,) of each class, by part. Without folds, the first parts are needed most.
        folds: whether the parts are alike.
    """

    def __init__(
        self, labels: Tensor, groups: Tensor, classes: int, fractions: Sequence[float], *, folds: bool
    ) -> None:
        check_labels(labels, classes)
        if groups.shape != labels.shape or groups.dtype != torch.int64 or bool((groups < 0).any()):
            raise LongtailError(
                f"groups: expected shape {tuple(labels.shape)} of int64 of at least 0, got {tuple(groups.shape)} of "
                f"{groups.dtype}"
            )
        self.labels, self.groups, self.classes, self.folds = labels.numpy(), groups.numpy(), classes, folds
        self.fractions = np.asarray(fractions, dtype=np.float64)
        self.samples = np.bincount(self.labels, minlength=classes)
        self.divided_for = np.zeros(classes, dtype=bool)

    def run(self, divide: Callable[[Tensor], Tensor], untested: Array, seed: int, strict: bool) -> Tensor:
        """Return the (N,) int64 part of each sample.

        Args:
            divide: from the labels of some samples to their parts, class by class.
            untested: (C,) bool, classes that are in no part but :data:`ALWAYS_TRAIN`.
            seed: of the random choices.
            strict: divide no group.
        """
        rng = np.random.default_rng(mix(seed, _GROUPS))
        parts = np.full(len(self.labels), ALWAYS_TRAIN, dtype=np.int64)
        pairs = np.unique(np.stack([self.groups, self.labels], axis=1), axis=0)
        units = np.bincount(pairs[:, 1], minlength=self.classes)
        # all of it in one group, which therefore has to be divided
        alone = np.zeros(self.classes, dtype=bool) if strict else (units == 1) & (self.samples > 1) & ~untested
        free = alone[self.labels]
        parts[free] = divide(torch.from_numpy(self.labels[free])).numpy()
        placed = ~free & ~untested[self.labels]
        if placed.any():
            parts[placed] = self._place(placed, np.bincount(parts[free], minlength=len(self.fractions)), rng)
        if not strict:
            counts = self._counts(parts)
            if self.folds:
                lacking = ((counts > 0).sum(axis=0) == 1) & (self.samples > 1)
            else:
                hard = np.arange(len(counts))[:, None] < np.minimum(self.samples, 2)
                lacking = (hard & (counts == 0)).any(axis=0)
            self.divided_for = alone | untested | lacking
            for label in np.flatnonzero(lacking & ~untested).tolist():
                self._divide_class(label, counts[:, label], parts, rng)
        return torch.from_numpy(parts)

    def result(self, parts: Tensor, numbers: Tensor) -> GroupedSplit:
        """Return what the (N,) parts give; ``numbers`` (N,) is what they are called."""
        counts = self._counts(parts.numpy())
        missing = np.flatnonzero((self.samples > 0) & (counts == 0).any(axis=0))
        pairs = np.unique(np.stack([self.groups, parts.numpy()], axis=1), axis=0)[:, 0]
        groups, parts_of = np.unique(pairs, return_counts=True)
        divided = groups[parts_of > 1]
        inside = np.bincount(self.labels[np.isin(self.groups, divided)], minlength=self.classes) > 0
        reasons = np.flatnonzero(inside & self.divided_for)
        return GroupedSplit(numbers, missing.tolist(), divided.tolist(), reasons.tolist())

    def _place(self, placed: Array, sizes: Array, rng: np.random.Generator) -> Array:
        """Return the parts of the samples at a mask, groups undivided; ``sizes`` (P,) are in the parts already."""
        groups, labels = self.groups[placed], self.labels[placed]
        pairs, counts = np.unique(np.stack([groups, labels], axis=1), axis=0, return_counts=True)
        names, starts = np.unique(pairs[:, 0], return_index=True)
        edges = [*starts.tolist(), len(pairs)]
        members = [
            (pairs[first:last, 1], counts[first:last].astype(np.float64)) for first, last in itertools.pairwise(edges)
        ]
        state = _State(members, self.fractions, self.classes, sizes, len(self.labels), folds=self.folds)
        state.place_all(rng)
        state.repair(rng)
        return state.part[np.searchsorted(names, groups)]

    def _counts(self, parts: Array) -> Array:
        """Return the (P, C) samples by part and class."""
        tested = parts >= 0
        cells = parts[tested] * self.classes + self.labels[tested]
        return np.bincount(cells, minlength=len(self.fractions) * self.classes).reshape(-1, self.classes)

    def _divide_class(self, label: int, counts: Array, parts: Array, rng: np.random.Generator) -> None:
        """Move some samples of a class to where it must be and is not, from the group that has most of them.

        Args:
            label: the class.
            counts: (P,) its samples by part; changed with ``parts``.
            parts: (N,) of each sample; changed.
            rng: chooses the samples.
        """
        here = np.flatnonzero(self.labels == label)
        kept = np.ones_like(counts) if self.folds else (np.arange(len(counts)) < min(2, len(here))).astype(np.int64)
        needed = [int(np.argmin(counts))] if self.folds else np.flatnonzero((counts == 0) & (kept > 0)).tolist()
        for part in needed:
            spare = counts - kept if len(here) > 1 else counts
            donor = int(np.argmax(spare))
            samples = here[parts[here] == donor]
            groups, sizes = np.unique(self.groups[samples], return_counts=True)
            samples = samples[self.groups[samples] == groups[np.argmax(sizes)]]
            moved = min(max(1, round(self.fractions[part] * len(here))), int(spare[donor]), len(samples))
            parts[rng.permutation(samples)[:moved]] = part
            counts[donor] -= moved
            counts[part] += moved


class _State:
    """Which group is in which part, and what that gives each class.

    Args:
        members: of each of the G groups, its classes and the number of its samples of each.
        fractions: (P,) of each class, by part.
        classes: C.
        sizes: (P,) samples that are in the parts already.
        total: N.
        folds: whether the parts are alike.
    """

    def __init__(
        self,
        members: Sequence[tuple[Array, Array]],
        fractions: Array,
        classes: int,
        sizes: Array,
        total: int,
        *,
        folds: bool,
    ) -> None:
        self.members, self.fractions, self.folds = members, fractions, folds
        parts = len(fractions)
        self.part = np.full(len(members), -1)
        self.cover = np.zeros((parts, classes), dtype=np.int64)
        """Groups by part and class."""
        self.counts = np.zeros((parts, classes))
        """Samples by part and class."""
        self.sizes, self.size_target = sizes.astype(np.float64), fractions * total
        labels = np.concatenate([labels for labels, _ in members])
        self.units = np.bincount(labels, minlength=classes)
        """(C,) groups of each class."""
        samples = np.bincount(labels, np.concatenate([counts for _, counts in members]), minlength=classes)
        self.target = np.maximum(fractions[:, None] * samples, 1e-9)
        self.wanted = np.arange(parts)[:, None] < np.minimum(self.units, parts)
        """(P, C): as many parts as a class has groups, the first ones; of folds, any as many."""

    def penalty(self, cover: Array, labels: Array) -> Array:
        """Return what classes lack, (L,), of their (P, L) groups by part."""
        gaps = cover == 0
        if self.folds:
            lacking = gaps.sum(axis=0) - (len(cover) - self.wanted[:, labels].sum(axis=0))
            one_fold = (gaps.sum(axis=0) == len(cover) - 1) & (self.units[labels] > 1)
            short: Array = np.maximum(lacking, 0) + _HARD * one_fold
            return short
        hard = np.where(np.arange(len(cover)) < 2, _HARD, 1.0)
        lacks: Array = hard @ (gaps & self.wanted[:, labels])
        return lacks

    def move(self, group: int, part: int) -> None:
        """Move a group to a part."""
        labels, counts = self.members[group]
        before = self.part[group]
        if before >= 0:
            self.cover[before, labels] -= 1
            self.counts[before, labels] -= counts
            self.sizes[before] -= counts.sum()
        self.cover[part, labels] += 1
        self.counts[part, labels] += counts
        self.sizes[part] += counts.sum()
        self.part[group] = part

    def place_all(self, rng: np.random.Generator) -> None:
        """Place every group: the rarest classes first, and of these the largest groups."""
        rarest = np.array([self.units[labels].min() for labels, _ in self.members])
        size = np.array([counts.sum() for _, counts in self.members])
        left = self.units.copy()
        for group in np.lexsort((rng.random(len(self.members)), -size, rarest)).tolist():
            labels, counts = self.members[group]
            # a class that lacks as many parts as it has groups left; others get their parts with their smallest groups
            gaps = (self.cover[:, labels] == 0) & (self.folds | self.wanted[:, labels])
            lacking = gaps.sum(axis=0)
            if self.folds:
                lacking -= len(gaps) - self.wanted[:, labels].sum(axis=0)
            gain = (gaps & (lacking > 0) & (lacking >= left[labels])).sum(axis=1)
            over = self.counts[:, labels] - self.target[:, labels]
            # how much the sum of (count − target)² / target grows
            cost = ((2 * over + counts) * counts / self.target[:, labels]).sum(axis=1)
            cost += (2 * (self.sizes - self.size_target) + size[group]) * size[group] / self.size_target
            self.move(group, int(np.lexsort((cost, -gain))[0]))
            left[labels] -= 1

    def repair(self, rng: np.random.Generator) -> None:
        """Move groups until no class lacks a part, or nothing better was found for long."""
        everything = np.arange(len(self.units))
        lacks = self.penalty(self.cover, everything)
        if not lacks.any():
            return
        with_class: dict[int, list[int]] = {}
        for group, (labels, _) in enumerate(self.members):
            for label in labels.tolist():
                with_class.setdefault(label, []).append(group)
        best, best_part = lacks.sum(), self.part.copy()
        for _ in range(min(_REPAIR_STEPS * len(self.members), _MOST_REPAIR_STEPS)):
            lacking = np.flatnonzero(lacks)
            if len(lacking) == 0:
                return
            label = int(rng.choice(lacking))
            moves = self._moves(label, with_class[label], rng)
            if not moves:
                continue
            changes = [self._change(group, part, lacks) for group, part in moves]
            chosen = int(rng.integers(len(moves))) if rng.random() < 0.1 else int(np.argmin(changes))
            group, part = moves[chosen]
            self.move(group, part)
            labels = self.members[group][0]
            lacks[labels] = self.penalty(self.cover[:, labels], labels)
            if lacks.sum() < best:
                best, best_part = lacks.sum(), self.part.copy()
        for group in np.flatnonzero(self.part != best_part).tolist():
            self.move(group, int(best_part[group]))

    def _moves(self, label: int, groups: Sequence[int], rng: np.random.Generator) -> list[tuple[int, int]]:
        """Return groups of a class and parts that it lacks, in random order."""
        gaps = self.cover[:, label] == 0
        parts = np.flatnonzero(gaps if self.folds else gaps & self.wanted[:, label]).tolist()
        moves = [(group, part) for group in groups for part in parts]
        return [moves[index] for index in rng.permutation(len(moves))[:_TRIED_MOVES].tolist()]

    def _change(self, group: int, part: int, lacks: Array) -> float:
        labels = self.members[group][0]
        cover = self.cover[:, labels]
        cover[self.part[group]] -= 1
        cover[part] += 1
        return float(self.penalty(cover, labels).sum() - lacks[labels].sum())
