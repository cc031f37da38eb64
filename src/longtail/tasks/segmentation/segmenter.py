"""A trained model that labels every pixel of images of any size.

Legend: C classes, H and W sides of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from longtail.data.image_io import to_rgb
from longtail.errors import LongtailError
from longtail.inference.model import Prior, TrainedModel
from longtail.inference.model_card import ModelCardText
from longtail.inference.options import InferenceOptions
from longtail.inference.recognizer import ImageLike, to_pillow
from longtail.losses.score_loss import broadcast_to_classes
from longtail.nn.segmentation import build_segmentation_backbone, upsample_scores

_ROWS = 256  # of scores that are freed of the prior at once


class Segmenter(TrainedModel):
    """A trained model that labels every pixel.

    Args:
        encoder: images in [0, 1] to maps of features.
        classifier: features to scores.
        config: everything else.

    Example:
        >>> from longtail import Segmenter
        >>> segmenter = Segmenter.load("runs/camvid-gml-seed0")           # doctest: +SKIP
        >>> labels = next(segmenter.segment(["street.jpg"]))              # doctest: +SKIP
    """

    build_backbone: ClassVar[Callable[[str, int, str], nn.Module]] = staticmethod(build_segmentation_backbone)
    card_text: ClassVar[ModelCardText] = ModelCardText(
        kind="Segmenter",
        pipeline_tag="image-segmentation",
        counted="labelled pixels",
        metrics={
            "mean_iou": "mean IoU",
            "head": "head IoU",
            "middle": "middle IoU",
            "tail": "tail IoU",
            "boundary_iou": "boundary IoU",
            "balanced_accuracy": "mean class accuracy",
            "top1": "pixel accuracy",
        },
        usage='list(model.segment(["image.png"]))',
        calibrates=False,
    )

    @torch.no_grad()
    def scores(self, images: Tensor, options: InferenceOptions | None = None) -> Tensor:
        """Return (B, C, H, W) log-likelihood scores, free of any prior, of (B, channels, H, W) images in [0, 1].

        Args:
            images: of any size.
            options: how they are computed; without a sliding window in them, the model's own is used, if it has one.
        """
        options = options or InferenceOptions()
        window = self.config.sliding_window if options.sliding_window is None else options.sliding_window
        if options.tta in {"crops", "auto"}:
            raise LongtailError(f"tta {options.tta}: is for models that classify whole images; use flip")
        height, width = images.shape[-2:]
        total: Tensor | None = None
        for scale in options.tta_scales:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            scaled = images if scale == 1 else F.interpolate(images, size, mode="bilinear", antialias=True)
            for mirrored in (False, True) if options.tta_flip else (False,):
                scores = self._sliding_window(scaled.flip(-1) if mirrored else scaled, window)
                scores = scores.flip(-1) if mirrored else scores
                if scale != 1:
                    scores = F.interpolate(scores, (height, width), mode="bilinear")
                total = scores if total is None else total.add_(scores)
        assert total is not None
        total.div_(len(options.tta_scales) * (2 if options.tta_flip else 1))
        for top in range(0, height, _ROWS):  # the scores of a photograph may be gigabytes, which a copy would double
            rows = total[..., top : top + _ROWS, :]
            rows.copy_(self.remove_prior(rows))
        return total

    def _sliding_window(self, images: Tensor, window: int | None) -> Tensor:
        """Return the scores of an image, averaged over the windows that contain a pixel."""
        height, width = images.shape[-2:]
        if window is None or max(height, width) <= window:
            return self.raw_scores(images)
        sums = images.new_zeros(len(images), len(self.config.class_names), height, width)
        counts = images.new_zeros(height, width)
        for top in _window_starts(height, window):
            for left in _window_starts(width, window):
                part = (..., slice(top, top + window), slice(left, left + window))
                sums[part] += self.raw_scores(images[part])
                counts[part] += 1
        return sums.div_(counts)

    def raw_scores(self, images: Tensor) -> Tensor:
        """Return the classifier's scores of every pixel in one pass."""
        return upsample_scores(super().raw_scores(images), *images.shape[-2:])

    def segment(
        self,
        images: ImageLike | Iterable[ImageLike],
        prior: Prior = "uniform",
        options: InferenceOptions | None = None,
    ) -> Iterator[Tensor]:
        """Yield the most probable class of every pixel, (H, W) int64, image by image.

        Args:
            images: files, Pillow images, arrays (H, W, channels) of uint8, or tensors (channels, H, W).
            prior: class frequencies of the pixels where the images come from: ``uniform``, ``train``, C frequencies, a
                mapping from class name to frequency, or a file of them.
            options: how the scores of an image are computed, see :meth:`scores`.

        Raises:
            LongtailError: a file cannot be read, or the prior does not fit.
        """
        log_prior = self.log_prior(prior)
        if isinstance(images, str | Path | Image.Image | np.ndarray) or (
            isinstance(images, Tensor) and images.ndim == 3
        ):
            images = [images]
        for image in images:
            scores = self.scores(self.preprocess(to_pillow(image)), options)
            if log_prior is not None:
                scores += broadcast_to_classes(log_prior.to(scores), scores)
            yield scores.argmax(dim=1)[0].cpu()

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return an image as (1, channels, H, W) in [0, 1]."""
        pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
        return pixels.float().div_(255)[None].to(self.device)

    def export_input(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """Return an image resized to (H, W), as (H, W, channels) uint8."""
        return torch.from_numpy(np.array(to_rgb(image).resize(size[::-1])))


def _window_starts(length: int, window: int) -> list[int]:
    """Return where windows begin, two thirds of a window apart, the last at the end."""
    last = max(0, length - window)
    return sorted({*range(0, last, max(1, window * 2 // 3)), last})
