"""What a method trains on: a batch of views with their labels. Legend: B images, V views, S side in pixels."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """What a method trains on."""  # not frozen: Fabric inspects the arguments of a module, and refuses frozen ones

    views: tuple[Tensor, ...]
    """V views, each (B, channels, S, S) float32 in [0, 1]."""
    labels: Tensor
    """(B,) int64, or (B, S, S) where every pixel has a label; −1 where there is none. Or (B, T, 5) float32 boxes with
    their classes, where these are what an image has."""
    ids: Tensor
    """(B,) int64 ids of the images, so that a query can leave its own image out of the keys."""
    key_features: Tensor | None = None
    """(B, F) the teacher's features of the key view, where they are cached or computed ahead of the step."""
    teacher_scores: Tensor | None = None
    """(B, D, C) the teacher's scores of the D distilled views, where they are cached or computed ahead of the step."""
    max_local_batch: int | None = None
    """Most images that any process has of this batch; B if None."""
    global_batch: int | None = None
    """Images that all processes together have of it."""
    epoch_fraction: float | Tensor = 0.0
    """Fraction of the training's epochs before this one, in [0, 1); a scalar of the device where batches are made
    there, since a recorded step cannot contain a number that changes."""
    mixed_labels: Tensor | None = None
    """(B,) int64 labels of the images that the classified views are mixed with, see :mod:`longtail.data.mixing`; None
    where no images are mixed."""
    label_weights: Tensor | None = None
    """(B,) the weight of an image's own label in [0, 1], where images are mixed."""
    gradient_weights: Tensor | None = None
    """(B,) factors of the gradient of each image's loss with respect to its scores; the loss itself stays as it is."""
    part: int = 0
    """Which part of a batch whose gradient is accumulated in parts this is, from 0."""
    images: Batch | None = None
    """The batch of images, where this is one of parts of them; None where a sample is an image."""

    def __len__(self) -> int:
        return len(self.labels)

    def targets(self, num_classes: int) -> Tensor:
        """Return the labels of the classified views: ``labels``, or (B, C) probabilities where images are mixed.

        An image without a label has a row of zeros.
        """
        if self.mixed_labels is None or self.label_weights is None:
            return self.labels
        classes = torch.arange(num_classes, device=self.labels.device)
        own, other = (labels[:, None] == classes for labels in (self.labels, self.mixed_labels))
        weights = self.label_weights[:, None]
        return weights * own + (1 - weights) * other

    def map_tensors(self, function: Callable[[Tensor], Tensor], max_local_batch: int | None) -> Batch:
        """Return the batch with a function of every tensor that has a row for each image."""
        changes: dict[str, Any] = {"max_local_batch": max_local_batch, "views": tuple(map(function, self.views))}
        for name in BY_IMAGE:
            tensor = getattr(self, name)
            changes[name] = None if tensor is None else function(tensor)
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device) -> Batch:
        """Copy to ``device``, asynchronously to CUDA; itself where it is there."""
        if self.labels.device.type == device.type:
            return self
        pinned = device.type == "cuda"
        return self.map_tensors(
            lambda tensor: (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True),
            self.max_local_batch,
        )

    def split(self, parts: int) -> list[Batch]:
        """Return the batch in ``parts`` parts whose sizes differ by at most one."""
        if parts == 1:
            return [self]
        edges = [len(self) * part // parts for part in range(parts + 1)]
        max_local_batch = None if self.max_local_batch is None else -(-self.max_local_batch // parts)
        return [
            dataclasses.replace(
                self.map_tensors(lambda tensor, a=a, b=b: tensor[a:b], max_local_batch),  # type: ignore[misc]
                part=number,
            )
            for number, (a, b) in enumerate(itertools.pairwise(edges))
        ]


BY_IMAGE = (
    *("labels", "ids", "key_features", "teacher_scores"),
    *("mixed_labels", "label_weights", "gradient_weights"),
)
"""Tensors of a batch, beside its views, that have a row for every image."""
