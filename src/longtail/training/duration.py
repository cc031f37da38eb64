"""How long a run takes on this machine: the speed of its network, measured, times the images that pass through it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from longtail.config import Config, first_stage_epochs
from longtail.nn import Encoder
from longtail.nn.tuning import merge_lora
from longtail.registry import METHODS
from longtail.training.sharpness import passes_per_step

_IMAGES = 16  # of a measured batch: the time of an image hardly depends on it
_SECONDS, _CALLS = 2.0, 12  # of measurement for each direction at most, after two batches to warm up
_HEAD_STEP = 0.004  # seconds of a step on kept features, on a slow core


@dataclass(frozen=True)
class Speed:
    """Seconds per image of a network."""

    encode: float
    """Without gradients, low-rank updates merged into the weights."""
    train: float
    """Forward and backward."""

    def at(self, factor: float) -> Speed:
        """Return the speed for images of ``factor`` times as many pixels."""
        return Speed(self.encode * factor, self.train * factor)


@dataclass(frozen=True)
class Sizes:
    """Number of images of each split."""

    train: int
    val: int
    test: int


def measure_speed(encoder: Encoder, size: int, device: torch.device, tuned: bool = True) -> Speed:
    """Measure a network on random images; it is not changed, nor is the state of the random numbers.

    Args:
        encoder: the network.
        size: side in pixels of the images that it is given.
        device: where to measure.
        tuned: whether its parameters are trained at all.
    """
    network = copy.deepcopy(encoder).to(device)
    merged = merge_lora(network)  # as it is wherever nothing is trained: for validation, test, features and teachers
    with torch.random.fork_rng(devices=[]):
        images = torch.rand(_IMAGES, len(encoder.mean), size, size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)

        def forward() -> None:
            with torch.no_grad():
                merged(images)

        def step() -> None:
            features = network(images)
            if features.requires_grad:
                features.square().mean().backward()

        merged.eval()
        encode = _time(forward, device)
        network.train()
        train = _time(step, device) if tuned else encode
    return Speed(encode / _IMAGES, train / _IMAGES)


def _time(function: Callable[[], None], device: torch.device) -> float:
    """Return the lower quartile of the seconds of a call: a burst of other work is not the speed of the machine."""

    def run() -> float:
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    run()
    run()
    times = [run()]
    while sum(times) < _SECONDS and len(times) < _CALLS:
        times.append(run())
    return sorted(times)[len(times) // 4]


def expected_seconds(config: Config, sizes: Sizes, speed: Speed, missing: int | None = None) -> float:
    """Return how long a run takes from its first pass over the images to its test metrics.

    Args:
        config: settings of the run, without open ones.
        sizes: images of each split.
        speed: of the network at the size that it is given.
        missing: views of images whose features are not kept yet, with ``tune head``; all if not given.
    """
    assert isinstance(config.epochs, int)
    method = METHODS[config.method]
    steps = config.epochs * -(-sizes.train // config.batch_size)
    evaluated = sizes.test + sizes.val * (1 + config.epochs // config.validate_every)
    if config.tune == "head":
        images = sizes.train * config.feature_views + sizes.val + sizes.test if missing is None else missing
        passes = steps * method.view_plan(config).num_student * passes_per_step(config)
        return images * speed.encode + passes * _HEAD_STEP
    passes = first_stage_epochs(config) * sizes.train
    seconds = (config.epochs * sizes.train - passes) * speed.encode  # features for a second stage
    trained = passes * method.view_plan(config).num_student * passes_per_step(config)
    seconds += trained * speed.train + evaluated * speed.encode
    if config.classifier.init == "class_means":
        seconds += sizes.train * speed.encode
    teacher = config.teacher
    if method.needs_teacher(config):
        seconds += passes * speed.encode * teacher.count * len(teacher.sources)
        if teacher.source == "train":
            first = config.replace(
                method="la",
                epochs=teacher.epochs or config.epochs,
                second_stage="none",
                classifier={"distillation_weight": 0.0, "views": teacher.views},
                optimizer={"sharpness": "none"},
            )
            # a later generation learns from the one before
            one = expected_seconds(first, sizes, speed)
            seconds += teacher.count * (teacher.generations * one + (teacher.generations - 1) * passes * speed.encode)
    elif teacher.source == "ema" and method.distillation_weight(config) > 0:
        seconds += passes * speed.encode * method.view_plan(config).num_distilled
    return seconds


def format_duration(seconds: float) -> str:
    """Return a duration as a person says it.

    >>> format_duration(42), format_duration(510), format_duration(20_000)
    ('42 s', '8 min', '5 h 33 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
