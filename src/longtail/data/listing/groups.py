"""The column of a table that says which images belong together: those of one bird, patient or camera."""

from __future__ import annotations

import math
import posixpath
from pathlib import Path

from longtail.data.listing.tables import IMAGE_COLUMNS, pick_column, read_columns, row_name
from longtail.data.paths import nfc, printable, shortest_paths
from longtail.data.text import from_latin1, is_undecoded
from longtail.errors import LongtailError


def read_groups(path: Path, root: Path, image_column: str | None, group_column: str) -> tuple[str, dict[str, str]]:
    """Return the name of the column, and the group of each image by :func:`path_key`; empty where it has none.

    Args:
        path: the table.
        root: folder that the paths in it are relative to.
        image_column: column of paths; looked for under its usual names if not given.
        group_column: column of groups, in any case.

    Raises:
        LongtailError: a column is missing, the column is that of the paths, or an image is in two groups.
    """
    (columns, lines), where = read_columns(path, []), printable(path)
    image = pick_column(columns, image_column, IMAGE_COLUMNS, where, "image")
    try:
        name = pick_column(columns, group_column, (), where, "group")
    except LongtailError:
        existing = printable(", ".join(column for column in columns if column != image))
        raise LongtailError(f"--groups {group_column}: {where} has no such column; there are: {existing}") from None
    if name == image:
        raise LongtailError(f"--groups {group_column}: expected the column of groups, this one of {where} holds paths")
    groups: dict[str, str] = {}
    keys = shortest_paths((path_key(str(file)) for file in columns[image]), root)
    for index, (file, key, value) in enumerate(zip(columns[image], keys, columns[name], strict=True)):
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        group = "" if missing else str(value).strip()
        if groups.setdefault(key, group) != group:
            raise LongtailError(
                f"{where}, {row_name(index, lines)}: {printable(str(file))} is in the group '{printable(group)}', but "
                f"in '{printable(groups[key])}' in a row above; correct one"
            )
    return name, groups


def path_key(name: str) -> str:
    r"""Return a path as it is compared: decoded, in one Unicode form, in its shortest spelling, with ``/``.

    >>> path_key("photos/./owl//1.png"), path_key(r"photos\owl\1.png")
    ('photos/owl/1.png', 'photos/owl/1.png')
    """
    text = (from_latin1(name) if is_undecoded(name) else name).replace("\\", "/")
    return nfc(posixpath.normpath(text) if "//" in text or "./" in text else text)
