"""An exponential moving average of the student, which computes keys, or scores that are distilled."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from longtail.nn.tuning import frozen_batch_norms


class EMAEncoder(nn.Module):
    """An exponential moving average of modules: what it computes changes little from step to step.

    With warm-up, update t = 0, 1, … keeps min(1 − 1/(t + 1), decay) of the average, which is then the mean of the
    weights at all updates so far until there are 1 / (1 − decay) of them.

    Source: He et al., *Momentum Contrast*, CVPR 2020, arXiv 1911.05722; with warm-up Tarvainen & Valpola, *Mean
    teachers are better role models*, NeurIPS 2017, arXiv 1703.01780.

    Args:
        modules: applied one after the other.
        decay: of the average, in [0, 1).
        parts: updates in a step of the optimizer, one for each part of a batch, which move the average as far as one.
        warm_up: average over the updates so far at first.

    Attributes:
        updates: int64 buffer with warm-up, the updates so far: on the device, where a recorded step can count it.
    """

    updates: Tensor

    def __init__(self, modules: list[nn.Module], decay: float, parts: int = 1, warm_up: bool = False) -> None:
        super().__init__()
        self.decay, self.warm_up = decay ** (1 / parts), warm_up
        if warm_up:
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.average = nn.Sequential(*(copy.deepcopy(module) for module in modules))
        self._frozen = frozen_batch_norms(self.average)
        self.average.requires_grad_(False)

    def train(self, mode: bool = True) -> EMAEncoder:
        """Set the mode; the statistics of BatchNorm layers that are not trained stay, as the student's do."""
        super().train(mode)
        for name in self._frozen:
            self.average.get_submodule(name).eval()
        return self

    @torch.no_grad()
    def update(self, modules: list[nn.Module]) -> None:
        """Move towards the current weights of the modules."""
        current: list[Tensor] = [p.detach() for module in modules for p in module.parameters()]
        average: list[Tensor] = list(self.average.parameters())
        if not self.warm_up:
            torch._foreach_lerp_(average, current, 1 - self.decay)
            return
        self.updates += 1
        weight = (1 / self.updates).clamp(min=1 - self.decay)
        differences = list(torch._foreach_sub(current, average))
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(average, differences)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the output of the averaged modules; BatchNorm uses the statistics of the batch."""
        outputs: Tensor = self.average(images)
        return outputs
