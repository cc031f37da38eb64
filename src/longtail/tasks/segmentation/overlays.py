"""Pictures of wrongly labelled images: the image, the true labels, the prediction, and their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from longtail.data.data_uri import image_data_uri
from longtail.data.paths import printable
from longtail.data.sources.segmentation import SegmentationImages, SegmentationSample
from longtail.errors import LongtailError
from longtail.inference.label_images import overlay
from longtail.tasks.loading import load_run
from longtail.tasks.segmentation.segmenter import Segmenter

_MISSED, _WRONG, _OTHER = (204, 51, 68), (51, 102, 204), (150, 150, 150)


def worst_examples(run: Path, examples: Sequence[Mapping[str, int]]) -> list[tuple[str, str]]:
    """Return captions and pictures, as data URIs, of a run's worst examples; none where its images are missing."""
    try:
        segmenter, _, data = load_run(run)
    except LongtailError:  # a report can be written without the images
        return []
    tested = segmenter.config.training_info.get("test_images")
    if tested not in {None, data.fingerprints["test_images"]}:  # the examples are positions among other images
        return []
    images = data.test.images
    assert isinstance(segmenter, Segmenter)
    assert isinstance(images, SegmentationImages)
    pictures = []
    for example in examples:
        sample = images.open_sample(example["image"])
        predicted = next(segmenter.segment(sample.image, segmenter.config.predicts_under))
        name = data.class_names[example["class"]]
        file = Path(images.names[example["image"]]).name
        picture = comparison_strip(sample, predicted, example["class"], len(data.class_names))
        pictures.append((f"{printable(name)} in {printable(file)}", image_data_uri(picture, 1920, "JPEG")))
    return pictures


def comparison_strip(sample: SegmentationSample, predicted: Tensor, focus: int, classes: int) -> Image.Image:
    """Return image, true labels, prediction and difference side by side; the difference is of one class.

    Args:
        sample: the image and its labels.
        predicted: (H, W) int64.
        focus: the class.
        classes: C.
    """
    labels = torch.from_numpy(sample.labels).long()
    labelled = labels >= 0
    difference = torch.full((*labels.shape, 3), 255, dtype=torch.uint8)
    for color, pixels in (
        (_OTHER, labelled & (labels != predicted)),
        (_MISSED, labelled & (labels == focus) & (predicted != focus)),
        (_WRONG, labelled & (labels != focus) & (predicted == focus)),
    ):
        difference[pixels] = torch.tensor(color, dtype=torch.uint8)
    panels = [
        sample.image,
        overlay(sample.image, sample.labels, classes),
        overlay(sample.image, torch.where(labelled, predicted, -1).numpy(), classes),
        Image.fromarray(difference.numpy()),
    ]
    width, height = sample.image.size
    whole = Image.new("RGB", (len(panels) * (width + 4) - 4, height), "white")
    for place, panel in enumerate(panels):
        whole.paste(panel, (place * (width + 4), 0))
    return whole
