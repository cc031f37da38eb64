"""What every kind of listing can get wrong: missing files, gaps in the labels, files listed twice."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from longtail.data.listing.types import Entries, Listing
from longtail.data.paths import Folders, find_path, printable


def check(listing: Listing) -> None:
    """Add what is wrong to a listing's errors and remarks, and keep one entry of a file that a split lists twice.

    Paths that differ from a file's name in their Unicode form only become that name.
    """
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
        shown = ", ".join(printable(listing.class_names[label]) for label in empty[:5])
        listing.errors.append(
            f"train: {len(empty)} of {classes} classes {'has' if len(empty) == 1 else 'have'} no training image "
            f"({shown}{'…' * (len(empty) > 5)})"
            ": add images, or remove the classes"
        )
    _check_files(listing)
    _check_repeated(listing)


def _check_names(names: Sequence[str], errors: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        plain = " ".join(name.casefold().split())
        if plain in seen:
            errors.append(
                f"the classes '{printable(seen[plain])}' and '{printable(name)}' differ only in case or blanks: make "
                "them one, or rename one"
            )
        seen.setdefault(plain, name)


def _check_files(listing: Listing) -> None:
    """Look for every file, a folder at a time: a system call for each of a million files would take minutes."""
    folders = Folders(listing.root)
    missing: dict[str, dict[str, list[str]]] = {}
    for split, entries in listing.splits.items():
        names = [folders.find(name) for name in entries.names]
        absent = [name for name, found in zip(entries.names, names, strict=True) if found is None]
        if absent:
            missing.setdefault(_first_failure(listing.root, absent[0]), {})[split] = absent
        listing.splits[split] = Entries(
            [found or name for name, found in zip(entries.names, names, strict=True)], entries.labels
        )
    for reason, by_split in missing.items():
        count = sum(map(len, by_split.values()))
        total = sum(len(listing.splits[split]) for split in by_split)
        examples = [name for names in by_split.values() for name in names][:3]
        shown = printable(", ".join(examples)) + ("…" if count > 3 else "")
        # close names say more than that the root may be another
        is_root = count == total and "perhaps you meant" not in reason
        hint = "; the folder that the names begin in is --data.root FOLDER" if is_root else ""
        if "\\" in examples[0] and folders.find(examples[0].replace("\\", "/")) is not None:
            hint = "; separate folders by / in place of \\"
        listing.errors.append(
            f"{', '.join(by_split)}: {count:,} of {total:,} files are missing below {printable(listing.root)} "
            f"({shown}): {reason}{hint}"
        )


def _first_failure(root: Path, name: str) -> str:
    """Return which part of a path does not exist, and the names closest to it."""
    parent = root
    for part in Path(name).parts:
        place = find_path(parent / part)
        if not place.exists():
            if place.is_symlink():
                return f"{printable(place)} is a broken or circular link"
            try:
                beside = sorted(entry.name for entry in os.scandir(parent))[:10_001]
            except OSError:
                return f"{printable(parent)} cannot be read"
            close = difflib.get_close_matches(part, beside, n=3) if len(beside) <= 10_000 else []
            hint = f"; perhaps you meant {printable(' or '.join(close))}?" if close else ""
            return f"{printable(parent)} has no '{printable(part)}'{hint}"
        parent = place
    return f"{printable(parent)} cannot be read"


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
                first, second = (printable(listing.class_names[number]) for number in (owner[name][1], label))
                listing.errors.append(
                    f"{split}: {printable(name)} is listed under '{first}' and '{second}'; correct one"
                )
        if len(kept) < len(entries):
            repeated = len(entries) - len(kept)
            listing.remarks.append(
                f"{split}: 1 entry names a file that is listed already, and is left out"
                if repeated == 1
                else f"{split}: {repeated:,} entries name a file that is listed already, and are left out"
            )
            listing.splits[split] = entries.at(torch.tensor(kept, dtype=torch.int64))
    for (first, second), names in across.items():
        files = "file is" if len(names) == 1 else "files are"
        example = f"{printable(names[0])}{'…' if len(names) > 1 else ''}"
        listing.errors.append(
            f"{len(names):,} {files} listed in {first} and again in {second} ({example}): test and validation images "
            "must not be trained on"
        )
