"""Class frequencies of the data that a model is used on: the one parser of all ways to specify them. Imports no torch.

Legend: C classes.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from longtail.data.class_order import head_first
from longtail.data.paths import find_path, nfc
from longtail.data.text import from_latin1, is_undecoded, read_text
from longtail.errors import LongtailError, did_you_mean

PriorName = Literal["uniform", "train"]
"""Class frequencies that predictions may assume by name: all classes equally frequent, or as in the training set."""

ClassFrequencies = str | Path | Mapping[Any, float] | Sequence[float]
"""A specification of class frequencies, see :func:`resolve_class_frequencies`."""


def resolve_class_frequencies(
    spec: ClassFrequencies,
    class_names: Sequence[Hashable],
    class_counts: Sequence[int],
    *,
    imbalance: float = 100.0,
    where: str = "prior",
    ignore_unknown: bool = False,
) -> list[float]:
    """Return C class frequencies with sum 1, in the order of ``class_names``.

    Args:
        spec: one of

            - ``uniform``: all classes equally frequent;
            - ``train``: as in the training set; 0 for a class without training images;
            - ``forward``: a long tail with the classes in the order of their training frequency; ``backward``: in the
              reverse order, see :func:`long_tailed_frequencies`;
            - a file: a JSON object of class names and frequencies, or a table (.csv, .tsv) of two columns, class and
              frequency, with or without a header;
            - a mapping from class name to frequency, such as a dictionary or a pandas series;
            - C frequencies in the order of ``class_names``, as a sequence, array or tensor.

            Frequencies in files, mappings and sequences must be above 0 and need not sum to 1.
        class_names: (C,) names of the classes.
        class_counts: (C,) training images of each class.
        imbalance: largest frequency over the smallest of ``forward`` and ``backward``, at least 1.
        where: name of the argument or flag, for error messages.
        ignore_unknown: leave out the classes of a mapping or file that are not in ``class_names``, such as those that a
            fold of a cross-validation lacks; the frequencies of the others are scaled to sum 1.

    Raises:
        LongtailError: there is no such file, it cannot be read, or a class is missing, unknown, listed twice or
            without a frequency above 0; the message names the class and the value.
    """
    if isinstance(spec, Path):
        place = f"{where} '{spec}'"
        pairs = _read_pairs(find_path(spec), class_names, place)  # under the name that the disk has
        return _from_pairs(pairs, class_names, place, ignore_unknown)
    if isinstance(spec, str):
        if spec == "uniform":
            return [1 / len(class_names)] * len(class_names)
        if spec == "train":
            total = sum(class_counts)
            return [float(count / total) for count in class_counts]
        if spec in {"forward", "backward"}:
            if not 1 <= imbalance < math.inf:
                raise LongtailError(f"imbalance {imbalance:g}: expected at least 1")
            return long_tailed_frequencies(class_counts, spec, imbalance)
        if not find_path(Path(spec)).is_file():
            raise LongtailError(
                f"{where} '{spec}': expected uniform, train, or a file of class frequencies (a test set also takes "
                "forward and backward); there is no such file"
            )
        return resolve_class_frequencies(
            Path(spec), class_names, class_counts, where=where, ignore_unknown=ignore_unknown
        )
    if isinstance(spec, Mapping):
        return _from_pairs(spec.items(), class_names, where, ignore_unknown)
    if hasattr(spec, "items") and hasattr(spec, "keys"):  # a pandas series is no Mapping
        return _from_pairs(spec.items(), class_names, where, ignore_unknown)
    values = spec.tolist() if hasattr(spec, "tolist") else spec  # of an array or tensor
    numbers = [_to_float(value) for value in values] if isinstance(values, Iterable) else []
    expected = f"expected {len(class_names)} frequencies above 0"
    if len(numbers) != len(class_names):
        count = f"{len(numbers)}: " if isinstance(values, Iterable) else ""
        advice = "; a mapping from class name to frequency does not depend on the number of classes"
        raise LongtailError(f"{where}: {expected}, got {count}{_shorten(spec)}{advice}")
    for name, value, number in zip(class_names, values, numbers, strict=True):
        if not _is_frequency(number):
            raise LongtailError(f"{where}: {expected}, got {_shorten(value)} for class '{name}'")
    return _normalize([number for number in numbers if number is not None])


def long_tailed_frequencies(class_counts: Sequence[int], direction: str, imbalance: float) -> list[float]:
    """Return (C,) class frequencies with an exponential tail and sum 1.

    Args:
        class_counts: (C,) training images of each class, which order the classes from head to tail.
        direction: ``forward`` (the class with the most training images is the most frequent) or ``backward`` (that
            with the fewest is).
        imbalance: largest frequency over the smallest, at least 1.
    """
    order = head_first(class_counts)
    if direction == "backward":
        order.reverse()
    weights = [0.0] * len(order)
    for position, index in enumerate(order):
        weights[index] = imbalance ** (-position / max(1, len(order) - 1))
    return _normalize(weights)


def _read_pairs(path: Path, class_names: Sequence[Hashable], where: str) -> list[tuple[Any, Any]]:
    """Return the entries of a file as pairs of class name and value."""
    text = read_text(path)
    names = {nfc(str(name)) for name in class_names}
    if path.suffix.lower() in {".csv", ".tsv"}:
        pairs = _table_pairs(
            from_latin1(text) if is_undecoded(text) else text, path.suffix.lower() == ".tsv", names, where
        )
        has_header = bool(pairs) and _to_float(pairs[0][1]) is None and nfc(pairs[0][0]) not in names
        return pairs[1:] if has_header else pairs
    if is_undecoded(text):
        raise LongtailError(f"{where}: cannot be read: is no text in UTF-8, as JSON is; save it as such")
    try:
        entries = json.loads(text, object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise LongtailError(f"{where}: is neither JSON nor a .csv or .tsv table ({error})") from None
    if not isinstance(entries, list) or not all(isinstance(entry, tuple) for entry in entries):
        raise LongtailError(f"{where}: expected an object of class names and frequencies")
    return entries


def _table_pairs(text: str, has_tabs: bool, names: Collection[str], where: str) -> list[tuple[str, str]]:
    """Return the rows of a table, whose columns a tab, comma or semicolon divides: what gives the most class names,
    then two columns in the most rows, then the most numbers.
    """
    readings: list[tuple[tuple[int, ...], list[list[str]]]] = []
    problem = ""
    for delimiter in "\t" if has_tabs else ",;":
        try:
            rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter, strict=True) if row]
        except csv.Error as error:
            problem = problem or f"cannot be read as a table: {error}"
            continue
        if delimiter == ";":  # as spreadsheets write it beside 0,5
            rows = [[*row[:1], *(value.replace(",", ".") for value in row[1:])] for row in rows]
        in_two = [row for row in rows if len(row) == 2]
        known = sum(nfc(row[0]) in names for row in rows)
        readings.append(((known, len(in_two), sum(_to_float(row[1]) is not None for row in in_two)), rows))
    if not readings:
        raise LongtailError(f"{where}: {problem}")
    _, rows = max(readings, key=lambda reading: reading[0])
    wrong_row = next((row for row in rows if len(row) != 2), None)
    if wrong_row is not None:
        raise LongtailError(f"{where}: expected two columns, a class and its frequency, got {wrong_row}")
    return [(row[0], row[1]) for row in rows]


def _from_pairs(
    pairs: Iterable[tuple[Any, Any]], class_names: Sequence[Hashable], where: str, ignore_unknown: bool
) -> list[float]:
    """Return normalised frequencies from pairs of class name and frequency.

    Names are equal if they are equal as values, such as the label 1.0 and the key 1, or as text in one Unicode form.
    """
    names = [nfc(str(name)) for name in class_names]
    by_value = dict(zip(class_names, names, strict=True))
    known_names = set(names)
    frequencies: dict[str, float] = {}
    unknown: list[str] = []
    for key, value in pairs:
        name, number = by_value.get(key, nfc(str(key))), _to_float(value)
        if name not in known_names:
            if not ignore_unknown:
                raise LongtailError(f"{where}: there is no class '{name}'{did_you_mean(name, names)}")
            unknown.append(name)
            continue
        if name in frequencies:
            raise LongtailError(f"{where}: class '{name}' is listed twice")
        if number is None or not _is_frequency(number):
            raise LongtailError(f"{where}: class '{name}' has {_shorten(value)}, expected a frequency above 0")
        frequencies[name] = number
    missing = next((name for name in names if name not in frequencies), None)
    if missing is not None:
        close = difflib.get_close_matches(missing, unknown, n=1)
        hint = f"; is it '{close[0]}', which is no class?" if close else ""
        raise LongtailError(f"{where}: class '{missing}' is missing, expected a frequency of every class{hint}")
    return _normalize([frequencies[name] for name in names])


def _normalize(values: Sequence[float]) -> list[float]:
    total = sum(values)
    if total == math.inf:  # of finite values near float64's largest
        largest = max(values)
        return _normalize([value / largest for value in values])
    return [value / total for value in values]


def _is_frequency(number: float | None) -> bool:
    return number is not None and 0 < number < math.inf


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _shorten(value: Any) -> str:
    """Return a representation that fits into one line of a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
