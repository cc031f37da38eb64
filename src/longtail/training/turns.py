"""Trainings in several threads of one process: what they share is used by one at a time."""

from __future__ import annotations

import collections
import contextlib
import gc
import logging
import threading
from collections.abc import Iterator

import torch

from longtail.data.device_loader import SharedViews

logger = logging.getLogger(__name__)

Streams = tuple[torch.cuda.Stream, torch.cuda.Stream]
"""Of a training: for its steps, and for the preparation of its views beside them."""
_idle: collections.defaultdict[torch.device, list[Streams]] = collections.defaultdict(list)


def take_streams(device: torch.device) -> Streams | None:
    """Return two streams that no other training of this process uses; None where the device is no CUDA device.

    torch has 32 streams for each device, which it gives out in turn. Trainings that took new ones would in time share
    those of one that still runs.
    """
    if device.type != "cuda":
        return None
    try:
        return _idle[device].pop()
    except IndexError:
        return torch.cuda.Stream(device), torch.cuda.Stream(device)


def return_streams(device: torch.device, streams: Streams) -> None:
    """Let a later training have streams on which all work has ended."""
    _idle[device].append(streams)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Let Python collect no garbage of its own accord, in no thread."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def reset_generator(device: torch.device) -> None:
    """Let a device's generator draw again after a failed recording, of whose end some versions of torch do not tell it.

    The numbers that follow are those that would have followed. Nothing where the device is no CUDA device.
    """
    if device.type != "cuda":
        return
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    try:
        generator.graphsafe_set_state(generator.clone_state())  # a copy is outside any recording
    except RuntimeError as error:  # of a device that has failed; the steps that follow raise it
        logger.debug("%s", error)


class Turn:
    """The right of one training to use what it shares with the others beside it.

    That is the state of torch's random numbers, from which networks are initialised, and the recording of a CUDA graph.
    A training holds its turn from its start to the end of its first epoch, and takes it again to evaluate.

    Args:
        lock: shared by all trainings of the process; None where there is one training only.
        views: augmented images that they have in common.

    Attributes:
        given: set when the turn was given for the first time.
    """

    def __init__(self, lock: threading.Lock | None = None, views: SharedViews | None = None) -> None:
        self._lock, self.views = lock, views
        self._held = False
        self.given = threading.Event()

    @property
    def alone(self) -> bool:
        """Whether there is no other training in this process."""
        return self._lock is None

    def take(self) -> None:
        """Wait until no other training has its turn; nothing if this one has it."""
        if self._lock is not None and not self._held:
            self._lock.acquire()
            self._held = True

    def give(self) -> None:
        """Let the others have their turn; nothing if this one has not got it."""
        if self._lock is not None and self._held:
            self._held = False
            self._lock.release()
            self.given.set()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Hold the turn, and give it back unless it was held before."""
        before = self._held
        self.take()
        try:
            yield
        finally:
            if not before:
                self.give()
