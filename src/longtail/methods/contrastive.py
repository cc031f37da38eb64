"""What the contrastive methods share: an embedding beside the classifier, and the views that are compared.

Legend: B samples, V compared views, F feature width, D embedding width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from longtail.config import Config, Positive, PositiveFloat, Settings, Weight
from longtail.data.batch import Batch
from longtail.errors import LongtailError
from longtail.memory import ClassQueues
from longtail.methods.base import Method, TeacherOutput
from longtail.methods.views import CLASSIFICATION, CONTRAST, ViewPlan
from longtail.nn import ProjectionMLP

_Self = TypeVar("_Self", bound="QueueContrastive")


@dataclass(frozen=True, kw_only=True)
class ContrastiveSettings(Settings):
    """A contrastive loss beside the classifier."""

    weight: Weight = 1.0
    """Weight of the contrastive loss."""
    embedding_dim: Positive = 32
    """Width of the embeddings."""
    temperature: PositiveFloat = 0.1
    """Temperature; it is not learned."""
    views: Positive = 1
    """Student views that are compared."""
    share_view: bool = True
    """Let the classification view be one of them. The papers' recipes compare two more."""


class Contrastive(Method):
    """Logit adjustment on the classification view, and a contrastive loss on the embeddings of V views.

    Each process compares the images of its own part of the batch.
    """

    settings_class: ClassVar[type[ContrastiveSettings]]
    settings: ContrastiveSettings

    def build(self) -> None:
        """Add the embedding of the features."""
        self.embed = ProjectionMLP(self.encoder.num_features, self.settings.embedding_dim)

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where there is nothing to compare with."""
        super().check(config, class_counts)
        present = sum(count > 0 for count in class_counts)
        if present < 2:
            raise LongtailError(
                f"method {config.method}: compares classes, expected at least 2 with training images, got {present}; "
                "use a data set with more classes"
            )

    @classmethod
    def view_plan(cls, config: Config) -> ViewPlan:
        """Return the classification view and the compared views, of which it may be one."""
        settings, classifier = config.section(cls.settings_class), config.classifier
        student = settings.views + (not settings.share_view)
        return ViewPlan(
            student=(CLASSIFICATION, *(CONTRAST,) * (student - 1)),
            num_classified=student if classifier.every_view else 1,
            distill_every_view=classifier.distill_every_view,
        )

    @classmethod
    def reason_against_mixing(cls, config: Config) -> str:
        """Return why a view that is compared is classified too: compared images have one class each."""
        settings = config.section(cls.settings_class)
        if settings.share_view or config.classifier.every_view:
            return (
                "compares the classified view with images of its class; set "
                f"{settings.section}.share_view and classifier.every_view to false"
            )
        return ""

    def auxiliary_loss(
        self,
        features: Tensor,
        scores: Tensor,
        batch: Batch,
        teacher_output: TeacherOutput,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the weighted contrastive loss."""
        views = self.settings.views
        embeddings, labels = self.embed(features[-views * len(batch) :]), batch.labels.repeat(views)
        return {"contrast": self.settings.weight * self.contrastive_loss(embeddings, labels, scores, batch)}

    @abstractmethod
    def contrastive_loss(self, embeddings: Tensor, labels: Tensor, scores: Tensor, batch: Batch) -> Tensor:
        """Return the contrastive loss, a scalar.

        Args:
            embeddings: (V · B, D) of the compared views.
            labels: (V · B,).
            scores: (·, C) of the classified views.
            batch: the batch.
        """


def self_mask(embeddings: Tensor, num_keys: int) -> Tensor:
    """Return (V · B, num_keys) bool, True where a key is the query itself: the first V · B keys are the queries."""
    return torch.eye(len(embeddings), num_keys, dtype=torch.bool, device=embeddings.device)


@dataclass(frozen=True, kw_only=True)
class QueueSettings(ContrastiveSettings):
    """A contrastive loss against a queue of earlier embeddings."""

    queue_size: Positive = 1024
    """Embeddings of earlier steps that are kept."""


class QueueContrastive(Contrastive):
    """A contrastive method with one queue of the embeddings of earlier steps, for all classes."""

    settings_class: ClassVar[type[QueueSettings]]
    settings: QueueSettings

    def build(self) -> None:
        """Add the queue."""
        super().build()
        size, dim = self.settings.queue_size, self.settings.embedding_dim
        self.queue = ClassQueues(self.class_counts, size, dim=dim, shared=True)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the contents of the queue: part of ``state_dict``, but not buffers."""
        return self.queue.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Restore the contents of the queue."""
        self.queue.load_state_dict(state)

    def metrics_to_log(self) -> dict[str, Tensor]:
        """Return the filled fraction of the queue."""
        return {"queue_fill": self.queue.fill}

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)
        self.queue.apply(fn)
        return self
