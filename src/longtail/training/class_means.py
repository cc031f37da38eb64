"""Initial weights of a classifier on a pretrained encoder. Legend: C classes, F feature width."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from longtail.data.dataset import LongTailedData
from longtail.inference.features import encode_split
from longtail.nn import CosineClassifier, Encoder


@torch.no_grad()
def init_from_class_means(
    classifier: CosineClassifier, encoder: Encoder, data: LongTailedData, device: torch.device, batch_size: int
) -> None:
    """Set (C, F) weights to the normalised mean of the normalised features of every class.

    Args:
        classifier: its weights are changed.
        encoder: it is put into eval mode.
        data: its training images are used without augmentation.
        device: where both are.
        batch_size: images per pass.
    """
    encoder.eval()
    sums = torch.zeros_like(classifier.weight)
    for features, labels in encode_split(encoder, data.train, data.image_size, device=device, batch_size=batch_size):
        sums.index_add_(0, labels, F.normalize(features))
    classifier.weight.copy_(F.normalize(sums))
