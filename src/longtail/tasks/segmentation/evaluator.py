"""Evaluation of a segmentation on a split: counts of pixels, summed over images and processes. Legend: C classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import ImageSet
from longtail.data.prefetch import prefetch
from longtail.data.sources.segmentation import SegmentationImages
from longtail.distributed import all_reduce_sum, rank, world_size
from longtail.evaluation.segmentation import boundary_band, count_pixels, pixel_metrics
from longtail.inference.options import InferenceOptions
from longtail.losses.score_loss import broadcast_to_classes
from longtail.tasks.base import Evaluator, Metrics
from longtail.tasks.segmentation.segmenter import Segmenter
from longtail.tasks.segmentation.settings import SegmentationSettings

_WORST_CLASSES = 6  # that a report shows an image of


def predict_split(
    model: Segmenter, images: ImageSet, options: InferenceOptions
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield position, scores and labels image by image, so that results depend on neither batch nor processes."""
    assert isinstance(images.images, SegmentationImages)
    model.encoder.eval()
    for index, sample in prefetch(images.images.open_sample, range(rank(), len(images), world_size())):
        scores = model.scores(model.preprocess(sample.image), options)
        labels = torch.from_numpy(sample.labels).to(model.device, torch.int64)
        yield torch.tensor([index]), scores, labels[None]


class SegmentationEvaluator(Evaluator):
    """IoU by class and by thirds of the classes, boundary IoU, accuracy, and images of the worst classes.

    Args:
        model: what is evaluated.
        images: the split.
        config: settings of the run.
        priors: (C,) log priors by name; None is the uniform one.
        accuracy_only: without boundary IoU.
    """

    def __init__(
        self,
        model: Segmenter,
        images: ImageSet,
        config: Config,
        priors: Mapping[str, Tensor | None],
        accuracy_only: bool = False,
    ) -> None:
        self.model_config, self.num_images, self.priors = model.config, len(images), priors
        self.boundary = None if accuracy_only else config.section(SegmentationSettings).boundary
        self.num_classes = len(model.config.class_names)
        zeros = torch.zeros(3 if accuracy_only else 6, self.num_classes, dtype=torch.int64, device=model.device)
        self.counts = {name: zeros.clone() for name in priors}
        # per image: pixels of a class that were missed or wrongly predicted as it
        self.errors = torch.zeros(len(images), self.num_classes, dtype=torch.int64, device=model.device)

    def update(self, positions: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Add the (1, C, H, W) scores and (1, H, W) labels of an image."""
        band = None if self.boundary is None else boundary_band(labels[0], self.boundary)
        for name, prior in self.priors.items():
            adjusted = scores if prior is None else scores + broadcast_to_classes(prior.to(scores), scores)
            predicted = adjusted.argmax(dim=1)[0]
            counts = count_pixels(predicted, labels[0], self.num_classes, self.boundary, band)
            self.counts[name] += counts
            if name == self.model_config.predicts_under:
                self.errors[int(positions[0])] = counts[0] + counts[1] - 2 * counts[2]

    def compute(self) -> dict[str, Metrics]:
        """Return the metrics over all processes, by prior."""
        errors = all_reduce_sum(self.errors).cpu()
        metrics: dict[str, dict[str, Any]] = {
            name: pixel_metrics(all_reduce_sum(counts).cpu(), self.model_config.class_counts, self.num_images)
            for name, counts in self.counts.items()
        }
        main = metrics[self.model_config.predicts_under]
        main["worst"] = self._worst(main["per_class"], errors)
        return metrics

    def _worst(self, iou: list[float | None], errors: Tensor) -> list[dict[str, int]]:
        """Return the classes of lowest IoU that have wrong pixels, each with the image of most; no image twice."""
        worst: list[dict[str, int]] = []
        values = [100.0 if value is None else value for value in iou]
        for index in sorted(range(self.num_classes), key=values.__getitem__):
            used = {entry["image"] for entry in worst}
            order = errors[:, index].argsort(descending=True).tolist()
            unused = [image for image in order if image not in used and errors[image, index] > 0]
            if len(worst) < _WORST_CLASSES and unused and iou[index] is not None:
                worst.append({"class": index, "image": unused[0]})
        return worst
