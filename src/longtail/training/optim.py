"""The optimizer: which parameters have which learning rate and weight decay."""

from __future__ import annotations

from typing import Any

import torch

from longtail.config import Config
from longtail.methods.base import Method
from longtail.nn import CosineClassifier, LinearClassifier, RegionClassifier
from longtail.nn.tuning import layer_depths


def build_optimizer(
    method: Method, config: Config, on_device: bool = False, device: torch.device | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters of a method that require gradients.

    Every group has a factor ``lr_scale`` of the learning rate.

    Args:
        method: what is trained.
        config: settings of the run.
        on_device: whether a step needs nothing of the host: its learning rate may then be a tensor, and a CUDA graph
            may contain it. All parameters are updated by one kernel.
        device: where it will run, to which the method may not have been moved yet; that of the method if not given.
    """
    settings = config.optimizer
    options: dict[str, Any] = {"fused": True} if on_device else {}
    groups = [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in _groups(method, config).items()
    ]
    if settings.name == "adamw":
        device = device or next(method.parameters()).device
        options |= {"capturable": True} if on_device and device.type == "cuda" else {}
        return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, **options)
    return torch.optim.SGD(
        groups,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        **options,
    )


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Restore the state of an optimizer that :func:`build_optimizer` built, for this device or for another one."""
    how = ("lr", "foreach", "fused", "capturable", "differentiable")
    groups = [
        {**saved, **{name: group[name] for name in how if name in group}}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the learning rate of every group, times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


@torch.no_grad()
def limit_row_norms(method: Method, max_norm: float) -> None:
    """Project the weights of every class to a norm of at most ``max_norm``, in place, without waiting for the device.

    Source: MaxNorm of Alshammari et al., *Long-Tailed Recognition via Weight Balancing*, CVPR 2022, arXiv 2203.14197.
    """
    for module in method.modules():
        if isinstance(module, CosineClassifier | LinearClassifier | RegionClassifier) and module.weight.requires_grad:
            norms = torch.linalg.vector_norm(module.weight, dim=1, keepdim=True)
            module.weight.mul_((max_norm / norms.clamp(min=1e-12)).clamp(max=1.0))


def _groups(method: Method, config: Config) -> dict[tuple[float, float], list[torch.nn.Parameter]]:
    """Return parameters by factor of the learning rate and by weight decay."""
    settings = config.optimizer
    head_scale = 1.0 if settings.head_learning_rate is None else settings.head_learning_rate / settings.learning_rate
    depths = layer_depths(method.encoder.backbone) if settings.layer_decay < 1 else {}
    deepest = max(depths.values(), default=0)
    without_decay = {id(parameter) for parameter in method.no_weight_decay()}
    head_decay = settings.weight_decay if settings.head_weight_decay is None else settings.head_weight_decay
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decay, prefix = head_scale, head_decay, "encoder.backbone."
        if name.startswith(prefix):
            depth = depths.get(name.removeprefix(prefix), deepest)
            scale, decay = settings.layer_decay ** (deepest - depth), settings.weight_decay
        if id(parameter) in without_decay:
            decay = 0.0
        elif parameter.ndim <= 1 and settings.norm_weight_decay is not None:
            decay = settings.norm_weight_decay
        elif parameter.ndim <= 1 and settings.name == "adamw":
            decay = 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return groups
