"""Class frequencies where a model is used: given in a file, or made for a test. Legend: C classes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longtail.errors import LongtailError, nearest


def read_prior(path: Path, class_names: Sequence[str]) -> list[float]:
    """Read class frequencies from a file, in the order of the classes; they need not add up to 1.

    JSON, an object of class names and frequencies, or a table (.csv, .tsv) of two columns, with a header or without.

    Raises:
        LongtailError: the file cannot be read, or a class is missing, unknown, named twice, or has none above 0.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LongtailError(f"prior '{path}': cannot be read: {getattr(error, 'strerror', None) or error}") from None
    pairs: list[tuple[Any, Any]]
    if path.suffix.lower() in {".csv", ".tsv"}:
        rows = [row for row in csv.reader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",") if row]
        bad = next((row for row in rows if len(row) != 2), None)
        if bad is not None:
            raise LongtailError(f"prior '{path}': expected two columns, a class and its frequency, got {bad}")
        pairs = [(row[0], row[1]) for row in rows]
        if pairs and _number(pairs[0][1]) is None and pairs[0][0] not in class_names:
            pairs = pairs[1:]  # a header
    else:
        try:
            values = json.loads(text, object_pairs_hook=list)
        except json.JSONDecodeError as error:
            raise LongtailError(f"prior '{path}': is neither JSON nor a .csv or .tsv table ({error})") from None
        if not isinstance(values, list) or not all(isinstance(pair, tuple) for pair in values):
            raise LongtailError(f"prior '{path}': expected an object of class names and frequencies")
        pairs = values
    found: dict[str, float] = {}
    for name, value in pairs:
        number = _number(value)
        if name not in class_names:
            raise LongtailError(f"prior '{path}': there is no class '{name}'{nearest(str(name), class_names)}")
        if name in found:
            raise LongtailError(f"prior '{path}': class '{name}' stands there twice")
        if number is None or not 0 < number < math.inf:
            raise LongtailError(f"prior '{path}': class '{name}' has {value!r}, expected a frequency above 0")
        found[str(name)] = number
    missing = next((name for name in class_names if name not in found), None)
    if missing is not None:
        raise LongtailError(f"prior '{path}': class '{missing}' is missing, expected a frequency of every class")
    total = sum(found.values())
    return [found[name] / total for name in class_names]


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def long_tailed_prior(class_counts: Sequence[int], direction: str, imbalance: float) -> list[float]:
    """Return an exponential tail of class frequencies, (C,).

    Args:
        class_counts: (C,) training images; they say which class is head and which is tail.
        direction: forward (the head stays the head) or backward (the rarest class in training is the most frequent).
        imbalance: largest frequency over the smallest, at least 1.
    """
    order = sorted(range(len(class_counts)), key=lambda index: -class_counts[index])
    if direction == "backward":
        order.reverse()
    weights = [0.0] * len(order)
    for place, index in enumerate(order):
        weights[index] = imbalance ** (-place / max(1, len(order) - 1))
    return [weight / sum(weights) for weight in weights]
