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
from longtail.data.paths import printable
from longtail.inference.output import PredictionOutput, readable_files
from longtail.inference.pictures import OVERLAY, PictureNames, write_picture

Labels = np.ndarray[Any, Any]
_ROWS = 256  # of an overlay that are mixed at once


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

    def label(file: Path) -> None:
        image = read_or_record(open_image, file, unreadable)
        if image is None:
            return
        labels = predict(image)
        counts = np.bincount(labels.ravel(), minlength=len(names))
        present = [index for index in np.argsort(-counts, kind="stable").tolist() if counts[index]]
        label_file, overlay_file = write_label_image(pictures, file, labels, len(names))
        shares = {names[index]: float(counts[index]) / labels.size for index in present}
        records.append({"path": str(file), "labels": str(label_file), "overlay": str(overlay_file), "shares": shares})

    for file in tqdm(files, unit="image", disable=not progress, leave=False):
        try:
            label(file)
        except Exception as error:
            if not _lacks_memory(error):
                raise
            unreadable[file] = f"{printable(file)}: labelling its pixels needs more memory than there is; shrink it"
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


def _lacks_memory(error: Exception) -> bool:
    """Return whether an error of Python, torch or ONNX Runtime says that memory cannot be allocated."""
    # torch, which need not be here, has a class for accelerators; its error on a CPU is a usual one, as ONNX Runtime's
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "allocate memory" in str(error)


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
    colors = np.array(class_colors(classes), dtype=np.float32)
    mixed = np.array(to_rgb(image))
    for top in range(0, len(mixed), _ROWS):  # colours and mixtures of all of a large image would take gigabytes
        band = labels[top : top + _ROWS]
        pixels = mixed[top : top + _ROWS].astype(np.float32)
        tinted = opacity * colors[band.clip(min=0)] + (1 - opacity) * pixels
        mixed[top : top + _ROWS] = np.where((band >= 0)[..., None], tinted, pixels).round()
    return Image.fromarray(mixed)
