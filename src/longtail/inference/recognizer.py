"""A trained classifier of images. Legend: N images, C classes, S side in pixels."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from longtail.data.image_io import open_image, open_square, read_or_record
from longtail.data.images import to_square
from longtail.data.transforms.batched import center, to_float
from longtail.errors import LongtailError
from longtail.evaluation.calibration import conformal_thresholds
from longtail.evaluation.label_shift import EstimatedPrior, estimate_map
from longtail.inference.model import Prior, TrainedModel
from longtail.inference.model_card import ModelCardText
from longtail.inference.options import TTA, check_batch_size, check_tta
from longtail.losses import posterior
from longtail.nn import build_backbone

_TOLERANCE = 1e-3  # of floats in [0, 1], which may be results of half precision
_ENLARGEMENT = 256 / 224  # of images without room for crops, as photographs are kept

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

    @torch.no_grad()
    def scores(self, images: Tensor, tta: TTA = "none") -> Tensor:
        """Return (N, C) log-likelihood scores, free of any prior.

        With test-time augmentation they are the mean over the views of an image: the logarithm of the geometric mean of
        the views' likelihoods. A prior is added to them as it is to those of one view. The temperature is that of one
        view.

        Args:
            images: (N, channels, R, R) in [0, 1], R as :meth:`input_size` says; with ``crops`` images of S pixels are
                accepted too, see :meth:`views`.
            tta: ``none``; ``flip``, the mean over an image and its mirror image; or ``crops``, the mean over its centre
                and four corners, each also mirrored (Krizhevsky et al., NeurIPS 2012). Means of scores over crops at
                test time are those of Shi et al., *Long-Tail Learning with Foundation Model*, ICML 2024, arXiv
                2309.10019.

        Raises:
            LongtailError: the images are not floats.
        """
        return self.remove_prior(self.mean_raw_scores(images, tta))

    def mean_raw_scores(self, images: Tensor, tta: TTA = "none") -> Tensor:
        """Return :meth:`raw_scores`, averaged over the views of test-time augmentation, one pass for each."""
        views = iter(self.views(images, tta))
        total, count = self.raw_scores(next(views)), 1
        for view in views:
            total, count = total + self.raw_scores(view), count + 1
        return total if count == 1 else total / count

    def input_size(self, tta: TTA = "none") -> int:
        """Return the side in pixels of the images that the scores are computed from.

        It is S, or with ``crops`` that at which images are kept before the centre is cropped.
        """
        return self.config.stored_size if tta == "crops" else self.config.image_size

    def views(self, images: Tensor, tta: TTA) -> Iterator[Tensor]:
        """Yield the views of images that test-time augmentation averages over.

        Where images are kept at S pixels there is no room for crops: these are resized up in the ratio 256 : 224
        (bicubic) first. If the network resizes its images (``network_size``), they are resized to that side in the same
        ratio, and cropped to it.

        Args:
            images: (N, channels, R, R) in [0, 1].
            tta: which views.
        """
        if tta == "none":
            yield images
            return
        if tta == "flip":
            yield images
            yield images.flip(-1)
            return
        size = self.config.image_size
        if images.shape[-1] == size:
            size = self.encoder.resize or size
            enlarged = max(size + 2, round(size * _ENLARGEMENT))  # at least one pixel on every side
            shrinks = images.shape[-1] > enlarged
            images = F.interpolate(images, size=enlarged, mode="bicubic", antialias=shrinks).clamp(0, 1)
        room = images.shape[-1] - size
        for top, left in ((room // 2, room // 2), (0, 0), (0, room), (room, 0), (room, room)):
            crop = images[:, :, top : top + size, left : left + size]
            yield crop
            yield crop.flip(-1)

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        prior: Prior = "uniform",
        batch_size: int = 256,
        coverage: float | None = None,
        tta: TTA = "none",
        unreadable: dict[Path, str] | None = None,
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
            tta: test-time augmentation, see :meth:`scores`: ``none``, ``flip`` (2 times the computation) or ``crops``
                (10 times).
            unreadable: takes the path of every file that cannot be read, with the reason; there is no prediction for
                it then. If not given, such a file is an error.

        Raises:
            LongtailError: a file cannot be read, a tensor's values are out of range, the prior does not fit, there are
                no images in a batch, or there were no validation images, which conformal sets need; or these are asked
                for with test-time augmentation.
        """
        parts = list(self.predict_batches(images, prior, batch_size, coverage, tta, unreadable))
        if not parts:
            empty = torch.empty(0, len(self.config.class_names))
            parts = [Predictions(empty, self.config.class_names, in_set=None if coverage is None else empty.bool())]
        if len(parts) == 1:
            return parts[0]
        in_set = [part.in_set for part in parts if part.in_set is not None]
        probabilities = torch.cat([part.probabilities for part in parts])
        return Predictions(probabilities, self.config.class_names, in_set=torch.cat(in_set) if in_set else None)

    def predict_batches(
        self,
        images: ImageLike | Iterable[ImageLike],
        prior: Prior = "uniform",
        batch_size: int = 256,
        coverage: float | None = None,
        tta: TTA = "none",
        unreadable: dict[Path, str] | None = None,
    ) -> Iterator[Predictions]:
        """Yield what :meth:`predict` returns, a batch of images at a time, for more images than fit into memory.

        With the prior ``estimate`` all of them come at once, since it rests on the scores of every image.

        Args:
            images: see :meth:`predict`.
            prior: see :meth:`predict`.
            batch_size: images per pass through the network.
            coverage: see :meth:`predict`.
            tta: see :meth:`predict`.
            unreadable: see :meth:`predict`; an image of a batch that is to come is not in it yet.

        Raises:
            LongtailError: as :meth:`predict`.
        """
        check_tta(tta)
        check_batch_size(batch_size)
        estimate = isinstance(prior, str) and prior == "estimate"
        log_prior = None if estimate else self.log_prior(prior)
        thresholds = None if coverage is None else self.conformal_thresholds(coverage, tta)
        batches = self._batches(images, batch_size, self.input_size(tta), unreadable)
        parts: Iterable[Tensor] = (self.scores(batch, tta).cpu() for batch in batches)
        estimated = None
        if estimate:
            every = list(parts)
            if unreadable and not every:
                raise LongtailError(next(iter(unreadable.values())))
            scores = torch.cat(every) if every else torch.empty(0, len(self.config.class_names))
            estimated = self.estimate_prior(scores)
            log_prior = self.log_prior(self.corrected_frequencies(estimated))
            parts = [scores]
        for part in parts:
            in_set = None if thresholds is None else posterior(part).exp() >= thresholds.to(part)
            yield Predictions(posterior(part, log_prior).exp(), self.config.class_names, estimated, in_set)

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
        values, counts = scores.cpu().numpy(), self.config.class_counts
        if stats is None:
            return estimate_map(values, counts, weights=weights, validation_images=0)
        return estimate_map(values, counts, stats.bias.numpy(), stats.halves.numpy(), weights, len(stats.labels))

    def corrected_frequencies(self, estimated: EstimatedPrior) -> list[float]:
        """Return (C,) frequencies to predict under: the estimated ones times the correction of the scores."""
        if self.calibration_stats is None:
            return estimated.frequencies
        bias = self.calibration_stats.bias.double()
        corrected: Tensor = torch.tensor(estimated.frequencies, dtype=torch.float64) * bias.exp()
        return corrected.tolist()

    def conformal_thresholds(self, coverage: float, tta: str = "none") -> Tensor:
        """Return the (C,) probabilities under the uniform prior from which on a class is in a conformal set.

        Args:
            coverage: fraction of each class's images whose set contains their class, in (0, 1).
            tta: test-time augmentation that the thresholds are for. The guarantee holds for ``none`` alone, with which
                the validation images were predicted.

        Raises:
            LongtailError: the coverage is out of its range, there were no validation images, or there is test-time
                augmentation.
        """
        if tta != "none":
            raise LongtailError(
                "coverage: conformal sets are calibrated on predictions without test-time augmentation; use either "
                "--coverage or --tta"
            )
        if not 0 < coverage < 1:
            raise LongtailError(f"coverage {coverage}: expected a fraction between 0 and 1")
        stats = self.calibration_stats
        if stats is None:
            raise LongtailError(
                "coverage: conformal sets need validation images, and the run had none; train with some "
                "(--data.val_fraction 0.1)"
            )
        return conformal_thresholds(stats.true_probability, stats.labels, len(self.config.class_names), coverage)

    def _batches(
        self,
        images: ImageLike | Iterable[ImageLike],
        batch_size: int,
        side: int,
        unreadable: dict[Path, str] | None = None,
    ) -> Iterable[Tensor]:
        size = self.config.image_size
        if isinstance(images, Tensor) and images.ndim == 4:
            images = _as_pixels(images)
            for part in images.split(batch_size):
                pixels = part if part.dtype == torch.uint8 else (part.clamp(0, 1) * 255).round().to(torch.uint8)
                if pixels.shape[1:] == (self.config.channels, size, size):
                    yield (to_float(pixels) if part.dtype == torch.uint8 else part).to(self.device)
                else:
                    yield self._preprocess([to_pillow(image) for image in pixels], side).to(self.device)
            return
        if isinstance(images, str | Path | Image.Image | np.ndarray | Tensor):
            images = [images]
        batch: list[Image.Image] = []
        for image in self._opened(images, 2 * batch_size, unreadable):
            if image is None:
                continue
            batch.append(image)
            if len(batch) == batch_size:
                yield self._preprocess(batch, side).to(self.device)
                batch = []
        if batch:
            yield self._preprocess(batch, side).to(self.device)

    def _opened(
        self, images: Iterable[ImageLike], ahead: int, unreadable: dict[Path, str] | None
    ) -> Iterator[Image.Image | None]:
        """Yield the images in order; threads decode up to ``ahead`` of them while earlier ones are classified."""
        if isinstance(images, Sequence) and len(images) == 1:
            yield self._open(images[0], unreadable)
            return
        pending: collections.deque[Future[Image.Image | None]] = collections.deque()
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            for image in images:
                pending.append(pool.submit(self._open, image, unreadable))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _open(self, image: ImageLike, unreadable: dict[Path, str] | None) -> Image.Image | None:
        if isinstance(image, str | Path):
            return read_or_record(self._open_file, Path(image), unreadable)
        return to_pillow(image)

    def _open_file(self, path: Path) -> Image.Image:
        # a file becomes a square as the training images did
        return open_square(path, self.config.stored_size, self.config.channels)

    def _preprocess(self, images: list[Image.Image], side: int) -> Tensor:
        pixels = torch.stack([to_square(image, self.config.stored_size, self.config.channels) for image in images])
        return to_float(center(pixels, side))

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return an image as the network sees it, (1, channels, S, S) in [0, 1]."""
        return self._preprocess([image], self.config.image_size).to(self.device)

    def export_input(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """Return an image as an exported file takes it, (H, W, channels) uint8.

        Args:
            image: of any size.
            size: (H, W), equal, as :meth:`input_size` says.
        """
        return (self._preprocess([image], size[0])[0].permute(1, 2, 0) * 255).round().to(torch.uint8)


def _as_pixels(images: Tensor) -> Tensor:
    """Return uint8 as it is, floats as float32."""
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise LongtailError(
            f"images: expected a tensor of uint8 from 0 to 255 or of floats from 0 to 1, got {images.dtype}; take "
            "images.byte() where they are from 0 to 255"
        )
    images = images.float()
    if images.numel():
        low, high = (float(bound) for bound in torch.aminmax(images))
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # NaN is neither
            raise LongtailError(
                f"images: expected floats from 0 to 1, got values from {low:.4g} to {high:.4g}; take images / 255 "
                "where they are from 0 to 255; the model normalises them itself"
            )
    return images


def to_pillow(image: ImageLike) -> Image.Image:
    """Return a file, an array or a tensor as a Pillow image."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return open_image(Path(image))
    if isinstance(image, Tensor):
        image = _as_pixels(image)
        if image.dtype != torch.uint8:
            image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
        image = image.detach().cpu().permute(1, 2, 0).numpy() if image.ndim == 3 else image.detach().cpu().numpy()
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and 1 <= image.shape[2] <= 4)):
        raise LongtailError(
            "image: expected an array of uint8, (H, W) or (H, W, channels) with 1 to 4 channels, got "
            f"{image.dtype} of shape {tuple(image.shape)}"
        )
    return Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
