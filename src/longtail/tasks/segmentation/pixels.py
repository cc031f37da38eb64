"""Pixels as samples: which pixels of an image are queries and keys of the mixture.

Legend: B images, P points of each, C classes, F feature width, H and W sides of an image in pixels, h and w of its map
of features.

An image has a hundred thousand pixels, most of them of a few classes, and neighbouring pixels are alike. So P of them
are drawn: one of every class that is present, then a second of every class that still has one, and so on. The prior of
such a draw is not that of the pixels, but how often a class is drawn
(:attr:`~longtail.data.sources.segmentation.SegmentationData.draw_counts`).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.data.batch import Batch
from longtail.losses.reduction import to_full_precision
from longtail.methods.samples import SampleAdapter, Samples
from longtail.nn.segmentation import STRIDE, downsample_labels, upsample_scores

_CANDIDATES = 2**14  # pixels of an image that a draw looks at; of a larger one every second, third, … either way


class PixelAdapter(SampleAdapter):
    """Samples are pixels: all of them for the classifier, drawn ones and regions for the mixture.

    Args:
        pixels_per_image: P, the largest number of pixels that are drawn from an image.
        keys: what becomes keys: drawn pixels, regions (the mean feature of a class in an image), or both.
        draw_counts: (C,) how often each class is drawn.
    """

    one_per_image: ClassVar[bool] = False

    def __init__(
        self, pixels_per_image: int, keys: Literal["pixels", "regions", "both"], draw_counts: list[int]
    ) -> None:
        self.pixels_per_image, self.key_kind, self.draw_counts = pixels_per_image, keys, draw_counts

    def upsample_scores(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return (B, C, H, W) scores of every pixel."""
        return upsample_scores(scores, *labels.shape[1:])

    def downsample_labels(self, labels: Tensor) -> Tensor:
        """Return (B, h, w) labels."""
        return downsample_labels(labels)

    def queries(self, features: Tensor, batch: Batch) -> Samples:
        """Return features, labels and image ids of drawn pixels; features are of one view."""
        rows, columns, drawn = draw_points(batch.labels, self.pixels_per_image)
        ids = batch.ids.repeat_interleave(drawn.shape[1])
        return Samples(features_at(features, rows, columns), drawn.flatten(), ids)

    def keys(self, features: Tensor, batch: Batch) -> Samples:
        """Return drawn pixels, regions, or both."""
        parts = []
        if self.key_kind != "regions":
            parts.append(self.queries(features, batch)[:3])
        if self.key_kind != "pixels":
            classes = len(self.draw_counts)
            parts.append((*regions(features, batch.labels, classes), batch.ids.repeat_interleave(classes)))
        merged, labels, ids = (torch.cat(part) for part in zip(*parts, strict=True))
        largest = None if batch.max_local_batch is None else batch.max_local_batch * len(ids) // len(batch)
        return Samples(merged, labels, ids, largest)

    def sample_counts(self, class_counts: list[int]) -> list[int]:  # noqa: ARG002
        """Return how often each class is drawn."""
        return self.draw_counts


def draw_points(labels: Tensor, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pixels, shared out evenly among the classes of each image. No wait for an accelerator.

    Args:
        labels: (B, H, W) int64 in [0, C), −1 where unlabelled.
        points: P, the most an image.

    Returns:
        Rows and columns, (B, P) int64, and labels, (B, P); −1 fills up where there are fewer labelled pixels than P.
    """
    _, height, width = labels.shape
    step = max(1, math.ceil(math.sqrt(height * width / _CANDIDATES)))
    down, across = torch.randint(step, (2,)).tolist() if step > 1 else (0, 0)
    seen = labels[:, down::step, across::step][:, : height // step, : width // step]
    columns = seen.shape[2]
    flat = seen.flatten(1)
    # by class, and at random within each
    order = (flat + torch.rand(flat.shape, device=labels.device)).argsort(dim=1)
    ordered = flat.gather(1, order)
    place = torch.arange(flat.shape[1], device=labels.device)
    turn = (place - torch.searchsorted(ordered, ordered)).float()
    # whose turn it is is decided by lot, so that no class is preferred in a turn that is not finished
    turn = turn.masked_fill(ordered < 0, math.inf) + torch.rand(flat.shape, device=labels.device)
    chosen = turn.topk(min(points, flat.shape[1]), dim=1, largest=False).indices
    position = order.gather(1, chosen)
    return position // columns * step + down, position % columns * step + across, ordered.gather(1, chosen)


def features_at(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return (B · P, F) features of pixels, between those of the squares around them, of (B, F, h, w) maps."""
    maps = to_full_precision(maps)  # half precision would move positions by a pixel
    height, width = maps.shape[-2:]
    grid = torch.stack([(columns + 0.5) / (STRIDE * width), (rows + 0.5) / (STRIDE * height)], dim=-1)
    found = F.grid_sample(maps, 2 * grid[:, None] - 1, mode="bilinear", padding_mode="border", align_corners=False)
    return found[:, :, 0].transpose(1, 2).flatten(0, 1)


def regions(maps: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean feature of every class in every image, (B · C, F), and its label, (B · C,), −1 where it is not.

    Args:
        maps: (B, F, h, w).
        labels: (B, H, W) int64 in [0, C), −1 where unlabelled.
        classes: C.
    """
    maps = to_full_precision(maps)  # in bfloat16 a count ends at 256
    batch, width = maps.shape[:2]
    squares = downsample_labels(labels).flatten(1)
    # a class more than there are takes what is unlabelled
    row = torch.where(squares < 0, classes, squares) + (classes + 1) * torch.arange(batch, device=maps.device)[:, None]
    sums = maps.new_zeros(batch * (classes + 1), width)
    sums.index_add_(0, row.flatten(), maps.flatten(2).transpose(1, 2).flatten(0, 1))
    counts = maps.new_zeros(batch * (classes + 1)).index_add_(0, row.flatten(), maps.new_ones(row.numel()))
    means = (sums / counts.clamp(min=1)[:, None]).view(batch, classes + 1, width)[:, :classes]
    there = counts.view(batch, classes + 1)[:, :classes] > 0
    index = torch.arange(classes, device=maps.device).expand(batch, -1)
    return means.flatten(0, 1), torch.where(there, index, -1).flatten()
