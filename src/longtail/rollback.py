"""What an object was before a change that failed. Imports nothing of longtail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def all_or_nothing(changed: object) -> Iterator[None]:
    """Return a context that gives an object its attributes back where the body raises.

    An estimator keeps its last fit, or none, where a new one fails. What an attribute holds must be replaced rather
    than changed in place.

    Args:
        changed: the object whose attributes the body sets.
    """
    before = dict(vars(changed))
    try:
        yield
    except BaseException:
        changed.__dict__ = before
        raise
