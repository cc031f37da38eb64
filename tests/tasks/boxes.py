"""Small sets of images with boxes, and an evaluation of detectors by average precision at an overlap of one half."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import IMAGENET_MEAN, IMAGENET_STD, ImageSet
from longtail.data.detection import Annotations, DetectionData, DetectionImages, Detections
from longtail.inference.options import InferenceOptions
from longtail.tasks.base import Evaluator, Metrics
from longtail.tasks.detection.detector import Detector
from longtail.tasks.detection.task import Detection

NAMES = ("red", "green", "blue")
_COLORS = np.array([(220, 40, 40), (40, 200, 60), (60, 60, 220)])


def draw_images(root: Path, count: int, seed: int, size: int = 64) -> Annotations:
    """Write images of coloured rectangles, the classes ever rarer, and return where they are."""
    rng, folder = np.random.default_rng(seed), root / f"images{seed}"
    folder.mkdir(parents=True)
    boxes, labels, index = [], [], []
    for number in range(count):
        pixels = rng.integers(90, 140, (size, size, 3))
        for label in range(3):
            if number % (1, 2, 4)[label]:
                continue
            width, height = rng.integers(12, 28, 2)
            left, top = rng.integers(0, size - width), rng.integers(0, size - height)
            pixels[top : top + height, left : left + width] = _COLORS[label] + rng.integers(-20, 20, 3)
            boxes.append((left, top, left + width, top + height))
            labels.append(label)
            index.append(number)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    corners = torch.tensor(np.array(boxes), dtype=torch.float32)
    return Annotations(
        files=tuple(f"{folder.name}/{number:03}.png" for number in range(count)),
        sizes=torch.full((count, 2), size),
        image_ids=tuple(range(count)),
        class_names=NAMES,
        image_index=torch.tensor(index),
        boxes=corners,
        labels=torch.tensor(labels),
        ignored=torch.zeros(len(labels), dtype=torch.bool),
        areas=(corners[:, 2:] - corners[:, :2]).prod(dim=1),
    )


def draw_data(root: Path, train: int = 16, test: int = 6, size: int = 64) -> DetectionData:
    """Return a set of coloured rectangles, see :func:`draw_images`."""
    sets = []
    for seed, count in enumerate((train, test, test)):
        annotations = draw_images(root, count, seed, size)
        images = DetectionImages(root, annotations, size)
        sets.append(ImageSet(images, torch.zeros(count, dtype=torch.int64), torch.arange(count)))
    return DetectionData(
        train=sets[0],
        val=sets[1],
        test=sets[2],
        class_names=NAMES,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=size,
        augment="none",
    )


def average_precision(found: Sequence[Detections], wanted: Annotations, overlap: float = 0.5) -> list[float]:
    """Return the area below the precision-recall curve of each class, in percent; loops, from the definition."""
    result = []
    for label in range(len(wanted.class_names)):
        rows, total = [], 0
        for image, detections in enumerate(found):
            objects = wanted.objects_of(image)
            boxes = [wanted.boxes[row].tolist() for row in objects.tolist() if int(wanted.labels[row]) == label]
            total += len(boxes)
            for box, own, score in zip(*(part.tolist() for part in detections[:3]), strict=True):
                if own != label:
                    continue
                overlaps = [intersection_over_union(box, other) for other in boxes]
                best = max(range(len(boxes)), key=overlaps.__getitem__, default=None)
                hit = best is not None and overlaps[best] >= overlap
                if best is not None and hit:
                    boxes.pop(best)
                rows.append((score, hit))
        rows.sort(key=lambda row: -row[0])
        hits, area, precisions = 0, 0.0, []
        for rank, (_, hit) in enumerate(rows, 1):
            hits += hit
            precisions.append((hits / rank, hit))
        for place, (_, hit) in enumerate(precisions):
            area += hit * max(value for value, _ in precisions[place:]) / max(1, total)
        result.append(100 * area)
    return result


def intersection_over_union(a: Sequence[float], b: Sequence[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


class HalfOverlap(Evaluator):
    """Average precision at an overlap of one half."""

    def __init__(self, images: ImageSet, priors: Mapping[str, Tensor | None]) -> None:
        assert isinstance(images.images, DetectionImages)
        self.annotations = images.images.annotations
        self.found: dict[str, list[Detections]] = {name: [] for name in priors}

    def update(self, positions: Tensor, scores: Any, labels: Tensor) -> None:
        for name, detections in scores.items():
            self.found[name].append(detections)

    def compute(self) -> dict[str, Metrics]:
        metrics: dict[str, Metrics] = {}
        for name, found in self.found.items():
            by_class = average_precision(found, self.annotations)
            mean = sum(by_class) / len(by_class)
            metrics[name] = {"ap": mean, "ap50": mean, "per_class": by_class}
        return metrics


def _predict(
    self: Detection,
    model: Detector,
    images: ImageSet,
    options: InferenceOptions,
) -> Iterable[Any]:
    assert isinstance(images.images, DetectionImages)
    model.encoder.eval()
    for index in range(len(images)):
        image = images.images.open_sample(index).image
        regions = model.regions(model.preprocess(image))
        found = {prior: next(iter(model.select(regions, prior=prior))) for prior in ("uniform", "train")}
        yield torch.tensor([index]), {name: model.to_stored(d, image.size) for name, d in found.items()}, None


def _evaluator(
    self: Detection,
    model: Detector,
    images: ImageSet,
    config: Config,
    priors: Mapping[str, Tensor | None],
    accuracy_only: bool,
) -> Evaluator:
    return HalfOverlap(images, priors)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate detectors by :class:`HalfOverlap`."""
    monkeypatch.setattr(Detection, "predict_split", _predict)
    monkeypatch.setattr(Detection, "evaluator", _evaluator)
    monkeypatch.setattr(Detection, "save_examples", lambda *_: None)
