"""Handling of SIGTERM and SIGINT during training: finish the step, save a checkpoint, then stop."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch

from longtail.distributed import all_reduce_max, rank, world_size
from longtail.errors import StoppedError

_SYNC_EVERY = 10  # steps between two synchronisations of several processes, at most
_SYNC_SECONDS = 5.0  # between two, unless one step takes longer: torchrun kills its processes 30 s after a signal

_active: PreemptionHandler | None = None  # the innermost handler of the main thread


class PreemptionHandler:
    """Context manager that records SIGTERM and SIGINT; the second signal ends the process at once.

    Several processes agree on the step to stop at, since each waits for the others within a step. A signal itself
    raises nothing: raised inside a library's code, an exception could be mistaken for an error of the library, or be
    swallowed. When handlers are nested, the inner one starts with a signal that the outer one has recorded, and passes
    its own on to the outer one at exit; the second signal is counted over all of them. In another thread than the main
    one, which alone receives signals, a handler follows the one of the main thread.

    Args:
        quiet: print nothing when a signal arrives.
        ignore_repeat: ignore every further signal, instead of ending the process at the second.

    Attributes:
        name: the recorded signal, as ``"SIGTERM"``; empty while there is none.
    """

    def __init__(self, quiet: bool, ignore_repeat: bool = False) -> None:
        self.quiet, self.ignore_repeat, self.name = quiet, ignore_repeat, ""
        self._previous: dict[int, Any] = {}
        self._outer: PreemptionHandler | None = None
        self._main: PreemptionHandler | None = None  # of the main thread, where this one is in another
        self._synced_at: int | None = None  # step of the last synchronisation
        self._next_sync = 0
        self._clock = 0.0  # at the last synchronisation

    def __enter__(self) -> PreemptionHandler:
        global _active
        self._clock = time.monotonic()
        if threading.current_thread() is not threading.main_thread():
            self._main = _active
            return self
        if _active is not None:
            self._outer, self.name = _active, self.name or _active.name
        _active = self
        if self.ignore_repeat or not self.name:  # after the first signal the next one ends the process
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        self._restore()
        if _active is self:
            _active = self._outer
        if self._outer is not None:  # a signal after the last step still has to stop the outer loop
            self._outer.name = self._outer.name or self.name

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        handler: PreemptionHandler | None = self
        while handler is not None and not handler.ignore_repeat:
            handler._restore()  # from the inside out: what was there before all of them is left
            handler = handler._outer
        if not self.quiet and rank() == 0:
            print(f"\nlongtail: {self.name}: finishing this step, then saving", file=sys.stderr, flush=True)

    def check(self, place: str) -> None:
        """Raise StoppedError if this process has received a signal; for work that it does not share with others.

        Args:
            place: how far the training came, for the message.
        """
        if name := self._received():
            raise StoppedError(name, place)

    def _received(self) -> str:
        return self.name or (self._main.name if self._main is not None else "")

    def sync(self, step: int, save: bool, device: torch.device, now: bool = False) -> tuple[str, bool]:
        """Return the name of the signal that any process received, and whether any process wants to save.

        Several processes communicate at every tenth step, or more often where steps are slow, so that about five
        seconds pass in between; at the other steps the answer is ``("", False)``.

        Args:
            step: the number of steps done, equal on all processes.
            save: whether this process wants to save a checkpoint.
            device: device that the process group communicates through.
            now: communicate at this step in any case; equal on all processes.
        """
        if world_size() == 1:
            return self._received(), save
        if step < self._next_sync and not now:
            return "", False
        steps = 1 if self._synced_at is None else max(1, step - self._synced_at)
        received, seconds = self._received(), (time.monotonic() - self._clock) / steps
        local = [int(signal.Signals[received]) if received else 0, int(save), seconds]
        number, save_any, slowest = all_reduce_max(torch.tensor(local, device=device)).tolist()
        # the slowest process decides for all of them
        every = max(1, min(_SYNC_EVERY, int(_SYNC_SECONDS / max(slowest, 1e-9))))
        self._next_sync = step - step % every + every
        self._synced_at, self._clock = step, time.monotonic()
        return signal.Signals(int(number)).name if number else "", bool(save_any)
