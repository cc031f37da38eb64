"""What does a GML step over pixels cost beside cross-entropy's at the same network?

UPerNet of width 64 on EfficientNet-Lite0, CamVid's shape (batch 8, 240 × 320), 4096 slots, 128 points an image, pixels
and regions as keys, distillation. The teacher's pass has a row of its own: what a step costs beyond cross-entropy's and
that pass is the method's own. All rows are timed in one run, turn by turn.

Command: python benchmarks/pixels.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from longtail.config import load_recipe
from longtail.data.loaders import Batch
from longtail.methods import method_class
from longtail.methods.base import Method
from longtail.nn import CosineClassifier, Encoder, FrozenEncoder

CLASSES, SIZE, BATCH = 11, (240, 320), 8
MEAN = STD = (0.5, 0.5, 0.5)


def build(name: str) -> Method:
    """Return a method over CamVid's classes."""
    torch.manual_seed(0)
    config = load_recipe("camvid").config.replace(method=name, gml={"distillation_weight": 1.0})
    counts = [2 ** (20 - index) for index in range(CLASSES)]
    parts: tuple[Any, Any] = (None, None)
    if name == "gml":
        teacher = Encoder(config.network, MEAN, STD).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        parts = (teacher, CosineClassifier(teacher.num_features, CLASSES))
    student = Encoder(config.network, MEAN, STD)
    method = method_class(name)(config, student, counts, *parts, [100] * CLASSES)
    return method.to(memory_format=torch.channels_last).train()


def stepper(method: Method, batch: Batch) -> Callable[[], None]:
    """Return a whole step: all terms, backward, optimiser."""
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(method(batch).values())).sum().backward()
        optimizer.step()

    return step


def main() -> None:
    options = argparse.ArgumentParser(allow_abbrev=False)
    options.add_argument("--rounds", type=int, default=9)
    rounds = options.parse_args().rounds
    torch.set_num_threads(2)
    torch.manual_seed(0)
    # blocks of 40 × 40, so that an image has some classes and outlines
    labels = torch.randint(-1, CLASSES, (BATCH, 6, 8)).repeat_interleave(40, 1).repeat_interleave(40, 2)
    images = torch.rand(BATCH, 3, *SIZE).to(memory_format=torch.channels_last)
    batch = Batch((images,), labels, torch.arange(BATCH), total=BATCH)
    gml = build("gml")
    teacher = gml._frozen[0]
    assert isinstance(teacher, FrozenEncoder)

    def look() -> None:
        with torch.no_grad():
            teacher(images)

    rows = {
        "cross-entropy's step": stepper(build("ce"), batch),
        "the teacher's pass": look,
        "GML's step": stepper(gml, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(rounds + 1):
        for name, run in rows.items():
            started = time.perf_counter()
            run()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, median of {rounds} rounds")
    base, passed, whole = medians.values()
    own = whole - base - passed
    for name, value in {**medians, "GML beyond both": own}.items():
        print(f"{name:24}{value:8.3f} s{value / base:8.1%} of cross-entropy's step")


if __name__ == "__main__":
    main()
