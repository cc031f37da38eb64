"""Tables for spreadsheets. Imports no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longtail.files import make_folder, write_text


def table_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV, with the byte-order mark by which spreadsheets recognise UTF-8."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return f"\ufeff{text.getvalue()}"


def write_table(path: Path, text: str) -> None:
    """Write the file of ``--csv``. Creates the folder.

    Raises:
        LongtailError: the folder or the file cannot be written.
    """
    make_folder(path.parent)
    write_text(path, text)
