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
from longtail.data.loaders import Batch, TrainLoader
from longtail.data.views import build_view
from longtail.methods.gml import GML
from longtail.nn import CosineClassifier, Encoder


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


class Step:
    """The parts of a step, each to be timed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = load_recipe("cifar100-lt").config
        counts = profile_counts("exponential", 500, 100, 100)
        labels = torch.repeat_interleave(torch.arange(100), torch.tensor(counts))
        # noise costs what photographs cost: no operation here looks at the content
        pixels = torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8)
        images = ImageSet(ArrayImages(pixels), labels, torch.arange(len(labels)))
        self.loader = TrainLoader(images, 128, [build_view("cifar", 32)] * 3, seed=0)
        self.student = Encoder("resnet32", CIFAR_MEAN, CIFAR_STD)
        self.teacher = Encoder("resnet56", CIFAR_MEAN, CIFAR_STD)
        self.method = GML(config, self.student, counts, self.teacher, CosineClassifier(64, 100))
        self.method.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.method.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.method.fill(lambda splits, number: self.loader.batches(splits, -1 - number, [2]), labels)
        self.method.train()
        self.positions = torch.randperm(len(labels))[:128]

    def draw(self) -> Batch:
        return next(self.loader.batches([self.positions], 0))

    def student_view(self, batch: Batch) -> None:
        self.student(batch.views[0]).sum().backward()

    def networks(self, batch: Batch) -> None:
        with torch.no_grad():
            self.teacher(torch.cat([batch.views[0], batch.views[2]]))
        two: Tensor = self.student(torch.cat(batch.views[:2]))
        two.sum().backward()

    def step(self, batch: Batch) -> None:
        loss = torch.stack(list(self.method(batch).values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=12, help="timings of each row; the median counts")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    made = Step()
    batch = made.draw()
    rows: dict[str, Callable[[], object]] = {
        "student, one view, forward + backward": lambda: made.student_view(batch),
        "networks alone (2 student views, 2 teacher views)": lambda: made.networks(batch),
        "step: all views, all terms, optimiser": lambda: made.step(batch),
        "augmentation of 3 views": made.draw,
        "step with augmentation": lambda: made.step(made.draw()),
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
