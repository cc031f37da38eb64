"""What a sample is for a method, and which classifiers score its features.

Legend: B samples, V student views, F feature width, C classes, h and w sides of a map of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.losses import posterior_cross_entropy
from longtail.nn import CosineClassifier, Encoder, LinearClassifier, RegionClassifier
from longtail.nn.encoder import EncoderEnsemble, FrozenEncoder

TrainedClassifier = CosineClassifier | LinearClassifier | RegionClassifier
"""What a method trains to score features."""


class Samples(NamedTuple):
    """Features with their labels and the ids of the images that they come from."""

    features: Tensor
    """(B, F)."""
    labels: Tensor
    """(B,) int64; −1 does not count."""
    ids: Tensor
    """(B,) int64."""
    max_local_batch: int | None = None
    """Largest B of all processes; None where they are equal."""


class Encoded(NamedTuple):
    """The samples of a batch, as the student encodes them."""

    features: Tensor
    """(V · B, F) of all views, one view after the other."""
    batch: Batch
    """Labels, ids and views of the samples."""
    terms: dict[str, Tensor]
    """Loss terms of the encoder alone, weighted."""


class SampleAdapter:
    """What a sample is. Here: one image with one label. A task whose labels are maps or boxes gives another one."""

    one_per_image: ClassVar[bool] = True
    classes_only: ClassVar[bool] = True
    """Whether every sample has one of the C classes, so that −log p(y|z) is an estimate of H(Y|Z)."""

    def encode(self, encoder: Encoder, views: Sequence[Tensor], batch: Batch) -> Encoded:
        """Return the features of all views, and what they are of.

        A pass per view: the statistics of BatchNorm are then those of one view, and a CPU's caches hold more of the
        activations, which saves a seventh of the time.
        """
        features = [encoder(view) for view in views]
        return Encoded(features[0] if len(features) == 1 else torch.cat(features), batch, {})

    def build_classifier(self, num_features: int, num_classes: int, config: Config) -> TrainedClassifier:
        """Return the classifier of (N, F) features, as it is before the training."""
        return CosineClassifier(num_features, num_classes, config.classifier.scale)

    def classifier_loss(self, scores: Tensor, labels: Tensor, log_prior: Tensor | None) -> Tensor:
        """Return −log p(y|x) of scores and a log prior, its mean over the samples.

        Args:
            scores: of the classifier, free of the prior.
            labels: of the samples; probabilities where images are mixed.
            log_prior: (C,) that the training adds; None adds nothing.
        """
        return posterior_cross_entropy(scores, labels, log_prior)

    def upsample_scores(self, scores: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        """Return scores at the resolution of the labels."""
        return scores

    def downsample_labels(self, labels: Tensor) -> Tensor:
        """Return labels at the resolution of the features."""
        return labels

    def queries(self, features: Tensor, batch: Batch) -> Samples:
        """Return the samples that are compared with keys, of the features of one view or several."""
        views = len(features) // len(batch)
        return Samples(features, batch.labels.repeat(views), batch.ids.repeat(views))

    def encode_keys(self, teacher: FrozenEncoder | EncoderEnsemble, view: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return the features of the key view, of which :meth:`keys` makes samples; the batch is one of images."""
        return cast(Tensor, teacher(view))

    def keys(self, features: Tensor, batch: Batch) -> Samples:
        """Return the samples that become keys, of the features of :meth:`encode_keys`."""
        return Samples(features, batch.labels, batch.ids, batch.max_local_batch)

    def sample_counts(self, class_counts: list[int]) -> list[int]:
        """Return (C,) class frequencies of queries and keys, as counts."""
        return class_counts
