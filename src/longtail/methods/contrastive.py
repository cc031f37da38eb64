"""What the contrastive rivals share: an embedding beside the classifier, and which views are compared.

Legend: B samples, V compared views, F feature width, D embedding width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.errors import LongtailError
from longtail.memory import ClassQueues
from longtail.methods.base import Method, Taught, View
from longtail.nn import Encoder, ProjectionMLP

_Self = TypeVar("_Self", bound="Remembering")


class Contrastive(Method):
    """Logit adjustment on the classification view, and a contrast term on the embeddings of V views.

    A process compares the images of its own part of the batch with one another.
    """

    def __init__(self, config: Config, encoder: Encoder, class_counts: list[int], *teacher: Any) -> None:
        super().__init__(config, encoder, class_counts, *teacher)
        self.embed = ProjectionMLP(encoder.num_features, config.contrast.embedding_dim)

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where there is nothing to compare with."""
        if sum(count > 0 for count in class_counts) < 2:
            raise LongtailError(
                f"method {config.method}: compares classes, expected at least 2 with training images, got "
                f"{sum(count > 0 for count in class_counts)}; use a set with more classes"
            )

    @classmethod
    def student_views(cls, config: Config) -> int:
        """Return V, and one more where the classification view is not among them."""
        return config.contrast.views + (not config.contrast.share_view)

    @classmethod
    def classified_views(cls, config: Config) -> int:
        """Return 1, or all of them."""
        return cls.student_views(config) if config.classifier.every_view else 1

    @classmethod
    def views(cls, config: Config) -> tuple[View, ...]:
        """Return the classification view and the compared ones."""
        contrast: View = "contrast"
        return ("classification", *(contrast,) * (cls.student_views(config) - 1))

    def compared(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (V · B, D) embeddings of the compared views and their (V · B,) labels."""
        views = self.config.contrast.views
        return self.embed(features[-views * len(batch) :]), batch.labels.repeat(views)

    def contrast(self, features: Tensor, scores: Tensor, batch: Batch, taught: Taught) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the contrast term, weighed."""
        embeddings, labels = self.compared(features, batch)
        return {"contrast": self.config.contrast.weight * self.compare(embeddings, labels, scores, batch)}

    @abstractmethod
    def compare(self, embeddings: Tensor, labels: Tensor, scores: Tensor, batch: Batch) -> Tensor:
        """Return the contrast term, a scalar.

        Args:
            embeddings: (V · B, D) of the compared views.
            labels: (V · B,).
            scores: (·, C) of the classified views.
            batch: whose views these are.
        """


def themselves(embeddings: Tensor, keys: int) -> Tensor:
    """Return (V · B, keys) bool, True where a key is the query itself: the first V · B keys are the queries."""
    return torch.eye(len(embeddings), keys, dtype=torch.bool, device=embeddings.device)


class Remembering(Contrastive):
    """With one plain queue of the embeddings of earlier steps."""

    def __init__(self, config: Config, encoder: Encoder, class_counts: list[int], *teacher: Any) -> None:
        super().__init__(config, encoder, class_counts, *teacher)
        settings = config.contrast
        self.queue = ClassQueues(class_counts, settings.queue_size, dim=settings.embedding_dim, shared=True)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the queue's contents: part of ``state_dict``, but no buffers."""
        return self.queue.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Restore the queue's contents."""
        self.queue.load_state_dict(state)

    def watched(self) -> dict[str, Tensor]:
        """Return the share of the queue that is filled."""
        return {"queue_fill": self.queue.fill}

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)
        self.queue.apply(fn)
        return self
