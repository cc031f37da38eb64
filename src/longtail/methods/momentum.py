"""A slow average of the student, which makes keys."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Momentum(nn.Module):
    """A slow average of modules, which gives keys that change little from step to step.

    Source: He et al., *Momentum Contrast*, CVPR 2020, arXiv 1911.05722.

    Args:
        modules: applied one after the other.
        decay: of the average.
    """

    def __init__(self, modules: list[nn.Module], decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.average = nn.Sequential(*(copy.deepcopy(module) for module in modules)).requires_grad_(False)

    @torch.no_grad()
    def update(self, modules: list[nn.Module]) -> None:
        """Move towards the modules as they are now."""
        here = [p for module in modules for p in module.parameters()]
        torch._foreach_lerp_(list(self.average.parameters()), [p.detach() for p in here], 1 - self.decay)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return what the averaged modules make of images; BatchNorm uses the batch's statistics."""
        made: Tensor = self.average(images)
        return made
