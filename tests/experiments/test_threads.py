"""Runs of a comparison side by side on one accelerator, here a CPU."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longtail.config import Config
from longtail.data.device_loader import SharedViews
from longtail.data.sources import load_data
from longtail.errors import LongtailError, StoppedError
from longtail.experiments.compare import compare
from longtail.experiments.threads import fitting_jobs, reason_against_threads, run_in_threads
from longtail.training import steps
from longtail.training.auto_config import auto_config
from longtail.training.checkpoint import load_checkpoint
from longtail.training.preemption import PreemptionHandler
from longtail.training.turns import Turn
from tests.training.runs import equal, weights

CPU = torch.device("cpu")


@pytest.fixture
def small(tiny: Config) -> Config:
    return tiny.replace(network="conv8", accelerator={"batches": "device"}, gml={"distillation_weight": 1.0})


def test_runs_beside_one_another_give_what_they_give_alone(small: Config, tmp_path: Path) -> None:
    methods = ["ce", "ldam", "gml"]
    alone = compare(small, methods, [0, 1], tmp_path / "alone", jobs=1, quiet=True, budget="epochs")
    beside = compare(small, methods, [0, 1], tmp_path / "beside", jobs=4, quiet=True, budget="epochs")
    for ours, theirs in zip(beside, alone, strict=True):
        assert (ours.method, ours.seed, ours.metrics) == (theirs.method, theirs.seed, theirs.metrics)
        one, other = (
            load_checkpoint(tmp_path / folder / f"{ours.method}-seed{ours.seed}" / "last.ckpt")["method"]
            for folder in ("alone", "beside")
        )
        assert all(torch.equal(other[key], value) for key, value in one.items() if isinstance(value, torch.Tensor))
    # finished runs are not trained again
    stamp = (tmp_path / "beside" / "ce-seed0" / "last.ckpt").stat().st_mtime_ns
    assert compare(small, methods, [0, 1], tmp_path / "beside", quiet=True, budget="epochs") == beside
    assert (tmp_path / "beside" / "ce-seed0" / "last.ckpt").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_generations_of_teachers_and_second_stages_are_what_they_are_alone(small: Config, tmp_path: Path) -> None:
    config = small.replace(
        classifier={"distillation_weight": 0.5},
        teacher={"generations": 2, "count": 2, "epochs": 1},
        second_stage="reweight",
    )
    for folder, jobs in (("alone", 1), ("beside", 4)):
        compare(config, ["la", "gml"], [0], tmp_path / folder, jobs=jobs, quiet=True, budget="epochs")
    for name in ("la-seed0", "gml-seed0"):
        assert equal(weights(tmp_path / "alone" / name), weights(tmp_path / "beside" / name))
    teachers = [
        sorted(path.name for path in (tmp_path / folder / "teachers").iterdir() if path.is_dir())
        for folder in ("alone", "beside")
    ]
    assert teachers[0] == teachers[1]
    assert len(teachers[0]) == 6  # the first generation is shared; the second is distilled with other weights


def test_that_runs_were_side_by_side_is_kept(small: Config, tmp_path: Path) -> None:
    config = small.replace(network="conv8-tiny", epochs=1)
    for jobs, expected in ((1, False), (2, True)):
        records = compare(config, ["ce"], [0, 1], tmp_path / str(jobs), jobs=jobs, quiet=True, budget="epochs")
        assert [record.side_by_side for record in records] == [expected] * 2


def test_what_cannot_share_the_process_is_trained_in_turn(
    small: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small.replace(network="test_resnet.r160_in1k", epochs=1)
    with caplog.at_level(logging.INFO, logger="longtail"):
        compare(config, ["ce", "la"], [0], tmp_path / "runs", quiet=True, budget="epochs")
    assert "the runs cannot share one process: the networks of timm may draw random numbers" in caplog.text


def _let_images_take(part: float, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the training images of digits-lt need this part of the device's memory."""
    images = load_data(config.data, 0).train
    needed = len(images) * images.images.take(torch.zeros(1, dtype=torch.int64)).numel()
    monkeypatch.setattr(steps, "memory_for_images", lambda config, _device: config.accelerator.memory * needed / part)


def test_as_many_runs_at_a_time_as_there_is_memory_for_the_images_of_each(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data(small.data, 0)
    _let_images_take(0.1, small, monkeypatch)
    for memory, most, expected in ((0.25, 8, 2), (0.25, 1, 1), (0.5, 8, 5), (0.5, 3, 3), (0.15, 8, 1)):
        config = auto_config(small.replace(accelerator={"memory": memory}), data)[0]
        assert reason_against_threads(config, data) == ""
        assert fitting_jobs(config, data, most) == expected


@pytest.mark.parametrize(("part", "side_by_side"), [(0.1, True), (0.2, False)])
def test_runs_whose_images_do_not_fit_side_by_side_are_trained_in_turn(
    small: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    part: float,
    side_by_side: bool,
) -> None:
    """Of the memory for images, which is 0.25, each of two runs has a half, however many there could be at a time."""
    config = small.replace(network="conv8-tiny", epochs=1)
    _let_images_take(part, config, monkeypatch)
    with caplog.at_level(logging.INFO, logger="longtail"):
        records = compare(config, ["ce", "la"], [0], tmp_path / "runs", quiet=True, budget="epochs")
    assert [record.side_by_side for record in records] == [side_by_side] * 2
    said = "the runs are trained one after another: accelerator.memory holds the images of no more"
    assert (said in caplog.text) is not side_by_side


def test_a_single_run_is_trained_alone(small: Config, tmp_path: Path) -> None:
    config = small.replace(network="conv8-tiny", epochs=1)
    (record,) = compare(config, ["ce"], [0], tmp_path / "runs", quiet=True)
    assert not record.side_by_side


@pytest.mark.parametrize(
    ("version", "graph", "refused"),
    [("2.6.0+cu124", True, True), ("2.6.0", False, False), ("2.7.0", True, False), ("2.14.1+cu130", True, False)],
)
def test_no_step_runs_while_another_is_recorded_in_older_versions_of_torch(
    small: Config, monkeypatch: pytest.MonkeyPatch, version: str, graph: bool, refused: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr("longtail.experiments.threads.select_device", lambda _: types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(steps, "memory_for_images", lambda *_: 2.0**30)
    data = load_data(small.data, 0)
    reason = reason_against_threads(auto_config(small.replace(accelerator={"graph": graph}), data)[0], data)
    assert ("no step can run while another is recorded" in reason) is refused
    assert bool(reason) is refused


def test_keys_that_are_drawn_at_random_are_not_drawn_beside_others(small: Config) -> None:
    data = load_data(small.data, 0)
    config = auto_config(small, data)[0]
    assert reason_against_threads(config, data) == ""
    transfer = config.replace(gml={"feature_transfer": 1})
    assert "gml.feature_transfer draws random numbers" in reason_against_threads(transfer, data)
    assert reason_against_threads(transfer.replace(method="la"), data) == ""


def test_a_task_starts_when_the_one_before_gives_its_turn() -> None:
    order: list[str] = []
    free = threading.Event()

    def task(name: str) -> Callable[[Turn], str]:
        def run(turn: Turn) -> str:
            with turn.taken():
                order.append(f"{name} starts")
                turn.give()
            assert free.wait(30)
            return name

        return run

    def check() -> None:
        if len(order) == 2:
            free.set()

    results = dict(run_in_threads([task(name) for name in "abc"], 3, CPU, check))
    assert results == {0: "a", 1: "b", 2: "c"}
    assert order == ["a starts", "b starts", "c starts"]


def test_no_task_starts_after_one_has_failed() -> None:
    started: list[int] = []

    def task(number: int) -> Callable[[Turn], int]:
        def run(_turn: Turn) -> int:
            started.append(number)
            if number == 1:
                raise LongtailError("the second")
            return number

        return run

    with pytest.raises(LongtailError, match="the second"):
        list(run_in_threads([task(number) for number in range(5)], 1, CPU, lambda: None))
    assert started == [0, 1]


def test_what_ends_after_another_has_failed_is_yielded_before_the_error() -> None:
    failed = threading.Event()
    started: list[int] = []

    def task(number: int) -> Callable[[Turn], int]:
        def run(turn: Turn) -> int:
            started.append(number)
            with turn.taken():
                turn.give()
            if number == 1:
                failed.set()
                raise LongtailError("the second")
            assert failed.wait(30)
            if number == 2:
                raise LongtailError("the third, later")
            return number

        return run

    ended: list[tuple[int, int]] = []
    results = run_in_threads([task(number) for number in range(5)], 4, CPU, lambda: None)
    with pytest.raises(LongtailError, match=r"the (second|third)"):
        ended.extend(results)
    assert (0, 0) in ended
    assert 4 not in started


def test_the_memory_of_a_run_is_free_before_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("gc.collect", lambda: calls.append("collected"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100, 100))

    def task(turn: Turn) -> str:
        with turn.taken():
            calls.append("trained")
        return "result"

    assert dict(run_in_threads([task, task], 1, torch.device("cuda"), lambda: None)) == {0: "result", 1: "result"}
    assert calls == ["trained", "collected", "emptied"] * 2


def test_memory_that_cannot_be_freed_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch frees none while it takes a failed recording for one that goes on."""

    def fails() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100, 100))
    assert dict(run_in_threads([lambda _turn: "result"] * 2, 1, torch.device("cuda"), lambda: None)) == {
        0: "result",
        1: "result",
    }


def test_a_training_that_has_not_reached_its_steps_hears_a_signal() -> None:
    signalled = threading.Event()

    def task(turn: Turn) -> str:
        with turn.taken():
            turn.give()
        assert signalled.wait(30)  # until then a network is built, and images are moved
        with PreemptionHandler(quiet=True) as stop:
            stop.check("at a step")
        return "trained to its end"

    with PreemptionHandler(quiet=True) as signals:

        def send() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            while not signals.name:
                time.sleep(0.01)
            signalled.set()

        sender = threading.Timer(0.1, send)
        sender.start()
        with pytest.raises(StoppedError, match="stopped by SIGTERM at a step"):
            list(run_in_threads([task], 1, CPU, lambda: None))
        sender.join()


def test_no_task_starts_after_a_signal() -> None:
    def stopped() -> None:
        raise StoppedError("SIGTERM", "after 0 of 2 runs")

    with pytest.raises(StoppedError):
        list(run_in_threads([lambda _turn: 1], 2, CPU, stopped))


def test_shared_views_are_made_once_and_the_oldest_go_first() -> None:
    views = SharedViews(capacity=2 * 4 * 100)
    made: list[int] = []

    def make(number: int) -> Callable[[], torch.Tensor]:
        def function() -> torch.Tensor:
            made.append(number)
            return torch.full((100,), float(number))

        return function

    for number in (1, 2, 1, 3, 1, 2):
        assert float(views.get(number, make(number))[0]) == number
    assert made == [1, 2, 3, 2]
    assert (views.misses, views.hits) == (4, 2)
