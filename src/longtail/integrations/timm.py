"""GML as a training task of timm, for versions that have ``timm.task``.

Legend: B samples, C classes, T teacher's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from longtail.errors import LongtailError
from longtail.integrations.mixture import MixtureTerms


class _Trainable(nn.Module):
    """What is trained, in one forward pass, as DistributedDataParallel needs it."""

    model: Any

    def __init__(self, model: nn.Module, terms: MixtureTerms) -> None:
        super().__init__()
        self.model, self.terms = model, terms

    def no_weight_decay(self) -> set[str]:
        inner = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"model.{name}" for name in inner} | {"terms.criterion.temperature_logit"}

    def forward(
        self, images: Tensor, teacher_features: Tensor, labels: Tensor, ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        features = self.model.forward_features(images)
        output = self.model.forward_head(features)
        pooled = self.model.forward_head(features, pre_logits=True)
        terms = self.terms(pooled, teacher_features, labels, ids)
        return output, terms.mixture, terms.temperature


class GMLTask(TrainingTask):  # type: ignore[misc]
    """A classification loss and the terms of GML, as a task of timm's training loop.

    For a loss on scores alone no bridge is needed: ``timm.task.ClassificationTask(model, criterion=loss)`` with a
    module of :mod:`longtail.losses`.

    timm's loaders give no image ids, without which the temperature cannot be learned: it is fixed, unless
    ``learn_temperature`` is set and the loop calls ``task(input, target, ids)``.

    Args:
        model: a timm network for C classes.
        teacher: a timm network whose pooled features are the keys; it is frozen, in eval mode, and gets the images as
            the model gets them.
        class_counts: (C,) training images of each class.
        criterion: (scores, class indices) to the classifier's loss, such as
            :class:`longtail.losses.LogitAdjustedLoss`.
        mixture_weight: weight of both terms [the paper's β].
        learn_temperature: learn τ.
        device: device of the task.
        dtype: type of the floating-point tensors of teacher and terms, which is that of the model.
        verbose: as in timm.
        **options: of :class:`~longtail.integrations.mixture.MixtureTerms`.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        class_counts: Any,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor],
        *,
        mixture_weight: float = 1.0,
        learn_temperature: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.criterion = criterion.to(self.device) if isinstance(criterion, nn.Module) else criterion
        self.teacher: Any = teacher.to(device=self.device, dtype=dtype).eval().requires_grad_(False)
        terms = MixtureTerms(
            class_counts, _width(model), _width(teacher), learn_temperature=learn_temperature, **options
        )
        self.trainable_module: Any = _Trainable(model, terms.to(device=self.device, dtype=dtype))
        self.mixture_weight = mixture_weight

    def forward(self, input: Tensor, target: Tensor, ids: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``loss``, ``output`` (the scores), ``task_loss`` and ``mixture_loss``.

        Args:
            input: (B, …) images.
            target: (B,) int64 class indices.
            ids: (B,) int64 image ids.

        Raises:
            LongtailError: the target is not of class indices.
        """
        if target.is_floating_point() or target.ndim != 1:
            raise LongtailError(
                f"target: expected class indices (B,), got {tuple(target.shape)} of {target.dtype}; GML compares an "
                "image with the keys of its class, so switch mixup and cutmix off"
            )
        with torch.no_grad():
            features = self.teacher.forward_head(self.teacher.forward_features(input), pre_logits=True)
        output, mixture, temperature = self.trainable_module(input, features, target, ids)
        task_loss = self.criterion(output, target)
        loss = task_loss + self.mixture_weight * (mixture + temperature)
        return {"loss": loss, "output": output, "task_loss": task_loss, "mixture_loss": mixture}

    def train(self, mode: bool = True) -> GMLTask:
        """Set the mode of all but the teacher."""
        super().train(mode)
        self.teacher.eval()
        return self

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> GMLTask:
        """Wrap what is trained in DistributedDataParallel."""
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the network alone."""
        resolved = super().get_eval_model(module=module, ema=ema)
        current: Any = resolved
        while current is not None and not isinstance(current, _Trainable):
            current = getattr(current, "module", None)
        network: nn.Module | None = resolved if current is None else current.model
        return network

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the parameters whose gradients are clipped."""
        trainable = unwrap_model(self.trainable_module)
        parameters = list(trainable.model.parameters())
        return (parameters[:-2] if exclude_head else parameters) + list(trainable.terms.parameters())

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return projections, temperature and queues."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            return {}
        terms = unwrap_model(module).terms
        return {"terms": terms.state_dict(), "queues": terms.queues.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Restore projections, temperature and queues."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if not state or module is None:
            return
        terms = unwrap_model(module).terms
        terms.load_state_dict(state["terms"], strict=strict)
        terms.queues.load_state_dict(state["queues"])


def _width(network: nn.Module) -> int:
    """Return the width of a timm network's pooled features."""
    return int(getattr(network, "head_hidden_size", None) or network.num_features)  # type: ignore[arg-type]
