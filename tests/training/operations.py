"""The number of operations of a piece of code, each of which an accelerator launches at least one kernel for."""

from __future__ import annotations

import collections
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_EMPTY = ("empty", "new_empty", "detach", "_local_scalar_dense", "promote_types", "profiler")


class CountsOperations(TorchDispatchMode):
    """Counts the operations by name, without views and what computes nothing."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)  # super() would hide from mypy that it is torch's
        self.operations: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        name = str(func)
        if not views and not name.removeprefix("aten.").startswith(_EMPTY):
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))
