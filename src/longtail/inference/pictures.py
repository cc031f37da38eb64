"""Pictures that predictions write: their names, and the mark that tells which image each is of. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from longtail.data.image_io import image_errors, open_header
from longtail.data.paths import printable
from longtail.errors import LongtailError
from longtail.files import atomic_write, make_folder

OVERLAY = "-overlay.png"
"""End of the names of overlays; the label image beside one has the same name with ``.png``."""
OBJECTS = "-objects.jpg"
"""End of the names of drawings of objects."""
_MARK = "Source"  # a text of PNG files; a comment of JPEG files begins with it
_LONGEST_STEM = 200  # bytes of an image's name in those of its pictures; most file systems allow 255 with the ending


class PictureNames:
    """Names of the pictures that a command writes.

    A picture has its image's name with an ending, and is written over earlier pictures of that image alone. A number is
    appended to a name that another file has taken, and a very long name is shortened. A file in the folder is opened at
    most once for each name, since thousands of class folders may hold a ``1.jpg`` each.

    Args:
        out: the folder.
        endings: of the names of an image's pictures, one for each.
    """

    def __init__(self, out: Path, endings: Sequence[str]) -> None:
        self.out, self.endings = out, tuple(endings)
        self._numbers: dict[str, dict[str, int]] = {}
        """By name, then by image: the number that is appended."""
        self._next: dict[str, int] = {}
        """By name: the first number that has not been looked at."""

    def paths(self, file: Path) -> tuple[Path, ...]:
        """Return where the pictures of an image are to be written, one for each ending."""
        stem, source = file.stem, _source(file)
        while len(os.fsencode(stem)) > _LONGEST_STEM:
            stem = stem[:-1]
        numbers = self._numbers.setdefault(stem, {})
        while source not in numbers:
            number = self._next.get(stem, 1)
            self._next[stem] = number + 1
            owners = {source_of(path) for path in self._numbered(stem, number) if os.path.lexists(path)} or {source}
            owner = owners.pop() if len(owners) == 1 else None
            if owner is not None:
                numbers.setdefault(owner, number)
        return self._numbered(stem, numbers[source])

    def _numbered(self, stem: str, number: int) -> tuple[Path, ...]:
        suffix = "" if number == 1 else f"-{number}"
        return tuple(self.out / f"{stem}{suffix}{ending}" for ending in self.endings)


def write_picture(path: Path, picture: Image.Image, file: Path) -> None:
    """Write a picture of an image as PNG, or as JPEG where the name ends in ``.jpg``, with a mark of the image.

    Raises:
        LongtailError: the folder or the file cannot be written.
    """
    make_folder(path.parent)

    def save(partial: Path) -> None:
        if path.suffix == ".jpg":
            picture.save(partial, "JPEG", quality=90, comment=f"{_MARK}: {_source(file)}")
        else:
            texts = PngInfo()
            texts.add_text(_MARK, _source(file))
            picture.save(partial, "PNG", pnginfo=texts)

    atomic_write(path, save)


def source_of(path: Path) -> str | None:
    """Return which image a file is a picture of, by its mark; None if it is another kind of file."""
    try:
        with image_errors(path), open_header(path) as image:
            text, comment = image.info.get(_MARK), image.info.get("comment")
    except LongtailError:
        return None
    if isinstance(comment, bytes) and comment.startswith(f"{_MARK}: ".encode()):
        text = comment.decode(errors="replace").removeprefix(f"{_MARK}: ")
    # other programs write this text of PNG files too, with the name of a camera or scanner
    return text if isinstance(text, str) and Path(text).is_absolute() else None


def written_pictures(files: Sequence[Path], out: Path | None) -> set[Path]:
    """Return those of some image files that predictions wrote, by their marks.

    Args:
        files: of which only those that may be such pictures by their names are opened: of 100,000 photos hardly one.
        out: folder of the output, if there is one.
    """
    # a label image may have any name, but the overlay that was written with it lies beside it; in the folder of the
    # output, where overlays may have been deleted, every PNG file is opened
    overlays = {file for file in files if file.name.endswith(OVERLAY)}
    folders = {file.parent for file in files if file.suffix == ".png"}
    outputs = set() if out is None else {folder for folder in folders if folder.resolve() == out.resolve()}

    def may_be(file: Path) -> bool:
        if file.suffix != ".png":
            return file.name.endswith(OBJECTS)
        return file in overlays or file.parent in outputs or file.with_name(f"{file.stem}{OVERLAY}") in overlays

    return {file for file in files if may_be(file) and source_of(file) is not None}


def _source(file: Path) -> str:
    return printable(file.resolve())  # texts of pictures are Unicode, names of files may be other bytes
