"""Networks with a feature for every pixel: a decoder of segmentation-models-pytorch on top of a timm encoder.

A network's name is ``DECODER:ENCODER`` or ``DECODER:ENCODER:WIDTH``, such as ``upernet:resnet50``. Legend: B images, C
classes, F feature width, H and W height and width in pixels. Features have a quarter of the images' resolution.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.errors import LongtailError, did_you_mean
from longtail.nn.pretrained import pretrained_cfg_overlay, wrap_timm_errors

DECODERS = ("upernet", "segformer")
STRIDE = 4
"""Height and width in pixels of the square that shares a feature."""
_MULTIPLE = 32  # encoders halve the resolution five times
_DEFAULT_WIDTH = 256
_TRIED_SIZES = ((64, 64), (96, 128))  # in pixels; small, as every network that is built is tried


def is_segmentation_network(name: str) -> bool:
    """Return whether the name of a network starts with one of :data:`DECODERS`."""
    return name.partition(":")[0] in DECODERS


def build_segmentation_backbone(name: str, channels: int = 3, pretrained: str = "none") -> SegmentationNetwork:
    """Return a network with features of pixels; :class:`longtail.nn.Encoder` takes this function as ``build``.

    Args:
        name: ``DECODER:ENCODER`` or ``DECODER:ENCODER:WIDTH``, with a decoder of :data:`DECODERS`, a timm model or an
            encoder of segmentation-models-pytorch, and the feature width (256 if not given).
        channels: channels of the images.
        pretrained: weights of the encoder: ``none``, ``timm`` (downloaded at first use), or a file of weights for the
            timm model.

    Raises:
        LongtailError: the extra ``seg`` is not installed, there is no such network, it takes images of one size only,
            or its weights cannot be loaded.
    """
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        raise LongtailError(f"network {name}: segmentation needs the extra seg: pip install 'longtail[seg]'") from None
    import timm

    decoder, _, rest = name.partition(":")
    encoder, _, width = rest.partition(":")
    if decoder not in DECODERS:
        expected = " or ".join(f"{known_decoder}:ENCODER" for known_decoder in DECODERS)
        raise LongtailError(f"network '{name}': expected {expected}")
    if not encoder or (width and not (width.isdecimal() and int(width) > 0)):
        raise LongtailError(f"network '{name}': expected {decoder}:ENCODER or {decoder}:ENCODER:WIDTH")
    num_features = int(width or _DEFAULT_WIDTH)
    options: dict[str, Any] = {}
    if timm.is_model(encoder.split(".")[0]):
        encoder_name = f"tu-{encoder}"
        overlay = pretrained_cfg_overlay(pretrained, encoder)
        if overlay:
            options["pretrained_cfg_overlay"] = overlay
        if encoder.startswith("swin"):
            options["strict_img_size"] = False  # windows are padded at the borders instead
    elif encoder in smp.encoders.encoders:
        encoder_name = encoder
        if pretrained not in {"none", "timm"}:
            raise LongtailError(f"pretrained '{pretrained}': expected none or timm; '{encoder}' is no timm model")
    else:
        encoders = [*smp.encoders.encoders, *timm.list_models()]
        raise LongtailError(f"network '{name}': there is no encoder '{encoder}'{did_you_mean(encoder, encoders)}")
    model_class = {"upernet": smp.UPerNet, "segformer": smp.Segformer}[decoder]
    width_option = {"upernet": "decoder_channels", "segformer": "decoder_segmentation_channels"}[decoder]
    weights = None if pretrained == "none" else True if encoder_name.startswith("tu-") else "imagenet"
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)  # it warns that the classifier is left out
    with wrap_timm_errors(name, pretrained):
        try:
            model = model_class(
                encoder_name=encoder_name,
                encoder_weights=weights,
                in_channels=channels,
                **{width_option: num_features},
                **options,
            )
        except ValueError as error:  # an encoder that does not halve the resolution, such as a vision transformer
            raise LongtailError(
                f"network '{name}': {' '.join(str(error).split()).rstrip('.')}; choose another encoder"
            ) from None
    network = SegmentationNetwork(model.encoder, model.decoder, num_features)
    on_meta = any(parameter.is_meta for parameter in network.parameters())  # whose names and shapes are wanted only
    if not on_meta and not _takes_any_size(network, channels):
        raise LongtailError(
            f"network '{name}': takes images of one size only; choose another encoder, such as resnet50 or "
            "convnext_tiny"
        )
    return network


def _takes_any_size(network: SegmentationNetwork, channels: int) -> bool:
    network.eval()
    try:
        with torch.no_grad():
            return all(
                network(torch.zeros(1, channels, height, width)).shape[2:] == (height // STRIDE, width // STRIDE)
                for height, width in _TRIED_SIZES
            )
    except Exception:  # networks raise errors of all kinds
        return False
    finally:
        network.train()


class SegmentationNetwork(nn.Module):
    """An encoder and a decoder, which give a feature to every square of 4 × 4 pixels.

    Args:
        encoder: an encoder of segmentation-models-pytorch.
        decoder: a decoder of segmentation-models-pytorch.
        num_features: F.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, num_features: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.num_features = encoder, decoder, num_features

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, F, ⌈H/4⌉, ⌈W/4⌉) features of (B, channels, H, W) normalised images of any size."""
        height, width = images.shape[-2:]
        # padded at the right and the bottom, so that no pixel moves
        padded = F.pad(images, (0, -width % _MULTIPLE, 0, -height % _MULTIPLE))
        features: Tensor = self.decoder(self.encoder(padded))
        return features[..., : -(-height // STRIDE), : -(-width // STRIDE)]


def upsample_scores(scores: Tensor, height: int, width: int) -> Tensor:
    """Return (B, C, H, W) scores of pixels, interpolated between (B, C, ⌈H/4⌉, ⌈W/4⌉) scores of squares."""
    larger = F.interpolate(scores, scale_factor=STRIDE, mode="bilinear")
    return larger[..., :height, :width]


def downsample_labels(labels: Tensor) -> Tensor:
    """Return (B, ⌈H/4⌉, ⌈W/4⌉) labels of the squares' central pixels, of (B, H, W) labels."""
    height, width = labels.shape[-2:]
    rows = torch.arange(STRIDE // 2, height + STRIDE // 2, STRIDE, device=labels.device).clamp(max=height - 1)
    columns = torch.arange(STRIDE // 2, width + STRIDE // 2, STRIDE, device=labels.device).clamp(max=width - 1)
    return labels[:, rows[:, None], columns[None]]
