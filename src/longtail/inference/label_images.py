"""Label images and overlays: files and pictures of predicted labels, and the table of them. Imports no torch.

Legend: C classes, H and W sides in pixels; labels are (H, W) of any type of integers, −1 where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from longtail.data.image_io import open_image, read_or_record, to_rgb
from longtail.data.palette import class_colors
from longtail.inference.output import PredictionOutput, readable_files
from longtail.inference.pictures import OVERLAY, PictureNames, write_picture

Labels = np.ndarray[Any, Any]


def predict_label_images(
    files: Sequence[Path],
    predict: Callable[[Image.Image], Labels],
    names: Sequence[str],
    out: Path,
    top: int | None = None,
    progress: bool = False,
) -> PredictionOutput:
    """Write the labels of every image file as a PNG, and an overlay, and return the table of them.

    Args:
        files: that are read one at a time.
        predict: returns the labels of an image, at its size.
        names: C names of the classes.
        out: the folder.
        top: how many classes the table shows, those with most pixels; 3 if not given.
        progress: show a progress bar.

    Raises:
        LongtailError: no file can be read, or the folder cannot be written.
    """
    records: list[dict[str, Any]] = []
    unreadable: dict[Path, str] = {}
    pictures = label_pictures(out)
    for file in tqdm(files, unit="image", disable=not progress, leave=False):
        image = read_or_record(open_image, file, unreadable)
        if image is None:
            continue
        labels = predict(image)
        counts = np.bincount(labels.ravel(), minlength=len(names))
        present = [index for index in np.argsort(-counts, kind="stable").tolist() if counts[index]]
        label_file, overlay_file = write_label_image(pictures, file, labels, len(names))
        shares = {names[index]: float(counts[index]) / labels.size for index in present}
        records.append({"path": str(file), "labels": str(label_file), "overlay": str(overlay_file), "shares": shares})
    readable_files(files, unreadable)  # an error if there is none
    rows = [
        [
            record["path"],
            record["labels"],
            ", ".join(f"{name} {value:.3f}" for name, value in list(record["shares"].items())[: top or 3]),
        ]
        for record in records
    ]
    notes = [f"labels (value 1 is {names[0]}) and overlays: {out}"]
    return PredictionOutput(records, ["path", "labels", "largest shares"], rows, notes, unreadable)


def label_image(labels: Labels, classes: int) -> Image.Image:
    """Return labels as an image in the format of ``annotations/``: 1 for the first class, 0 where unlabelled.

    Up to 255 classes it has a palette, so that viewers show colours.
    """
    values = labels + 1
    if classes > 255:
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, *(value for color in class_colors(classes) for value in color)])
    return image


def label_pictures(out: Path) -> PictureNames:
    """Return the names of label images and their overlays in a folder, ``NAME.png`` and ``NAME-overlay.png``."""
    return PictureNames(out, (".png", OVERLAY))


def write_label_image(pictures: PictureNames, file: Path, labels: Labels, classes: int) -> tuple[Path, Path]:
    """Write the label image of an image and the overlay; return their paths, which :func:`label_pictures` gives."""
    label_path, overlay_path = pictures.paths(file)
    mixed = overlay(open_image(file), labels, classes)
    write_picture(label_path, label_image(labels, classes), file)
    write_picture(overlay_path, mixed, file)
    return label_path, overlay_path


def overlay(image: Image.Image, labels: Labels, classes: int, opacity: float = 0.6) -> Image.Image:
    """Return an image with the colours of its labels over it; unlabelled pixels stay as they are."""
    colors = np.array(class_colors(classes), dtype=np.float32)[labels.clip(min=0)]
    pixels = np.array(to_rgb(image), dtype=np.float32)
    mixed = np.where((labels >= 0)[..., None], opacity * colors + (1 - opacity) * pixels, pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))
