"""Time of a GML training step for segmentation, relative to a cross-entropy step with the same network.

UPerNet of width 64 on EfficientNet-Lite0, the shape of CamVid (batch 8, 240 × 320), 4096 slots, 128 pixels per image,
pixels and regions as keys, distillation. The forward pass of the teacher has a row of its own: the overhead of the
method is the time of its step minus that of a cross-entropy step and of this pass. All rows are timed in turn in one
process.

Command: python benchmarks/pixels.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from longtail.config import load_recipe
from longtail.data.batch import Batch
from longtail.methods.base import Method
from longtail.nn import CosineClassifier, Encoder, FrozenEncoder
from longtail.nn.segmentation import build_segmentation_backbone
from longtail.registry import METHODS
from longtail.tasks.segmentation.pixels import PixelAdapter
from longtail.tasks.segmentation.settings import SegmentationSettings

CLASSES, SIZE, BATCH = 11, (240, 320), 8
MEAN = STD = (0.5, 0.5, 0.5)


def build_encoder() -> Encoder:
    """Return the network of the recipe with random weights."""
    encoder = Encoder(load_recipe("camvid").config.network, MEAN, STD, build=build_segmentation_backbone)
    return encoder.to(memory_format=torch.channels_last)


def build_method(name: str, teacher: Encoder | None = None) -> Method:
    """Return a method for the classes of CamVid."""
    torch.manual_seed(0)
    config = load_recipe("camvid").config.replace(method=name, gml={"distillation_weight": 1.0})
    settings = config.section(SegmentationSettings)
    counts = [2 ** (20 - index) for index in range(CLASSES)]
    adapter = PixelAdapter(settings.pixels_per_image, settings.keys, [100] * CLASSES)
    classifier = None if teacher is None else CosineClassifier(teacher.num_features, CLASSES)
    method = METHODS[name](config, build_encoder(), counts, teacher, classifier, adapter)
    return method.to(memory_format=torch.channels_last).train()


def training_step(method: Method, batch: Batch) -> Callable[[], None]:
    """Return a function that makes a training step: all loss terms, backward pass, optimizer."""
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(method(batch).values())).sum().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=9, help="timings of each row; the median is reported")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    torch.manual_seed(0)
    # blocks of 40 × 40, so that an image has several classes and boundaries
    labels = torch.randint(-1, CLASSES, (BATCH, 6, 8)).repeat_interleave(40, 1).repeat_interleave(40, 2)
    images = torch.rand(BATCH, 3, *SIZE).to(memory_format=torch.channels_last)
    batch = Batch((images,), labels, torch.arange(BATCH), global_batch=BATCH)
    teacher = build_encoder().eval().requires_grad_(False)
    frozen = FrozenEncoder(teacher)

    def teacher_pass() -> None:
        with torch.no_grad():
            frozen(images)

    rows = {
        "cross-entropy step": training_step(build_method("ce"), batch),
        "teacher pass": teacher_pass,
        "GML step": training_step(build_method("gml", teacher), batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(rounds + 1):
        for name, run in rows.items():
            started = time.perf_counter()
            run()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, median of {rounds} rounds")
    base, teacher_seconds, total = medians.values()
    for name, value in {**medians, "GML overhead": total - base - teacher_seconds}.items():
        print(f"{name:24}{value:8.3f} s{value / base:8.1%} of a cross-entropy step")


if __name__ == "__main__":
    main()
