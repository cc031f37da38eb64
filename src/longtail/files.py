"""Files: written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from longtail.errors import LongtailError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, bring it to the disk, and put it in ``path``'s place in one move.

    Raises:
        LongtailError: the file cannot be written; what was at ``path`` before is untouched.
    """
    if path.exists() and not path.is_file():  # /dev/stdout, for one: nothing to put anything in the place of
        write(path)
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # of a full disk torch and safetensors say so their way
        partial.unlink(missing_ok=True)
        raise LongtailError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def write_text(path: Path, text: str, errors: str = "backslashreplace") -> None:
    """Write a text file whole; a name that is not UTF-8 is told by its escapes, which JSON and YAML read."""

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8", errors=errors)

    write_whole(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_made(path: Path, value: Any) -> None:
    """Write what ``--json`` asks for, text as it is and all else as JSON, making its folder if need be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtailError(f"{path.parent}: cannot be made: {error.strerror}") from None
    if isinstance(value, str):
        write_text(path, value)
    else:
        write_json(path, value)
