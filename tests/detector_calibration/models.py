"""Small detectors with random weights, of every kind that is supported."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision.models import detection

CLASSES = 5
SIZE: dict[str, Any] = {"min_size": 64, "max_size": 96}


def spread(model: Any, seed: int = 0) -> Any:
    """Give the class layer weights of another scale and biases, so that corrections can be seen in the detections."""
    from longtail.detector_calibration.heads import find_class_head

    generator = torch.Generator().manual_seed(seed)
    head = find_class_head(model)
    with torch.no_grad():
        for layer in head.layers:
            layer.weight.copy_(
                torch.randn(layer.weight.shape, generator=generator) * 2 / layer.weight[0].numel() ** 0.5
            )
            assert layer.bias is not None
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.5)
    return model.eval()


def _torchvision(builder: Callable[..., Any], classes: int, **options: Any) -> Any:
    return builder(weights=None, weights_backbone=None, num_classes=classes, **options)


def _fcos() -> Any:
    backbone = nn.Conv2d(3, 32, 3, stride=16, padding=1)
    backbone.out_channels = 32
    sizes = detection.anchor_utils.AnchorGenerator(((8,),), ((1.0,),))
    return detection.FCOS(backbone, CLASSES, anchor_generator=sizes, score_thresh=0.01, **SIZE)


def _ssd() -> Any:
    backbone = nn.Conv2d(3, 8, 3, stride=16, padding=1)
    boxes = detection.anchor_utils.DefaultBoxGenerator([[2]], scales=[0.2, 0.5])
    head = detection.ssd.SSDHead([8], boxes.num_anchors_per_location(), CLASSES + 1)
    return detection.ssd.SSD(backbone, boxes, (64, 64), CLASSES + 1, head=head)


def _retinanet() -> Any:
    backbone = nn.Conv2d(3, 8, 3, stride=16, padding=1)
    backbone.out_channels = 8
    anchors = detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0, 2.0),))
    return detection.RetinaNet(backbone, CLASSES, anchor_generator=anchors, **SIZE)


def fasterrcnn(classes: int = CLASSES) -> Any:
    return _torchvision(detection.fasterrcnn_mobilenet_v3_large_320_fpn, classes + 1, box_score_thresh=0.01, **SIZE)


def _maskrcnn() -> Any:
    backbone = nn.Conv2d(3, 8, 3, stride=16, padding=1)
    backbone.out_channels = 8
    anchors = detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0,),))
    return detection.MaskRCNN(backbone, CLASSES + 1, rpn_anchor_generator=anchors, box_detections_per_img=10, **SIZE)


TORCHVISION: dict[str, Callable[[], Any]] = {
    "fasterrcnn": fasterrcnn,
    "maskrcnn": _maskrcnn,
    "retinanet": _retinanet,
    "fcos": _fcos,
    "ssd": _ssd,
    "ssdlite": lambda: _torchvision(detection.ssdlite320_mobilenet_v3_large, CLASSES + 1),
}


def _backbone(config: str = "ResNetConfig", stages: tuple[int, ...] = (2, 3, 4)) -> Any:
    transformers: Any = importlib.import_module("transformers")

    if config == "RTDetrResNetConfig":
        return transformers.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, layer_type="basic", out_indices=list(stages)
        )
    if config == "HGNetV2Config":
        return transformers.HGNetV2Config(
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 8, 8, 8],
            stage_mid_channels=[8] * 4,
            stage_out_channels=[8, 8, 8, 8],
            stage_num_blocks=[1] * 4,
            stage_numb_of_layers=[1] * 4,
            hidden_sizes=[8, 8, 8, 8],
            depths=[1] * 4,
            embedding_size=8,
            out_indices=list(stages),
        )
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, layer_type="basic", out_indices=list(stages)
    )


DETR: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 12,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
}
HYBRID: dict[str, Any] = {
    "d_model": 16,
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 8, 8],
    "encoder_layers": 1,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_in_channels": [16, 16, 16],
    "decoder_layers": 2,
    "decoder_ffn_dim": 16,
    "decoder_attention_heads": 2,
    "num_queries": 12,
    "num_denoising": 0,
    "num_feature_levels": 3,
}


def names(classes: int = CLASSES) -> dict[int, str]:
    return {index: f"class {index}" for index in range(classes)}


def transformers_model(kind: str, **options: Any) -> Any:
    transformers: Any = importlib.import_module("transformers")

    labels: dict[str, Any] = {"id2label": names(), "label2id": {name: index for index, name in names().items()}}
    common = labels | options
    detr = common | DETR | {"backbone_config": _backbone(stages=(4,))}
    hybrid = common | HYBRID
    configs: dict[str, Callable[[], Any]] = {
        "Detr": lambda: transformers.DetrConfig(**detr),
        "ConditionalDetr": lambda: transformers.ConditionalDetrConfig(**detr),
        "TableTransformer": lambda: transformers.TableTransformerConfig(**detr),
        "DabDetr": lambda: transformers.DabDetrConfig(
            **{**detr, "hidden_size": 16},
        ),
        "DeformableDetr": lambda: transformers.DeformableDetrConfig(
            **(
                detr
                | {"d_model": 32, "backbone_config": _backbone(), "num_feature_levels": 3}
                | {"two_stage_num_proposals": 12}
                | options
            )
        ),
        "RTDetr": lambda: transformers.RTDetrConfig(**hybrid, backbone_config=_backbone("RTDetrResNetConfig")),
        "RTDetrV2": lambda: transformers.RTDetrV2Config(**hybrid, backbone_config=_backbone("RTDetrResNetConfig")),
        "DFine": lambda: transformers.DFineConfig(**hybrid, backbone_config=_backbone("HGNetV2Config")),
        "Deimv2": lambda: transformers.Deimv2Config(**hybrid, backbone_config=_backbone("HGNetV2Config")),
        "LwDetr": lambda: transformers.LwDetrConfig(
            **common,
            d_model=32,
            decoder_layers=2,
            num_queries=12,
            group_detr=1,
            decoder_ffn_dim=16,
            decoder_n_points=2,
            decoder_self_attention_heads=2,
            decoder_cross_attention_heads=2,
            hidden_expansion=0.5,
            c2f_num_blocks=1,
            projector_scale_factors=[1.0],
            backbone_config=transformers.LwDetrViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=64,
                pretrain_image_size=64,
                patch_size=16,
                window_block_indices=[0],
                num_windows=4,
                out_indices=[2],
            ),
        ),
        "Yolos": lambda: transformers.YolosConfig(
            **common,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=[64, 64],
            num_detection_tokens=12,
        ),
    }
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForObjectDetection")(configs[kind]()).eval()


TRANSFORMERS = (
    "Detr",
    "ConditionalDetr",
    "TableTransformer",
    "Yolos",
    "DabDetr",
    "DeformableDetr",
    "RTDetr",
    "RTDetrV2",
    "DFine",
    "Deimv2",
    "LwDetr",
)
