"""Time and memory of a training step, relative to its networks alone.

cifar: the shapes of CIFAR-100-LT, ResNet-32 student, ResNet-56 teacher, batch 128, 4096 slots, distillation. Every
layout of the views has three rows: its plain networks (forward and backward pass of the student, forward pass of the
teacher, all views in one pass, channels_last); its networks as the step uses them (a view at a time, BatchNorm of the
teacher folded); and the step (all loss terms, queue push, optimizer). The overhead of GML is the time of its step
beyond its networks, minus the same of a cross-entropy step. Peak memory is that of one step in a new process, after a
first step.

digits: digits-lt, conv8, batch 64. Every method has two rows, in milliseconds per step: networks and losses on one
batch, forward and backward; and the training loop as the trainer counts its seconds (loader, step, tracker).

All rows are timed in turn in one process, so that other load on the machine affects all of them equally.

allocator: longtail.allocator.reuse_freed_memory beside malloc's own settings, on networks and steps whose activations
are large: images per second, and how much of the time is spent in the kernel. And the resident size of a training on
digits-lt after 100 and after 2,000 steps. What is changed cannot be changed back, so every number comes from a new
process; the processes of both kinds alternate.

Command: python benchmarks/step.py [--rounds 12] [--only cifar|digits|allocator]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from peak import elsewhere, peak_mib, resident
from torch import Tensor, nn

from longtail.config import Config, load_recipe
from longtail.data.batch import Batch
from longtail.data.dataset import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD, ImageSet
from longtail.data.images import ArrayImages
from longtail.data.imbalance import profile_counts
from longtail.data.loader import TrainLoader
from longtail.data.sources import load_data
from longtail.data.transforms import build_transform
from longtail.methods.gml import GML
from longtail.nn import CosineClassifier, Encoder, FrozenEncoder
from longtail.registry import METHODS, TASKS
from longtail.training.auto_config import auto_config
from longtail.training.trainer import fit

LAYOUTS: dict[str, Callable[[Config], Config]] = {
    "ce, one view": lambda config: config.replace(method="ce"),
    "paper: three views": lambda config: config,
    "classification and key view shared": lambda config: config.replace(gml={"share_key": True}),
    "teacher cached": lambda config: config.replace(teacher={"cache": 4}),
    "teacher cached, one student view": lambda config: config.replace(teacher={"cache": 4}, gml={"share_query": True}),
}
DIGITS_EPOCHS = 10
REUSE = "from longtail.allocator import reuse_freed_memory; assert reuse_freed_memory(); "
"""Begins the code of a process whose freed memory is reused."""
PROCESSES = 3
"""Of each kind, one after the other; the median of their numbers is reported."""


def time_call(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


class Step:
    """The training step of a layout, and its networks alone."""

    def __init__(self, layout: str = "paper: three views") -> None:
        torch.manual_seed(0)
        self.config = config = LAYOUTS[layout](load_recipe("cifar100-lt").config)
        counts = profile_counts("exponential", 500, 100, 100)
        labels = torch.repeat_interleave(torch.arange(100), torch.tensor(counts))
        # noise: no operation here depends on the contents of the images
        pixels = torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8)
        images = ImageSet(ArrayImages(pixels), labels, torch.arange(len(labels)))
        self.student = Encoder("resnet32", CIFAR_MEAN, CIFAR_STD)
        self.teacher = Encoder("resnet56", CIFAR_MEAN, CIFAR_STD).eval().requires_grad_(False)
        self.teacher.to(memory_format=torch.channels_last)
        self.folded = FrozenEncoder(self.teacher)
        method_class = METHODS[config.method]
        parts = (self.teacher, CosineClassifier(64, 100)) if method_class.needs_teacher(config) else ()
        self.method = method_class(config, self.student, counts, *parts)
        self.method.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.method.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.views, self.passes = len(method_class.view_plan(config).uses), method_class.view_plan(config).num_student
        self.loader = TrainLoader(images, 128, [build_transform("cifar", 32)] * self.views, seed=0)
        if method_class.needs_teacher(config):
            for _ in range(60):  # fills the queues without the teacher passes of the trainer
                rows = torch.randint(len(labels), (128,))
                assert isinstance(self.method, GML)
                self.method.queues.push(torch.randn(128, 64), labels[rows], rows)
        self.method.train()
        self.positions = torch.randperm(len(labels))[:128]

    def draw(self) -> Batch:
        batch = next(self.loader.batches([self.positions], 0))
        if not self.config.teacher.cache:
            return batch
        return dataclasses.replace(batch, key_features=torch.randn(128, 64), teacher_scores=torch.randn(128, 100))

    def networks(self, batch: Batch, teacher: nn.Module) -> None:
        if self.config.method == "gml" and not self.config.teacher.cache:
            shared = GML.view_plan(self.config).share_key
            views = [batch.views[0]] if shared else [batch.views[0], batch.views[-1]]
            with torch.no_grad():
                teacher(torch.cat(views))
        if teacher is self.teacher:
            features: Tensor = self.student(torch.cat(batch.views[: self.passes]))
        else:
            seen = batch.views[: self.passes]
            features = self.method.adapter.encode(self.method.encoder, seen, batch).features
        features.sum().backward()

    def step(self, batch: Batch) -> None:
        loss = torch.stack(list(self.method(batch).values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def peak(layout: str) -> None:
    """Print the peak of one step in MiB."""
    torch.set_num_threads(2)
    training = Step(layout)
    batch = training.draw()
    training.step(batch)
    print(peak_mib(lambda: training.step(batch)))


class Digits:
    """A method on digits-lt: its networks and losses on one batch, and the training loop."""

    def __init__(self, method: str, folder: Path) -> None:
        self.folder = folder / method
        recipe = load_recipe("digits-lt").config
        config = recipe.replace(method=method, epochs=DIGITS_EPOCHS, device="cpu", teacher={"epochs": 1})
        self.data = data = load_data(config.data, config.seed)
        config, _ = auto_config(config, data)
        self.config = config
        method_class = METHODS[method]
        torch.manual_seed(0)
        teacher, classifier = None, None
        if method_class.needs_teacher(config):
            teacher = Encoder(config.network, data.mean, data.std).eval().requires_grad_(False)
            classifier = CosineClassifier(teacher.num_features, len(data.class_names))
        student = Encoder(config.network, data.mean, data.std)
        self.method = method_class(config, student, data.class_counts, teacher, classifier)
        self.method.to(memory_format=torch.channels_last)
        transforms = TASKS[data.task].build_transforms(config, data, method_class.view_plan(config).uses)
        loader = TrainLoader(data.train, config.batch_size, transforms, config.seed)

        def draw(splits: Sequence[Tensor], number: int) -> Iterator[Batch]:
            return loader.batches(splits, -1 - number, only=[len(transforms) - 1])

        self.method.init_memory(draw, data.train.labels)
        self.method.train()
        self.batch = next(loader.epoch(0))
        self.steps = loader.steps * DIGITS_EPOCHS

    def networks_and_losses(self) -> float:
        """Return milliseconds per step of forward and backward passes on one batch."""

        def run() -> None:
            for _ in range(self.steps):
                self.method.zero_grad(set_to_none=True)
                torch.stack(list(self.method(self.batch).values())).sum().backward()

        return 1000 * time_call(run) / self.steps

    def training_loop(self) -> float:
        """Return milliseconds per step of the trainer, without evaluation and teacher."""
        return 1000 * fit(self.config, self.folder, overwrite=True, quiet=True, data=self.data).seconds / self.steps


def time_digits(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows: dict[tuple[str, str], Callable[[], float]] = {}
        for method in ("la", "gml"):
            digits = Digits(method, Path(folder))
            rows[method, "networks and losses"] = digits.networks_and_losses
            rows[method, "training loop"] = digits.training_loop
        times: dict[tuple[str, str], list[float]] = {name: [] for name in rows}
        for turn in range(rounds + 1):
            for name, function in rows.items():
                milliseconds = function()
                if turn:  # the first is a warm-up
                    times[name].append(milliseconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'digits-lt, conv8, batch 64':32}{'':22}{'ms':>9}{'beyond':>12}")
    for (method, row), median in medians.items():
        base = medians[method, "networks and losses"]
        beyond = f"{100 * (median / base - 1):.1f} %" if row == "training loop" else ""
        print(f"{method if not beyond else '':32}{row:22}{median:9.2f}{beyond:>12}", flush=True)


def time_cifar(rounds: int) -> None:
    trainings = {layout: Step(layout) for layout in LAYOUTS}
    batches = {layout: each.draw() for layout, each in trainings.items()}
    rows: dict[tuple[str, str], Callable[[], object]] = {}
    for layout, each in trainings.items():
        batch = batches[layout]
        rows[layout, "plain networks"] = functools.partial(each.networks, batch, each.teacher)
        rows[layout, "networks"] = functools.partial(each.networks, batch, each.folded)
        rows[layout, "step"] = functools.partial(each.step, batch)
    rows["augmentation of three views", ""] = trainings["paper: three views"].draw
    for function in rows.values():
        function()
    times: dict[tuple[str, str], list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, function in rows.items():
            times[name].append(time_call(function))
    medians = {name: statistics.median(values) for name, values in times.items()}
    unit = medians["ce, one view", "plain networks"]
    print(
        f"{'CIFAR-100-LT, batch 128':38}{'':16}{'seconds':>9}{'× one view':>12}{'beyond networks':>17}{'peak MiB':>10}"
    )
    for (layout, row), median in medians.items():
        beyond = f"{100 * (median / medians[layout, 'networks'] - 1):.1f} %" if row == "step" else ""
        peak = f"{elsewhere(f'from step import peak; peak({layout!r})'):.0f}" if row == "step" else ""
        title = layout if row in {"plain networks", ""} else ""
        print(f"{title:38}{row:16}{median:9.3f}{median / unit:12.2f}{beyond:>17}{peak:>10}", flush=True)


def encode_photos() -> Callable[[], object]:
    """Return the forward pass of 64 photographs."""
    torch.manual_seed(0)
    encoder = FrozenEncoder(Encoder("tf_efficientnet_lite0", IMAGENET_MEAN, IMAGENET_STD))
    encoder.to(memory_format=torch.channels_last)
    images = torch.rand(64, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.no_grad():
            encoder(images)

    return run


def train_photos() -> Callable[[], object]:
    """Return a training step on 32 photographs."""
    torch.manual_seed(0)
    config = load_recipe("folder").config
    method = METHODS["la"](config, Encoder("tf_efficientnet_lite0", IMAGENET_MEAN, IMAGENET_STD), [100, 10])
    method.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(method.parameters())
    images = torch.rand(32, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    batch = Batch((images,), torch.arange(32) % 2, torch.arange(32))

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(method(batch).values())).sum().backward()
        optimizer.step()

    return run


def train_cifar() -> Callable[[], object]:
    """Return the step of CIFAR-100-LT with the paper's three views."""
    training = Step()
    return functools.partial(training.step, training.draw())


def time_alone(make: Callable[[], Callable[[], object]], rounds: int, threads: int) -> None:
    """Print the median seconds of a call after a first one, and what percentage of the time the kernel has of it."""
    torch.set_num_threads(threads)
    run = make()
    run()
    before = os.times()
    seconds = statistics.median(time_call(run) for _ in range(rounds))
    user, system = (after - first for after, first in zip(os.times()[:2], before[:2], strict=True))
    print(seconds, 100 * system / (user + system))


def resident_after(steps: int, threads: int) -> None:
    """Print the resident MiB of this process after a training on digits-lt of about that many steps."""
    torch.set_num_threads(threads)
    config = load_recipe("digits-lt").config.replace(method="la", device="cpu")
    data = load_data(config.data, config.seed)
    epochs = round(steps / -(-len(data.train) // config.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        fit(config.replace(epochs=epochs), Path(folder) / "run", quiet=True, data=data)
    print(resident("VmRSS") / 1024)


def both_allocators(code: str) -> list[list[float]]:
    """Return the medians of the numbers that Python code prints: with malloc's own settings, and with memory reused."""
    found: list[list[list[float]]] = [[], []]
    for _ in range(PROCESSES):
        for numbers, first in zip(found, ("", REUSE), strict=True):
            command = [sys.executable, "-c", first + code]
            result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
            numbers.append([float(number) for number in result.stdout.split()])
    return [[statistics.median(column) for column in zip(*numbers, strict=True)] for numbers in found]


def time_allocators(rounds: int, threads: int) -> None:
    print(f"{'':60}{'malloc':>12}{'reused':>12}{'× as fast':>12}")
    for name, make, images in (
        ("EfficientNet-Lite0, 224², forward pass", encode_photos, 64),
        ("EfficientNet-Lite0, 224², training step", train_photos, 32),
        ("CIFAR-100-LT, GML with three views, training step", train_cifar, 128),
    ):
        each = max(1, rounds // PROCESSES)
        own, reused = both_allocators(f"import step; step.time_alone(step.{make.__name__}, {each}, {threads})")
        title = f"{name}, images/s"
        print(f"{title:60}{images / own[0]:12.1f}{images / reused[0]:12.1f}{own[0] / reused[0]:12.2f}", flush=True)
        print(f"{'  in the kernel, % of the time':60}{own[1]:12.1f}{reused[1]:12.1f}", flush=True)
    for steps in (100, 2000):
        own, reused = both_allocators(f"import step; step.resident_after({steps}, {threads})")
        title = f"digits-lt, MiB resident after {steps:,} steps"
        print(f"{title:60}{own[0]:12.0f}{reused[0]:12.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=12, help="timings of each row; the median is reported")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["cifar", "digits", "allocator"], help="one of the parts; all if not given")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, median of {args.rounds} rounds")
    if args.only in {None, "cifar"}:
        time_cifar(args.rounds)
    if args.only in {None, "digits"}:
        time_digits(args.rounds)
    if args.only in {None, "allocator"}:
        time_allocators(args.rounds, args.threads)


if __name__ == "__main__":
    main()
