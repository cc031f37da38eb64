"""A trained model that finds objects in images of any size.

Legend: B images, N regions of all images, C classes, S side of a letterboxed image in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from longtail.data.detection import DEFAULT_POST_PROCESSING, Detections, PostProcessing
from longtail.data.image_io import to_rgb
from longtail.data.letterbox import boxes_in_image, letterbox, size_in_square
from longtail.inference.model import Classifier, Prior, TrainedModel
from longtail.inference.model_card import ModelCardText
from longtail.inference.model_config import ModelConfig
from longtail.inference.options import check_batch_size
from longtail.inference.recognizer import ImageLike, to_pillow
from longtail.losses.regions import relative_log_odds, relative_log_prior
from longtail.nn import Encoder, RegionClassifier
from longtail.nn.detection import DetectionNetwork, build_detection_network
from longtail.nn.encoder import channels_last
from longtail.nn.heads import FOREGROUND_PROBABILITY
from longtail.tasks.detection.regions import class_shift

MOST_CANDIDATES = 2000
"""Pairs of a region and a class of one image that suppression compares."""


class RegionScores(NamedTuple):
    """Regions of images with the scores of the classes."""

    boxes: Tensor
    """(N, 4) x1, y1, x2, y2 in pixels of the letterboxed images, image after image."""
    scores: Tensor
    """(N, C) free of any prior; (N, C + 1) where the background is a class, the last one."""
    counts: tuple[int, ...]
    """Regions of each of the B images."""


class Detector(TrainedModel):
    """A trained model that finds objects.

    Args:
        encoder: images in [0, 1] to regions and their features.
        classifier: features of regions to scores.
        config: everything else.

    Example:
        >>> from longtail import Detector
        >>> detector = Detector.load("runs/bccd-la-seed0")                # doctest: +SKIP
        >>> boxes, labels, scores, _ = next(detector.find(["smear.jpg"])) # doctest: +SKIP
    """

    build_backbone: ClassVar[Callable[[str, int, str], nn.Module]] = staticmethod(build_detection_network)
    card_text: ClassVar[ModelCardText] = ModelCardText(
        kind="Detector",
        pipeline_tag="object-detection",
        counted="objects",
        metrics={"ap": "AP", "ap50": "AP50", "ap75": "AP75", "frequent": "AP f", "common": "AP c", "rare": "AP r"},
        usage='list(model.find(["image.png"]))',
        calibrates=False,
    )

    @property
    def network(self) -> DetectionNetwork:
        """What proposes regions."""
        backbone = self.encoder.backbone
        assert isinstance(backbone, DetectionNetwork)
        return backbone

    @property
    def class_layer(self) -> RegionClassifier:
        """The layer whose rows of ``weight`` and ``bias`` are the classes'.

        With a background class there are C + 1 rows, the background's last; otherwise A · C, the C of each of the A
        regions that share a feature vector after one another.
        """
        assert isinstance(self.classifier, RegionClassifier)
        return self.classifier

    @property
    def background(self) -> bool:
        """Whether the background is a class of its own."""
        return self.network.background

    @classmethod
    def build_classifier(cls, config: ModelConfig, encoder: Encoder) -> Classifier:
        """Return a classifier whose weights are still to be loaded."""
        network = encoder.backbone
        assert isinstance(network, DetectionNetwork)
        classes = len(config.class_names)
        return RegionClassifier(encoder.num_features, classes, network.background, network.regions_per_feature)

    @torch.no_grad()
    def regions(self, images: Tensor) -> RegionScores:
        """Return the regions of (B, channels, S, S) letterboxed images in [0, 1], with scores free of any prior."""
        found = self._raw_regions(images)
        return found._replace(scores=self.remove_prior(found.scores))

    def raw_scores(self, images: Tensor) -> Tensor:
        """Return the scores of the classifier, (N, C) or (N, C + 1), of all regions."""
        return self._raw_regions(images).scores

    def _raw_regions(self, images: Tensor) -> RegionScores:
        found = self.network.propose(self.encoder.normalize(channels_last(images)))
        return RegionScores(found.boxes, self.classifier(found.features).float(), found.counts)

    def remove_prior(self, scores: Tensor) -> Tensor:
        """Return raw scores of regions free of the prior of the classes given an object, divided by the temperature.

        The background's stay as they are. After plain cross-entropy it is NorCal with a power of 1, with the class
        counts divided by their mean.

        Source: Pan et al., *On Model Calibration for Long-Tailed Object Detection and Instance Segmentation* (NorCal),
        NeurIPS 2021, arXiv 2107.02170.
        """
        if self.config.predicts_under == "train":
            shift = class_shift(self.log_prior("train"), self.background)
            assert shift is not None
            scores = scores - shift.to(scores)
        return scores / self.config.temperature

    def probabilities(self, scores: Tensor, prior: Prior = "uniform") -> Tensor:
        """Return (N, C) probabilities of the classes, of scores free of any prior.

        Args:
            scores: of :meth:`regions`.
            prior: class frequencies of the objects: ``uniform``, ``train``, C frequencies, a mapping from class name to
                frequency, or a file of them.

        Raises:
            LongtailError: the prior does not fit.
        """
        log_prior = self.log_prior(prior)
        if log_prior is not None:
            log_prior = log_prior.to(scores)
            scores = scores + (
                F.pad(relative_log_prior(log_prior), (0, 1))
                if self.background
                else relative_log_odds(log_prior, FOREGROUND_PROBABILITY)
            )
        return scores.softmax(dim=1)[:, :-1] if self.background else scores.sigmoid()

    def detect(
        self,
        images: Tensor,
        post_processing: PostProcessing = DEFAULT_POST_PROCESSING,
        prior: Prior = "uniform",
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Detections]:
        """Return what is found in (B, channels, S, S) letterboxed images in [0, 1], in pixels of these.

        Args:
            images: see :meth:`preprocess`.
            post_processing: what of the regions is returned.
            prior: see :meth:`probabilities`.
            sizes: width and height of each image as it is stored: boxes are clipped to the part of the square that the
                image takes, and those in the padding left out, before suppression and the choice of the best; if not
                given, the squares are taken as images.

        Raises:
            LongtailError: the prior does not fit.
        """
        return self.select(self.regions(images), post_processing, prior, sizes)

    def select(
        self,
        regions: RegionScores,
        post_processing: PostProcessing = DEFAULT_POST_PROCESSING,
        prior: Prior = "uniform",
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Detections]:
        """Return the detections among regions, as :meth:`detect` does; several priors then need one pass.

        Args:
            regions: of :meth:`regions`.
            post_processing: see :meth:`detect`.
            prior: see :meth:`probabilities`.
            sizes: see :meth:`detect`.

        Raises:
            LongtailError: the prior does not fit.
        """
        probabilities = self.probabilities(regions.scores, prior)
        shown = None if sizes is None else [size_in_square(size, self.config.image_size) for size in sizes]
        return select_detections(regions.boxes, probabilities, regions.counts, post_processing, shown)

    def find(
        self,
        images: ImageLike | Iterable[ImageLike],
        post_processing: PostProcessing = DEFAULT_POST_PROCESSING,
        prior: Prior = "uniform",
        batch_size: int = 8,
    ) -> Iterator[Detections]:
        """Yield what is found in images, in pixels of these, image by image; on the CPU.

        Args:
            images: files, Pillow images, arrays (H, W, channels) of uint8, or tensors (channels, H, W).
            post_processing: see :meth:`detect`.
            prior: see :meth:`probabilities`.
            batch_size: images of a pass.

        Raises:
            LongtailError: a file cannot be read, the prior does not fit, or there are no images in a batch.
        """
        for squares, sizes in self._batches(images, batch_size):
            found = self.detect(squares, post_processing, prior, sizes)
            for size, detections in zip(sizes, found, strict=True):
                yield self.to_stored(detections, size)

    @torch.no_grad()
    def find_corrected(
        self,
        images: ImageLike | Iterable[ImageLike],
        corrections: Sequence[Callable[[Tensor], Tensor] | None],
        post_processing: PostProcessing = DEFAULT_POST_PROCESSING,
        batch_size: int = 8,
    ) -> Iterator[tuple[Detections, ...]]:
        """Yield what is found in images with each of several corrections of the scores, from one pass of the network.

        Args:
            images: see :meth:`find`.
            corrections: of the raw scores, (N, C) or (N, C + 1), in place of removing a prior; None for none.
            post_processing: see :meth:`detect`.
            batch_size: images of a pass.

        Raises:
            LongtailError: a file cannot be read, or there are no images in a batch.
        """
        for squares, sizes in self._batches(images, batch_size):
            raw, found = self._raw_regions(squares), []
            for correct in corrections:
                if correct is None:
                    scores = self.remove_prior(raw.scores)
                else:
                    scores = correct(raw.scores) / self.config.temperature
                regions = raw._replace(scores=scores)
                found.append(self.select(regions, post_processing, sizes=sizes))
            for index, size in enumerate(sizes):
                yield tuple(self.to_stored(by_image[index], size) for by_image in found)

    def _batches(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int
    ) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
        """Yield (B, channels, S, S) letterboxed images in [0, 1] with the width and height of each."""
        if isinstance(images, str | Path | Image.Image | np.ndarray) or (
            isinstance(images, Tensor) and images.ndim == 3
        ):
            images = [images]
        check_batch_size(batch_size)
        remaining = iter(images)
        while group := list(itertools.islice(remaining, batch_size)):
            shown = [to_rgb(to_pillow(image)) for image in group]
            yield torch.cat([self.preprocess(image) for image in shown]), [image.size for image in shown]

    def to_stored(self, detections: Detections, size: tuple[int, int]) -> Detections:
        """Return detections in pixels of the image, of those in pixels of the letterboxed one; on the CPU.

        Those of which nothing is in the image are left out.

        Args:
            detections: of :meth:`detect`.
            size: width and height of the image.
        """
        moved = boxes_in_image(detections.boxes.float().cpu().numpy(), size, self.config.image_size)
        boxes, kept = (torch.from_numpy(array) for array in moved)
        return Detections(boxes[kept], detections.labels.cpu()[kept], detections.scores.cpu()[kept])

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return an image letterboxed, (1, channels, S, S) in [0, 1]."""
        pixels = torch.from_numpy(np.array(letterbox(to_rgb(image), self.config.image_size)[0])).permute(2, 0, 1)
        return (pixels.float() / 255)[None].to(self.device)

    def export_input(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """Return an image letterboxed to (S, S), as (S, S, channels) uint8."""
        return torch.from_numpy(np.array(letterbox(to_rgb(image), size[0])[0]))


def select_detections(
    boxes: Tensor,
    probabilities: Tensor,
    counts: Sequence[int],
    post_processing: PostProcessing = DEFAULT_POST_PROCESSING,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Detections]:
    """Return the detections of each image: probable classes of regions, without those that another one suppresses.

    Args:
        boxes: (N, 4), image after image.
        probabilities: (N, C).
        counts: regions of each image.
        post_processing: which of them are returned.
        sizes: width and height of each image, in the pixels of the boxes, which are clipped to it; not clipped if not
            given.
    """
    found = []
    parts = zip(boxes.split(list(counts)), probabilities.split(list(counts)), strict=True)
    for image, (own_boxes, own) in enumerate(parts):
        is_probable = own > post_processing.score_threshold
        if sizes is not None:
            width, height = sizes[image]
            own_boxes = clip_boxes_to_image(own_boxes, (height, width))
            is_probable &= (own_boxes[:, 2:] > own_boxes[:, :2]).all(dim=1, keepdim=True)
        rows, labels = torch.nonzero(is_probable, as_tuple=True)
        scores = own[rows, labels]
        if len(scores) > MOST_CANDIDATES:
            scores, best = scores.topk(MOST_CANDIDATES)
            rows, labels = rows[best], labels[best]
        candidates = own_boxes[rows].float()
        kept = batched_nms(candidates, scores.float(), labels, post_processing.nms_threshold)
        kept = kept[: post_processing.max_detections]
        found.append(Detections(candidates[kept], labels[kept], scores[kept].float()))
    return found
