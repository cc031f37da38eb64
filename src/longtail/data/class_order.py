"""Classes ordered and grouped by how frequent they are. Imports no torch. Legend: C classes."""

from __future__ import annotations

from collections.abc import Sequence


def head_first(class_counts: Sequence[float]) -> list[int]:
    """Return the C class indices by falling count; equal counts stay in order of index.

    >>> head_first([5, 100, 1, 100])
    [1, 3, 0, 2]
    """
    return sorted(range(len(class_counts)), key=lambda index: -class_counts[index])


def frequency_thirds(class_counts: Sequence[float]) -> list[str]:
    """Return head, middle or tail for each of the C classes: thirds of the classes by falling count, ties by index.

    >>> frequency_thirds([5, 100, 1])
    ['middle', 'head', 'tail']
    """
    order = head_first(class_counts)
    third = len(order) / 3
    groups = [""] * len(order)
    for rank, index in enumerate(order):
        groups[index] = "head" if rank < round(third) else "middle" if rank < round(2 * third) else "tail"
    return groups
