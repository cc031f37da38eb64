"""One process or many: the same losses, the same queues, runs that move between them, and how they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from longtail.config import load_recipe
from longtail.data.loaders import TrainLoader
from longtail.data.sources import load_data
from longtail.data.views import build_view
from longtail.engine.books import read_metrics
from longtail.engine.files import load_checkpoint
from longtail.methods.gml import GML
from longtail.nn import CosineClassifier, Encoder
from longtail.recognizer import Recognizer
from tests.conftest import TINY


def without_batchnorm(module: nn.Module) -> None:
    """BatchNorm on a CPU has each process's own statistics; all else must be equal."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        without_batchnorm(child)


def _train(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        where = f"file://{folder}/rendezvous{world}"
        torch.distributed.init_process_group("gloo", where, rank=rank, world_size=world)
    config = load_recipe("digits-lt").config.replace(
        gml={"distillation_weight": 1.0, "queue_size": 200, "share_query": False}
    )
    data = load_data(config.data, 0)
    torch.manual_seed(0)
    student, teacher = (Encoder("conv8-tiny", [0.3], [0.4]) for _ in range(2))
    method = GML(config, student, data.class_counts, teacher, CosineClassifier(teacher.num_features, 10))
    for part in (method, teacher):
        without_batchnorm(part)
    # an uneven number of images a step, so that the processes' shares differ
    loader = TrainLoader(data.train, 37, [build_view("digits", 8)] * 3, seed=1, rank=rank, world=world)
    method.fill(lambda splits, number: loader.batches(splits, -1 - number, [2]), data.train.labels)
    wrapped = method if world == 1 else DistributedDataParallel(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _, batch in zip(range(8), loader.epoch(0), strict=False):
        terms = torch.stack(list(wrapped(batch).values()))
        optimizer.zero_grad()
        terms.sum().backward()
        optimizer.step()
        whole = terms.detach().clone()
        if world > 1:
            torch.distributed.all_reduce(whole)
        losses.append(whole / world)
    state = {"losses": torch.stack(losses), "queues": method.queues.state_dict(), "weights": method.state_dict()}
    torch.save(state, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_the_same_batch_gives_the_same_losses_queues_and_weights(tmp_path: Path) -> None:
    _train(0, 1, str(tmp_path))
    alone = torch.load(tmp_path / "1-0.pt", weights_only=True)
    assert alone["losses"][0].min() > 0
    for world in (2, 4):
        multiprocessing.spawn(_train, (world, str(tmp_path)), nprocs=world)  # type: ignore[attr-defined, no-untyped-call]
        for rank in range(world):
            here = torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True)
            assert torch.allclose(here["losses"], alone["losses"], rtol=2e-4, atol=1e-5)
            for name, tensor in alone["queues"].items():
                assert torch.allclose(here["queues"][name].double(), tensor.double(), atol=1e-5), name
            for name, tensor in alone["weights"].items():
                if isinstance(tensor, torch.Tensor):
                    assert torch.allclose(here["weights"][name].double(), tensor.double(), rtol=1e-3, atol=2e-4), name


# the command line, with a copy of the checkpoint of step 20
KEEPS_STEP_20 = """
import shutil, sys
from longtail.engine import fit
save = fit.save_checkpoint
def keeping(path, state):
    save(path, state)
    if state["books"]["step"] == 20:
        shutil.copy(path, path.with_name("middle.ckpt"))
fit.save_checkpoint = keeping
from longtail.cli import main
main()
"""


def torchrun(world: int, *arguments: str | Path, program: str | None = None) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = (
        [] if world == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={world}", f"--master_port={port}"]
    )
    what = ["-m", "longtail"]
    if program is not None:
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(program)
        what = [file.name]
    return subprocess.run(
        [sys.executable, *launcher, *what, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_run_moves_between_one_process_and_two(tmp_path: Path) -> None:
    common = ["train", "digits-lt", *TINY[:2], "--checkpoint_seconds", "0", "--batch_size", "50"]
    for first, second in ((2, 1), (1, 2)):
        out = tmp_path / f"from{first}"
        arguments = [*common, "--method", "la", "--epochs", "8", "--out", str(out)]
        done = torchrun(first, *arguments, program=KEEPS_STEP_20)
        assert done.returncode == 0, done.stderr
        assert "balanced accuracy" in done.stdout
        assert done.stdout.count("recogniser:") == 1  # one process prints
        assert read_metrics(out / "metrics.jsonl")[-1]["uniform"]["images"] == 500
        # back to a checkpoint from the middle of an epoch, as a kill would have left it
        middle = (out / "middle.ckpt").read_bytes()
        (out / "last.ckpt").write_bytes(middle)
        assert load_checkpoint(out / "last.ckpt")["books"]["step"] == 20
        again = torchrun(second, *arguments, "--resume")
        assert again.returncode == 0, again.stderr
        assert "resumed at step 20 of 64" in again.stderr
        lines = read_metrics(out / "metrics.jsonl")
        assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == list(range(1, 9))
        assert lines[-1]["uniform"]["images"] == 500


def test_one_process_in_trouble_ends_all_with_its_message(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert torchrun(1, "train", "digits-lt", *TINY, "--method", "la", "--out", out).returncode == 0
    started = time.monotonic()
    done = torchrun(2, "train", "digits-lt", *TINY, "--method", "la", "--out", out)
    assert done.returncode != 0
    assert "process 0: " in done.stderr
    assert "holds a run already" in done.stderr
    assert "longtail/engine" not in done.stderr, "a traceback of ours"
    assert time.monotonic() - started < 60


def test_torchrun_that_is_told_to_stop_saves(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command = [*launcher, "-m", "longtail", *LONG, "--checkpoint_seconds", "3600", "--out", str(out)]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        deadline = time.monotonic() + 120
        while len(read_metrics(out / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=60) != 0
    assert "stopped by SIGTERM at step" in (tmp_path / "errors").read_text()
    step = load_checkpoint(out / "last.ckpt")["books"]["step"]
    assert step % 10 == 0  # where both looked
    assert step >= 18


def test_too_small_a_batch_for_the_processes(tmp_path: Path) -> None:
    done = torchrun(2, "train", "digits-lt", *TINY, "--batch_size", "3", "--out", tmp_path / "run")
    assert "batch_size 3: expected at least 4, two for each of 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


# long enough that a signal finds it at work on a fast machine too, however late it is sent
LONG = ["train", "digits-lt", *TINY[:2], "--epochs", "200", "--method", "la"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    whole = torchrun(1, *LONG, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "longtail", *LONG, "--checkpoint_seconds", "3600", "--out", str(tmp_path / "cut")]
    with (tmp_path / "errors").open("w") as errors:
        # as many threads as the others have: with more, sums are made in another order
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        deadline = time.monotonic() + 240
        while len(read_metrics(tmp_path / "cut" / "metrics.jsonl")) < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
    said = (tmp_path / "errors").read_text()
    assert f"stopped by {number.name} at step" in said
    assert "--resume goes on from there" in said
    assert "Traceback" not in said
    step = load_checkpoint(tmp_path / "cut" / "last.ckpt")["books"]["step"]
    assert f"at step {step} of" in said
    again = torchrun(1, *LONG, "--checkpoint_seconds", "3600", "--out", tmp_path / "cut", "--resume")
    assert again.returncode == 0, again.stderr
    weights = [Recognizer.load(tmp_path / name).encoder.state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
