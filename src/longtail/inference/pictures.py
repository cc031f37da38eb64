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


def free_paths(out: Path, file: Path, endings: Sequence[str]) -> tuple[Path, ...]:
    """Return where pictures of an image are written: at its name with each ending, over earlier pictures of it alone.

    A number is appended to a name that another file has taken, and a very long name is shortened.

    Args:
        out: the folder.
        file: the image.
        endings: of the names, one for each picture.
    """
    stem, number, source = file.stem, "", _source(file)
    while len(os.fsencode(stem)) > _LONGEST_STEM:
        stem = stem[:-1]
    while True:
        paths = tuple(out / f"{stem}{number}{ending}" for ending in endings)
        if all(not os.path.lexists(path) or source_of(path) == source for path in paths):
            return paths
        number = f"-{int(number[1:] or 1) + 1}"


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
