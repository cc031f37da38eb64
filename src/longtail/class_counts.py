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
        ValueError: a mapping, or a series whose index is not 0 … C − 1.
    """
    if isinstance(class_counts, Mapping):  # a Counter, whose keys would be taken as the counts
        raise ValueError(f"{name}: expected one {noun} for each class in order, got a mapping; give a list")
    counts: list[Any] = class_counts.tolist() if hasattr(class_counts, "tolist") else list(class_counts)
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
