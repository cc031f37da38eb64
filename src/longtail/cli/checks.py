"""Checks of paths before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from longtail.errors import LongtailError


def check_folder(path: Path) -> None:
    """Raise LongtailError if nothing can be written to a folder that may not exist yet."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise LongtailError(
            f"{path.absolute()}: cannot be written: {place.absolute()} is not a folder that you may write to; choose "
            "another"
        )


def check_output(path: Path | None, flag: str = "--json", suffix: str | None = None) -> None:
    """Raise LongtailError if a file cannot be written, or its name has another ending; JSON takes no other file's."""
    if path is None:
        return
    if path.is_dir():
        raise LongtailError(f"{flag} {path}: is a folder, expected a file")
    if suffix is not None and path.suffix.lower() != suffix:
        raise LongtailError(f"{flag} {path}: expected a name that ends in {suffix}")
    if flag == "--json" and path.suffix.lower() not in {".json", ".jsonl", ""}:
        raise LongtailError(f"{flag} {path}: expected a name that ends in .json, since the file is overwritten")
    check_folder(path.parent)


def check_run(folder: Path) -> None:
    """Raise LongtailError if there is no such folder."""
    if not folder.is_dir():
        raise LongtailError(f"{folder}: there is no such run folder")
