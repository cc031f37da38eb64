"""Sharpness-aware steps: along the gradient at the weights nearby where a loss is largest.

With the loss L of a batch, class weights ω_c in [0, 1], the loss L^ω in which the loss of each image has the weight of
its class, and a factor λ, a step is along

    ∇L(w) + λ [∇L^ω(w + ε) − ∇L^ω(w)],    ε = ρ ∇L^ω(w) / ‖∇L^ω(w)‖

- SAM (Foret et al., ICLR 2021, arXiv 2010.01412): ω = 1 and λ = 1, so that the step is along ∇L(w + ε).
- ImbSAM (Zhou et al., ICCV 2023, arXiv 2308.07815): ω = 1 for classes with fewer images than η, 0 for others, λ = 1.
- Focal-SAM (Li et al., ICML 2025, arXiv 2505.01660): ω_c = (1 − π_c)^γ, with the share π_c of the training images.

That takes up to three passes over the batch. The first, with the weights ω, gives ε; its BatchNorm statistics, queues
and moving averages are those that count. The second, with 1 − λω (SAM needs none), and the third at w + ε, with λω, add
up to the gradient of the step. Before each of them the state is that before the first pass, so that it sees the same
queues; after the last it is that after the first. Weights return to w by copies, bit by bit.

ρ limits the norm over all parameters, and over all processes: ε is computed from the gradient of the whole batch. Where
a network draws random numbers (dropout), each pass draws its own.

Legend: B images, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.errors import LongtailError
from longtail.methods.base import LabelKind, Method

_PASSES = {"none": 1, "sam": 2, "imbsam": 3, "focal": 3}

Backward = Callable[[Sequence[Batch], bool], dict[str, Tensor]]
"""A pass over the parts of a batch, forward and backward: adds to the gradients, and returns the loss terms. The flag
says whether the gradients of all processes are averaged now; where not, they are with those of the next pass."""


def passes_per_step(config: Config) -> int:
    """Return how often a student view passes through the student in a step, forward and backward."""
    return _PASSES[config.optimizer.sharpness]


def sharpness_class_weights(config: Config, class_counts: list[int]) -> Tensor | None:
    """Return ω, (C,) float32 in [0, 1]; None where all are 1.

    Args:
        config: settings of the run.
        class_counts: (C,) training images per class.
    """
    settings, counts = config.optimizer, torch.tensor(class_counts, dtype=torch.float64)
    if settings.sharpness == "imbsam":
        return (counts < (settings.sharpness_below or config.shots.few_below)).float()
    if settings.sharpness == "focal":
        return ((1 - counts / counts.sum()) ** settings.sharpness_gamma).float()
    return None


def check_sharpness(config: Config, method: type[Method], class_counts: list[int], label_kind: LabelKind) -> None:
    """Raise LongtailError where the steps that ``optimizer.sharpness`` asks for do not fit.

    Args:
        config: settings of the run.
        method: what is trained.
        class_counts: (C,) training images per class.
        label_kind: what a label is of.
    """
    kind, weights = config.optimizer.sharpness, sharpness_class_weights(config, class_counts)
    if weights is None:
        return
    if label_kind != "image" or not method.losses_are_per_image():
        what = f"method {config.method}" if label_kind == "image" else f"images with labels of {label_kind}"
        raise LongtailError(
            f"optimizer.sharpness {kind}: weighs the loss of an image by its one class, and {what} cannot be split up "
            "by class; use sam"
        )
    if kind == "imbsam" and not bool((weights * torch.tensor(class_counts)).any()):
        below = config.optimizer.sharpness_below or config.shots.few_below
        raise LongtailError(
            f"optimizer.sharpness imbsam: expected a class with fewer than {below} training images, the smallest has "
            f"{min(filter(None, class_counts))}; raise optimizer.sharpness_below"
        )


class SharpnessAware:
    """Computes the gradient of a sharpness-aware step.

    Args:
        config: settings of the run; ``optimizer.sharpness`` is not none.
        method: what is trained, on its device.
        class_counts: (C,) training images per class.
        optimizer: of its parameters; only its ``zero_grad`` is called.
    """

    def __init__(self, config: Config, method: Method, class_counts: list[int], optimizer: Any) -> None:
        self.rho = config.optimizer.rho
        self.factor = config.optimizer.sharpness_weight if config.optimizer.sharpness == "focal" else 1.0
        self.optimizer = optimizer
        self.parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
        weights = sharpness_class_weights(config, class_counts)
        self.class_weights = None if weights is None else weights.to(method.classifier.weight.device)
        state = state_tensors(method)  # what a pass changes, before and after the first one
        self._before, self._after, self._originals = _Copies(state), _Copies(state), _Copies(self.parameters)

    def backward(self, parts: Sequence[Batch], backward: Backward) -> dict[str, Tensor]:
        """Leave the gradient of the step in the parameters, and return the loss terms at the weights as they are.

        Args:
            parts: of the batch, on the device.
            backward: a pass over them; the gradients are empty.
        """
        weights = [self._image_weights(part) for part in parts]
        self._before.save()
        terms = backward(_weighted(parts, weights), True)
        self._after.save()
        found = [(parameter, parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        steps = perturbation([gradient for _, gradient in found], self.rho)
        self.optimizer.zero_grad(set_to_none=True)
        if self.class_weights is not None:
            self._before.restore()
            backward(_weighted(parts, [None if w is None else 1 - self.factor * w for w in weights]), False)
        self._originals.save()
        with torch.no_grad():
            torch._foreach_add_([parameter for parameter, _ in found], steps)
        self._before.restore()
        backward(_weighted(parts, [None if w is None else self.factor * w for w in weights]), True)
        self._originals.restore()
        self._after.restore()
        return terms

    def _image_weights(self, batch: Batch) -> Tensor | None:
        """Return (B,) weights of the images; of a mixed one it is the mean of its classes' weights."""
        if self.class_weights is None:
            return None
        weights = self.class_weights[batch.labels.clamp(min=0)]
        if batch.mixed_labels is None or batch.label_weights is None:
            return weights
        others = self.class_weights[batch.mixed_labels.clamp(min=0)]
        return batch.label_weights * weights + (1 - batch.label_weights) * others


def perturbation(gradients: list[Tensor], rho: float) -> list[Tensor]:
    """Return ε = ρ g / ‖g‖, the norm over all tensors; 0 where the gradient is 0."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return list(torch._foreach_mul(gradients, rho / (norm + 1e-12)))


def named_tensors(method: Method) -> dict[str, Tensor]:
    """Return every tensor of a method by its name, those of its memories too, which are no buffers."""
    found: dict[str, Tensor] = {}
    for path, module in method.named_modules():
        owners: dict[str, object] = {path: module}
        owners |= {f"{path}.{name}": value for name, value in vars(module).items() if not isinstance(value, nn.Module)}
        for prefix, owner in owners.items():
            tensors = {**getattr(owner, "_buffers", {}), **getattr(owner, "_parameters", {})}
            tensors |= {k: v for k, v in getattr(owner, "__dict__", {}).items() if isinstance(v, Tensor)}
            found |= {f"{prefix}.{name}".strip("."): tensor for name, tensor in tensors.items() if tensor is not None}
    return found


def state_tensors(method: Method) -> list[Tensor]:
    """Return what a pass over a batch changes beside the gradients: buffers, queues, and moving averages."""
    own = {id(parameter) for part in (method.encoder, method.classifier) for parameter in part.parameters()}
    found = {id(tensor): tensor for tensor in named_tensors(method).values()}
    return [tensor for key, tensor in found.items() if key not in own and not tensor.requires_grad]


def _weighted(parts: Sequence[Batch], weights: Sequence[Tensor | None]) -> list[Batch]:
    return [dataclasses.replace(part, gradient_weights=w) for part, w in zip(parts, weights, strict=True)]


class _Copies:
    """Room for the values of tensors, to which they return later.

    Args:
        tensors: whose values are saved and restored, in one operation for all of one type.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor.detach())
        self._groups = [(group, [torch.empty_like(tensor) for tensor in group]) for group in by_type.values()]

    @torch.no_grad()
    def save(self) -> None:
        for tensors, copies in self._groups:
            torch._foreach_copy_(copies, tensors)

    @torch.no_grad()
    def restore(self) -> None:
        for tensors, copies in self._groups:
            torch._foreach_copy_(tensors, copies)
