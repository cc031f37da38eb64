"""How long a step takes on an accelerator: all of it, its graph alone, its networks alone, and without a graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerator_context import Context, Remarks, about_graph, one_line
from accelerator_images import first_images
from accelerator_variants import LA, LA_TWO_VIEWS, VARIANTS

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.loader import TrainLoader
from longtail.data.sources import load_data
from longtail.data.transforms import PerImageTransform, build_transform
from longtail.nn import CosineClassifier, Encoder
from longtail.registry import METHODS, TASKS
from longtail.training.auto_config import auto_config
from longtail.training.fabric import build_fabric, wrap
from longtail.training.metric_log import MetricTracker, NonFiniteLossGuard
from longtail.training.optim import build_optimizer
from longtail.training.steps import DeviceSteps, Student, build_steps
from longtail.training.turns import Turn

LEAST, COMPILED = 30.0, 90.0  # seconds that have to be left for a measurement; of a network that is compiled first


class Training:
    """A training on the device without its run: random teachers, no evaluation, no files."""

    def __init__(self, config: Config, data: LongTailedData, folder: Path) -> None:
        config, _ = auto_config(config, data)
        torch.manual_seed(config.seed)
        kind, task = METHODS[config.method], TASKS[data.task]
        parts: tuple[Any, ...] = ()
        if kind.needs_teacher(config):
            network = config.teacher.network if config.teacher.network != "auto" else config.network
            teacher = Encoder(network, data.mean, data.std).eval()
            parts = (teacher, CosineClassifier(teacher.num_features, len(data.class_names)))
        self.encoder = Encoder(config.network, data.mean, data.std)
        kind.prepare_encoder(self.encoder, config)
        self.method = kind(config, self.encoder, data.class_counts, *parts).train()
        self.method.to(memory_format=torch.channels_last)
        fabric = build_fabric(config)
        assert isinstance(config.epochs, int)
        transforms = task.build_transforms(config, data, kind.view_plan(config).uses)
        self.loader = TrainLoader(data.train, config.batch_size, transforms, config.seed, epochs=config.epochs)
        optimizer: Any = build_optimizer(self.method, config, on_device=True)
        wrapped, optimizer = wrap(fabric, self.method, optimizer)
        self.student = Student(
            *(config, fabric, self.method, wrapped, optimizer, None, MetricTracker()),
            guard=NonFiniteLossGuard(folder),
            total=self.loader.steps * config.epochs,
            turn=Turn(),
        )
        steps = build_steps(self.student, self.loader, True, ())
        assert isinstance(steps, DeviceSteps)
        self.steps = steps
        self.losses: list[float] = []
        """Of the first steps, each read before the next one."""
        self.epoch = 0
        self._images = 0

    def __enter__(self) -> Training:
        self._context = self.steps.context()
        self._context.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._context.__exit__(None, None, None)
        self.steps.close()

    @property
    def as_graph(self) -> bool:
        """Whether the steps are CUDA graphs."""
        return self.steps.record

    def run_epoch(self) -> float:
        """Train an epoch, and return its seconds."""
        started, tracker = time.monotonic(), self.student.tracker
        tracker.clear()
        before, self._images = 0.0, 0
        for _ in self.steps.epoch(self.epoch, 0):
            if self.epoch == 0 and len(self.losses) < 10:  # read one by one for the comparison of devices
                self.steps.check()
                total = sum(float(value) for value in tracker.sums.values())
                self.losses.append((total - before) / (tracker.images - self._images))
                before, self._images = total, tracker.images
        self.steps.check()
        self.epoch += 1
        return time.monotonic() - started

    def graph_alone(self) -> float | None:
        """Return milliseconds of a step on views that are prepared, once more the last ones; None without a graph.

        On a CPU, in a rehearsal, it is the step that would have been recorded.
        """
        loader = self.steps.loader
        if loader.device.type == "cuda" and not self.steps.record:
            return None

        def run() -> None:
            loader.counter.zero_()
            for _ in range(loader.rows):
                self.steps.launch(loader.largest)

        milliseconds = _milliseconds(run, loader.device, 3 if loader.device.type == "cuda" else 1) / loader.rows
        loader.counter.zero_()
        return milliseconds

    def networks_alone(self) -> float:
        """Return milliseconds of the student's network alone, forward and backward, as a graph too."""
        student, device = self.student, self.student.fabric.device
        views = student.method.plan.num_student
        shape = (student.config.batch_size, 3, 32, 32)
        batch = torch.rand(shape, device=device).contiguous(memory_format=torch.channels_last)

        def run() -> None:
            student.optimizer.zero_grad(set_to_none=True)
            with student.fabric.autocast():
                features = torch.cat([self.encoder(batch) for _ in range(views)])
            features.float().square().mean().backward()

        call: Callable[[], object] = run
        if device.type == "cuda":
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            student.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                run()
            call = graph.replay
        return _milliseconds(call, device, 100 if device.type == "cuda" else 1)


def _milliseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    if device.type == "cuda":
        call()
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(rounds):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - started) / rounds


def measure(context: Context, variants: Mapping[str, Config], phase: str) -> dict[str, Any]:
    """Measure a step of each variant, write it, and return what was found by name; a failure is a figure as well."""
    steps: dict[str, Any] = {}
    for name, config in variants.items():
        if context.limit - context.now < (COMPILED if config.compile else LEAST):
            steps[name] = {"skipped": f"{context.limit - context.now:.0f} s were left"}
            break
        try:
            steps[name] = _measured(context, name, config)
        except Exception as error:
            steps[name] = {"error": one_line(error)}
        context.say(f"{phase}: {name}: {steps[name]}")
        _write_steps(context, steps)
    return steps


def _measured(context: Context, name: str, config: Config) -> dict[str, Any]:
    data = load_data(config.data, 0)
    if context.rehearse:
        data = first_images(data, config.batch_size)
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    remarks = Remarks()
    with remarks.attached(), Training(config.replace(epochs=4), data, context.runs) as training:
        if config.compile:
            training.encoder.backbone.compile(dynamic=False)
        first = training.run_epoch()
        seconds = training.run_epoch() if context.rehearse else min(training.run_epoch(), training.run_epoch())
        graph, networks = training.graph_alone(), training.networks_alone()
    milliseconds = 1000 * seconds / training.loader.steps
    if config.accelerator.graph and not config.compile:
        context.milliseconds[name] = milliseconds
    found = {
        "step": milliseconds,
        "graph_alone": graph,
        "networks_alone": networks,
        "first_epoch_seconds": first,
        "images_per_second": len(data.train) / seconds,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if context.device.type == "cuda" else None,
        "steps": about_graph([line for lines in remarks.lines.values() for line in lines]),
    }
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}


def _write_steps(context: Context, steps: Mapping[str, Any], **more: Any) -> None:
    """Add measurements to those of this call, in the form of benchmarks/results/step-h200.json."""
    context.steps |= steps
    config = context.recipe()
    settings = f"{config.data.source}, imbalance {config.data.imbalance:g}, batch {config.batch_size}, {config.network}"
    settings += f", {config.precision}; the engine of longtail train, the quicker of two epochs"
    context.more |= more
    context.write("steps", {"settings": settings, "milliseconds": context.steps, **context.more})


def speed(context: Context) -> None:
    """Milliseconds of a step, with and without a graph, beside the graph and the networks alone; views a second."""
    variants = {
        "la": context.recipe(**VARIANTS[LA].changes),
        "gml, not distilled": context.recipe(gml={"distillation_weight": 0.0}),
        LA_TWO_VIEWS: context.recipe(**VARIANTS[LA_TWO_VIEWS].changes),
        "gml, distilled, operation by operation": context.recipe(accelerator={"graph": False}),
        "la, operation by operation": context.recipe(method="la", accelerator={"graph": False}),
    }
    measure(context, variants, "speed")
    rate = views_per_second(context)
    context.say(f"speed: {rate:,.0f} views a second")
    _write_steps(context, {}, views_per_second=round(rate))


def compiled(context: Context) -> None:
    """Milliseconds of a step with compiled networks; the compilation takes most of a minute."""
    variants = {
        "la, compiled": context.recipe(method="la", compile=True),
        "gml, not distilled, compiled": context.recipe(gml={"distillation_weight": 0.0}, compile=True),
    }
    measure(context, {} if context.rehearse else variants, "compiled")


def views_per_second(context: Context) -> float:
    """Return how many views the device makes."""
    data = load_data(context.recipe(method="la").data, 0)
    transform = build_transform("cifar", 32)
    assert not isinstance(transform, PerImageTransform)
    count = len(data.train)
    pixels = data.train.images.take(torch.arange(count)).to(context.device)
    ids = torch.arange(count, device=context.device)
    times = []
    for epoch in range(1 if context.rehearse else 3):
        started = time.perf_counter()
        for part in torch.arange(count).split(16384 if context.device.type == "cuda" else 1365):
            transform(pixels[part[0] : part[-1] + 1], ids[part[0] : part[-1] + 1], (0, epoch, 0))
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return count / min(times)
