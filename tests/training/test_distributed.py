"""One process or several: the same losses and queues, runs that move between them, and how they end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from longtail.config import load_recipe
from longtail.data.loader import TrainLoader
from longtail.data.sources import load_data
from longtail.data.transforms import build_transform
from longtail.inference.recognizer import Recognizer
from longtail.methods.gml import GML
from longtail.nn import CosineClassifier, Encoder
from longtail.nn.backbones import build_backbone
from longtail.registry import METHODS
from longtail.training.checkpoint import load_checkpoint
from longtail.training.fabric import synchronize_batch_norm
from longtail.training.metric_log import read_metrics
from tests.conftest import TINY
from tests.processes import run_longtail, start_longtail, start_ranks


def without_batchnorm(module: nn.Module) -> None:
    """BatchNorm on a CPU has each process's own statistics; all else must be equal."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        without_batchnorm(child)


def train_steps(rank: int, world: int, folder: str, name: str) -> None:
    """Train eight steps as one of several processes, and write losses, queues and weights to ``folder``."""
    torch.set_num_threads(1)
    if world > 1:
        rendezvous = f"file://{folder}/rendezvous{world}"
        torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=world)
    config = load_recipe("digits-lt").config.replace(
        method=name.removesuffix(", two experts"),
        gml={
            "distillation_weight": 1.0,
            "queue_size": 200,
            "share_query": False,
            "ensemble_weight": 1.0,
            "stages": 2 if name.endswith("experts") else None,
        },
        classifier={"views": 2, "every_view": True, "distillation_weight": 1.0, "agreement_weight": 1.0},
        experts={"self_distillation_weight": 1.0},
    )
    data = load_data(config.data, 0)
    torch.manual_seed(0)
    student, teacher = (Encoder("conv8-tiny", [0.3], [0.4]) for _ in range(2))
    classifier = CosineClassifier(teacher.num_features, 10)
    method = METHODS[config.method](config, student, data.class_counts, teacher, classifier)
    for part in (method, teacher):
        without_batchnorm(part)
    # an uneven number of images a step, so that the processes' shares differ
    loader = TrainLoader(
        data.train, 37, [build_transform("digits", 8)] * len(method.plan.uses), seed=1, rank=rank, world=world
    )
    method.init_memory(
        lambda splits, number: loader.batches(splits, -1 - number, [len(loader.views) - 1]), data.train.labels
    )
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
    queues = method.queues.state_dict() if isinstance(method, GML) else {}
    state = {"losses": torch.stack(losses), "queues": queues, "weights": method.state_dict()}
    torch.save(state, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "world"),
    [("gml", 2), ("gml, two experts", 2), ("experts", 2), pytest.param("gml", 4, marks=pytest.mark.slow)],
)
def test_the_same_batch_gives_the_same_losses_queues_and_weights(tmp_path: Path, name: str, world: int) -> None:
    train_steps(0, 1, str(tmp_path), name)
    alone = torch.load(tmp_path / "1-0.pt", weights_only=True)
    assert alone["losses"][0].min() > 0
    step = "from tests.training.test_distributed import train_steps; train_steps({}, {}, {!r}, {!r})"
    ranks = [
        start_longtail("--version", prelude=step.format(rank, world, str(tmp_path), name)) for rank in range(world)
    ]
    for process in ranks:
        assert process.wait(timeout=120) == 0, process.stderr
    for rank in range(world):
        here = torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True)
        assert torch.allclose(here["losses"], alone["losses"], rtol=2e-4, atol=1e-5)
        for name, tensor in alone["queues"].items():
            assert torch.allclose(here["queues"][name].double(), tensor.double(), atol=1e-5), name
        for name, tensor in alone["weights"].items():
            if isinstance(tensor, torch.Tensor):
                assert torch.allclose(here["weights"][name].double(), tensor.double(), rtol=1e-3, atol=2e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("network", ["tf_efficientnet_lite0", "mobilenetv3_small_100", "resnet18"])
def test_shared_batch_norm_keeps_activations_and_frozen_layers(network: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(network, 3)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    next(iter(backbone.parameters())).requires_grad_(False)
    model = nn.Sequential(backbone).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        names = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
        synchronize_batch_norm(model)
        torch.testing.assert_close(model(images), before)
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == names
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.slow
def test_processes_share_the_second_stage(tmp_path: Path) -> None:
    arguments = ("train", "digits-lt", "--method", "la", *TINY, "--classifier.distillation_weight", "1")
    arguments += ("--teacher.source", "ema", "--second_stage", "crt")
    assert run_longtail(*arguments, "--out", tmp_path / "one").returncode == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "recognizer")
    # the first stage is there: what follows is the second, on its encoder
    for process in run_ranks(2, *arguments, "--out", tmp_path / "two", "--resume"):
        assert process.returncode == 0, process.stderr
    one, two = (Recognizer.load(tmp_path / name).classifier.weight for name in ("one", "two"))
    assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)
    # and both stages, with the moving average, in two processes
    for process in run_ranks(2, *arguments, "--out", tmp_path / "whole"):
        assert process.returncode == 0, process.stderr
    kinds = [line["kind"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert kinds == ["epoch", "first_stage", "second_stage", "test"]


# run before the command: keeps a copy of the first checkpoint within the third epoch, of eight steps, or a later one
KEEP_MIDDLE = """
import shutil
from longtail.training import trainer
save = trainer.save_checkpoint
def save_and_keep(path, state):
    save(path, state)
    kept, step = path.with_name("middle.ckpt"), state["tracker"]["step"]
    if step > 16 and step % 8 and not kept.exists():
        shutil.copy(path, kept)
trainer.save_checkpoint = save_and_keep
"""


def run_ranks(world: int, *arguments: str | Path, prelude: str = "") -> list[subprocess.CompletedProcess[str]]:
    """Run the command in several processes that train together, as torchrun would start them."""
    processes = start_ranks(world, *arguments, prelude=prelude)
    ended = [process.communicate(timeout=240) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.wait(), *output)
        for process, output in zip(processes, ended, strict=True)
    ]


def torchrun(world: int, *arguments: str | Path) -> list[str]:
    """Return the command that starts ``longtail`` by the real torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", f"--master_port={port}"]
    return [*launcher, "-m", "longtail", *map(str, arguments)]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("first", "second"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_moves_between_one_process_and_two(tmp_path: Path, first: int, second: int) -> None:
    out = tmp_path / "run"
    arguments = ["train", "digits-lt", *TINY[:2], "--checkpoint_seconds", "0", "--batch_size", "50"]
    arguments += ["--method", "la", "--epochs", "8", "--out", str(out)]
    before = run_ranks(first, *arguments, prelude=KEEP_MIDDLE)
    assert [done.returncode for done in before] == [0] * first, before
    printed = "".join(done.stdout for done in before)
    assert "balanced accuracy" in printed
    assert printed.count("model:") == 1  # one process prints
    assert read_metrics(out / "metrics.jsonl")[-1]["uniform"]["images"] == 500
    # back to a checkpoint from the middle of an epoch, as a kill would have left it
    (out / "last.ckpt").write_bytes((out / "middle.ckpt").read_bytes())
    step = load_checkpoint(out / "last.ckpt")["tracker"]["step"]
    after = run_ranks(second, *arguments, "--resume")
    assert [done.returncode for done in after] == [0] * second, after
    assert f"resumed at step {step} of 64" in after[0].stderr
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == list(range(1, 9))
    assert lines[-1]["uniform"]["images"] == 500


def test_an_error_of_one_process_ends_all_with_its_message(tmp_path: Path) -> None:
    arguments = ["train", "digits-lt", *TINY, "--method", "la", "--out", str(tmp_path / "run")]
    assert run_longtail(*arguments).returncode == 0
    started = time.monotonic()
    failed, other = run_ranks(2, *arguments, "--resume", "--batch_size", "32")  # which process 0 alone refuses
    assert time.monotonic() - started < 60
    assert (failed.returncode, other.returncode) == (2, 2)
    assert failed.stderr.startswith("longtail: error: process 0: ")
    assert "was started with batch_size" in failed.stderr
    assert "process 1: another process has exited; see its own message" in other.stderr
    assert "Traceback" not in failed.stderr + other.stderr


@pytest.mark.slow
def test_an_error_of_one_process_under_torchrun(tmp_path: Path) -> None:
    arguments = ["train", "digits-lt", *TINY, "--method", "la", "--out", str(tmp_path / "run")]
    assert run_longtail(*arguments).returncode == 0
    started = time.monotonic()
    done = subprocess.run(torchrun(2, *arguments), capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert done.returncode != 0
    assert "process 0: " in done.stderr
    assert "contains a run already" in done.stderr
    assert "longtail/training" not in done.stderr, "a traceback of ours"
    assert time.monotonic() - started < 60


def test_too_small_a_batch_for_the_processes(tmp_path: Path) -> None:
    for done in run_ranks(2, "train", "digits-lt", *TINY, "--batch_size", "3", "--out", tmp_path / "run"):
        assert done.returncode == 2
        assert "batch_size 3: expected at least 4, two for each of 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


# long enough that a signal finds it at work on a fast machine too, however late it is sent
LONG = ["train", "digits-lt", *TINY[:2], "--epochs", "200", "--method", "la"]


def wait_for_lines(run: Path, lines: int, alive: Callable[[], bool]) -> None:
    """Wait until the run has logged some epochs."""
    deadline = time.monotonic() + 240
    while len(read_metrics(run / "metrics.jsonl")) < lines and time.monotonic() < deadline and alive():
        time.sleep(0.005)


@pytest.mark.slow
def test_torchrun_that_is_stopped_saves(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = torchrun(2, *LONG, "--checkpoint_seconds", "3600", "--out", out)
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=ONE_THREAD)
        wait_for_lines(out, 3, lambda: process.poll() is None)
        process.terminate()
        assert process.wait(timeout=60) != 0
    assert "stopped by SIGTERM at step" in (tmp_path / "errors").read_text()
    step = load_checkpoint(out / "last.ckpt")["tracker"]["step"]
    assert step >= 18


# run before the command: process 1 receives SIGTERM during the last validation
TERMINATED_AT_THE_END = """
import os, signal
from longtail.training.trainer import _Trainer
end_epoch = _Trainer._end_epoch
def terminated(trainer, student, *rest):
    end_epoch(trainer, student, *rest)
    if student.tracker.step == 12 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
_Trainer._end_epoch = terminated
"""


def test_a_signal_after_the_last_regular_synchronization_is_heard(tmp_path: Path) -> None:
    arguments = ["train", "digits-lt", *TINY, "--method", "la", "--out", str(tmp_path / "run")]
    for done in run_ranks(2, *arguments, prelude=TERMINATED_AT_THE_END):
        assert done.returncode == 143, done.stderr
        assert "stopped by SIGTERM at step 12 of 12, all of it saved" in done.stderr
    assert load_checkpoint(tmp_path / "run" / "last.ckpt")["tracker"]["step"] == 12
    assert not (tmp_path / "run" / "recognizer").exists()


def stop_in_new_python(run: Path, number: signal.Signals) -> tuple[int, str]:
    """Stop ``python -m longtail`` when it has logged five epochs; return its exit code and standard error."""
    command = [sys.executable, "-m", "longtail", *LONG, "--checkpoint_seconds", "3600", "--out", str(run)]
    # as many threads as the other runs have: with more, sums are made in another order
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
    ) as process:
        wait_for_lines(run, 5, lambda: process.poll() is None)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def stop_in_fork(run: Path, number: signal.Signals) -> tuple[int, str]:
    """Stop a forked command when it has logged five epochs; return its exit code and standard error."""
    with start_longtail(*LONG, "--checkpoint_seconds", "3600", "--out", run) as process:
        wait_for_lines(run, 5, lambda: process.poll() is None)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    return process.wait(), stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run_longtail(*LONG, "--out", run)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "stop"),
    [
        pytest.param(signal.SIGTERM, stop_in_new_python, id="SIGTERM"),
        pytest.param(signal.SIGINT, stop_in_fork, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_saves_and_its_continuation_equals_an_uninterrupted_run(
    tmp_path: Path, uninterrupted: Path, number: signal.Signals, stop: Callable[[Path, signal.Signals], tuple[int, str]]
) -> None:
    cut = tmp_path / "cut"
    code, stderr = stop(cut, number)
    assert code == 128 + number
    assert f"stopped by {number.name} at step" in stderr
    assert "use --resume to continue" in stderr
    assert "Traceback" not in stderr
    step = load_checkpoint(cut / "last.ckpt")["tracker"]["step"]
    assert f"at step {step} of" in stderr
    done = run_longtail(*LONG, "--checkpoint_seconds", "3600", "--out", cut, "--resume")
    assert done.returncode == 0, done.stderr
    weights = [Recognizer.load(run).encoder.state_dict() for run in (uninterrupted, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
