"""GML as a callback of Lightning, which is installed as ``pytorch_lightning`` or ``lightning``; neither is imported."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longtail.errors import LongtailError
from longtail.integrations.mixture import MixtureTerms


class GMLCallbackMixin:
    """The hooks of a callback that adds the terms of GML to a module's loss.

    With ``Callback`` of the installed library it is a callback::

        class GMLCallback(GMLCallbackMixin, pytorch_lightning.Callback): ...

    The module keeps its own loss, such as :class:`longtail.losses.LogitAdjustedLoss`. Its ``training_step`` returns a
    dictionary with ``loss`` and ``features``, (B, F), and its batches have image ids beside images and labels
    (:class:`~longtail.integrations.mixture.WithIds`). Projections and temperature become the module's child ``gml``
    before ``configure_optimizers`` is called, so ``self.parameters()`` has them there, and checkpoints too: load one
    for prediction with ``strict=False``. The queues are saved as the callback's state; the teacher is not saved.

    Args:
        class_counts: (C,) training images of each class.
        teacher: images to features (B, T); it is frozen, in eval mode, and gets the module's device and precision.
        feature_dim: F.
        teacher_dim: T.
        mixture_weight: weight of both terms [the paper's β].
        unpack: from a batch to images, labels and ids; the first three entries, if not given, which a dictionary does
            not have.
        **options: of :class:`~longtail.integrations.mixture.MixtureTerms`.

    Raises:
        LongtailError: (by a fit) the module optimizes manually, its ``training_step`` returns no features, or a batch
            is a dictionary and there is no ``unpack``.
    """

    def __init__(
        self,
        class_counts: Any,
        teacher: nn.Module,
        feature_dim: int,
        teacher_dim: int,
        *,
        mixture_weight: float = 1.0,
        unpack: Callable[[Any], tuple[Tensor, Tensor, Tensor]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.terms = MixtureTerms(class_counts, feature_dim, teacher_dim, **options)
        self.teacher = teacher.eval().requires_grad_(False)
        self.mixture_weight = mixture_weight
        self.unpack = unpack or _first_three

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module the trained parts, and add the terms to what its ``training_step`` returns."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise LongtailError(
                "automatic_optimization: expected True, since the terms are added to the loss that training_step "
                "returns, which manual optimization does not use; compute them with MixtureTerms in training_step"
            )
        self.teardown(trainer, pl_module, stage)  # which an interrupted fit has left out
        pl_module.add_module("gml", self.terms)
        step = pl_module.training_step

        # wrapped, and not in on_before_backward: there a loss scaler has multiplied the loss already
        @functools.wraps(step)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return self._add_terms(pl_module, step(batch, *args, **kwargs), batch)

        pl_module.training_step = training_step

    def _add_terms(self, pl_module: Any, output: Any, batch: Any) -> Any:
        if not isinstance(output, Mapping) or "features" not in output:
            got = f"the keys {', '.join(output)}" if isinstance(output, Mapping) else type(output).__name__
            raise LongtailError(
                "training_step: expected a dictionary with loss and features, from which the GML callback computes its "
                f"terms, got {got}"
            )
        images, labels, ids = self.unpack(batch)
        with torch.no_grad():
            teacher_features = self.teacher(images)
        terms = self.terms(output["features"], teacher_features, labels, ids)
        pl_module.log_dict(
            {"gml/mixture": terms.mixture.detach(), "gml/tau": self.terms.criterion.temperature.detach()}
        )
        return {**output, "loss": output["loss"] + self.mixture_weight * (terms.mixture + terms.temperature)}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Give the teacher the module's device and type."""
        self.teacher.to(pl_module.device, pl_module.dtype)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Give the module its own ``training_step`` back."""
        if stage == "fit":
            pl_module.__dict__.pop("training_step", None)

    def state_dict(self) -> dict[str, Any]:
        """Return the contents of the queues."""
        return dict(self.terms.queues.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the contents of the queues."""
        self.terms.queues.load_state_dict(state_dict)


def _first_three(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, labels and ids; a function of the module, which can be pickled, as ``ddp_spawn`` needs it."""
    if isinstance(batch, Mapping):
        raise LongtailError(
            f"batch: expected images, labels and ids in this order, got a dictionary with the keys {', '.join(batch)}; "
            'give the callback unpack=lambda batch: (batch["pixel_values"], batch["labels"], batch["ids"])'
        )
    images, labels, ids = tuple(batch)[:3]
    return images, labels, ids
