"""What a word on the command line stands for. Imports no torch, so that a mistake in it is told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longtail.errors import LongtailError, nearest

NAMED = ("digits-lt", "cifar10-lt", "cifar100-lt", "imagenet-lt", "places-lt", "inat2018", "camvid", "ade20k")
"""Sets that have a name of their own."""


def source_of(text: str) -> dict[str, Any]:
    """Return the fields of ``data`` that a word on the command line stands for.

    A named set; ``hub:NAME``; a folder (of classes, of Parquet files, or of images/ and annotations/); or a list
    (.txt), a table (.csv, .tsv, .parquet) or annotations (.json).

    Raises:
        LongtailError: it is none of these.
    """
    if text in NAMED:
        return {"source": text}
    if text.startswith("hub:"):
        return {"source": "hub", "name": text.removeprefix("hub:")}
    path = Path(text)
    if (path / "images").is_dir() and (path / "annotations").is_dir():
        return {"source": "masks", "root": text}
    if path.is_dir():
        return {"source": "hub" if next(path.rglob("*.parquet"), None) is not None else "folder", "root": text}
    if path.suffix.lower() in {".txt", ".lst", ".csv", ".tsv", ".parquet", ".json"}:
        return {"source": "list", "train": text}
    raise LongtailError(
        f"data '{text}': there is no such folder or set{nearest(text, NAMED)}; expected a named set, a folder, a list "
        "(.txt), a table (.csv, .tsv, .parquet), annotations (.json) or hub:NAME"
    )
