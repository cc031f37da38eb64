"""Exceptions of the package, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class LongtailError(ValueError):
    """An input that cannot be used. The message is one line: what is wrong where, what was expected, what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """


class StoppedError(Exception):
    """A training was stopped by SIGTERM or SIGINT after it saved a checkpoint.

    Args:
        name: the signal, such as ``SIGTERM``.
        place: how far the training came, such as ``at step 5 of 10``.

    Attributes:
        code: exit code of the process, 128 + the number of the signal.
    """

    def __init__(self, name: str, place: str) -> None:
        super().__init__(name, place)  # the same arguments, so that the exception can be pickled
        self.name, self.place = name, place
        self.code = 128 + signal.Signals[name]

    def __str__(self) -> str:
        return f"stopped by {self.name} {self.place}, all of it saved"


def did_you_mean(name: str, known_names: Iterable[str]) -> str:
    """Return the end of an error message that suggests the known names closest to ``name``.

    If no name is close, it lists all names, unless they are more than twenty.

    >>> did_you_mean("resnet35", ["resnet34", "vgg16"])
    '; perhaps you meant resnet34?'
    """
    names = sorted(set(known_names))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"; perhaps you meant {' or '.join(close)}?"
    return f"; there are: {', '.join(names)}" if len(names) <= 20 else ""
