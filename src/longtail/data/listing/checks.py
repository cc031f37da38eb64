"""What every kind of listing can get wrong: missing files, gaps in the labels, files listed twice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from longtail.data.listing.types import Listing
from longtail.errors import did_you_mean


def check(listing: Listing) -> None:
    """Add what is wrong to a listing's errors and remarks, and keep one entry of a file that a split lists twice."""
    _check_names(listing.class_names, listing.errors)
    classes = len(listing.class_names)
    counts = torch.bincount(listing.training.labels, minlength=classes)
    for split, entries in listing.splits.items():
        beyond = sorted(set(entries.labels[entries.labels >= classes].tolist()))
        if beyond:
            listing.errors.append(
                f"{split}: label {beyond[0]} is not among the {classes} training classes, 0 to {classes - 1}"
            )
    empty = torch.nonzero(counts[:classes] == 0).flatten().tolist()
    if empty:
        shown = ", ".join(str(label) for label in empty[:5]) + ("…" if len(empty) > 5 else "")
        listing.errors.append(
            f"train: {len(empty)} of {classes} labels have no training image ({shown}): number the classes without gaps"
        )
    _check_files(listing)
    _check_repeated(listing)


def _check_names(names: Sequence[str], errors: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        plain = " ".join(name.casefold().split())
        if plain in seen:
            errors.append(
                f"the classes '{seen[plain]}' and '{name}' differ only in case or blanks: make them one, or rename one"
            )
        seen.setdefault(plain, name)


def _check_files(listing: Listing) -> None:
    """Look for every file, a folder at a time: a system call for each of a million files would take minutes."""
    folders: dict[str, set[str] | None] = {}
    for split, entries in listing.splits.items():
        missing = []
        for name in entries.names:
            folder, _, file = name.rpartition("/")
            if folder not in folders:
                try:
                    with os.scandir(listing.root / folder) as files:
                        folders[folder] = {entry.name for entry in files}
                except OSError:
                    folders[folder] = None
            existing = folders[folder]
            if existing is None or file not in existing:
                missing.append(name)
        if missing:
            shown = ", ".join(missing[:3]) + ("…" if len(missing) > 3 else "")
            listing.errors.append(
                f"{split}: {len(missing):,} of {len(entries):,} files are missing below {listing.root} ({shown}): "
                f"{_first_failure(listing.root, missing[0])}"
            )


def _first_failure(root: Path, name: str) -> str:
    """Return which part of a path does not exist, and the names closest to it."""
    parent = root
    for part in Path(name).parts:
        if not (parent / part).exists():
            try:
                beside = sorted(entry.name for entry in os.scandir(parent))[:100_000]
            except OSError:
                beside = []
            close = did_you_mean(part, beside) if len(beside) <= 10_000 else ""
            return f"{parent} has no '{part}'{close}"
        parent = parent / part
    return f"{parent} cannot be read"


def _check_repeated(listing: Listing) -> None:
    """Keep one entry of a file that a split lists twice; one under two labels, or in two splits, is an error."""
    owner: dict[str, tuple[str, int]] = {}
    across: dict[tuple[str, str], list[str]] = {}
    for split, entries in listing.splits.items():
        kept = []
        for position, (name, label) in enumerate(zip(entries.names, entries.labels.tolist(), strict=True)):
            if name not in owner:
                owner[name] = (split, label)
                kept.append(position)
            elif owner[name][0] != split:
                across.setdefault((owner[name][0], split), []).append(name)
                kept.append(position)
            elif owner[name][1] != label:
                listing.errors.append(f"{split}: {name} is listed under the labels {owner[name][1]} and {label}")
        if len(kept) < len(entries):
            repeated = len(entries) - len(kept)
            listing.remarks.append(
                f"{split}: {repeated:,} entries name a file that is listed already, and are left out"
            )
            listing.splits[split] = entries.at(torch.tensor(kept, dtype=torch.int64))
    for (first, second), names in across.items():
        files = "file is" if len(names) == 1 else "files are"
        example = f"{names[0]}{'…' if len(names) > 1 else ''}"
        listing.errors.append(
            f"{len(names):,} {files} listed in {first} and again in {second} ({example}): test and validation images "
            "must not be trained on"
        )
