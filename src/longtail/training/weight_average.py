"""A moving average of the student's weights, which is validated and saved in their place."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

_WARM_UP_POWER = 2 / 3


class WeightAverage:
    """An exponential moving average of modules, of their parameters and their buffers, in eval mode.

    Update t = 0, 1, … keeps min(1 − max(t, 1)^(−2/3), decay) of the average: the first two replace it. That is
    computed with tensors, so that a CUDA graph of a step can contain it.

    Source: the warm-up is that of timm's ``ModelEmaV3``.

    Args:
        modules: whose average it is, on their device.
        decay: of the average, in [0, 1).

    Attributes:
        module: the averaged modules.
        updates: int64 scalar on the device, the updates so far, which is not part of the modules' state.
    """

    def __init__(self, modules: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(modules).eval()
        self.updates = torch.zeros((), dtype=torch.int64, device=next(modules.parameters()).device)
        self._modules = modules

    @functools.cached_property
    def _tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Averaged tensors and the current ones, and those that are copied, such as counts, and the current ones."""
        current = self._modules.state_dict()
        pairs = [(tensor, current[name]) for name, tensor in self.module.state_dict().items()]
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        return [a for a, _ in floating], [b for _, b in floating], [a for a, _ in others], [b for _, b in others]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current weights of the modules."""
        average, current, copied, originals = self._tensors
        weight = self.updates.clamp(min=1).float().pow(-_WARM_UP_POWER).clamp(min=1 - self.decay)
        differences = list(torch._foreach_sub(current, average))
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(average, differences)
        if copied:
            torch._foreach_copy_(copied, originals)
        self.updates += 1

    def restore(self, state: dict[str, Tensor], updates: int) -> None:
        """Restore the state dict of :attr:`module` after some updates."""
        self.module.load_state_dict(state)
        self.updates.fill_(updates)
