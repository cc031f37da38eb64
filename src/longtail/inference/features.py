"""Features of a data split: the one loop that passes images through a network without augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.data.dataset import ImageSet
from longtail.data.evaluation_batches import evaluation_batch_size, evaluation_batches
from longtail.nn.encoder import channels_last


@torch.no_grad()
def encode_split(
    encoder: nn.Module,
    images: ImageSet,
    image_size: int,
    *,
    device: torch.device,
    batch_size: int | None = None,
    resize: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (B, F) float32 features and (B,) labels on ``device``, every image once.

    Args:
        encoder: images in [0, 1] to features, in eval mode.
        images: the split.
        image_size: side in pixels of the centre crop.
        device: where the encoder is.
        batch_size: images per pass; fewer of large images than of small ones if not given.
        resize: side in pixels that the network wants, if another one.
        rank: of this process, which takes every ``world_size``-th image.
        world_size: number of processes.
    """
    if batch_size is None:
        batch_size = evaluation_batch_size(max(image_size, resize or 0, getattr(encoder, "resize", None) or 0))
    for views, labels in evaluation_batches(images, image_size, batch_size, rank, world_size):
        inputs = (views.pin_memory() if device.type == "cuda" else views).to(device, non_blocking=True)
        if resize is not None and inputs.ndim == 4 and inputs.shape[-1] != resize:
            inputs = F.interpolate(inputs, size=resize, mode="bicubic", antialias=True).clamp(0, 1)
        features = encoder(channels_last(inputs)).float()
        yield features, labels.to(device)
