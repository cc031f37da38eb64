"""Time of the metrics of detections, with and without intervals over images.

    python benchmarks/detection_metrics.py [--images 5000] [--classes 80] [--objects 7] [--detections 20] [--seed 0]

Images of random boxes, classes of falling frequency; of the detections of an image most are objects with noise, the
others anywhere. faster-coco-eval's average precision is a part of every row; the intervals are those of 1,000 resampled
sets of images, for every class and every group of classes.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from longtail.data.detection import Annotations, Detections
from longtail.evaluation.detection import detection_metrics


def draw(images: int, classes: int, objects: int, detections: int, seed: int) -> tuple[list[Detections], Annotations]:
    """Return detections and annotations of random images of 640 × 480 pixels."""
    rng = np.random.default_rng(seed)
    shares = 100.0 ** (-np.arange(classes) / max(classes - 1, 1))
    index = np.repeat(np.arange(images), rng.poisson(objects, images))
    corner, sides = rng.uniform(0, 400, (len(index), 2)), np.exp(rng.normal(4, 0.8, (len(index), 2)))
    boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
    labels = rng.choice(classes, size=len(index), p=shares / shares.sum())
    annotations = Annotations(
        files=tuple(f"{image}.jpg" for image in range(images)),
        sizes=torch.tensor([[480, 640]] * images),
        image_ids=tuple(range(1, images + 1)),
        class_names=tuple(f"class {label}" for label in range(classes)),
        image_index=torch.from_numpy(index),
        boxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        ignored=torch.zeros(len(index), dtype=torch.bool),
        areas=torch.from_numpy(sides.prod(axis=1).astype(np.float32)),
    )
    found = []
    for image in range(images):
        mine = annotations.objects_of(image).numpy()
        drawn = rng.choice(mine, detections) if len(mine) else mine
        near = boxes[drawn] + rng.normal(0, 6, (len(drawn), 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        wrong = rng.random(len(drawn)) < 0.3
        predicted = np.where(wrong, rng.integers(classes, size=len(drawn)), labels[drawn])
        scores = np.sort(rng.random(len(drawn)))[::-1].copy()
        found.append(
            Detections(
                torch.from_numpy(near.astype(np.float32)),
                torch.from_numpy(predicted),
                torch.from_numpy(scores.astype(np.float32)),
            )
        )
    return found, annotations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"images": 5000, "classes": 80, "objects": 7, "detections": 20, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    found, annotations = draw(options.images, options.classes, options.objects, options.detections, options.seed)
    print(f"{options.images:,} images, {options.classes} classes, {len(annotations.labels):,} objects, ", end="")
    print(f"{sum(len(each.labels) for each in found):,} detections")
    print("| metrics | seconds |\n| --- | --- |")
    counts = annotations.image_counts.tolist()
    for name, resamples in (("without intervals", 0), ("with intervals", 1000)):
        start = time.perf_counter()
        detection_metrics(found, annotations, image_counts=counts, resamples=resamples)
        print(f"| {name} | {time.perf_counter() - start:.1f} |")


if __name__ == "__main__":
    main()
