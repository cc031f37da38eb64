"""What Lightning Fabric wraps."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtail.config import Config
from longtail.errors import LongtailError
from longtail.training.fabric import build_fabric, wrap


@pytest.mark.parametrize("variables", [{"SLURM_NTASKS": "4"}, {"SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "2"}])
def test_a_training_in_a_job_of_several_tasks_is_one_process(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    job = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    for name, value in {**job, "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", **variables}.items():
        monkeypatch.setenv(name, value)
    fabric = build_fabric(tiny.replace(device="cpu"))
    assert (fabric.world_size, fabric.global_rank, fabric.local_rank) == (1, 0, 0)


@pytest.mark.parametrize(
    ("processes", "here", "gpus", "message"),
    [
        (4, 4, 2, "4 processes on this machine, 2 GPUs: start at most one process for each GPU"),
        (3, 2, 0, "2 of 3 processes on this machine: start equally many processes on every machine"),
        (3, 1, 0, "1 of 3 processes on this machine: start equally many processes on every machine"),
    ],
)
def test_processes_that_cannot_train_together_are_refused(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, processes: int, here: int, gpus: int, message: str
) -> None:
    names = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": here, "GROUP_WORLD_SIZE": 1 if here == processes else 2}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(LongtailError) as error:
        build_fabric(tiny.replace(device="cuda" if gpus else "cpu"))
    assert str(error.value) == message


def test_half_precision_of_gpus_is_refused_on_a_cpu(tiny: Config) -> None:
    with pytest.raises(LongtailError, match=r"^precision 16-mixed: needs a GPU; use bf16-mixed or 32-true$"):
        build_fabric(tiny.replace(device="cpu", precision="16-mixed"))


def test_trainings_in_threads_do_not_end_the_backward_of_one_another(tiny: Config) -> None:
    """Fabric says by a flag of the whole process that a backward is under way."""
    begun, ended = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    class Wait(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(_ctx: Any, gradient: Tensor) -> Tensor:
            begun.set()
            assert ended.wait(30)
            return gradient

    def step(first: bool) -> None:
        try:
            fabric = build_fabric(tiny.replace(device="cpu", precision="bf16-mixed"))
            module = nn.Linear(4, 4)
            wrapped, optimizer = wrap(fabric, module, torch.optim.SGD(module.parameters(), lr=0.1))
            loss = wrapped(torch.rand(2, 4)).square().mean()
            if not first:
                assert begun.wait(30)
            fabric.backward(Wait.apply(loss) if first else loss)
            optimizer.step()
        except BaseException as error:  # of a thread, which would be lost
            errors.append(error)
        finally:
            (begun if first else ended).set()

    threads = [threading.Thread(target=step, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
