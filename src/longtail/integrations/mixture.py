"""GML for any training loop: what the bridges share. Legend: B samples, C classes, F and T widths of features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from longtail.class_counts import in_class_order
from longtail.errors import LongtailError
from longtail.losses import GMLLoss, GMLTerms
from longtail.memory import ClassQueues
from longtail.nn import ProjectionMLP

MAX_AUTO_QUEUE = 16384
"""Largest total size of the queues that is chosen automatically, in slots."""

_Self = TypeVar("_Self", bound="MixtureTerms")


class MixtureTerms(nn.Module):
    """The terms of GML beside a classifier's loss: both projections, the temperature, and the queues.

    The queues are no part of ``state_dict``; save ``queues.state_dict()`` beside it. Weight decay is wrong for
    ``criterion.temperature_logit``.

    Args:
        class_counts: (C,) training images of each class.
        feature_dim: F, width of the features of the network that is trained.
        teacher_dim: T, width of the teacher's features.
        embedding_dim: width of queries and keys.
        queue_size: slots of all queues together; one for each training image, at most :data:`MAX_AUTO_QUEUE`, if not
            given.
        queue_minimum: smallest number of slots of a class.
        temperature: initial temperature τ, between 0.02 and 1.
        learn_temperature: learn τ, which needs image ids.

    Raises:
        ValueError: the counts are not counts, there are too few slots, or τ is out of range.

    Source: Suh & Seo, ICML 2023, arXiv 2305.01160.
    """

    def __init__(
        self,
        class_counts: Any,
        feature_dim: int,
        teacher_dim: int,
        *,
        embedding_dim: int = 32,
        queue_size: int | None = None,
        queue_minimum: int = 2,
        temperature: float = 0.1,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__()
        counts = in_class_order(class_counts)
        size = queue_size or max(min(MAX_AUTO_QUEUE, int(sum(counts))), queue_minimum * len(counts))
        self.queues = ClassQueues(counts, size, queue_minimum, teacher_dim, dtype=torch.get_default_dtype())
        self.query_mlp = ProjectionMLP(feature_dim, embedding_dim)
        self.key_mlp = ProjectionMLP(teacher_dim, embedding_dim)
        self.criterion = GMLLoss(counts, temperature, learn_temperature, validate=False)
        self.learn_temperature = learn_temperature

    def forward(
        self, features: Tensor, teacher_features: Tensor, labels: Tensor, ids: Tensor | None = None
    ) -> GMLTerms:
        """Push the teacher's features into the queues, in training mode, and return both terms.

        A batch of one image has no statistics: both projections then use their running ones, and leave them as they
        are.

        Args:
            features: (B, F) of the network that is trained; under several processes, B is the same in all.
            teacher_features: (B, T) of the same images, without gradient.
            labels: (B,) int64 in [0, C).
            ids: (B,) int64 image ids, by which a query's own image is left out where τ is learned.

        Raises:
            LongtailError: τ is learned and there are no ids.
        """
        if ids is None:
            if self.learn_temperature:
                raise LongtailError(
                    "ids: expected the id of each image, without which the learned temperature would overfit; give "
                    "them (longtail.integrations.mixture.WithIds adds them to a data set) or set "
                    "learn_temperature=False"
                )
            ids = torch.full_like(labels, -1)
        if self.training:
            self.queues.push(teacher_features, labels, ids)
        slots = self.queues.slots()
        alone = self.training and len(features) == 1
        if alone:
            self.query_mlp.eval()
            self.key_mlp.eval()
        queries, keys = self.query_mlp(features), self.key_mlp(slots.features)
        if alone:
            self.query_mlp.train()
            self.key_mlp.train()
        return self.criterion.terms(queries, labels, keys, slots.labels, ids, slots.ids)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.queues.apply(fn)
        return self


class WithIds(Dataset[Any]):
    """A map-style data set whose samples have their index, the image's id.

    Tuples and lists have it at the end; mappings, as those of Hugging Face's data sets, under the key ``ids``.

    Args:
        dataset: with ``__getitem__`` and ``__len__``.

    Raises:
        LongtailError: (by reading a sample) a mapping has the key ``ids`` already.

    Example:
        >>> WithIds([("image", 3)])[0]
        ('image', 3, 0)
        >>> WithIds([{"pixel_values": "image", "labels": 3}])[0]
        {'pixel_values': 'image', 'labels': 3, 'ids': 0}
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Any, ...] | dict[str, Any]:
        """Return a sample and its index."""
        sample = self.dataset[index]
        if not isinstance(sample, Mapping):
            return (*sample, int(index))
        if "ids" in sample:
            raise LongtailError("dataset: expected samples without the key ids, which is for the index; rename it")
        return {**sample, "ids": int(index)}

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)
