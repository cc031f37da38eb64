"""Reading of text files, and atomic writing: a file is written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from longtail.errors import LongtailError

_FULL = os.strerror(errno.ENOSPC)
_LITTLE = 2**20  # bytes that are free on a disk where a larger file has not fitted
_LONGEST_NAME = 240  # bytes of a file's name that its temporary file has; most file systems allow 255


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a temporary file beside ``path``, flush it to disk, and rename it to ``path``.

    Args:
        path: the file; overwritten if it exists.
        write: called with the path of the temporary file, which it writes.

    Raises:
        LongtailError: the file cannot be written; an existing file is unchanged.
    """
    try:
        is_device = _is_device(path)
        path = Path(os.path.realpath(path)) if path.is_symlink() and not is_device else path  # a link stays one
    except OSError as error:
        raise LongtailError(f"{path}: cannot be written: {error.strerror}") from None
    if is_device:  # such as /dev/stdout, which cannot be replaced
        write(path)
        return
    name = os.fsdecode(os.fsencode(path.name)[-_LONGEST_NAME:])
    partial = path.with_name(f".{name}.partial")
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
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are what torch and safetensors raise
        reason = getattr(error, "strerror", None) or (_FULL if _is_full(path.parent) else error)
        with contextlib.suppress(OSError):
            partial.unlink()
        raise LongtailError(f"{path}: cannot be written: {reason}") from None


def _is_full(folder: Path) -> bool:
    """Return whether the disk of a folder is full, which torch and safetensors do not say."""
    try:
        return shutil.disk_usage(folder).free < _LITTLE
    except OSError:
        return False


def _is_device(path: Path) -> bool:
    """Return whether a path is no regular file, or leads to one by way of /dev or /proc, as /dev/stdout does."""
    if path.exists() and not path.is_file():
        return True
    for _ in range(40):  # as many links as Linux follows
        if str(path.absolute()).startswith(("/dev/", "/proc/")):
            return True
        if not path.is_symlink():
            return False
        path = path.parent / path.readlink()
    return False


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        LongtailError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise LongtailError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LongtailError(f"{path}: cannot be read: is no text in UTF-8 (byte {error.start})") from None


def write_text(path: Path, text: str, errors: str = "backslashreplace") -> None:
    """Write a text file in UTF-8, atomically; surrogates of undecodable file names become escapes by default."""

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8", errors=errors)

    atomic_write(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, atomically.

    Raises:
        LongtailError: it cannot be written, or has a number that is not finite, which JSON lacks.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise LongtailError(f"{path}: cannot be written: a number is not finite") from None
    write_text(path, text + "\n")


def make_folder(path: Path) -> None:
    """Make a folder, and those that it is in, where they do not exist; raises LongtailError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtailError(f"{path}: cannot be made: {error.strerror}") from None


def write_json_output(path: Path, value: Any) -> None:
    """Write the output file of ``--json``: a string as it is, any other value as JSON. Creates the folder.

    Raises:
        LongtailError: the folder or the file cannot be written.
    """
    make_folder(path.parent)
    if isinstance(value, str):
        write_text(path, value)
    else:
        write_json(path, value)
