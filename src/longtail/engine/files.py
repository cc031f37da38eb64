"""Files of a run: written whole or not at all."""

from __future__ import annotations

import pickle
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from longtail.config import Config, read_config
from longtail.errors import LongtailError
from longtail.files import write_text, write_whole

FORMAT = 1
"""Version of ``last.ckpt``."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole."""
    write_whole(path, lambda partial: torch.save({"format": FORMAT, **state}, partial))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values alone, so that a foreign file cannot run code.

    Raises:
        LongtailError: the file is truncated, foreign, or of a later version.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise LongtailError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign file: what it is, is told below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError):
        raise LongtailError(f"{path}: is truncated or no checkpoint of longtail; start anew with --overwrite") from None
    if not isinstance(state, dict) or "format" not in state:
        raise LongtailError(f"{path}: is no checkpoint of longtail; start anew with --overwrite")
    if state["format"] != FORMAT:
        raise LongtailError(f"{path}: has format {state['format']}, this version reads {FORMAT}; use the other version")
    return state


def open_run(folder: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Make the folder of a run, with its ``config.yaml``.

    Raises:
        LongtailError: it holds something and neither ``resume`` nor ``overwrite`` is given, it is another run's, or it
            cannot be written.
    """
    try:
        entries = list(folder.iterdir()) if folder.exists() else []
        if entries:
            if not (folder / "config.yaml").is_file():
                raise LongtailError(f"{folder}: is not empty and no run of longtail; choose another --out")
            if overwrite:
                shutil.rmtree(folder)
            elif not resume:
                raise LongtailError(f"{folder}: holds a run already; use --resume, --overwrite or another --out")
            else:
                _same_run(read_config(folder / "config.yaml"), config, folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LongtailError(f"{folder}: cannot be written: {error.strerror or error}") from None
    if not (folder / "config.yaml").is_file():
        write_text(folder / "config.yaml", config.to_yaml())


INCIDENTAL = frozenset(
    {
        *("device", "compile", "checkpoint_seconds", "log"),
        *("data.root", "data.train", "data.val", "data.test", "data.memory_gib", "data.workers", "data.broken_share"),
    }
)
"""Settings that do not make it another run: where it is computed, how often it is saved, where its images lie."""


def _same_run(there: Config, here: Config, folder: Path) -> None:
    old, new = flatten(there.to_dict()), flatten(here.to_dict())
    for name in new:
        if name not in INCIDENTAL and old[name] != new[name]:
            raise LongtailError(
                f"{folder}: was started with {name} {old[name]}, not {new[name]}; "
                "resume with the same settings, or use --overwrite or another --out"
            )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
