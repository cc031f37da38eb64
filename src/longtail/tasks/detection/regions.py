"""Regions of images as samples: their features and labels, and the prior of a class given an object.

The queries of a mixture are the regions of objects that a step draws, and its keys what a teacher pools from the boxes
of the annotations. The background is neither: the mixture is of p(z|c) for the C classes, its prior their frequencies
among the training objects.

Legend: B images, T rows of targets an image, N regions of all images, C classes, F feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.box_labels import BACKGROUND_REGION, IGNORED_REGION
from longtail.config import Config
from longtail.data.batch import Batch
from longtail.losses import posterior_cross_entropy
from longtail.losses.regions import federated_classes, relative_log_odds, relative_log_prior, sigmoid_focal_loss
from longtail.methods.samples import Encoded, SampleAdapter, Samples
from longtail.nn import Encoder, EncoderEnsemble, FrozenEncoder, RegionClassifier
from longtail.nn.detection import DETECTORS, DetectionNetwork, FasterRCNN
from longtail.nn.heads import FOREGROUND_PROBABILITY
from longtail.tasks.detection.settings import DetectionSettings


class RegionAdapter(SampleAdapter):
    """Samples are regions of the images, with the label of the object in it, or C for the background.

    Args:
        settings: of detection.
        network: name of the network, which says whether the background is a class.
        class_counts: (C,) training objects of each class.
    """

    one_per_image: ClassVar[bool] = False
    classes_only: ClassVar[bool] = False

    def __init__(self, settings: DetectionSettings, network: str, class_counts: list[int]) -> None:
        self.settings, self.class_counts = settings, torch.tensor(class_counts)
        kind = DETECTORS[network.partition(":")[0]]
        self.background, self.regions_per_feature = kind.background, kind.regions_per_feature

    def encode(self, encoder: Encoder, views: Sequence[Tensor], batch: Batch) -> Encoded:
        """Return the features of drawn regions, a batch of these, and the losses of their boxes."""
        network, settings = encoder.backbone, self.settings
        assert isinstance(network, DetectionNetwork)
        images = encoder.normalize(views[0])
        samples = network.sample(images, batch.labels, settings.objects, settings.regions_per_image)
        labels = torch.where(samples.labels == BACKGROUND_REGION, len(self.class_counts), samples.labels)
        ids = batch.ids[samples.image_index]
        regions = dataclasses.replace(batch, labels=labels, ids=ids, max_local_batch=None, images=batch)
        return Encoded(samples.features, regions, {name: settings.box_weight * t for name, t in samples.terms.items()})

    def queries(self, features: Tensor, batch: Batch) -> Samples:
        """Return all regions of objects, as many rows as can be drawn from B images.

        Rows that are left do not count; they repeat regions of objects, so that the statistics of BatchNorm are those
        of objects. How many rows count depends on the images, the shapes do not.
        """
        assert batch.images is not None
        settings, classes = self.settings, len(self.class_counts)
        most = max(1, int(settings.regions_per_image * settings.objects)) * len(batch.images)
        is_object = (batch.labels >= 0) & (batch.labels < classes)
        number, place = is_object.sum(), torch.arange(min(most, len(batch)), device=features.device)
        objects_first = is_object.logical_not().to(torch.uint8).argsort(stable=True)
        index = objects_first[place % number.clamp(min=1)]
        labels = torch.where(place < number, batch.labels[index], IGNORED_REGION)
        return Samples(features[index], labels, batch.ids[index])

    def encode_keys(self, teacher: FrozenEncoder | EncoderEnsemble, view: Tensor, batch: Batch) -> Tensor:
        """Return (B · T, F) features of the boxes of all rows of targets; those of empty rows mean nothing."""
        assert isinstance(teacher, FrozenEncoder)
        network = teacher.backbone
        assert isinstance(network, FasterRCNN)
        return network.pool(teacher.normalize(view), batch.labels[..., :4].float().unbind())

    def keys(self, features: Tensor, batch: Batch) -> Samples:
        """Return the objects of the annotations, B · T; rows that are empty, ignored or without area do not count."""
        assert batch.images is not None
        targets, largest = batch.images.labels, batch.images.max_local_batch
        rows = targets.shape[1]
        has_area = (targets[..., 2:4] > targets[..., :2]).all(dim=2)
        classes = targets[..., 4].round().long()  # neither padding nor ignored
        labels = torch.where(has_area & (classes >= 0), classes, IGNORED_REGION)
        ids = batch.images.ids.repeat_interleave(rows)
        return Samples(features, labels.flatten(), ids, None if largest is None else largest * rows)

    def build_classifier(self, num_features: int, num_classes: int, config: Config) -> RegionClassifier:  # noqa: ARG002
        """Return a linear classifier, with a row for the background if it is a class."""
        return RegionClassifier(num_features, num_classes, self.background, self.regions_per_feature)

    def classifier_loss(self, scores: Tensor, labels: Tensor, log_prior: Tensor | None) -> Tensor:
        """Return cross-entropy with the background as a class; without one, the sigmoid focal loss.

        The prior is that of the classes given an object. A class without training objects gets none: it is background
        wherever it is.
        """
        if self.background:
            return posterior_cross_entropy(scores, labels, class_shift(log_prior, background=True))
        settings = self.settings
        classes = None
        if settings.federated is not None:
            self.class_counts = self.class_counts.to(scores.device)
            classes = federated_classes(labels, self.class_counts, settings.federated)
        return sigmoid_focal_loss(
            scores,
            labels,
            settings.focal_gamma,
            settings.focal_alpha,
            shift=class_shift(log_prior, background=False),
            classes=classes,
        )


def class_shift(log_prior: Tensor | None, background: bool) -> Tensor | None:
    """Return what a log prior adds to the scores of regions, 0 for a class without frequency; None of no prior.

    Args:
        log_prior: (C,) log class frequencies of objects.
        background: whether the scores have a column for the background, to which nothing is added.

    Returns:
        (C,), or (C + 1,) with a background.
    """
    if log_prior is None:
        return None
    if background:
        shift = F.pad(relative_log_prior(log_prior), (0, 1))
    else:
        shift = relative_log_odds(log_prior, FOREGROUND_PROBABILITY)
    return shift.masked_fill(shift.isinf(), 0.0)
