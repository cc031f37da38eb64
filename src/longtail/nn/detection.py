"""Networks that propose regions of an image: torchvision's detectors on timm encoders, without their class layer.

A network's name is ``DETECTOR:ENCODER`` or ``DETECTOR:ENCODER:WIDTH``, such as ``fasterrcnn:resnet50:128``. The class
layer is not a part of it: a method scores the features of the regions (:class:`longtail.nn.RegionClassifier`). Boxes
are regressed for all classes together, so that a rare class has the boxes of the frequent ones.

Legend: B images, T rows of targets an image, S side of the images in pixels, N regions of all images, A regions that
share a feature vector, F feature width, W width of the feature pyramid.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetRegressionHead
from torchvision.ops import (
    Conv2dNormActivation,
    FeaturePyramidNetwork,
    MultiScaleRoIAlign,
    box_iou,
    clip_boxes_to_image,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from longtail.box_labels import BACKGROUND_REGION, IGNORED_REGION
from longtail.errors import LongtailError, did_you_mean
from longtail.nn.detection_sampling import FloatRPNHead, ProposalNetwork, RegionHeads, is_covered, split_targets
from longtail.nn.pretrained import pretrained_cfg_overlay, wrap_timm_errors

_STRIDES = (8, 16, 32)
_LEVELS = len(_STRIDES) + 1
_MULTIPLE = 64  # of the coarsest level, a pooled one
_DEFAULT_WIDTH = 128
_SCALES, _RATIOS = (1.0, 1.5), (0.5, 1.0, 2.0)  # sides of the anchors of a level, and height by width
_ANCHORS = len(_SCALES) * len(_RATIOS)
_POOLED = 7  # side of the grid that a region is pooled to
_TOWER = 2  # convolutions before the classes and the boxes of RetinaNet; the paper has 4
_GROUP = 8  # channels that are normalised together


class RegionSamples(NamedTuple):
    """Regions that a training step learns from."""

    features: Tensor
    """(N / A, F)."""
    labels: Tensor
    """(N,) int64 in [0, C); ``BACKGROUND_REGION`` or ``IGNORED_REGION`` of :mod:`longtail.box_labels`."""
    image_index: Tensor
    """(N,) int64 position of each region's image in the batch."""
    terms: dict[str, Tensor]
    """Loss terms of proposals and boxes."""


class Regions(NamedTuple):
    """Regions where objects may be."""

    features: Tensor
    """(N / A, F)."""
    boxes: Tensor
    """(N, 4) x1, y1, x2, y2 in pixels, image after image."""
    counts: tuple[int, ...]
    """Regions of each image."""


def is_detection_network(name: str) -> bool:
    """Return whether the name of a network starts with one of :data:`DETECTORS`."""
    return name.partition(":")[0] in DETECTORS


def build_detection_network(name: str, channels: int = 3, pretrained: str = "none") -> DetectionNetwork:
    """Return a network with features of regions; :class:`longtail.nn.Encoder` takes this function as ``build``.

    Args:
        name: ``DETECTOR:ENCODER`` or ``DETECTOR:ENCODER:WIDTH``, with a detector of :data:`DETECTORS`, a timm model
            with features at an eighth, a 16th and a 32nd of the resolution, and the width W of the feature pyramid
            (128 if not given).
        channels: channels of the images.
        pretrained: weights of the encoder: ``none``, ``timm`` (downloaded at first use), or a file of weights.

    Raises:
        LongtailError: there is no such network, or its weights cannot be loaded.
    """
    import timm

    detector, _, rest = name.partition(":")
    encoder_name, _, width = rest.partition(":")
    if detector not in DETECTORS:
        raise LongtailError(f"network '{name}': expected {' or '.join(f'{known}:ENCODER' for known in DETECTORS)}")
    if not encoder_name or (width and not (width.isdecimal() and int(width) > 0)):
        raise LongtailError(f"network '{name}': expected {detector}:ENCODER or {detector}:ENCODER:WIDTH")
    num_channels = int(width or _DEFAULT_WIDTH)
    if num_channels % _GROUP:
        raise LongtailError(f"network '{name}': expected a WIDTH that is a multiple of {_GROUP}, got {num_channels}")
    if not timm.is_model(encoder_name.split(".")[0]):
        known = did_you_mean(encoder_name, timm.list_models())
        raise LongtailError(f"network '{name}': there is no encoder '{encoder_name}'{known}")
    options: dict[str, Any] = {}
    overlay = pretrained_cfg_overlay(pretrained, encoder_name)
    if overlay:
        options["pretrained_cfg_overlay"] = overlay
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)  # it warns that the classifier is left out
    unsuited = LongtailError(
        f"network '{name}': an encoder needs features at 1/8, 1/16 and 1/32 of the resolution, and '{encoder_name}' "
        "does not have these; choose another, such as tf_efficientnet_lite0 or resnet50"
    )
    with wrap_timm_errors(name, pretrained):
        try:
            encoder = timm.create_model(
                encoder_name,
                features_only=True,
                out_indices=(-3, -2, -1),
                pretrained=pretrained != "none",
                in_chans=channels,
                **options,
            )
        except (IndexError, AssertionError, AttributeError):  # of a model that has fewer maps, or none
            raise unsuited from None
    if tuple(encoder.feature_info.reduction()) != _STRIDES:
        raise unsuited
    return DETECTORS[detector](encoder, encoder.feature_info.channels(), num_channels)


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """Boxes of six shapes around every place of every level, whose sides follow from the size of the images.

    Sides are 1 and 1.5 times a base that doubles from level to level, at ratios of height and width of ½, 1 and 2. The
    base is a 20th of the images' side, at least 16 pixels: in images of 320 pixels or more sides are 5 to 60 % of it.

    Args:
        levels: number of feature maps.
    """

    base: Tensor
    """Side in pixels of the smallest anchors; a buffer, so that a saved network keeps it."""

    def __init__(self, levels: int) -> None:
        super().__init__((_SCALES,) * levels, (_RATIOS,) * levels)
        self.register_buffer("base", torch.tensor(16.0))

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:  # noqa: ARG002
        """Compute the shapes around a place, (A, 4) for every level, in full precision whatever that of the maps.

        Half of it cannot hold a position in pixels, and the anchors have the precision of the shapes.
        """
        scales = torch.tensor(_SCALES, dtype=torch.float32, device=device)
        roots = torch.tensor(_RATIOS, dtype=torch.float32, device=device).sqrt()
        widths, heights = (scales / roots[:, None]).flatten(), (scales * roots[:, None]).flatten()
        shapes = torch.stack([-widths, -heights, widths, heights], dim=1) / 2 * self.base.float()
        self.cell_anchors = [shapes * 2**level for level in range(len(self.sizes))]


class DetectionNetwork(nn.Module, ABC):
    """A timm encoder and a feature pyramid with four levels, from an eighth to a 64th of the resolution.

    Args:
        encoder: a timm model with features only.
        channels: widths of its features.
        width: W.
        num_features: F.
    """

    background: bool
    """Whether the background is a class of its own, as in a softmax."""
    regions_per_feature: int
    """A."""

    def __init__(self, encoder: nn.Module, channels: Sequence[int], width: int, num_features: int) -> None:
        super().__init__()
        self.encoder, self.channels, self.num_features = encoder, tuple(channels), num_features
        # pretrained encoders differ in the size of their features, which the new layers would have to learn first
        norm = partial(nn.GroupNorm, width // _GROUP)
        self.pyramid = FeaturePyramidNetwork(list(channels), width, extra_blocks=LastLevelMaxPool(), norm_layer=norm)

    @property
    @abstractmethod
    def anchors(self) -> Anchors:
        """The boxes that all others are regressed from."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile encoder and pyramid, most of the work; the number of regions differs from image to image."""
        self.encoder.compile(*args, **kwargs)
        self.pyramid.compile(*args, **kwargs)

    def set_image_size(self, size: int) -> None:
        """Fit the anchors to images of ``size`` × ``size`` pixels."""
        # anchors that are much smaller than the distance between their places would miss most objects
        self.anchors.base.fill_(max(2 * _STRIDES[0], size / 20))

    def freeze(self, batch_norm: bool, early: bool) -> None:
        """Set ``requires_grad`` of what of the encoder stays as it is to False.

        Args:
            batch_norm: weights and biases of BatchNorm; the trainer then keeps their statistics too.
            early: the layers up to a quarter of the resolution, as torchvision's detectors do.
        """
        for module in self.encoder.modules():
            if batch_norm and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
        names = [name for name, _ in self.encoder.named_parameters()]
        info: Any = self.encoder.feature_info
        stages = [stage["module"].replace(".", "[._]") for stage in info.info if stage["reduction"] <= _STRIDES[0] // 2]
        last = max(
            (row for row, name in enumerate(names) for stage in stages if re.match(rf"{stage}[._]", name)), default=-1
        )
        for name in names[: last + 1] if early else ():
            self.encoder.get_parameter(name).requires_grad_(False)

    def _maps(self, images: Tensor) -> tuple[OrderedDict[str, Tensor], ImageList]:
        """Return the levels of the pyramid, and the images as torchvision's modules take them."""
        height, width = images.shape[-2:]
        # padded at the right and the bottom, so that no pixel moves
        padded = F.pad(images, (0, -width % _MULTIPLE, 0, -height % _MULTIPLE))
        maps = self.encoder(padded)
        # some encoders have their channels last
        maps = [
            level if level.shape[1] == channels else level.permute(0, 3, 1, 2)
            for level, channels in zip(maps, self.channels, strict=True)
        ]
        named = OrderedDict((str(index), level) for index, level in enumerate(maps))
        return self.pyramid(named), ImageList(padded, [(height, width)] * len(images))

    @abstractmethod
    def sample(self, images: Tensor, targets: Tensor, foreground: float, regions: int) -> RegionSamples:
        """Return regions to learn from, and the losses of proposals and boxes.

        torchvision draws them image by image, which waits for an accelerator: such a step is no CUDA graph.

        Args:
            images: (B, channels, S, S) normalised.
            targets: (B, T, 5) float32, x1, y1, x2, y2 in pixels and the class; ``PADDING_TARGET`` of
                :mod:`longtail.box_labels` where a row is empty, ``IGNORED_TARGET`` for a region that is ignored.
            foreground: largest fraction of the regions that are objects, where they are drawn.
            regions: regions that are drawn from an image, where they are.
        """

    @abstractmethod
    def propose(self, images: Tensor) -> Regions:
        """Return the regions of (B, channels, S, S) normalised images where objects may be, with their boxes."""


class FasterRCNN(DetectionNetwork):
    """Regions are proposed, pooled from the pyramid, and classified with a background class.

    Source: Ren et al., *Faster R-CNN*, NeurIPS 2015, arXiv 1506.01497; Lin et al., *Feature Pyramid Networks*, CVPR
    2017, arXiv 1612.03144. Boxes of all classes together: Cai & Vasconcelos, *Cascade R-CNN*, CVPR 2018, arXiv
    1712.00726.
    """

    background = True
    regions_per_feature = 1

    def __init__(self, encoder: nn.Module, channels: Sequence[int], width: int) -> None:
        num_features = max(256, 2 * width)
        super().__init__(encoder, channels, width, num_features)
        self.proposals = ProposalNetwork(
            Anchors(_LEVELS),
            FloatRPNHead(width, _ANCHORS),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 500, "testing": 500},
            post_nms_top_n={"training": 500, "testing": 300},
            nms_thresh=0.7,
        )
        self.regions = RegionHeads(
            MultiScaleRoIAlign([str(index) for index in range(len(channels))], _POOLED, sampling_ratio=2),
            TwoMLPHead(width * _POOLED**2, num_features),
            nn.Linear(num_features, 4),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=64,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.0,
            nms_thresh=0.5,
            detections_per_img=100,
        )
        # boxes begin as the proposals
        nn.init.normal_(self.regions.box_predictor.weight, std=0.001)
        nn.init.zeros_(self.regions.box_predictor.bias)

    @property
    def anchors(self) -> Anchors:
        """The boxes that proposals are regressed from."""
        anchors = self.proposals.anchor_generator
        assert isinstance(anchors, Anchors)
        return anchors

    def sample(self, images: Tensor, targets: Tensor, foreground: float, regions: int) -> RegionSamples:
        """Return drawn proposals with their features and labels."""
        maps, listed = self._maps(images)
        objects = split_targets(targets, first_class=1)
        boxes, losses = self.proposals(listed, maps, objects)
        drawing = self.regions.fg_bg_sampler
        drawing.batch_size_per_image, drawing.positive_fraction = regions, foreground
        with torch.no_grad():
            boxes, _, drawn, box_targets = self.regions.select_training_samples(boxes, objects)
        features, deltas = self._pool(maps, boxes, listed)
        labels = torch.cat(drawn)
        is_object = labels > 0
        # an image without objects has no box to regress to, and its targets are not finite
        regression_targets = torch.where(is_object[:, None], torch.cat(box_targets), 0.0)
        box_losses = F.smooth_l1_loss(deltas, regression_targets, beta=1 / 9, reduction="none").sum(dim=1)
        terms = {
            "objectness": losses["loss_objectness"],
            "proposals": losses["loss_rpn_box_reg"],
            "boxes": torch.where(is_object, box_losses, 0.0).sum() / max(1, len(labels)),
        }
        lengths = [len(part) for part in drawn]
        return RegionSamples(
            features,
            torch.where(is_object, labels - 1, BACKGROUND_REGION),
            torch.arange(len(lengths), device=labels.device).repeat_interleave(
                torch.tensor(lengths, device=labels.device), output_size=len(labels)
            ),
            terms,
        )

    def propose(self, images: Tensor) -> Regions:
        """Return the proposals, with the boxes that are regressed from them."""
        maps, listed = self._maps(images)
        proposals, _ = self.proposals(listed, maps)
        features, deltas = self._pool(maps, proposals, listed)
        boxes = self.regions.box_coder.decode_single(deltas, torch.cat(proposals))
        boxes = clip_boxes_to_image(boxes.float(), images.shape[-2:])
        return Regions(features, boxes, tuple(len(part) for part in proposals))

    def pool(self, images: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Return (N, F) features of given boxes, (M, 4) in pixels for each image."""
        maps, listed = self._maps(images)
        return self._pool(maps, boxes, listed)[0]

    def _pool(self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor], listed: ImageList) -> tuple[Tensor, Tensor]:
        # torchvision derives the scales of the maps from this size, and they are maps of the padded images
        sizes = [tuple(listed.tensors.shape[-2:])] * len(boxes)
        pooled = self.regions.box_roi_pool(maps, list(boxes), sizes)
        features: Tensor = self.regions.box_head(pooled)
        return features, self.regions.box_predictor(features).float()


class RetinaNet(DetectionNetwork):
    """Every anchor is a region, which has a yes or no for each class.

    Two convolutions with group normalisation come before the classes and before the boxes, where the paper has four
    without: the heads are most of the time of a small network.

    Source: Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017, arXiv 1708.02002.
    """

    background = False
    regions_per_feature = _ANCHORS

    def __init__(self, encoder: nn.Module, channels: Sequence[int], width: int) -> None:
        super().__init__(encoder, channels, width, width)
        norm = partial(nn.GroupNorm, width // _GROUP)
        self.tower = nn.Sequential(*(Conv2dNormActivation(width, width, norm_layer=norm) for _ in range(_TOWER)))
        self.boxes = RetinaNetRegressionHead(width, _ANCHORS, norm_layer=norm)
        self.boxes.conv = self.boxes.conv[:_TOWER]
        self.shapes = Anchors(_LEVELS)
        self.matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)

    @property
    def anchors(self) -> Anchors:
        """The regions before they are regressed."""
        return self.shapes

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return features (B, places, F), deltas (B, places · A, 4) and the anchors, (places · A, 4) for each image."""
        named, listed = self._maps(images)
        maps = list(named.values())
        features = torch.cat([self.tower(level).flatten(2).transpose(1, 2) for level in maps], dim=1)
        return features, self.boxes(maps).float(), self.anchors(listed, maps)

    def sample(self, images: Tensor, targets: Tensor, foreground: float, regions: int) -> RegionSamples:  # noqa: ARG002
        """Return all anchors, with the objects that they overlap."""
        features, deltas, anchors = self._encode(images)
        objects = split_targets(targets, first_class=0)
        matches, labels = [], []
        with torch.no_grad():
            for anchors_per_image, objects_per_image in zip(anchors, objects, strict=True):
                matches_per_image, labels_per_image = self._match(anchors_per_image, objects_per_image)
                matches.append(matches_per_image)
                labels.append(labels_per_image)
        terms = {"boxes": self.boxes.compute_loss(objects, {"bbox_regression": deltas}, anchors, matches)}
        index = torch.arange(len(anchors), device=deltas.device).repeat_interleave(deltas.shape[1])
        return RegionSamples(features.flatten(0, 1), torch.cat(labels), index, terms)

    def _match(self, anchors: Tensor, objects: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the object of every anchor, as torchvision's matcher numbers them, and its label."""
        boxes = objects["boxes"]
        if len(boxes) == 0:
            matches = torch.full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
            labels = torch.full_like(matches, BACKGROUND_REGION)
        else:
            matches = self.matcher(box_iou(boxes, anchors))
            labels = torch.where(matches < 0, BACKGROUND_REGION, objects["labels"][matches.clamp(min=0)])
            labels = torch.where(matches == Matcher.BETWEEN_THRESHOLDS, IGNORED_REGION, labels)
        is_ignored = (labels == BACKGROUND_REGION) & is_covered(anchors, objects["ignored"])
        return matches, torch.where(is_ignored, IGNORED_REGION, labels)

    def propose(self, images: Tensor) -> Regions:
        """Return all anchors, with the boxes that are regressed from them."""
        features, deltas, anchors = self._encode(images)
        boxes = self.boxes.box_coder.decode_single(deltas.flatten(0, 1), torch.cat(anchors))
        boxes = clip_boxes_to_image(boxes, images.shape[-2:])
        return Regions(features.flatten(0, 1), boxes, (deltas.shape[1],) * len(images))


DETECTORS: dict[str, type[FasterRCNN | RetinaNet]] = {"fasterrcnn": FasterRCNN, "retinanet": RetinaNet}
"""Networks by the beginning of their names."""
