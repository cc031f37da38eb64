"""The recording of a step as a CUDA graph, with stand-ins for CUDA: what is freed when, and what a failure says."""

from __future__ import annotations

import gc
import logging
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from longtail.config import Config
from longtail.training import steps as training_steps
from longtail.training.steps import DeviceSteps
from longtail.training.trainer import fit
from longtail.training.turns import Turn, reset_generator


class _Graph:
    """A graph that counts what is done with it."""

    alive: ClassVar[weakref.WeakSet[_Graph]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.replays, self.resets = 0, 0
        _Graph.alive.add(self)

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        self.resets += 1

    def pool(self) -> tuple[int, int]:
        return 0, 0


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let graphs be recorded; what is noted says whether Python may collect garbage meanwhile."""
    notes: list[str] = []

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        notes.append("collects" if gc.isenabled() else "does not collect")
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    _Graph.alive.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return notes


class _Steps(DeviceSteps):
    """Steps that only count; the recording of a step over ``fails`` images fails."""

    fails = 0

    def __init__(self) -> None:
        method = nn.Linear(2, 2)
        student: Any = types.SimpleNamespace(
            method=method,
            optimizer=torch.optim.SGD(method.parameters(), lr=0.1),
            turn=Turn(),
            config=types.SimpleNamespace(method="la"),
        )
        loader: Any = types.SimpleNamespace(device=torch.device("cpu"))
        super().__init__(student, loader, record=False)
        self.record = True
        self.launched: list[int] = []

    def step(self, size: int) -> None:
        self.launched.append(size)
        if size == self.fails and self.launched.count(size) == 3:  # the first two are no recording
            raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_python_collects_no_garbage_while_a_step_is_recorded(recorded: list[str]) -> None:
    steps = _Steps()
    for _ in range(4):
        steps.launch(8)
    assert recorded == ["does not collect"]
    assert gc.isenabled()
    (graph,) = _Graph.alive
    assert graph.replays == 2
    steps.close()
    assert graph.resets == 1


def test_a_step_that_cannot_be_recorded_ends_the_graphs_of_others(
    recorded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    steps = _Steps()
    steps.fails = 7
    for _ in range(4):
        steps.launch(8)
    (first,) = _Graph.alive
    with caplog.at_level(logging.INFO, logger="longtail"):
        for _ in range(3):
            steps.launch(7)
    assert len(recorded) == 2
    assert gc.isenabled()
    assert first.resets == 1
    assert len(_Graph.alive) == 2  # the failed one is kept until the end
    launched = len(steps.launched)
    steps.launch(8)
    steps.launch(7)
    assert steps.launched[launched:] == [8, 7]
    (line,) = (line for line in caplog.text.splitlines() if "cannot be one CUDA graph" in line)
    assert "operation not permitted when stream is capturing (training/test_recording.py:" in line
    assert "later trainings of this process may not be recorded either" in caplog.text
    steps.close()
    del first
    assert not _Graph.alive


class _Generator:
    """A generator of random numbers, which knows of a recording or not."""

    def __init__(self, records: bool) -> None:
        self.records = records

    def clone_state(self) -> _Generator:
        return _Generator(records=False)

    def graphsafe_set_state(self, other: _Generator) -> None:
        self.records = other.records


def test_random_numbers_are_drawn_again_after_a_failed_recording(
    recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generators = _Generator(records=True), _Generator(records=True)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    steps = _Steps()
    steps.fails = 8
    for _ in range(2):
        steps.launch(8)
    steps.loader.device = torch.device("cuda", 1)
    steps.launch(8)
    assert len(recorded) == 1
    assert [generator.records for generator in generators] == [True, False]


def test_a_device_that_has_failed_raises_nothing_more_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(_Generator):
        def clone_state(self) -> _Generator:
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "default_generators", (Failing(records=True),))
    reset_generator(torch.device("cuda", 0))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "la"},
        {"method": "gml", "gml": {"distillation_weight": 1.0}},
        {"method": "la", "optimizer": {"sharpness": "sam", "ema_decay": 0.9}, "data": {"val_fraction": 0.2}},
    ],
)
def test_a_training_that_has_ended_leaves_nothing_on_the_device(
    tiny: Config, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Python's collector of cycles comes round."""
    left: list[weakref.ref[Any]] = []
    build_steps = training_steps.build_steps

    def build(student: Any, *arguments: Any) -> Any:
        steps = build_steps(student, *arguments)
        left.extend(weakref.ref(each) for each in (steps, steps.loader, student.method, student.optimizer))
        return steps

    monkeypatch.setattr("longtail.training.trainer.build_steps", build)
    config = tiny.replace(epochs=1, accelerator={"batches": "device"}, **changes)
    gc.disable()
    try:
        fit(config, tmp_path / "run", quiet=True)
        assert left
        assert [each() for each in left] == [None] * len(left)
    finally:
        gc.enable()
