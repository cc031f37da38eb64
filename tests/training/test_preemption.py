"""Signals during a training: when the processes ask one another for them, and that none is announced and dropped."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longtail.config import Config
from longtail.errors import StoppedError
from longtail.training import preemption, trainer
from longtail.training.checkpoint import save_checkpoint
from longtail.training.preemption import PreemptionHandler
from longtail.training.trainer import fit


@pytest.fixture
def interrupted() -> Iterator[list[int]]:
    """What was there before all handlers, and which of the two signals it has received."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


class Ranks:
    """A clock, and the exchange of two processes, of which the other one's steps take as long as is said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.other, self.exchanges = 100.0, 0.0, 0
        monkeypatch.setattr(preemption, "world_size", lambda: 2)
        monkeypatch.setattr(preemption, "all_reduce_max", self.exchange)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def exchange(self, local: torch.Tensor) -> torch.Tensor:
        self.exchanges += 1
        return torch.maximum(local, torch.tensor([0.0, 0.0, self.other]))


def synchronized(ranks: Ranks, seconds: float, first: int = 1, steps: int = 40) -> list[int]:
    """Return the steps after which processes of such steps have synchronised."""
    device, found = torch.device("cpu"), []
    with PreemptionHandler(quiet=True) as stop:
        for step in range(first, first + steps):
            ranks.now += seconds
            before = ranks.exchanges
            assert stop.sync(step, False, device) == ("", False)
            found += [step] * (ranks.exchanges - before)
    return found


def test_slow_steps_are_synchronized_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    assert synchronized(ranks, 0.01) == [1, 10, 20, 30, 40]
    assert synchronized(ranks, 0.01, first=57, steps=12) == [57, 60]
    assert synchronized(ranks, 1.5, steps=8) == [1, 3, 6]
    assert synchronized(ranks, 20, steps=4) == [1, 2, 3, 4]
    ranks.other = 2.5  # the slower process decides
    assert synchronized(ranks, 0.01, steps=6) == [1, 2, 4, 6]


def test_processes_synchronize_when_they_have_to(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, device = Ranks(monkeypatch), torch.device("cpu")
    with PreemptionHandler(quiet=True) as stop:
        for step in range(1, 4):
            assert stop.sync(step, True, device) == ("", step == 1)
        stop.name = "SIGTERM"
        assert stop.sync(4, True, device) == ("", False)
        assert stop.sync(4, False, device, now=True) == ("SIGTERM", False)
    assert ranks.exchanges == 2


def test_a_signal_during_the_last_checkpoint_stops_before_the_evaluation(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(path: Path, state: dict[str, Any]) -> None:
        save_checkpoint(path, state)
        if state["tracker"]["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "save_checkpoint", terminated)
    with pytest.raises(StoppedError, match="stopped by SIGTERM at step 6 of 6, all of it saved"):
        fit(tiny.replace(method="la", epochs=1), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "recognizer").exists()


def test_the_second_signal_is_counted_over_nested_handlers(interrupted: list[int]) -> None:
    with PreemptionHandler(quiet=True) as outer:
        with PreemptionHandler(quiet=True) as inner:
            signal.raise_signal(signal.SIGINT)
            assert (inner.name, interrupted) == ("SIGINT", [])
            signal.raise_signal(signal.SIGINT)
            assert interrupted == [signal.SIGINT]
        assert outer.name == "SIGINT"
        signal.raise_signal(signal.SIGTERM)
        assert interrupted == [signal.SIGINT, signal.SIGTERM]
    with PreemptionHandler(quiet=True) as later:  # nothing is left of them
        assert later.name == ""


def test_a_handler_that_begins_after_a_signal_does_not_take_the_second(interrupted: list[int]) -> None:
    with PreemptionHandler(quiet=True):
        signal.raise_signal(signal.SIGTERM)
        with PreemptionHandler(quiet=True) as inner:
            assert inner.name == "SIGTERM"
            signal.raise_signal(signal.SIGTERM)
    assert interrupted == [signal.SIGTERM]


def test_repeated_signals_are_ignored_by_the_worker_around_a_training(interrupted: list[int]) -> None:
    with PreemptionHandler(quiet=True, ignore_repeat=True) as worker:
        for _ in range(2):
            with PreemptionHandler(quiet=True):
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            assert worker.name == "SIGTERM"
    assert interrupted == []


def test_a_thread_hears_a_signal_that_came_before_its_handler(interrupted: list[int]) -> None:
    names: list[str] = []

    def train() -> None:
        with PreemptionHandler(quiet=True) as stop:
            names.append(stop.sync(1, False, torch.device("cpu"))[0])

    with PreemptionHandler(quiet=True):
        signal.raise_signal(signal.SIGTERM)
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    assert (names, interrupted) == (["SIGTERM"], [])
