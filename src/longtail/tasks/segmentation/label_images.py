"""Label images and overlays: files and pictures of predicted labels. Legend: C classes, H and W sides in pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from longtail.data.image_io import image_errors, open_header, open_image, to_rgb
from longtail.data.palette import class_colors
from longtail.data.paths import printable
from longtail.errors import LongtailError
from longtail.files import atomic_write


def label_image(labels: Tensor, classes: int) -> Image.Image:
    """Return labels as an image in the format of ``annotations/``: 1 for the first class, 0 where unlabelled.

    Up to 255 classes it has a palette, so that viewers show colours.
    """
    values = (labels + 1).numpy()
    if classes > 255:
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, *(value for color in class_colors(classes) for value in color)])
    return image


def write_segmentation(out: Path, file: Path, labels: Tensor, classes: int) -> tuple[Path, Path]:
    """Write ``NAME.png`` with the labels of an image and an overlay ``NAME-overlay.png``; return both paths.

    A number is appended to a name that another image has taken.
    """
    stem, number = file.stem, 1
    source = printable(file.resolve())  # PNG's texts are Unicode, names of files may be other bytes
    paths = (out / f"{stem}.png", out / f"{stem}-overlay.png")
    while any(path.exists() and _source(path) != source for path in paths):
        number += 1
        stem = f"{file.stem}-{number}"
        paths = (out / f"{stem}.png", out / f"{stem}-overlay.png")
    metadata = PngInfo()
    metadata.add_text("Source", source)
    images = (label_image(labels, classes), overlay(open_image(file), labels, classes))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtailError(f"{out}: cannot be made: {error.strerror}") from None
    for path, image in zip(paths, images, strict=True):
        atomic_write(path, lambda partial, image=image: image.save(partial, "PNG", pnginfo=metadata))  # type: ignore[misc]
    return paths


def _source(path: Path) -> str | None:
    """Return which image a file was made of; None if it is another kind of file."""
    try:
        with image_errors(path), open_header(path) as image:
            return image.info.get("Source")
    except LongtailError:
        return None


def overlay(image: Image.Image, labels: Tensor, classes: int, opacity: float = 0.6) -> Image.Image:
    """Return an image with the colours of its labels over it; unlabelled pixels stay as they are."""
    colors = torch.tensor(class_colors(classes), dtype=torch.float32)[labels.clamp(min=0)]
    pixels = torch.from_numpy(np.array(to_rgb(image))).float()
    mixed = torch.where((labels >= 0)[..., None], opacity * colors + (1 - opacity) * pixels, pixels)
    return Image.fromarray(mixed.round().to(torch.uint8).numpy())
