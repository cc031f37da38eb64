"""Standard streams that are closed, that nobody reads any more, or that cannot be written."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Messages(io.FileIO):
    """Standard error, of which is dropped what cannot be written: a message or a bar must not end a training."""

    def write(self, data: Buffer, /) -> int:
        left = total = memoryview(data).cast("B")
        with contextlib.suppress(OSError):
            while left:
                left = left[super().write(left) or len(left) :]  # None where a pipe that does not block is full
        return len(total)


def prepare_streams() -> None:
    """Replace closed standard streams by the null device, and let no message fail."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # the lowest free descriptor is that of the closed stream, which a file of a run would take otherwise: it
            # would receive what libraries and other processes print
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 (open as long as the process)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        # without a buffer between, which cannot be entered again by a message of a signal's handler
        raw = _Messages(sys.stderr.fileno(), "w", closefd=False)
        sys.stderr = io.TextIOWrapper(raw, encoding=sys.stderr.encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8


def is_read(stream: TextIO) -> bool:
    """Return whether a stream can be written to as far as known: False for a pipe whose reader has gone."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # errors are reported without being asked for
    return not poll.poll(0)


def discard(stream: TextIO) -> None:
    """Lead a stream to the null device, with what it holds: it would fail again when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
