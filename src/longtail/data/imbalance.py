"""How a set is made long-tailed, and how one without splits gets them.

Legend: C classes, n_max images of the largest class, f the imbalance factor, r a class's rank from the head, from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longtail.errors import LongtailError
from longtail.randomness import generator, mix

PARETO_POWER = 6
"""Power of the Pareto profile, as ImageNet-LT was drawn with (Liu et al., CVPR 2019)."""

_ORDER, _SPLIT = mix(11), mix(12)  # streams of draws that never meet


def profile_counts(profile: str, largest: int, classes: int, factor: float) -> list[int]:
    """Return the images of every class, head first.

    - exponential: int(n_max · f^(−r/(C−1))), the profile of CIFAR-LT (Cui et al., CVPR 2019);
    - step: the first half of the classes has n_max, the rest n_max/f (Buda et al., 2018);
    - pareto: n_max · (1 + r/(C−1) · (f^(1/a) − 1))^(−a), a power law from n_max to n_max/f; a is :data:`PARETO_POWER`.

    Args:
        profile: one of these.
        largest: n_max.
        classes: C.
        factor: f, at least 1.
    """
    last = max(classes - 1, 1)
    if profile == "step":
        return [largest if 2 * rank < classes else int(largest / factor) for rank in range(classes)]
    if profile == "pareto":
        slope = factor ** (1 / PARETO_POWER) - 1
        # a part in 10⁹ more, so that the last class is not one short by rounding
        return [int(largest * (1 + rank / last * slope) ** -PARETO_POWER * (1 + 1e-9)) for rank in range(classes)]
    assert profile == "exponential"
    return [int(largest * (1 / factor) ** (rank / last)) for rank in range(classes)]


def class_order(order: str, names: Sequence[str], seed: int) -> list[int]:
    """Return the classes from head to tail: by index, by name, or at random."""
    if order == "name":
        return sorted(range(len(names)), key=lambda index: names[index])
    if order == "random":
        drawn: list[int] = torch.randperm(len(names), generator=generator(seed, _ORDER)).tolist()
        return drawn
    return list(range(len(names)))


def permuted_by_class(labels: Tensor, classes: int, seed: int) -> list[Tensor]:
    """Return, for every class, the positions of its images in an order that the seed alone decides."""
    grouped = torch.argsort(labels, stable=True).split(torch.bincount(labels, minlength=classes).tolist())
    return [
        positions[torch.randperm(len(positions), generator=generator(seed, index))]
        for index, positions in enumerate(grouped)
    ]


def subsample(order: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Return the positions of the first ``counts[c]`` images of every class, ascending.

    A smaller imbalance factor keeps all the images of a larger one, since both read the same order.
    """
    return torch.cat([positions[:count] for positions, count in zip(order, counts, strict=True)]).sort().values


def long_tailed(
    order: Sequence[Tensor], names: Sequence[str], profile: str, factor: float, ranks: str, seed: int
) -> Tensor:
    """Return the positions of the images that make a set long-tailed, ascending; nested over factors.

    The head is as large as it can be, and a class that has fewer images than the profile wants keeps all.

    Args:
        order: each class's positions, see :func:`permuted_by_class`.
        names: class names.
        profile: natural (all images), exponential, step or pareto.
        factor: imbalance factor.
        ranks: which class is head and which is tail: index, name or random.
        seed: of random ranks.

    Raises:
        LongtailError: the smallest class would have no image.
    """
    if profile == "natural":
        return torch.cat(list(order)).sort().values
    head_first = class_order(ranks, names, seed)
    wanted = profile_counts(profile, len(order[head_first[0]]), len(order), factor)
    if min(wanted) < 1:
        raise LongtailError(
            f"data.imbalance {factor:g} leaves the smallest class without an image; "
            f"with {wanted[0]} in the largest it can be at most {wanted[0]}"
        )
    counts = [0] * len(order)
    for rank, index in enumerate(head_first):
        counts[index] = wanted[rank]
    return subsample(order, counts)


def stratified(labels: Tensor, classes: int, val: float, test: float, seed: int) -> tuple[Tensor, list[int]]:
    """Share every class out over train, val and test.

    A class of at least 3 images has one in each split that was asked for; one of 2 has one to train on and one to test
    on; one of 1 is trained on alone.

    Args:
        labels: (N,).
        classes: C.
        val: share of each class for validation; 0 makes no such split.
        test: share of each class for the test; 0 makes no such split.
        seed: decides which images.

    Returns:
        (N,) 0 for train, 1 for val, 2 for test; and the classes that lack an image in one of the splits asked for.
    """
    assignment = torch.zeros(len(labels), dtype=torch.int64)
    short = []
    for index, positions in enumerate(permuted_by_class(labels, classes, mix(seed, _SPLIT))):
        count = len(positions)
        tested = max(1, round(count * test)) if test > 0 and count >= 2 else 0
        validated = max(1, round(count * val)) if val > 0 and count >= (3 if test > 0 else 2) else 0
        while tested + validated > count - 1:  # one stays to train on
            if tested >= validated:
                tested -= 1
            else:
                validated -= 1
        if (test > 0 and tested == 0) or (val > 0 and validated == 0):
            short.append(index)
        assignment[positions[:tested]] = 2
        assignment[positions[tested : tested + validated]] = 1
    return assignment, short


def gini(counts: Sequence[int]) -> float:
    """Return the Gini coefficient of the class counts: 0 when all are equal, towards 1 when one class has all."""
    ordered = sorted(counts)
    total, classes = sum(ordered), len(ordered)
    if total == 0:
        return 0.0
    weighted = sum((2 * rank - classes + 1) * count for rank, count in enumerate(ordered))
    return weighted / (classes * total)


def imbalance_factor(counts: Sequence[int]) -> float:
    """Return images of the largest class over those of the smallest; inf where one has none."""
    return max(counts) / min(counts) if min(counts) > 0 else math.inf
