"""A trained classifier of images. Legend: N images, C classes, S side in pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from longtail.data.image_io import open_image
from longtail.data.images import to_square
from longtail.data.transforms.batched import center, to_float
from longtail.errors import LongtailError
from longtail.evaluation.calibration import conformal_thresholds
from longtail.evaluation.label_shift import EstimatedPrior, estimate_map
from longtail.inference.model import Prior, TrainedModel
from longtail.inference.model_card import ModelCardText
from longtail.losses import posterior
from longtail.nn import build_backbone

ImageLike = str | Path | Image.Image | np.ndarray[Any, Any] | Tensor


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of images, with the names of the classes."""

    probabilities: Tensor
    """(N, C)."""
    class_names: tuple[str, ...]
    prior: EstimatedPrior | None = None
    """Class frequencies estimated from these images, if that was asked for."""
    in_set: Tensor | None = None
    """(N, C) bool, the classes in the conformal set of an image, if a coverage was asked for."""

    @property
    def labels(self) -> Tensor:
        """(N,) most probable class of each image."""
        return self.probabilities.argmax(dim=1)

    @property
    def names(self) -> list[str]:
        """Name of the most probable class of each image."""
        return [self.class_names[label] for label in self.labels.tolist()]

    @property
    def sets(self) -> list[list[str]] | None:
        """Names of the classes in the conformal set of each image."""
        if self.in_set is None:
            return None
        return [[self.class_names[c] for c in row.nonzero()[:, 0].tolist()] for row in self.in_set]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return the k most probable classes of each image with their probabilities, best first."""
        values, indices = self.probabilities.topk(min(k, len(self.class_names)), dim=1)
        return [
            [(self.class_names[index], value) for index, value in zip(row, probabilities, strict=True)]
            for row, probabilities in zip(indices.tolist(), values.tolist(), strict=True)
        ]


class Recognizer(TrainedModel):
    """A trained classifier of images.

    Args:
        encoder: images in [0, 1] to features.
        classifier: features to scores.
        config: everything else.
        calibration_stats: its predictions on the validation images, if there were some.

    Example:
        >>> from longtail import Recognizer
        >>> recognizer = Recognizer.load("runs/digits-lt")            # doctest: +SKIP
        >>> recognizer.predict(["photo.png"], prior="uniform").names  # doctest: +SKIP
    """

    build_backbone: ClassVar[Callable[[str, int, str], nn.Module]] = staticmethod(build_backbone)
    card_text: ClassVar[ModelCardText] = ModelCardText(
        kind="Recognizer",
        pipeline_tag="image-classification",
        counted="images",
        metrics={
            "balanced_accuracy": "balanced accuracy",
            "top1": "top-1",
            "many": "many",
            "medium": "medium",
            "few": "few",
        },
        usage='model.predict(["image.png"], prior="uniform").names',
    )

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        prior: Prior = "uniform",
        batch_size: int = 256,
        coverage: float | None = None,
    ) -> Predictions:
        """Return class probabilities.

        Args:
            images: files, Pillow images, arrays (H, W) or (H, W, channels) of uint8, or a tensor (N, channels, H, W)
                of uint8, or of floats in [0, 1].
            prior: class frequencies where the images come from: ``uniform``, ``train`` (those of the training set), C
                frequencies, a mapping or a file, or ``estimate``: from these images (:meth:`estimate_prior`).
            batch_size: images per pass through the network.
            coverage: fraction of each class's images whose conformal set contains their class, in (0, 1); no sets if
                not given.

        Raises:
            LongtailError: a file cannot be read, the prior does not fit, or there were no validation images, which
                conformal sets need.
        """
        estimate = isinstance(prior, str) and prior == "estimate"
        log_prior = None if estimate else self.log_prior(prior)
        thresholds = None if coverage is None else self.conformal_thresholds(coverage)
        parts = [self.scores(batch).cpu() for batch in self._batches(images, batch_size)]
        scores = torch.cat(parts) if parts else torch.empty(0, len(self.config.class_names))
        estimated = None
        if estimate:
            estimated = self.estimate_prior(scores)
            log_prior = self.log_prior(self.corrected_frequencies(estimated))
        in_set = None if thresholds is None else posterior(scores).exp() >= thresholds.to(scores)
        return Predictions(posterior(scores, log_prior).exp(), self.config.class_names, estimated, in_set)

    def estimate_prior(self, scores: Tensor, weights: Tensor | None = None) -> EstimatedPrior:
        """Return class frequencies estimated from scores: :func:`~longtail.evaluation.label_shift.estimate_map`.

        Args:
            scores: (N, C) as :meth:`scores` returns them.
            weights: (N,) weight of each image; equal if not given.

        Raises:
            LongtailError: there is no image.
        """
        if len(scores) == 0:
            raise LongtailError("prior estimate: there are no images to estimate it from")
        stats = self.calibration_stats
        bias, halves = (None, None) if stats is None else (stats.bias.numpy(), stats.halves.numpy())
        return estimate_map(scores.cpu().numpy(), self.config.class_counts, bias, halves, weights)

    def corrected_frequencies(self, estimated: EstimatedPrior) -> list[float]:
        """Return (C,) frequencies to predict under: the estimated ones times the correction of the scores."""
        if self.calibration_stats is None:
            return estimated.frequencies
        bias = self.calibration_stats.bias.double()
        corrected: Tensor = torch.tensor(estimated.frequencies, dtype=torch.float64) * bias.exp()
        return corrected.tolist()

    def conformal_thresholds(self, coverage: float) -> Tensor:
        """Return the (C,) probabilities under the uniform prior from which on a class is in a conformal set.

        Args:
            coverage: fraction of each class's images whose set contains their class, in (0, 1).

        Raises:
            LongtailError: the coverage is out of its range, or there were no validation images.
        """
        if not 0 < coverage < 1:
            raise LongtailError(f"coverage {coverage}: expected a fraction between 0 and 1")
        stats = self.calibration_stats
        if stats is None:
            raise LongtailError(
                "coverage: conformal sets need validation images, and the run had none; train with some "
                "(--data.val_fraction 0.1)"
            )
        return conformal_thresholds(stats.true_probability, stats.labels, len(self.config.class_names), coverage)

    def _batches(self, images: ImageLike | Iterable[ImageLike], batch_size: int) -> Iterable[Tensor]:
        size = self.config.image_size
        if isinstance(images, Tensor) and images.ndim == 4:
            for part in images.split(batch_size):
                pixels = part if part.dtype == torch.uint8 else (part.clamp(0, 1) * 255).round().to(torch.uint8)
                if pixels.shape[1:] == (self.config.channels, size, size):
                    yield (to_float(pixels) if part.dtype == torch.uint8 else part).to(self.device)
                else:
                    yield self._preprocess([to_pillow(image) for image in pixels]).to(self.device)
            return
        if isinstance(images, str | Path | Image.Image | np.ndarray | Tensor):
            images = [images]
        batch: list[Image.Image] = []
        for image in images:
            batch.append(to_pillow(image))
            if len(batch) == batch_size:
                yield self._preprocess(batch).to(self.device)
                batch = []
        if batch:
            yield self._preprocess(batch).to(self.device)

    def _preprocess(self, images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([to_square(image, self.config.stored_size, self.config.channels) for image in images])
        return to_float(center(pixels, self.config.image_size))

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return an image as the network sees it, (1, channels, S, S) in [0, 1]."""
        return self._preprocess([image]).to(self.device)

    def export_input(self, image: Image.Image, size: tuple[int, int]) -> Tensor:  # noqa: ARG002
        """Return an image as an exported file takes it, (H, W, channels) uint8.

        Args:
            image: of any size.
            size: (H, W).
        """
        return (self.preprocess(image)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).cpu()


def to_pillow(image: ImageLike) -> Image.Image:
    """Return a file, an array or a tensor as a Pillow image."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return open_image(Path(image))
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8:
            image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
        image = image.detach().cpu().permute(1, 2, 0).numpy() if image.ndim == 3 else image.detach().cpu().numpy()
    if image.dtype != np.uint8 or image.ndim not in {2, 3}:
        raise LongtailError(
            f"image: expected an array of uint8, (H, W) or (H, W, channels), got {image.dtype} of shape {image.shape}"
        )
    return Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
