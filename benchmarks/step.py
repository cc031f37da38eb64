"""What does a GML training step cost beside its networks alone, and beside the student's pass over one view?

CIFAR-100-LT's shapes: ResNet-32 student, ResNet-56 teacher, batch 128, 4096 slots, distillation. Every layout of the
views has three rows: its networks alone as they are (the student's forward and backward, the teacher's forward, all
views in one pass, channels_last); its networks as the step passes them (a view at a time, the teacher's BatchNorm
folded); and the whole step (all terms, queue push, optimiser). The method's own overhead is what the step costs beyond
its networks, less what cross-entropy's step costs beyond its own. All are timed in one run, turn by turn, so that a
slow minute of the machine hits all rows alike. Peak memory is that of one step in a process of its own, after a first.

Command: python benchmarks/step.py [--rounds 12]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import torch
from peak import elsewhere, peak_mib
from torch import Tensor, nn

from longtail.config import Config, load_recipe
from longtail.data.dataset import CIFAR_MEAN, CIFAR_STD, ImageSet
from longtail.data.images import ArrayImages
from longtail.data.imbalance import profile_counts
from longtail.data.loaders import Batch, TrainLoader
from longtail.data.views import build_view
from longtail.methods import method_class
from longtail.methods.gml import GML
from longtail.nn import CosineClassifier, Encoder, FrozenEncoder

LAYOUTS: dict[str, Callable[[Config], Config]] = {
    "ce, one view": lambda config: config.replace(method="ce"),
    "paper: three views": lambda config: config,
    "classification and key view shared": lambda config: config.replace(gml={"share_key": True}),
    "teacher cached": lambda config: config.replace(teacher={"cache": 4}),
    "teacher cached, one student view": lambda config: config.replace(teacher={"cache": 4}, gml={"share_query": True}),
}


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


class Step:
    """A layout's step and its networks alone."""

    def __init__(self, layout: str = "paper: three views") -> None:
        torch.manual_seed(0)
        self.config = config = LAYOUTS[layout](load_recipe("cifar100-lt").config)
        counts = profile_counts("exponential", 500, 100, 100)
        labels = torch.repeat_interleave(torch.arange(100), torch.tensor(counts))
        # noise costs what photographs cost: no operation here looks at the content
        pixels = torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8)
        images = ImageSet(ArrayImages(pixels), labels, torch.arange(len(labels)))
        self.student = Encoder("resnet32", CIFAR_MEAN, CIFAR_STD)
        self.teacher = Encoder("resnet56", CIFAR_MEAN, CIFAR_STD).eval().requires_grad_(False)
        self.teacher.to(memory_format=torch.channels_last)
        self.folded = FrozenEncoder(self.teacher)
        kind = method_class(config.method)
        parts = (self.teacher, CosineClassifier(64, 100)) if kind.needs_teacher(config) else ()
        self.method = kind(config, self.student, counts, *parts)
        self.method.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.method.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.views, self.passes = len(kind.views(config)), kind.student_views(config)
        self.loader = TrainLoader(images, 128, [build_view("cifar", 32)] * self.views, seed=0)
        if kind.needs_teacher(config):
            for _ in range(60):  # full queues, without the teacher's passes that the engine fills them with
                drawn = torch.randint(len(labels), (128,))
                assert isinstance(self.method, GML)
                self.method.queues.push(torch.randn(128, 64), labels[drawn], drawn)
        self.method.train()
        self.positions = torch.randperm(len(labels))[:128]

    def draw(self) -> Batch:
        batch = next(self.loader.batches([self.positions], 0))
        if not self.config.teacher.cache:
            return batch
        return dataclasses.replace(batch, key_features=torch.randn(128, 64), teacher_scores=torch.randn(128, 100))

    def networks(self, batch: Batch, teacher: nn.Module) -> None:
        if self.config.method == "gml" and not self.config.teacher.cache:
            views = [batch.views[0]] if self.config.gml.share_key else [batch.views[0], batch.views[-1]]
            with torch.no_grad():
                teacher(torch.cat(views))
        if teacher is self.teacher:  # plain
            features: Tensor = self.student(torch.cat(batch.views[: self.passes]))
        else:
            features = self.method.encode(batch.views[: self.passes])
        features.sum().backward()

    def step(self, batch: Batch) -> None:
        loss = torch.stack(list(self.method(batch).values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def peak(layout: str) -> None:
    """Print the peak of one step in MiB."""
    torch.set_num_threads(2)
    made = Step(layout)
    batch = made.draw()
    made.step(batch)
    print(peak_mib(lambda: made.step(batch)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=12, help="timings of each row; the median counts")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    made = {layout: Step(layout) for layout in LAYOUTS}
    batches = {layout: each.draw() for layout, each in made.items()}
    rows: dict[tuple[str, str], Callable[[], object]] = {}
    for layout, each in made.items():
        batch = batches[layout]
        rows[layout, "plain networks"] = functools.partial(each.networks, batch, each.teacher)
        rows[layout, "networks"] = functools.partial(each.networks, batch, each.folded)
        rows[layout, "step"] = functools.partial(each.step, batch)
    rows["augmentation of three views", ""] = made["paper: three views"].draw
    for function in rows.values():
        function()
    times: dict[tuple[str, str], list[float]] = {name: [] for name in rows}
    for _ in range(given.rounds):
        for name, function in rows.items():
            times[name].append(timed(function))
    medians = {name: statistics.median(values) for name, values in times.items()}
    unit = medians["ce, one view", "plain networks"]
    print(f"torch {torch.__version__}, {given.threads} threads, batch 128, median of {given.rounds} rounds")
    print(f"{'':38}{'':16}{'seconds':>9}{'× one view':>12}{'beyond networks':>17}{'peak MiB':>10}")
    for (layout, row), median in medians.items():
        beyond = f"{100 * (median / medians[layout, 'networks'] - 1):.1f} %" if row == "step" else ""
        peak = f"{elsewhere(f'from step import peak; peak({layout!r})'):.0f}" if row == "step" else ""
        shown = layout if row in {"plain networks", ""} else ""
        print(f"{shown:38}{row:16}{median:9.3f}{median / unit:12.2f}{beyond:>17}{peak:>10}", flush=True)


if __name__ == "__main__":
    main()
