"""What a step launches on an accelerator, counted in operations on a CPU, and what of it is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longtail.config import Config
from longtail.training.steps import DeviceSteps
from longtail.training.trainer import fit
from tests.training.operations import CountsOperations


def _operations(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of operations of the fourth step of a training."""
    totals: list[int] = []
    step = DeviceSteps.step

    def counted(self: Any, size: int) -> None:
        with CountsOperations() as counts:
            step(self, size)
        totals.append(counts.operations.total())

    with monkeypatch.context() as patched:
        patched.setattr(DeviceSteps, "step", counted)
        fit(config, out, quiet=True)
    return totals[3]


def test_a_step_has_no_more_operations_than_before(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of the time of a small network's step is that of its launches."""
    config = tiny.replace(
        method="la", network="resnet32", precision="bf16-mixed", epochs=1, accelerator={"batches": "device"}
    )
    plain = _operations(config, tmp_path / "plain", monkeypatch)
    assert plain <= 367
    averaged = _operations(config.replace(optimizer={"ema_decay": 0.9}), tmp_path / "averaged", monkeypatch)
    assert averaged <= plain + 9


@pytest.mark.parametrize("batches", ["host", "device"])
def test_only_the_steps_of_a_training_are_compiled(
    tiny: Config, batches: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo stops to compile after eight times."""
    with_gradients: list[bool] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        with_gradients.append(torch.is_grad_enabled())
        return graph.forward

    def compile_with(self: nn.Module, *arguments: Any, **options: Any) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, *arguments, **{**options, "backend": backend})

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", compile_with)
    config = tiny.replace(
        method="la", epochs=2, compile=True, accelerator={"batches": batches}, data={"val_fraction": 0.2}
    )
    fit(config.replace(second_stage="crt"), tmp_path / "run", quiet=True)
    assert 1 <= len(with_gradients) <= 2  # one for each size of a batch
    assert all(with_gradients)
