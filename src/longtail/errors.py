"""What a user is told when an input is not right."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class LongtailError(ValueError):
    """An input that cannot be used; the message is one line: what, where, what was expected, what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """


class StoppedError(Exception):
    """A training was told to stop by SIGTERM or SIGINT, and has saved.

    Args:
        name: of the signal.
        place: how far it came.
    """

    def __init__(self, name: str, place: str) -> None:
        super().__init__(name, place)  # as they came, so that it can go from one process to another
        self.name, self.place = name, place
        self.code = 128 + signal.Signals[name]

    def __str__(self) -> str:
        return f"stopped by {self.name} {self.place}, all of it saved"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return «; perhaps you meant X?» for the names closest to ``name``, or the list of all when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"; perhaps you meant {' or '.join(close)}?"
    return f"; there are: {', '.join(names)}" if len(names) <= 20 else ""
