"""Names of files and classes: compared in one Unicode form, and shown on one line. Imports no torch."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator
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
            except (OSError, ValueError):  # the latter for a name with a null character
                return path
        place = place / name
    return place if os.path.lexists(place) else path


def shortest_paths(paths: Iterable[str], root: Path) -> list[str]:
    """Return paths in their shortest spelling, so that a file listed twice is recognised.

    Args:
        paths: of files. An absolute one below ``root`` becomes one that is relative to it.
        root: the folder that the others are relative to.
    """
    roots = {nfc(f"{place.rstrip('/')}/") for place in (posixpath.normpath(root.absolute()), str(root.resolve()))}

    def shortest(path: str) -> str:
        path = posixpath.normpath(path) if "//" in path or "./" in path else path
        for place in roots if path.startswith("/") else ():
            *above, below = path.split("/", place.count("/"))
            if nfc("/".join([*above, ""])) == place:
                return below
        return path

    return [shortest(path) for path in paths]


class Folders:
    """What is in the folders below a root, each read once: a system call for each of a million files takes minutes.

    Args:
        root: the folder that paths are relative to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[str, tuple[set[str], dict[str, str]]] = {}

    def find(self, name: str) -> str | None:
        """Return the name that the disk has for a path, which may differ in its Unicode form; None if none exists."""
        folder, _, file = name.rpartition("/")
        exact, composed = self._read(folder)
        if file in exact:
            return name
        if name.isascii():
            return None
        if not exact and folder:
            found = self._find_folder(folder)
            if found is None or found == folder:
                return None
            return self.find(f"{found}/{file}")
        stored = composed.get(nfc(file))
        return None if stored is None else (f"{folder}/{stored}" if folder else stored)

    def _find_folder(self, folder: str) -> str | None:
        found = find_path(self.root / folder)
        if not found.is_dir():
            return None
        below = not Path(folder).is_absolute()  # else its place may be anywhere
        return found.relative_to(self.root).as_posix() if below else found.as_posix()

    def _read(self, folder: str) -> tuple[set[str], dict[str, str]]:
        """Return the names in a folder that are no broken links, and those beyond ASCII by their composed form."""
        if folder not in self.contents:
            try:
                with os.scandir(self.root / folder) as files:
                    names = {entry.name for entry in files if not entry.is_symlink() or Path(entry).exists()}
            except (OSError, ValueError):  # see above
                names = set()
            self.contents[folder] = (names, {nfc(name): name for name in names if not name.isascii()})
        return self.contents[folder]
