"""An exponential moving average of the student, which computes keys."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMAEncoder(nn.Module):
    """An exponential moving average of modules: its keys change little from step to step.

    Source: He et al., *Momentum Contrast*, CVPR 2020, arXiv 1911.05722.

    Args:
        modules: applied one after the other.
        decay: of the average, in [0, 1).
    """

    def __init__(self, modules: list[nn.Module], decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.average = nn.Sequential(*(copy.deepcopy(module) for module in modules)).requires_grad_(False)

    @torch.no_grad()
    def update(self, modules: list[nn.Module]) -> None:
        """Move towards the current weights of the modules."""
        current = [p.detach() for module in modules for p in module.parameters()]
        torch._foreach_lerp_(list(self.average.parameters()), current, 1 - self.decay)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the output of the averaged modules; BatchNorm uses the statistics of the batch."""
        outputs: Tensor = self.average(images)
        return outputs
