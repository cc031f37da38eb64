"""A detector as one ONNX file, from the pixels of a letterboxed image to boxes, with suppression inside.

Legend: N regions, K detections, C classes, S side in pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, nms, roi_align

import longtail
from longtail.data.detection import DEFAULT_POST_PROCESSING
from longtail.data.image_io import open_image
from longtail.data.letterbox import FILL
from longtail.errors import LongtailError
from longtail.inference.export import Exported, serialize, silent_export, to_onnx, write_bytes
from longtail.inference.model import Prior
from longtail.inference.options import TTA
from longtail.tasks.detection.detector import MOST_CANDIDATES, Detector

PARITY = 1e-3
"""Largest difference from PyTorch that an export goes through with: of a score, and of a box as a fraction of S."""
_EXAMPLES = 3  # images that both are compared on
_NEAR = 1e-3  # a score that is nearer to the threshold may fall on either side of it

Found = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


class _ExportModule(nn.Module):
    """(1, S, S, channels) uint8 to boxes (K, 4), labels (K,) and scores (K,)."""

    def __init__(self, model: Detector, prior: Prior) -> None:
        super().__init__()
        self.encoder, self.classifier = model.encoder, model.classifier
        self.model, self.prior = model, prior
        self.proposed: list[Tensor] = []
        """(N,) whether a proposal is one, where shapes are fixed."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.proposed.clear()
        regions = self.model.regions(images.permute(0, 3, 1, 2).float() / 255)
        probabilities = self.model.probabilities(regions.scores, self.prior)
        if self.proposed:
            probabilities = probabilities * self.proposed[0][:, None]
        classes, side = probabilities.shape[1], self.model.config.image_size
        scores, index = probabilities.flatten().topk(min(MOST_CANDIDATES, probabilities.numel()))
        rows, labels = index // classes, index % classes
        boxes = regions.boxes[rows].float()
        # moved apart by class, so that a box suppresses those of its own class alone
        kept = nms(boxes + (labels * 2 * side)[:, None], scores, DEFAULT_POST_PROCESSING.nms_threshold)
        kept = kept[scores[kept] > DEFAULT_POST_PROCESSING.score_threshold][: DEFAULT_POST_PROCESSING.max_detections]
        return boxes[kept], labels[kept], scores[kept]


@contextlib.contextmanager
def _fixed_shapes(module: _ExportModule) -> Iterator[None]:
    """Let torchvision's proposals and pooling compute with fixed shapes, which torch.export follows, for one image.

    Proposals that are none fill up to the most that there can be, and pooling looks at every level; the results are
    the same.
    """

    def filter_proposals(
        network: RegionProposalNetwork, boxes: Tensor, objectness: Tensor, shapes: Sequence[Any], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        height, width = shapes[0]
        boxes, scores = boxes[0], objectness.reshape(-1).sigmoid()
        parts, start = [], 0
        for level, count in enumerate(counts):
            values, best = scores[start : start + count].topk(min(network.pre_nms_top_n(), count))
            own = clip_boxes_to_image(boxes[start + best], (height, width))
            parts.append((own, values, torch.full_like(values, level)))
            start += count
        boxes, scores, levels = (torch.cat(part) for part in zip(*parts, strict=True))
        large = ((boxes[:, 2:] - boxes[:, :2]) >= network.min_size).all(dim=1)
        kept = nms(boxes + (levels * 2 * max(height, width))[:, None], scores, network.nms_thresh)
        ranked = torch.full_like(scores, -1.0).scatter(0, kept, scores[kept])
        values, best = torch.where(large, ranked, -1.0).topk(min(network.post_nms_top_n(), len(scores)))
        module.proposed.append((values >= 0).float())
        return [boxes[best]], [values]

    def pool(align: MultiScaleRoIAlign, maps: dict[str, Tensor], boxes: list[Tensor], shapes: Sequence[Any]) -> Tensor:
        levels = [maps[name] for name in align.featmap_names]
        rois = torch.cat([torch.zeros_like(boxes[0][:, :1]), boxes[0]], dim=1)
        # as torchvision finds them from the sides of maps and padded image
        scales = [2.0 ** round(float(np.log2(level.shape[-1] / shapes[0][1]))) for level in levels]
        first = -np.log2(scales[0])
        area = (boxes[0][:, 2:] - boxes[0][:, :2]).prod(dim=1)
        target = torch.floor(align.canonical_level + torch.log2(area.sqrt() / align.canonical_scale) + 1e-6) - first
        target = target.clamp(0, len(levels) - 1)
        pooled = torch.zeros(())
        for index, (level, scale) in enumerate(zip(levels, scales, strict=True)):
            part = roi_align(level, rois, align.output_size, scale, align.sampling_ratio)
            pooled = pooled + torch.where((target == index)[:, None, None, None], part, 0.0)
        return pooled

    patched: list[tuple[nn.Module, str]] = []
    for each in module.encoder.modules():
        for kind, name, function in (
            (RegionProposalNetwork, "filter_proposals", filter_proposals),
            (MultiScaleRoIAlign, "forward", pool),
        ):
            if isinstance(each, kind):
                each.__dict__[name] = function.__get__(each)
                patched.append((each, name))
    try:
        yield
    finally:
        for each, name in patched:
            del each.__dict__[name]


def export_onnx(model: Detector, path: Path | str, prior: Prior, images: Sequence[Path | str], tta: TTA) -> Exported:
    """Write a detector as an ONNX file, and compare it with PyTorch.

    The file takes ``images``, (1, S, S, channels) uint8: one image, scaled to fit the square and placed in its upper
    left corner, the rest of it filled with the colour under ``fill``. It returns ``boxes`` (K, 4), x1, y1, x2, y2 in
    pixels of the square, ``labels`` (K,) and ``scores`` (K,), descending, at most 100 with a score above 0.05 after
    suppression at IoU 0.5. Its metadata, JSON under the key ``longtail``, holds class names, prior and these numbers.

    Args:
        model: what to export, on the CPU.
        path: the file to write.
        prior: class frequencies that the scores assume.
        images: files to compare on; random images if there are none.
        tta: must be ``none``.

    Raises:
        LongtailError: the extra is missing, test-time augmentation is asked for, or what the file finds differs from
            what PyTorch finds; or the installed torch cannot convert the model.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise LongtailError("export: needs the extra onnx: pip install 'longtail[onnx]'") from None
    path = Path(path)
    if tta != "none":
        raise LongtailError(f"export: --tta {tta} is for models that classify whole images")
    config, log_prior = model.config, model.log_prior(prior)
    module = _ExportModule(model, prior).eval()
    inputs = _example_inputs(model, images)
    with torch.no_grad(), silent_export(), _fixed_shapes(module):
        module(inputs[:1])  # so that what the model computes once and keeps is no part of the graph
        proto = to_onnx(module, inputs[:1], ["boxes", "labels", "scores"])
    side = config.image_size
    named = isinstance(prior, str) and prior in {"uniform", "train"}
    frequencies = prior if named or log_prior is None else log_prior.exp().tolist()
    metadata = {
        "longtail": longtail.__version__,
        "task": config.task,
        "label_maps": False,
        "finds_objects": True,
        "class_names": config.class_names,
        "class_counts": config.class_counts,
        "channels": config.channels,
        "shape": (side, side),
        "stored_size": side,
        "fill": FILL,
        "prior": frequencies,
        **dataclasses.asdict(DEFAULT_POST_PROCESSING),
    }
    content = serialize(proto, metadata)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference, compared = 0.0, 0
    for image in inputs:
        boxes, labels, scores = session.run(None, {"images": image[None].numpy()})
        pixels = image[None].permute(0, 3, 1, 2).float() / 255
        want = model.detect(pixels, DEFAULT_POST_PROCESSING, prior)[0]
        expected = (want.boxes.numpy(), want.labels.numpy(), want.scores.numpy())
        difference = max(difference, detection_difference((boxes, labels, scores), expected, side))
        compared += int((want.scores >= DEFAULT_POST_PROCESSING.score_threshold + _NEAR).sum())
    if not difference < PARITY:
        raise LongtailError(
            f"{path}: what the ONNX file finds differs from what PyTorch finds by {difference:.2g}, expected less than "
            f"{PARITY:g}; nothing was written"
        )
    write_bytes(path, content)
    shape = (side, side, config.channels)
    note = ""
    if compared == 0:
        note = "nothing was found in these images, and so nothing compared: give images with objects"
    return Exported(path, shape, difference, len(inputs), compared="score or box", batch="1", note=note)


def detection_difference(one: Found, other: Found, side: int) -> float:
    """Return how far the detections of an image are from others: the largest distance of any from its nearest.

    The distance is the difference of the scores, or of the corners as a fraction of the side if that is larger; it is 1
    where the other has none of the class. Detections at the threshold may be missing.

    Args:
        one: boxes (K, 4), labels (K,), scores (K,).
        other: the same, of another K.
        side: S.
    """
    largest = 0.0
    for (boxes, labels, scores), (others, other_labels, other_scores) in ((one, other), (other, one)):
        for box, label, score in zip(boxes, labels, scores, strict=True):
            if score < DEFAULT_POST_PROCESSING.score_threshold + _NEAR:
                continue
            same = other_labels == label
            corners = np.abs(others[same] - box).max(axis=1, initial=0.0) / side
            distances = np.maximum(corners, np.abs(other_scores[same] - score))
            largest = max(largest, float(distances.min(initial=1.0)))
    return largest


def _example_inputs(model: Detector, files: Sequence[Path | str]) -> Tensor:
    """Return (M, S, S, channels) uint8 images to compare on."""
    side = model.config.image_size
    if files:
        return torch.stack([model.export_input(open_image(Path(file)), (side, side)) for file in files[:_EXAMPLES]])
    drawn = torch.rand(_EXAMPLES, side, side, model.config.channels, generator=torch.Generator().manual_seed(0))
    return (drawn * 255).to(torch.uint8)
