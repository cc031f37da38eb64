"""torchvision's choice of the regions that a detector learns from, which heeds ignored regions.

Legend: B images, T rows of targets an image, M and K boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from longtail.box_labels import IGNORED_TARGET

_BACKGROUND, _DISCARDED = 0, -1  # torchvision's labels; what is discarded is not drawn
_COVERED = 0.5  # part of a region in an ignored one from which on it is no background


class FloatRPNHead(RPNHead):  # type: ignore[misc]
    """Scores and boxes of proposals in full precision: half of it cannot hold a position in pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the scores and the boxes of every level."""
        scores, deltas = super().forward(x)
        return [level.float() for level in scores], [level.float() for level in deltas]


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's proposals, which do not learn that there is nothing in an ignored region."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the labels of the anchors, −1 to learn nothing, and their objects' boxes."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        labels = [
            _without_covered(labels_per_image, anchors_per_image, targets_per_image["ignored"])
            for labels_per_image, anchors_per_image, targets_per_image in zip(labels, anchors, targets, strict=True)
        ]
        return labels, boxes


class RegionHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's choice of regions, which takes no background from an ignored region."""

    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Return drawn proposals, the positions and labels of their objects, and the boxes to regress to."""
        self._ignored = [targets_per_image["ignored"] for targets_per_image in targets]
        drawn: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
        drawn = super().select_training_samples(proposals, targets)
        return drawn

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the positions and labels of the proposals' objects, −1 for a label that is not drawn."""
        matches, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        labels = [
            _without_covered(labels_per_image, proposals_per_image, ignored_per_image)
            for labels_per_image, proposals_per_image, ignored_per_image in zip(
                labels, proposals, self._ignored, strict=True
            )
        ]
        return matches, labels


def _without_covered(labels: Tensor, boxes: Tensor, ignored: Tensor) -> Tensor:
    """Return the labels of an image's boxes, those of background in an ignored region discarded."""
    return torch.where((labels == _BACKGROUND) & is_covered(boxes, ignored), _DISCARDED, labels)


def split_targets(targets: Tensor, first_class: int) -> list[dict[str, Tensor]]:
    """Return ``boxes`` and ``labels`` of every image, as torchvision's modules take them, and its ``ignored`` boxes.

    Args:
        targets: (B, T, 5), see :meth:`longtail.nn.detection.DetectionNetwork.sample`.
        first_class: label of the first class.
    """
    targets = targets.float()
    classes, has_area = targets[..., 4].round(), (targets[..., 2:4] > targets[..., :2]).all(dim=2)
    objects = _select(targets, (classes >= 0) & has_area)  # nothing is regressed to a box without area
    ignored = _select(targets, classes == IGNORED_TARGET)
    return [
        {
            "boxes": objects_per_image[:, :4],
            "labels": objects_per_image[:, 4].round().long() + first_class,
            "ignored": ignored_per_image[:, :4],
        }
        for objects_per_image, ignored_per_image in zip(objects, ignored, strict=True)
    ]


def _select(targets: Tensor, chosen: Tensor) -> Sequence[Tensor]:
    """Return the chosen rows of every image; two waits for an accelerator, however many images there are."""
    rows: Sequence[Tensor] = targets[chosen].split(chosen.sum(dim=1).tolist())
    return rows


def _intersections(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the areas that (M, 4) and (K, 4) boxes have in common, (M, K)."""
    first = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    last = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (last - first).clamp(min=0).prod(dim=2)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)


def is_covered(boxes: Tensor, ignored: Tensor) -> Tensor:
    """Return which of (M, 4) boxes lie for the most part in one of (K, 4) ignored regions, (M,) bool."""
    covered = _intersections(boxes, ignored) > _COVERED * _areas(boxes)[:, None]
    return covered.any(dim=1)
