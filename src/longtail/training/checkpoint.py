"""Checkpoints: written completely or not at all, and read without running code from them."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from longtail.errors import LongtailError
from longtail.files import atomic_write

FORMAT = 2
"""Version of ``last.ckpt``."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    atomic_write(path, lambda partial: torch.save({"format": FORMAT, **state}, partial))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, so that a foreign file cannot run code.

    Raises:
        LongtailError: the file is truncated, damaged, foreign, or of another version.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise LongtailError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # which torch does not look for: a flipped bit would be a wrong weight
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about a foreign file; the error below says what it is
            state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what unpickling raises is not limited
        raise LongtailError(
            f"{path}: is truncated or not a checkpoint of longtail; start again with --overwrite"
        ) from None
    if damaged:
        raise LongtailError(f"{path}: is damaged; start again with --overwrite")
    if not isinstance(state, dict) or "format" not in state:
        raise LongtailError(f"{path}: is not a checkpoint of longtail; start again with --overwrite")
    if state["format"] != FORMAT:
        raise LongtailError(
            f"{path}: has format {state['format']}, this version of longtail reads {FORMAT}; resume with the version "
            "that wrote it, or start again with --overwrite"
        )
    return state
