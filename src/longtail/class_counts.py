"""Class counts as a caller gives them. Imports nothing. Legend: C classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_class_order(class_counts: Any, name: str = "class_counts", noun: str = "count") -> list[Any]:
    """Return class counts as a list in the order of the classes; a pandas series is read by its index.

    Args:
        class_counts: (C,) one entry for each class.
        name: of the argument, for the message.
        noun: what an entry is, for the message.

    Raises:
        ValueError: no sequence of numbers, an empty one, a mapping, or a series whose index is not 0 … C − 1.
    """
    if isinstance(class_counts, Mapping):  # a Counter, whose keys would be taken as the counts
        raise ValueError(f"{name}: expected one {noun} for each class in order, got a mapping; give a list")
    kind = type(class_counts).__name__
    if hasattr(class_counts, "columns"):
        raise ValueError(f"{name}: expected one {noun} for each class, got a {kind}; give one of its columns")
    if isinstance(class_counts, str | bytes) or not hasattr(class_counts, "__iter__"):
        raise ValueError(f"{name}: expected a list of one {noun} for each class, got {class_counts!r}")
    is_iterator = hasattr(class_counts, "__next__")
    counts = class_counts.tolist() if hasattr(class_counts, "tolist") else list(class_counts)
    if not isinstance(counts, list):  # of an array or tensor without dimensions
        raise ValueError(f"{name}: expected a list of one {noun} for each class, got the single number {counts!r}")
    if is_iterator and not counts:
        raise ValueError(f"{name}: expected one {noun} for each class, got a used-up {kind}; give a list")
    for position, count in enumerate(counts):
        if isinstance(count, str | bytes) or count is None:
            raise ValueError(f"{name}: expected a number for each class, got {count!r} for class {position}")
    index = getattr(class_counts, "index", None)
    if index is None or callable(index):  # a method of sequences
        return counts
    order = list(index)
    by_class = dict(zip(order, counts, strict=True))
    if set(order) != set(range(len(counts))):
        raise ValueError(
            f"{name}: expected a series whose index are the class numbers 0 to {len(counts) - 1}, got the index "
            f"{', '.join(map(str, order[:5]))}{', …' * (len(order) > 5)}; give a list in the order of the classes"
        )
    return [by_class[number] for number in range(len(counts))]
