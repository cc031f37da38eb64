"""Names of files and classes: compared in one Unicode form, and shown on one line. Imports no torch."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path


def nfc(text: str) -> str:
    r"""Return a text in Unicode's composed form, in which names are compared: macOS writes ``é`` as two characters.

    >>> nfc("cafe\u0301") == "caf\u00e9"
    True
    """
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def printable(text: str | Path) -> str:
    r"""Return a name as a message or a table shows it: control characters and undecodable bytes as escape sequences.

    >>> printable("a\nb\t\x1b[31m")
    'a\\nb\\t\\x1b[31m'
    """
    text = str(text)
    if text.isprintable():
        return text
    # of the separators, those that are no plain space are not printable either, but only these break a line
    return "".join(
        character if character.isprintable() or character == "\u00a0" else _escape(character) for character in text
    )


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, through links to folders too, without those whose name begins with a dot."""

    def walk(place: str, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        try:
            with os.scandir(place) as entries:
                listed = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError:
            return
        for entry in listed:
            try:
                if not entry.is_dir():
                    if entry.is_file():
                        yield Path(entry.path)
                    continue
                status = entry.stat()
            except OSError:  # a circular link
                continue
            identity = (status.st_dev, status.st_ino)
            if identity not in above:  # a link to a folder above it
                yield from walk(entry.path, above | {identity})

    status = folder.stat()
    yield from walk(str(folder), frozenset({(status.st_dev, status.st_ino)}))


def find_path(path: Path) -> Path:
    """Return the path under which a file or folder exists, if it differs from ``path`` in its Unicode form only."""
    if str(path).isascii() or os.path.lexists(path):
        return path
    place = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        name = part
        if not os.path.lexists(place / part):
            try:
                name = next((entry.name for entry in place.iterdir() if nfc(entry.name) == nfc(part)), part)
            except OSError:
                return path
        place = place / name
    return place if os.path.lexists(place) else path
