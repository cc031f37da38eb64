"""Networks that give every pixel a feature: a decoder of segmentation-models-pytorch on a timm encoder.

A network's name is ``DECODER:ENCODER`` or ``DECODER:ENCODER:WIDTH``, ``upernet:resnet50`` for one. Legend: B images, F
feature width, H and W sides in pixels.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.errors import LongtailError, nearest

DECODERS = ("upernet", "segformer")
STRIDE = 4
"""Pixels of an image, either way, that share a feature."""
_MULTIPLE = 32  # what encoders halve five times must be a multiple of it


def is_dense(name: str) -> bool:
    """Return whether a network's name is one of these."""
    return name.partition(":")[0] in DECODERS


def build_dense(name: str, channels: int, pretrained: bool, overlay: dict[str, Any]) -> DenseBackbone:
    """Return a network by name.

    Args:
        name: see above; WIDTH is 256 if not given.
        channels: channels of the images.
        pretrained: load the encoder's weights.
        overlay: what timm shall know otherwise of these weights.

    Raises:
        LongtailError: the package is missing, or there is no such encoder.
    """
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        raise LongtailError(f"network {name}: segmentation needs the extra seg: pip install 'longtail[seg]'") from None
    import timm

    decoder, _, rest = name.partition(":")
    encoder, _, width = rest.partition(":")
    if not encoder or (width and not (width.isdecimal() and int(width) > 0)):
        raise LongtailError(f"network '{name}': expected {decoder}:ENCODER or {decoder}:ENCODER:WIDTH")
    given: dict[str, Any] = {}
    if timm.is_model(encoder.split(".")[0]):
        own = f"tu-{encoder}"
        if overlay:
            given["pretrained_cfg_overlay"] = overlay
        if encoder.startswith("swin"):
            given["strict_img_size"] = False  # windows are filled up at the borders instead
    elif encoder in smp.encoders.encoders:
        own = encoder
    else:
        known = [*smp.encoders.encoders, *timm.list_models()]
        raise LongtailError(f"network '{name}': there is no encoder '{encoder}'{nearest(encoder, known)}")
    kind = {"upernet": smp.UPerNet, "segformer": smp.Segformer}[decoder]
    key = {"upernet": "decoder_channels", "segformer": "decoder_segmentation_channels"}[decoder]
    weights = (True if own.startswith("tu-") else "imagenet") if pretrained else None
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)  # that a classifier is left out is meant
    try:
        model = kind(
            encoder_name=own, encoder_weights=weights, in_channels=channels, **{key: int(width or 256)}, **given
        )
    except ValueError as error:  # an encoder that does not halve step by step (a plain vision transformer)
        raise LongtailError(f"network '{name}': {' '.join(str(error).split())}; choose another encoder") from None
    return DenseBackbone(model.encoder, model.decoder, int(width or 256))


class DenseBackbone(nn.Module):
    """An encoder and a decoder: images to a feature for every square of 4 × 4 pixels.

    Args:
        encoder: of segmentation-models-pytorch.
        decoder: of the same.
        width: F.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.num_features = encoder, decoder, width

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, F, ⌈H/4⌉, ⌈W/4⌉) features of (B, channels, H, W) normalised images of any size."""
        height, width = images.shape[-2:]
        # to the right and below: what is there already stays where it is
        padded = F.pad(images, (0, -width % _MULTIPLE, 0, -height % _MULTIPLE))
        features: Tensor = self.decoder(self.encoder(padded))
        return features[..., : -(-height // STRIDE), : -(-width // STRIDE)]


def to_pixels(scores: Tensor, height: int, width: int) -> Tensor:
    """Return (B, C, H, W) scores of every pixel, between those of the squares, (B, C, ⌈H/4⌉, ⌈W/4⌉)."""
    larger = F.interpolate(scores, scale_factor=STRIDE, mode="bilinear")
    return larger[..., :height, :width]


def to_squares(labels: Tensor) -> Tensor:
    """Return (B, ⌈H/4⌉, ⌈W/4⌉) labels, each that of a pixel in the middle of its square, of (B, H, W) labels."""
    height, width = labels.shape[-2:]
    rows = torch.arange(STRIDE // 2, height + STRIDE // 2, STRIDE, device=labels.device).clamp(max=height - 1)
    columns = torch.arange(STRIDE // 2, width + STRIDE // 2, STRIDE, device=labels.device).clamp(max=width - 1)
    return labels[:, rows[:, None], columns[None]]
