"""One process or many: who this is, what all of them have together, and a stop that all of them make.

torchrun says by environment variables how many there are; Fabric starts none of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor, nn

from longtail.config import Config
from longtail.errors import LongtailError

_AGREE_EVERY = 10  # steps between two looks, by several processes together, at whether to stop or to save


def build_fabric(config: Config) -> Fabric:
    """Return Fabric for as many processes as there are.

    Raises:
        LongtailError: the device is not to be had, or a batch has fewer than two images a process.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    options: dict[str, Any] = {"accelerator": config.device, "precision": config.precision}
    if world > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
        if config.batch_size < 2 * world:
            raise LongtailError(
                f"batch_size {config.batch_size}: expected at least {2 * world}, two for each of {world} processes"
            )
        # statistics of BatchNorm are synchronised on accelerators; on a CPU every process keeps its own
        options |= {"devices": local, "num_nodes": world // local, "strategy": "ddp"}
    else:
        options["devices"] = 1
    try:
        fabric = Fabric(**options)
    except (RuntimeError, ValueError) as error:
        raise LongtailError(f"device {config.device}: is not to be had: {' '.join(str(error).split())}") from None
    if world > 1:
        fabric.launch()
    return fabric


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this is; 0 is the one that writes and prints."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def batch_sizes(sizes: list[int], device: torch.device) -> list[int]:
    """Return how many images all processes have in each part of a batch; of one part none need be asked."""
    if world_size() == 1 or len(sizes) == 1:
        return sizes
    total: list[int] = summed(torch.tensor(sizes, device=device)).tolist()
    return total


def wait_for_all() -> None:
    """Go on when all are here."""
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """Part from the other processes, once nothing is left to do together.

    A process that ends with its connections open may be ended by one of their threads instead, with an abort.
    """
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def summed(tensor: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def as_in_the_first(module: nn.Module) -> None:
    """Give all processes the first one's buffers: on a CPU BatchNorm's statistics are each process's own.

    What they judge together is then the very model that the first one writes.
    """
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


@contextlib.contextmanager
def one_line_of_a_lost_process() -> Iterator[None]:
    """Turn what a collective raises when another process has gone into one line: the reason is in that one's own."""
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise LongtailError("another process has gone; its own message says why") from None
        raise


class StopSignals:
    """SIGTERM and SIGINT ask for a stop at the end of the step; the second one ends the process at once.

    Several processes agree on the step, since each waits for the others in the middle of it. Nothing is raised where a
    signal comes: in the middle of a library's code that would be taken for an error of its own, or lost. Of two, one
    inside the other, the inner hears what the outer was told before, and the outer what the inner was told.

    Args:
        quiet: say nothing.
        patient: let no further signal end the process either.
    """

    def __init__(self, quiet: bool, patient: bool = False) -> None:
        self.quiet, self.patient, self.name = quiet, patient, ""
        self._before: dict[int, Any] = {}
        self._outer: StopSignals | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.signal(number, self._note)
                self._before[number] = before
                outer = getattr(before, "__self__", None)
                if isinstance(outer, StopSignals):
                    self._outer, self.name = outer, self.name or outer.name
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self._outer is not None:  # what came after the last step is for whoever goes on
            self._outer.name = self._outer.name or self.name

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if not self.patient:
            self._restore()
        if not self.quiet and rank() == 0:
            print(f"\nlongtail: {self.name}: finishing this step, then saving", file=sys.stderr, flush=True)

    def agreed(self, step: int, save: bool, device: torch.device) -> tuple[str, bool]:
        """Return the signal's name and whether to save, once all processes know of it."""
        if world_size() == 1:
            return self.name, save
        if step % _AGREE_EVERY:
            return "", False
        wanted = torch.tensor([int(signal.Signals[self.name]) if self.name else 0, int(save)], device=device)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        number, due = wanted.tolist()
        return signal.Signals(number).name if number else "", bool(due)
