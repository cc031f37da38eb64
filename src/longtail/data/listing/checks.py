"""What every kind of listing can get wrong: missing files, gaps in the labels, files listed twice."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from longtail.data.listing.types import Entries, Listing
from longtail.data.paths import Folders, find_path, printable

_WINDOWS = re.compile(r"[a-z]:[\\/]|\\\\", re.IGNORECASE)  # C:\, C:/, \\server
_NO_CLASSES = re.compile(
    r"(unsorted|unlabell?ed|unclassified|unknown|misc|miscellaneous|others?|various|te?mp|backup|new folder|untitled"
    r"|untitled folder)( ?\(?\d+\)?)?",
    re.IGNORECASE,
)
"""Names of folders for what is not in a class yet, also with a number: ``New folder (2)``."""


def check(listing: Listing) -> None:
    """Add what is wrong to a listing's errors and remarks, and keep one entry of a file that a split lists twice.

    Paths that differ from a file's name in their Unicode form only become that name.
    """
    _check_names(listing.class_names, listing.errors)
    _remark_on_names(listing.class_names, listing.remarks)
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


def _remark_on_names(names: Sequence[str], remarks: list[str]) -> None:
    doubtful = [name for name in names if _NO_CLASSES.fullmatch(name.rpartition("/")[2].strip())]
    if doubtful:
        shown = printable(", ".join(f"'{name}'" for name in doubtful[:3])) + "…" * (len(doubtful) > 3)
        is_class, it = (f"is {shown} a class", "it") if len(doubtful) == 1 else (f"are {shown} classes", "them")
        remarks.append(f"{is_class}? Leave {it} out of the set if not")


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
        lost = [name for absent in by_split.values() for name in absent]
        shown = printable(", ".join(lost[:3])) + ("…" if count > 3 else "")
        # close names say more than that the root may be another
        is_root = count == total and "perhaps you meant" not in reason
        hint = "; the folder that the names begin in is --data.root FOLDER" if is_root else ""
        if of_windows := [name for name in lost if _WINDOWS.match(name)]:
            reason, hint = _explain_windows(of_windows, folders), ""
        listing.errors.append(
            f"{', '.join(by_split)}: {count:,} of {total:,} files are missing below {printable(listing.root)} "
            f"({shown}): {reason}{hint}"
        )


def _explain_windows(names: Sequence[str], folders: Folders) -> str:
    """Return why absolute paths of Windows name no files, and what to do about it."""
    advice = "they are absolute paths of Windows: remove {} from them"
    common = os.path.commonprefix(names)  # noqa: RUF071 (cut at a separator, of either kind)
    ends = [separator.end() for separator in re.finditer(r"[\\/]+", common)]
    # the shortest, after which the first name and the last are found
    found = (end for end in ends if all(folders.find(name[end:].replace("\\", "/")) for name in (names[0], names[-1])))
    end = next(found, None)
    if end is not None:
        return advice.format(f"'{printable(common[:end])}'")
    prefix = f"'{printable(common[: ends[-1]])}'" if ends else "the drive and the folders of all"
    return f"{advice.format(prefix)}, and name the folder that it stands for with --data.root FOLDER"


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
