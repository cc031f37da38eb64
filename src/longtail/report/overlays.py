"""Segmented images to look at: the image, its truth, the prediction, and where they differ."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from longtail.data.scenes import Scene, SceneImages
from longtail.engine.evaluate import open_finished
from longtail.errors import LongtailError
from longtail.report.addresses import address
from longtail.segmenter import Segmenter, overlay

_MISSED, _TAKEN, _OTHER = (204, 51, 68), (51, 102, 204), (150, 150, 150)


def worst(folder: Path, examples: Sequence[dict[str, int]]) -> list[tuple[str, str]]:
    """Return captions and strips, as addresses that hold them, of a run's worst examples; none without its images."""
    try:
        segmenter, _, data = open_finished(folder)
    except LongtailError:  # a report is made where the images are not, too
        return []
    images = data.test.images
    assert isinstance(segmenter, Segmenter)
    assert isinstance(images, SceneImages)
    shown = []
    for example in examples:
        scene = images.scene(example["image"])
        predicted = next(segmenter.segment(scene.image, segmenter.card.predicts_under))
        name = data.class_names[example["class"]]
        file = Path(images.names[example["image"]]).name
        picture = strip(scene, predicted, example["class"], len(data.class_names))
        shown.append((f"{name} in {file}", _address(picture)))
    return shown


def strip(scene: Scene, predicted: Tensor, focus: int, classes: int) -> Image.Image:
    """Return image, truth, prediction and difference beside one another; the difference tells of one class.

    Args:
        scene: the image and its truth.
        predicted: (H, W) int64.
        focus: the class.
        classes: C.
    """
    truth = torch.from_numpy(scene.labels).long()
    known = truth >= 0
    difference = torch.full((*truth.shape, 3), 255, dtype=torch.uint8)
    for color, chosen in (
        (_OTHER, known & (truth != predicted)),
        (_MISSED, known & (truth == focus) & (predicted != focus)),
        (_TAKEN, known & (truth != focus) & (predicted == focus)),
    ):
        difference[chosen] = torch.tensor(color, dtype=torch.uint8)
    panels = [
        scene.image,
        overlay(scene.image, truth, classes),
        overlay(scene.image, torch.where(known, predicted, -1), classes),
        Image.fromarray(difference.numpy()),
    ]
    width, height = scene.image.size
    whole = Image.new("RGB", (len(panels) * (width + 4) - 4, height), "white")
    for place, panel in enumerate(panels):
        whole.paste(panel, (place * (width + 4), 0))
    return whole


def _address(image: Image.Image) -> str:
    image.thumbnail((1920, 1920))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=80)
    return address(held.getvalue(), "jpeg")
