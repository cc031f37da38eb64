"""Computing the next item while the current one is used. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield each item with ``function(item)``, in order; a thread computes one result ahead.

    It helps where the function waits or releases the interpreter's lock, as decoding image files does.

    Args:
        function: called once per item, never twice at a time.
        items: its arguments.
    """
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(function, items[0]) if len(items) else None
        for position, item in enumerate(items):
            assert pending is not None
            result = pending.result()
            if position + 1 < len(items):
                pending = pool.submit(function, items[position + 1])
            yield item, result
