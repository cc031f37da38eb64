"""The thing that a user keeps of a segmentation: images of any size to a class for every pixel.

Legend: C classes, H and W sides of an image in pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from longtail.data.pictures import open_image, upright
from longtail.errors import LongtailError
from longtail.files import write_whole
from longtail.nn.segmentation import to_pixels
from longtail.objectives.posterior import along
from longtail.recognizer import ImageLike, Recognizer, read_card, to_pillow


@dataclass(frozen=True, kw_only=True)
class Looks:
    """How often, and how large, an image is looked at; the scores of all looks are averaged."""

    window: int | None = None
    """Side of a square that slides over the image, two thirds of it a step; the whole image at once if not given."""
    flip: bool = False
    """Look at the mirrored image too."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes that the image is brought to, as shares of its own."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 32:
            raise LongtailError(f"window {self.window}: expected at least 32 pixels")
        if not self.scales or min(self.scales) <= 0 or max(self.scales) > 8:
            raise LongtailError(f"scales {self.scales}: expected numbers above 0, at most 8")


class Segmenter(Recognizer):
    """A trained long-tailed segmenter.

    Args:
        encoder: images in [0, 1] to maps of features.
        classifier: features to scores.
        card: everything else.

    Example:
        >>> from longtail import Segmenter
        >>> segmenter = Segmenter.load("runs/camvid-gml-seed0")           # doctest: +SKIP
        >>> labels = next(segmenter.segment(["street.jpg"]))              # doctest: +SKIP
    """

    task = "segmentation"

    @torch.no_grad()
    def scores(self, images: Tensor, looks: Looks | None = None) -> Tensor:
        """Return (B, C, H, W) log-likelihood scores, free of any prior, of (B, channels, H, W) images in [0, 1]."""
        looks = looks or Looks()
        height, width = images.shape[-2:]
        total: Tensor | None = None
        for scale in looks.scales:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            scaled = images if scale == 1 else F.interpolate(images, size, mode="bilinear", antialias=True)
            for mirrored in (False, True) if looks.flip else (False,):
                found = self._slide(scaled.flip(-1) if mirrored else scaled, looks.window)
                found = found.flip(-1) if mirrored else found
                if scale != 1:
                    found = F.interpolate(found, (height, width), mode="bilinear")
                total = found if total is None else total + found
        assert total is not None
        return self.free(total / (len(looks.scales) * (2 if looks.flip else 1)))

    def _slide(self, images: Tensor, window: int | None) -> Tensor:
        """Return the scores of an image, the mean over the windows that see a pixel."""
        height, width = images.shape[-2:]
        if window is None or max(height, width) <= window:
            return self.trained_scores(images)
        sums = images.new_zeros(len(images), len(self.card.class_names), height, width)
        seen = images.new_zeros(height, width)
        for top in _places(height, window):
            for left in _places(width, window):
                part = (..., slice(top, top + window), slice(left, left + window))
                sums[part] += self.trained_scores(images[part])
                seen[part] += 1
        return sums / seen

    def trained_scores(self, images: Tensor) -> Tensor:
        """Return the classifier's own scores of every pixel, looked at once."""
        return to_pixels(super().trained_scores(images), *images.shape[-2:])

    def segment(
        self,
        images: ImageLike | Iterable[ImageLike],
        prior: str | Sequence[float] | Tensor = "uniform",
        looks: Looks | None = None,
    ) -> Iterator[Tensor]:
        """Yield the most probable class of every pixel, (H, W) int64, an image after the other.

        Args:
            images: files, Pillow images, arrays (H, W, channels) of uint8, or tensors (channels, H, W).
            prior: how frequent the classes' pixels are where the images come from: ``uniform``, ``train``, or C
                frequencies.
            looks: how often an image is looked at.

        Raises:
            LongtailError: a file cannot be read, or the prior does not fit.
        """
        bias = self.log_prior(prior)
        if isinstance(images, str | Path | Image.Image | np.ndarray) or (
            isinstance(images, Tensor) and images.ndim == 3
        ):
            images = [images]
        for image in images:
            scores = self.scores(self.prepared(upright(to_pillow(image))), looks)
            yield (scores if bias is None else scores + along(bias.to(scores), scores)).argmax(dim=1)[0].cpu()

    def prepared(self, image: Image.Image) -> Tensor:
        """Return an image as (1, channels, H, W) in [0, 1]."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return (pixels.float() / 255)[None].to(self.classifier.weight.device)

    def predict(self, *_: Any, **__: Any) -> Any:
        """Refuse: an image has no one class here."""
        raise LongtailError("this is a segmenter, which gives every pixel a class: call segment instead of predict")


def load_kept(folder: Path | str) -> Recognizer:
    """Return the recogniser of a folder, or the segmenter that it holds."""
    return (Segmenter if read_card(folder).task == "segmentation" else Recognizer).load(folder)


def _places(length: int, window: int) -> list[int]:
    """Return where windows begin, two thirds of one apart, the last at the end."""
    last = max(0, length - window)
    return sorted({*range(0, last, max(1, window * 2 // 3)), last})


def palette(classes: int) -> list[tuple[int, int, int]]:
    """Return a colour a class, hues a golden ratio of the circle apart, so that neighbours differ."""
    colors = []
    for index in range(classes):
        lightness = (0.5, 0.7, 0.35)[index % 3]
        rgb = colorsys.hls_to_rgb(index * 0.618034 % 1, lightness, 0.75)
        colors.append((round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])))
    return colors


def label_image(labels: Tensor, classes: int) -> Image.Image:
    """Return labels as an image that is read as ``annotations/`` are: 1 for the first class, 0 where unlabelled.

    Up to 255 classes it has a palette, so that it is seen in colours.
    """
    values = (labels + 1).numpy()
    if classes > 255:
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, *(value for color in palette(classes) for value in color)])
    return image


def write_segmentation(out: Path, file: Path, labels: Tensor, classes: int) -> tuple[Path, Path]:
    """Write ``NAME.png`` with an image's labels and ``NAME-overlay.png`` to look at; return both paths.

    A name that is taken by another image gets a number.
    """
    stem, number = file.stem, 1
    while (out / f"{stem}.png").exists() and _source(out / f"{stem}.png") != str(file.resolve()):
        number += 1
        stem = f"{file.stem}-{number}"
    about = PngInfo()
    about.add_text("Source", str(file.resolve()))
    paths = (out / f"{stem}.png", out / f"{stem}-overlay.png")
    shown = (label_image(labels, classes), overlay(open_image(file), labels, classes))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtailError(f"{out}: cannot be made: {error.strerror}") from None
    for path, image in zip(paths, shown, strict=True):
        write_whole(path, lambda partial, image=image: image.save(partial, "PNG", pnginfo=about))  # type: ignore[misc]
    return paths


def _source(path: Path) -> str | None:
    with Image.open(path) as image:
        return image.info.get("Source")


def overlay(image: Image.Image, labels: Tensor, classes: int, share: float = 0.6) -> Image.Image:
    """Return an image with its labels' colours over it; what is unlabelled stays as it is."""
    colors = torch.tensor(palette(classes), dtype=torch.float32)[labels.clamp(min=0)]
    pixels = torch.from_numpy(np.array(upright(image))).float()
    mixed = torch.where((labels >= 0)[..., None], share * colors + (1 - share) * pixels, pixels)
    return Image.fromarray(mixed.round().to(torch.uint8).numpy())
