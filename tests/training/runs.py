"""Runs that are compared: their weights, and a run that is interrupted and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longtail.config import Config
from longtail.registry import METHODS
from longtail.training.trainer import fit


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's model by name."""
    loaded: dict[str, torch.Tensor] = load_file(run / "recognizer" / "model.safetensors")
    return loaded


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two models have the same weights, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fit_in_two(
    config: Config,
    out: Path,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    between: Callable[[], object] = lambda: None,
) -> None:
    """Train, interrupt the run without warning after some steps, and resume it; ``between`` is called before that."""
    method_class, done = METHODS[config.method], 0
    training_step = method_class.training_step

    def interrupted(self: Any, batch: Any) -> Any:
        nonlocal done
        if done == steps:
            raise KeyboardInterrupt
        done += 1
        return training_step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(method_class, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(config, out, quiet=True)
    between()
    fit(config, out, resume=True, quiet=True)
