"""What does a GML training step cost beside its networks alone?

CIFAR-100-LT's shapes: ResNet-32 student, ResNet-56 teacher, batch 128, 4096 slots, all three views and all terms.
Everything is timed in one run, turn by turn, so that a slow minute of the machine hits all rows alike.

Command: python benchmarks/step.py [--rounds 12]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from longtail.config import load_recipe
from longtail.data.dataset import CIFAR_MEAN, CIFAR_STD, ImageSet
from longtail.data.images import ArrayImages
from longtail.data.imbalance import profile_counts
from longtail.data.loaders import TrainLoader
from longtail.data.views import build_view
from longtail.methods.gml import GML
from longtail.nn import CosineClassifier, Encoder


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=12, help="timings of each row; the median counts")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)

    config = load_recipe("cifar100-lt").config
    counts = profile_counts("exponential", 500, 100, 100)
    labels = torch.repeat_interleave(torch.arange(100), torch.tensor(counts))
    # noise costs what photographs cost: no operation here looks at the content
    pixels = torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8)
    images = ImageSet(ArrayImages(pixels), labels, torch.arange(len(labels)))
    loader = TrainLoader(images, 128, [build_view("cifar", 32)] * 3, seed=0)

    student, teacher = Encoder("resnet32", CIFAR_MEAN, CIFAR_STD), Encoder("resnet56", CIFAR_MEAN, CIFAR_STD)
    method = GML(config, student, counts, teacher, CosineClassifier(64, 100))
    method.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    method.fill(lambda splits, number: loader.batches(splits, -1 - number, [2]), labels)
    method.train()
    positions = torch.randperm(len(labels))[:128]

    def draw() -> None:
        next(loader.batches([positions], 0))

    batch = next(loader.batches([positions], 0))

    def student_view() -> None:
        student(batch.views[0]).sum().backward()

    def networks() -> None:
        with torch.no_grad():
            teacher(torch.cat([batch.views[0], batch.views[2]]))
        two: Tensor = student(torch.cat(batch.views[:2]))
        two.sum().backward()

    def step() -> None:
        loss = torch.stack(list(method(batch).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def whole() -> None:
        draw()
        step()

    rows: dict[str, Callable[[], None]] = {
        "student, one view, forward + backward": student_view,
        "networks alone (2 student views, 2 teacher views)": networks,
        "step: all views, all terms, optimiser": step,
        "augmentation of 3 views": draw,
        "step with augmentation": whole,
    }
    for function in rows.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(given.rounds):
        for name, function in rows.items():
            times[name].append(timed(function))
    medians = {name: statistics.median(values) for name, values in times.items()}
    unit, base = medians["student, one view, forward + backward"], medians[list(rows)[1]]
    print(f"torch {torch.__version__}, {given.threads} threads, batch 128, median of {given.rounds} rounds")
    print(f"{'':52}{'seconds':>9}{'× one view':>12}{'× networks':>12}")
    for name, median in medians.items():
        print(f"{name:52}{median:9.3f}{median / unit:12.2f}{median / base:12.2f}")


if __name__ == "__main__":
    main()
