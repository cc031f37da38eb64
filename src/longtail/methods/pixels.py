"""Pixels as samples: which of an image's pixels the mixture meets, as queries and as keys.

Legend: B images, P points of each, C classes, F feature width, H and W sides of an image in pixels, h and w of its map
of features.

A picture has a hundred thousand pixels, most of them sky and road, and neighbours say the same. So P of them are drawn:
one of every class that is there, then a second of every class that still has one, and so on. The prior of such a draw
is not the pixels': it is how often a class gets a share (:attr:`~longtail.data.scenes.DenseData.draw_counts`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.nn.segmentation import STRIDE, to_squares

_CANDIDATES = 2**14  # pixels of an image that a draw looks at; of a larger one every second, third, … either way


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
    height, width = maps.shape[-2:]
    grid = torch.stack([(columns + 0.5) / (STRIDE * width), (rows + 0.5) / (STRIDE * height)], dim=-1)
    found = F.grid_sample(
        maps, 2 * grid[:, None].to(maps.dtype) - 1, mode="bilinear", padding_mode="border", align_corners=False
    )
    return found[:, :, 0].transpose(1, 2).flatten(0, 1)


def regions(maps: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean feature of every class in every image, (B · C, F), and its label, (B · C,), −1 where it is not.

    Args:
        maps: (B, F, h, w).
        labels: (B, H, W) int64 in [0, C), −1 where unlabelled.
        classes: C.
    """
    batch, width = maps.shape[:2]
    squares = to_squares(labels).flatten(1)
    # a class more than there are takes what is unlabelled
    row = torch.where(squares < 0, classes, squares) + (classes + 1) * torch.arange(batch, device=maps.device)[:, None]
    sums = maps.new_zeros(batch * (classes + 1), width)
    sums.index_add_(0, row.flatten(), maps.flatten(2).transpose(1, 2).flatten(0, 1))
    counts = maps.new_zeros(batch * (classes + 1)).index_add_(0, row.flatten(), maps.new_ones(row.numel()))
    means = (sums / counts.clamp(min=1)[:, None]).view(batch, classes + 1, width)[:, :classes]
    there = counts.view(batch, classes + 1)[:, :classes] > 0
    index = torch.arange(classes, device=maps.device).expand(batch, -1)
    return means.flatten(0, 1), torch.where(there, index, -1).flatten()
