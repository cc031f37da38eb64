"""Splitting a set of image files once, and writing the split as a table of path, class name and split."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import torch

from longtail.config import Data
from longtail.data.imbalance import stratified_split
from longtail.data.listing import SPLITS
from longtail.data.sources import read_listing
from longtail.errors import LongtailError
from longtail.files import write_text
from longtail.registry import SOURCES


def write_split(config: Data, out: Path, val: float, test: float, seed: int) -> dict[str, Any]:
    """Split a set and write the table.

    Args:
        config: a set of image files without splits.
        out: the table, a .csv.
        val: fraction of each class for validation, in [0, 1).
        test: fraction of each class for the test, in [0, 1).
        seed: decides which images.

    Returns:
        ``root`` (folder that the paths are relative to), ``images`` (their number by split) and ``short`` (names of the
        classes without an image in one of the splits).

    Raises:
        LongtailError: the set has splits already, has something wrong in it, or nothing would be left to train on.
    """
    if SOURCES[config.source].listing is None:
        raise LongtailError(f"{config.source}: has its own splits; a folder, a list or a table can be split")
    if min(val, test) < 0 or val + test >= 1 or val + test == 0:
        raise LongtailError(
            f"--val {val:g} and --test {test:g}: expected fractions from 0 whose sum is above 0 and below 1"
        )
    listing = read_listing(config)
    if listing.errors:
        raise LongtailError(listing.errors[0])
    if set(listing.splits) != {"all"}:
        raise LongtailError(f"{listing.root}: has splits already: {', '.join(listing.splits)}")
    entries, names = listing.splits["all"], listing.class_names
    assignment, short = stratified_split(entries.labels, len(names), val, test, seed)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "class_name", "split"])
    for name, label, split in zip(entries.names, entries.labels.tolist(), assignment.tolist(), strict=True):
        rows.writerow([name, names[label], SPLITS[split]])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text.getvalue(), errors="surrogateescape")
    counts = torch.bincount(assignment, minlength=3).tolist()
    return {
        "root": str(listing.root),
        "images": dict(zip(SPLITS, counts, strict=True)),
        "short": [names[index] for index in short],
    }
