"""Splitting a set once, and writing the split: of image files as a table of path, class name, split and group."""

from __future__ import annotations

import csv
import io
import shlex
from pathlib import Path
from typing import Any

import torch

from longtail.config import Data
from longtail.data.grouped_split import grouped_split, number_groups
from longtail.data.imbalance import stratified_split
from longtail.data.listing import SPLITS, Listing
from longtail.data.listing.groups import path_key, read_groups
from longtail.data.paths import find_path, printable
from longtail.data.sources import read_listing
from longtail.errors import LongtailError
from longtail.files import write_text
from longtail.registry import SOURCES


def write_split(
    config: Data,
    out: Path,
    val: float,
    test: float,
    seed: int,
    *,
    group_column: str | None = None,
    strict_groups: bool = False,
) -> dict[str, Any]:
    """Split a set and write the table.

    With groups, a class of at least 2 images is in train and test all the same; see
    :func:`~longtail.data.grouped_split.grouped_split`.

    Args:
        config: a set of image files without splits, or one whose source writes its splits itself.
        out: the table, a .csv; or a folder, where the source writes its own files.
        val: fraction of each class for validation, in [0, 1).
        test: fraction of each class for the test, in [0, 1).
        seed: decides which images.
        group_column: column of a table whose images of one value stay together; an empty cell is a group of its own.
        strict_groups: divide no group; a class may then be missing from a split.

    Returns:
        ``root`` (folder that the paths are relative to), ``images`` (their number by split), ``short`` (names of the
        classes without an image in one of the splits) and ``data`` (flags to train on it); with groups also ``groups``
        (their number), ``ungrouped`` (images without a group), ``divided`` (names of the groups in several splits) and
        ``divided_for`` (names of the classes that would have been missing from train or test otherwise).

    Raises:
        LongtailError: the set has splits already, has something wrong in it, nothing would be left to train on, or it
            is no table with such a column of groups.
    """
    source = SOURCES[config.source]
    if source.listing is None and source.write_split is None:
        raise LongtailError(f"{config.source}: has its own splits; a folder, a list or a table can be split")
    if not (val >= 0 and test >= 0 and 0 < val + test < 1):
        raise LongtailError(
            f"--val {val:g} and --test {test:g}: expected fractions from 0 whose sum is above 0 and below 1"
        )
    if source.write_split is not None:
        if group_column is not None:
            raise LongtailError(f"--groups {group_column}: is not supported for {config.source}; expected a table")
        return source.write_split(config, out, val, test, seed)
    listing = read_listing(config)
    if listing.errors:
        raise LongtailError(listing.errors[0])
    if set(listing.splits) != {"all"}:
        raise LongtailError(f"{listing.root}: has splits already: {', '.join(listing.splits)}")
    entries, names = listing.splits["all"], listing.class_names
    columns = [entries.names, [names[label] for label in entries.labels.tolist()]]
    header, summary = ["path", "class_name", "split"], dict[str, Any]()
    if group_column is None:
        assignment, short = stratified_split(entries.labels, len(names), val, test, seed)
        extra = []
    else:
        column, groups = _groups_of(listing, config, group_column)
        header.append("group" if column.casefold() in header else column)
        extra = [groups]
        numbers, group_names = number_groups(groups)
        split = grouped_split(entries.labels, numbers, len(names), val, test, seed, strict=strict_groups)
        assignment, short = split.parts, split.missing
        ungrouped = sum(not group for group in groups)
        summary = {
            "groups": len(group_names) - ungrouped,
            "ungrouped": ungrouped,
            "divided": [group_names[group] for group in split.divided],
            "divided_for": [names[index] for index in split.divided_for],
        }
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(header)
    rows.writerows(zip(*columns, [SPLITS[part] for part in assignment.tolist()], *extra, strict=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text.getvalue(), errors="surrogateescape")
    counts = torch.bincount(assignment, minlength=3).tolist()
    return {
        "root": str(listing.root),
        "images": dict(zip(SPLITS, counts, strict=True)),
        "short": [names[index] for index in short],
        "data": f"--data {shlex.quote(str(out))} --data.root {shlex.quote(str(listing.root))}",
        **summary,
    }


def writes_table(config: Data) -> bool:
    """Return whether :func:`write_split` of a set writes a table."""
    return SOURCES[config.source].write_split is None


def _groups_of(listing: Listing, config: Data, group_column: str) -> tuple[str, list[str]]:
    """Return the name of a table's column of groups, and the group of each image of its listing."""
    path = None if config.train is None else find_path(Path(config.train))
    if path is None or path.suffix.lower() not in {".csv", ".tsv", ".parquet"}:
        raise LongtailError(
            f"--groups {group_column}: expected a table (.csv, .tsv, .parquet) with this column, got "
            f"{printable(path or listing.root)}"
        )
    column, groups = read_groups(path, listing.root, config.image_column, group_column)
    return column, [groups[path_key(name)] for name in listing.splits["all"].names]
