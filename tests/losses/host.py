"""What shows that a loss would wait for an accelerator."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorsOfTheHost(TorchDispatchMode):
    """Notes the operations that read or make a tensor on the host, when all others are on the device meta."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)  # super() would hide from mypy that it is torch's
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, results)):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self.operations.add(str(func))
        return results
