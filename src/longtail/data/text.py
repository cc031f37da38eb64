"""Text files in the encodings that people's programs write. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from longtail.data.paths import printable
from longtail.errors import LongtailError


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or with a byte-order mark in UTF-16; bytes that are no UTF-8 become
    surrogates, as in the names of files.

    Raises:
        LongtailError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LongtailError(f"{printable(path)}: cannot be read: {error.strerror}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    return content.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def from_latin1(text: str) -> str:
    """Return a text that :func:`read_text` took for UTF-8, read as Latin-1 (in Windows' superset, code page 1252)."""
    content = text.encode("utf-8", "surrogateescape")
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def is_undecoded(text: str) -> bool:
    """Return whether a text contains bytes that are not UTF-8."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)
