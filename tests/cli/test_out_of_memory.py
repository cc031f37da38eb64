"""A device without enough memory: one line that says what needs less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longtail.training import trainer
from tests.conftest import Command

CUDA_ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.00 GiB of which …"


def _raise(error: Exception) -> Any:
    def fails(*_: object, **__: object) -> None:
        raise error

    return fails


@pytest.mark.parametrize(
    ("arguments", "called", "advice"),
    [
        (("train", "digits-lt"), "longtail.training.trainer.fit", "or lower --batch_size, --network_size or --accel"),
        (("compare", "digits-lt"), "longtail.experiments.compare.compare", "or lower --jobs; or lower --batch_size"),
        (("embed", "digits-lt"), "longtail.experiments.embed.embed", "or lower --batch_size"),
        (("recipes",), "longtail.cli.training.recipes", "or set CUDA_VISIBLE_DEVICES= to run on the CPU"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_device_without_enough_memory_is_one_line(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    called: str,
    advice: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(called, _raise(torch.OutOfMemoryError(CUDA_ERROR)))
    code, _, err = command(*arguments)
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith("longtail: error: the device is out of memory; end other programs that use it, or ")
    assert advice in line


def test_another_error_of_torch_keeps_its_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "fit", _raise(RuntimeError("a fault of the program")))
    with pytest.raises(RuntimeError, match="a fault of the program"):
        command("train", "digits-lt")
