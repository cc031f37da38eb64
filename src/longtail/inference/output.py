"""Predictions as they are printed and written; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longtail.errors import LongtailError


@dataclass(frozen=True)
class PredictionOutput:
    """Predictions as they are printed and written."""

    records: Sequence[Mapping[str, Any]]
    """What ``--json`` holds, one entry per image."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    """Lines below the table."""
    unreadable: Mapping[Path, str] = field(default_factory=dict)
    """Reason for each file that could not be read; there is no record of it."""


def readable_files(files: Sequence[Path], unreadable: Mapping[Path, str]) -> list[Path]:
    """Return the files that could be read.

    Raises:
        LongtailError: none of them could.
    """
    readable = [file for file in files if file not in unreadable]
    if not readable and unreadable:
        more = "" if len(unreadable) == 1 else f"; none of {len(files)} images can be read"
        raise LongtailError(f"{next(iter(unreadable.values()))}{more}")
    return readable


SEGMENTED = Path("segmented")
"""Folder of the label images, if no other one is asked for."""
OBJECT_THRESHOLD = 0.5
"""Lowest score of an object that is shown, if nothing else is asked for."""
OBJECTS_HEADER = ("path", "class", "score", "x1, y1, x2, y2")
_SHOWN_OF_SET = 10  # names of a conformal set in the table; with thousands of classes it may hold all of them


def object_records(
    boxes: Sequence[Sequence[float]], labels: Sequence[int], scores: Sequence[float], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the objects of an image as ``--json`` holds them: class, score and box.

    Args:
        boxes: K of x1, y1, x2, y2 in pixels of the image.
        labels: K classes in [0, C).
        scores: K of them.
        names: C names.
    """
    return [
        {"class": names[label], "score": score, "box": list(box)}
        for label, score, box in zip(labels, scores, boxes, strict=True)
    ]


def object_rows(file: Path, objects: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of an image in the table of objects, under :data:`OBJECTS_HEADER`."""
    rows = [
        [str(file), each["class"], f"{each['score']:.3f}", ", ".join(f"{value:.0f}" for value in each["box"])]
        for each in objects
    ]
    return rows or [[str(file), "nothing found", "", ""]]


def prediction_table(
    files: Sequence[Path],
    top: Sequence[Sequence[tuple[str, float]]],
    sets: Sequence[Sequence[str]] | None = None,
    notes: Sequence[str] = (),
    unreadable: Mapping[Path, str] | None = None,
) -> PredictionOutput:
    """Return the table of the most probable classes of images, and of their conformal sets if there are some."""
    records: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    for number, (file, classes) in enumerate(zip(files, top, strict=True)):
        record = {
            "path": str(file),
            "class": classes[0][0],
            "probability": classes[0][1],
            "top": [{"class": name, "probability": value} for name, value in classes],
        }
        others = ", ".join(f"{name} {value:.3f}" for name, value in classes[1:])
        row = [str(file), classes[0][0], f"{classes[0][1]:.3f}", others]
        if sets is not None:
            record["set"] = list(sets[number])
            row.append(_set_cell(sets[number]))
        records.append(record)
        rows.append(row)
    header = ["path", "class", "probability", "next", *(["set"] if sets is not None else [])]
    return PredictionOutput(records, header, rows, notes, unreadable or {})


def _set_cell(names: Sequence[str]) -> str:
    """Return the number of classes in a conformal set, and the first of them."""
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN_OF_SET:,} more" if len(names) > _SHOWN_OF_SET else ""
    return f"{len(names):,}: {', '.join(names[:_SHOWN_OF_SET])}{more}"
