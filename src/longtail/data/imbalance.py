"""Making a set long-tailed, and splitting one class by class.

Legend: N images, C classes, n_max images of the largest class, f the imbalance factor, r a class's rank from the head,
from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longtail.errors import LongtailError
from longtail.randomness import Stream, generator, mix

PARETO_POWER = 6
"""Power of the Pareto profile, as ImageNet-LT was drawn with (Liu et al., CVPR 2019)."""

_ORDER, _SPLIT = mix(Stream.CLASS_ORDER), mix(Stream.SPLIT)


def resolve_profile(profile: str, balanced: bool) -> str:
    """Return natural, exponential, step or pareto for a profile that may be auto.

    Args:
        profile: as configured; auto is exponential for a balanced set, and natural for one with a tail of its own.
        balanced: whether the set is balanced as published.
    """
    if profile != "auto":
        return profile
    return "exponential" if balanced else "natural"


def profile_counts(profile: str, largest: int, classes: int, factor: float) -> list[int]:
    """Return the number of images of every class, head first, (C,).

    - exponential: int(n_max · f^(−r/(C−1))), the profile of CIFAR-LT (Cui et al., CVPR 2019);
    - step: n_max for the first half of the classes, n_max/f for the rest (Buda et al., 2018);
    - pareto: n_max · (1 + r/(C−1) · (f^(1/a) − 1))^(−a), a power law from n_max to n_max/f; a is :data:`PARETO_POWER`.

    Args:
        profile: one of these.
        largest: n_max.
        classes: C.
        factor: f, at least 1.
    """
    last = max(classes - 1, 1)
    whole = 1 + 1e-9  # larger by one part in 10⁹, so that rounding does not take an image from the last class
    if profile == "step":
        return [largest if 2 * rank < classes else int(largest / factor * whole) for rank in range(classes)]
    if profile == "pareto":
        slope = factor ** (1 / PARETO_POWER) - 1
        return [int(largest * (1 + rank / last * slope) ** -PARETO_POWER * whole) for rank in range(classes)]
    assert profile == "exponential"
    return [int(largest * (1 / factor) ** (rank / last) * whole) for rank in range(classes)]


def rank_classes(order: str, names: Sequence[str], seed: int) -> list[int]:
    """Return the class indices from head to tail.

    Args:
        order: index, name or random.
        names: C class names.
        seed: of a random order.
    """
    if order == "name":
        return sorted(range(len(names)), key=lambda index: names[index])
    if order == "random":
        permutation: list[int] = torch.randperm(len(names), generator=generator(seed, _ORDER)).tolist()
        return permutation
    return list(range(len(names)))


def check_labels(labels: Tensor, classes: int | None = None) -> None:
    """Check that every image has a class.

    Args:
        labels: (N,) int64.
        classes: C; None for any number.

    Raises:
        LongtailError: a label is not in [0, C), or the labels are not (N,) int64.
    """
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise LongtailError(f"labels: expected shape (N,) of int64, got {tuple(labels.shape)} of {labels.dtype}")
    wrong = (labels < 0) if classes is None else (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        image = int(wrong.nonzero()[0])
        expected = "values of at least 0" if classes is None else f"values in [0, {classes})"
        raise LongtailError(f"labels: expected {expected}, got {int(labels[image])} for image {image}")


def permuted_by_class(labels: Tensor, classes: int, seed: int) -> list[Tensor]:
    """Return, for each of the C classes, the positions of its images in a random order given by the seed alone.

    Raises:
        LongtailError: a label is not in [0, C).
    """
    check_labels(labels, classes)
    grouped = torch.argsort(labels, stable=True).split(torch.bincount(labels, minlength=classes).tolist())
    return [
        positions[torch.randperm(len(positions), generator=generator(seed, index))]
        for index, positions in enumerate(grouped)
    ]


def subsample(order: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Return the positions of the first ``counts[c]`` images of every class c, ascending.

    A smaller imbalance factor keeps all the images of a larger one, since both read the same order.
    """
    return torch.cat([positions[:count] for positions, count in zip(order, counts, strict=True)]).sort().values


def long_tailed(
    order: Sequence[Tensor], names: Sequence[str], profile: str, factor: float, class_order: str, seed: int
) -> Tensor:
    """Return the positions of the images that make a set long-tailed, ascending; nested over factors.

    The head keeps all of its images, and so does a class that has fewer than the profile asks for.

    Args:
        order: positions of the images of every class, see :func:`permuted_by_class`.
        names: C class names.
        profile: natural (all images), exponential, step or pareto.
        factor: imbalance factor, at least 1.
        class_order: which classes are head and which are tail: index, name or random.
        seed: of a random class order.

    Raises:
        LongtailError: the smallest class would have no image.
    """
    if profile == "natural":
        return torch.cat(list(order)).sort().values
    ranked = rank_classes(class_order, names, seed)
    counts_by_rank = profile_counts(profile, len(order[ranked[0]]), len(order), factor)
    if min(counts_by_rank) < 1:
        raise LongtailError(
            f"data.imbalance {factor:g} leaves the smallest class without an image; "
            f"with {counts_by_rank[0]} in the largest it can be at most {counts_by_rank[0]}"
        )
    counts = [0] * len(order)
    for rank, index in enumerate(ranked):
        counts[index] = counts_by_rank[rank]
    return subsample(order, counts)


def remarks_on_tail(
    order: Sequence[Tensor],
    labels: Tensor,
    names: Sequence[str],
    profile: str,
    factor: float,
    class_order: str,
    seed: int,
) -> list[str]:
    """Return what a user should know of a tail that :func:`long_tailed` made of classes of different sizes.

    Its factor is another than the one asked for where a class had fewer images than the profile asks for; and the tail
    is smaller than need be where the head is not the largest class.

    Args:
        order: as :func:`long_tailed` took it, and so are the others.
        labels: (N,) int64 classes of the images that it kept.
        names: C class names.
        profile: natural, exponential, step or pareto.
        factor: imbalance factor that was asked for.
        class_order: index, name or random.
        seed: of a random class order.
    """
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    if profile == "natural" or min(counts) < 1:
        return []
    ranked = rank_classes(class_order, names, seed)
    wanted = profile_counts(profile, len(order[ranked[0]]), len(order), factor)
    remarks = []
    smallest = counts.index(min(counts))
    if counts[smallest] < min(wanted):
        remarks.append(
            f"data.imbalance {factor:g}: is {imbalance_factor(counts):.4g} in fact: class '{names[smallest]}' has "
            f"{counts[smallest]} training image{'s' * (counts[smallest] != 1)}, and the profile asks for "
            f"{wanted[ranked.index(smallest)]}"
        )
    largest = max(range(len(order)), key=lambda index: len(order[index]))
    if len(order[largest]) > len(order[ranked[0]]):
        remarks.append(
            f"data.class_order {class_order}: the head is '{names[ranked[0]]}' with {len(order[ranked[0]]):,} images, "
            f"and no class keeps more, although '{names[largest]}' has {len(order[largest]):,}"
        )
    return remarks


def hold_out_balanced(order: Sequence[Tensor], fraction: float) -> tuple[Tensor | None, list[Tensor]]:
    """Take the same number of images from every class, before a set is made long-tailed.

    Args:
        order: positions of the images of every class, see :func:`permuted_by_class`.
        fraction: of the smallest class, in [0, 1); 0 takes none.

    Returns:
        Positions of the images that are held out (None where none are), and the positions that remain of every class.
    """
    if fraction == 0:
        return None, list(order)
    count = max(1, round(fraction * min(len(positions) for positions in order)))
    return torch.cat([positions[:count] for positions in order]), [positions[count:] for positions in order]


def stratified_split(labels: Tensor, classes: int, val: float, test: float, seed: int) -> tuple[Tensor, list[int]]:
    """Split every class into train, val and test.

    A class of at least 3 images has one in each split that is asked for; one of 2 has one in train and one in test; one
    of 1 is in train.

    Args:
        labels: (N,) int64 in [0, C).
        classes: C.
        val: fraction of each class for validation; 0 makes no such split.
        test: fraction of each class for the test; 0 makes no such split.
        seed: decides which images.

    Returns:
        (N,) int64, 0 for train, 1 for val, 2 for test; and the classes without an image in one of the splits asked for.

    Raises:
        LongtailError: a label is not in [0, C).
    """
    assignment = torch.zeros(len(labels), dtype=torch.int64)
    short = []
    for index, positions in enumerate(permuted_by_class(labels, classes, mix(seed, _SPLIT))):
        count = len(positions)
        in_test = max(1, round(count * test)) if test > 0 and count >= 2 else 0
        in_val = max(1, round(count * val)) if val > 0 and count >= (3 if test > 0 else 2) else 0
        while in_test + in_val > count - 1:  # at least one is for training
            if in_test >= in_val:
                in_test -= 1
            else:
                in_val -= 1
        if (test > 0 and in_test == 0) or (val > 0 and in_val == 0):
            short.append(index)
        assignment[positions[:in_test]] = 2
        assignment[positions[in_test : in_test + in_val]] = 1
    return assignment, short


def gini(counts: Sequence[int]) -> float:
    """Return the Gini coefficient of class counts, in [0, 1): 0 when all are equal, near 1 when one class has all."""
    ordered = sorted(counts)
    total, classes = sum(ordered), len(ordered)
    if total == 0:
        return 0.0
    weighted = sum((2 * rank - classes + 1) * count for rank, count in enumerate(ordered))
    return weighted / (classes * total)


def imbalance_factor(counts: Sequence[int]) -> float:
    """Return the images of the largest class over those of the smallest; inf where a class has none."""
    return max(counts) / min(counts) if min(counts) > 0 else math.inf
