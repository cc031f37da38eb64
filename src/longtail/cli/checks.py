"""Checks of paths before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from longtail.errors import LongtailError
from longtail.run_folder import is_comparison, is_run

if TYPE_CHECKING:
    from longtail.config import Data

_OF_RUNS = frozenset({"config.json", "config.yaml", "metrics.jsonl", "records.jsonl", "comparison.json"})
"""Files in the folders of runs and comparisons that ``--json`` may not overwrite."""


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


def check_output(
    path: Path | None,
    flag: str = "--json",
    suffix: str | None = None,
    *,
    inputs: Iterable[str | Path | None] = (),
    lines: bool = False,
) -> None:
    """Raise LongtailError if a file cannot be written, or would take the place of another.

    Args:
        path: the file; None if none is to be written.
        flag: the flag that it is given by. The file of ``--json`` is overwritten, so that its name has the ending of no
            other format, and it is none of those of a run.
        suffix: the ending that its name must have, if any.
        inputs: files and folders that the command reads: it may be none of these, and no file that is in one of these.
        lines: whether ``--json`` writes lines where the name ends in ``.jsonl``.
    """
    if path is None:
        return
    if path.is_dir():
        raise LongtailError(f"{flag} {path}: is a folder, expected a file")
    if suffix is not None and path.suffix.lower() != suffix:
        raise LongtailError(f"{flag} {path}: expected a name that ends in {suffix}")
    place = _real_path(path)
    if flag == "--json":
        endings = {".json", ".jsonl", ""} if lines else {".json", ""}
        if path.suffix.lower() not in endings:
            raise LongtailError(f"{flag} {path}: expected a name that ends in .json, since the file is overwritten")
        if place.name in _OF_RUNS and any(is_run(folder) or is_comparison(folder) for folder in place.parents):
            raise LongtailError(f"{flag} {path}: is a file of a run or a comparison, expected another name")
    read = {_real_path(source) for source in inputs if source is not None}
    if place in read or (place.exists() and not read.isdisjoint(place.parents)):
        raise LongtailError(
            f"{flag} {path}: is among what this command reads, and would be overwritten; choose another name"
        )
    check_folder(path.parent)


def _real_path(path: str | Path) -> Path:
    """Return a path without links; those that lead in a circle stay, while Path.resolve raises RuntimeError."""
    return Path(os.path.realpath(path))


def check_is_not_data(path: Path | None, flag: str, data: Data) -> None:
    """Raise LongtailError if a file that is to be written is a table or annotations that the data is read from."""
    tables = (data.train, data.val, data.test)
    if path is not None and any(table is not None and Path(table).resolve() == path.resolve() for table in tables):
        raise LongtailError(
            f"{flag} {path}: is the table that the data is read from, and would be overwritten; choose another name"
        )


def check_outside_data(out: Path, data: Data) -> None:
    """Raise LongtailError if a new run would lie in a folder of which the library datasets reads every file.

    Where the folder is listed here, the runs in it are left out, see :func:`longtail.data.listing.read_folder`.
    """
    if data.source != "hub" or data.root is None or out.exists():
        return
    root = Path(data.root).resolve()
    if root in (out.resolve(), *out.resolve().parents):
        raise LongtailError(
            f"--out {out}: is in the data folder {root}, whose files would then all be read as data; choose an --out "
            "outside it"
        )


def check_run(folder: Path) -> None:
    """Raise LongtailError if there is no such folder."""
    if not folder.is_dir():
        raise LongtailError(f"{folder}: there is no such run folder")
