"""Initial weights of a classifier on a pretrained encoder. Legend: C classes, F feature width."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.errors import LongtailError
from longtail.inference.features import encode_split
from longtail.methods.samples import TrainedClassifier
from longtail.nn import Encoder
from longtail.nn.text_tower import text_weights


def init_classifier(
    classifier: TrainedClassifier, encoder: Encoder, data: LongTailedData, config: Config, device: torch.device
) -> None:
    """Set the weights as ``classifier.init`` asks for.

    Args:
        classifier: its weights are changed.
        encoder: it may be put into eval mode.
        data: what is trained on.
        config: settings of the run.
        device: where classifier and encoder are.

    Raises:
        LongtailError: the network has no text tower that fits it.
    """
    if config.classifier.init == "class_means":
        init_from_class_means(classifier, encoder, data, device, config.batch_size)
    elif config.classifier.init == "text":
        weights = text_weights(data.class_names, config.network, config.pretrained)
        if weights.shape != classifier.weight.shape:
            raise LongtailError(
                f"classifier.init text: the text tower of network '{config.network}' is for features of width "
                f"{weights.shape[1]}, not {classifier.weight.shape[1]}; use classifier.init class_means"
            )
        with torch.no_grad():
            classifier.weight.copy_(weights)


@torch.no_grad()
def init_from_class_means(
    classifier: TrainedClassifier, encoder: Encoder, data: LongTailedData, device: torch.device, batch_size: int
) -> None:
    """Set (C, F) weights to the normalised mean of the normalised features of every class.

    A class without a training image, or whose features are 0, keeps a random direction: behind the cosine, weights of 0
    would have a gradient of about 1e12.

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
        own = features[:, : sums.shape[1]]  # those behind them are another expert's
        sums.index_add_(0, labels, F.normalize(own))
    known = sums.norm(dim=1, keepdim=True) > 0
    classifier.weight.copy_(F.normalize(torch.where(known, sums, classifier.weight)))
