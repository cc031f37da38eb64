"""Which folders longtail wrote: by what is in them, not by their names alone. Imports little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FIELDS = frozenset({"recipe", "method", "network", "epochs", "batch_size", "seed", "data", "classifier", "teacher"})
"""Fields that ``config.yaml`` of a run has had in every version, so that runs of older ones are recognised."""
RESULTS = frozenset({"metrics.jsonl", "last.ckpt", "recognizer"})
"""What a run leaves, by one of which its folder is recognised."""
_BEFORE_RESULTS = frozenset(
    {
        *("config.yaml", "plugins.json", "unreadable.csv", "train_images.npy", "images_root.txt"),
        *("tables", "tensorboard", "wandb"),
    }
)
"""All that is in the folder of a run that was stopped before its first result."""


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, finished or not, of this version or an older one.

    Many programs write a ``config.yaml``, and a recipe in a folder of other files is no run either.
    """
    values = _values(folder / "config.yaml")
    if not isinstance(values, dict) or not values.keys() >= _FIELDS:
        return False
    names = set(_names(folder))
    written = {name for name in names if name not in _BEFORE_RESULTS and not is_partial(name)}
    return bool(names & RESULTS) or not written


def is_comparison(folder: Path) -> bool:
    """Return whether a folder is that of a comparison, which holds its runs."""
    values = _values(folder / "comparison.json")
    return isinstance(values, dict) and values.keys() >= {"format", "recipe"}


def is_written(folder: Path) -> bool:
    """Return whether a folder is that of a run, of a comparison, or of the teachers that a run's training left."""
    return is_run(folder) or is_comparison(folder) or _is_of_teachers(folder)


def _is_of_teachers(folder: Path) -> bool:
    """Return whether a folder has the name of that of teachers, and nothing but their runs, cache and locks in it."""
    if folder.name != "teachers":
        return False
    names = _names(folder)
    return bool(names) and all(
        (name.startswith(".") and name.endswith(".lock")) or _is_cache(folder / name) or is_run(folder / name)
        for name in names
    )


def _is_cache(folder: Path) -> bool:
    made = (".npy", ".making")
    return folder.name == "cache" and folder.is_dir() and all(name.endswith(made) for name in _names(folder))


def is_partial(name: str) -> bool:
    """Return whether a file is what an interrupted atomic write left."""
    return name.startswith(".") and name.endswith(".partial")


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _values(path: Path) -> Any:
    """Return the content of a YAML or JSON file; None if there is no such file, or it cannot be read."""
    if not path.is_file():
        return None
    import yaml  # not needed by what only reads images, such as a deployed model

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # text that is not UTF-8 is a ValueError
        return None
