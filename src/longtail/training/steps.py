"""The steps of a training: each launched operation by operation, or recorded once as a CUDA graph and launched whole.

Both do the same to weights, optimizer and memories. What differs is where the batches are made and when the loss terms
are read. Legend: R rows of the log of terms, T loss terms.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import math
import operator
import time
import traceback
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.data.device_loader import DeviceLoader, reason_against_device
from longtail.data.loader import TrainLoader
from longtail.distributed import rank, sum_batch_sizes, world_size
from longtail.errors import LongtailError
from longtail.methods.base import Method
from longtail.randomness import Stream, mix
from longtail.training.metric_log import MetricTracker, NonFiniteLossGuard
from longtail.training.optim import limit_row_norms, set_learning_rate
from longtail.training.schedule import rate
from longtail.training.sharpness import SharpnessAware, named_tensors, passes_per_step
from longtail.training.turns import (
    Streams,
    Turn,
    reset_generator,
    return_streams,
    take_streams,
    without_collections,
)
from longtail.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

_STEP = mix(Stream.STEP)
_NORM_EVERY = 10  # steps between two measurements of the gradient norm, where it is not clipped
_WARM_UP = 2  # steps of a batch size before it is recorded: libraries choose their kernels, optimizers make their state


@dataclasses.dataclass
class Student:
    """What a step changes, and what it needs for it."""

    config: Config
    fabric: Any
    method: Method
    wrapped: Any
    """The method as Fabric wraps it."""
    optimizer: Any
    ema: WeightAverage | None
    """Moving average of the student."""
    tracker: MetricTracker
    guard: NonFiniteLossGuard
    total: int
    """Steps of the training."""
    turn: Turn
    sharpness: SharpnessAware | None = None
    terms_are_checked: bool = False

    def learning_rate(self, step: int) -> float:
        """Return the learning rate at a step."""
        return self.config.optimizer.learning_rate * rate(self.config.schedule, step, self.total)

    def optimize(self, batch: Batch, measure_norm: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the loss terms of a batch, and the norm of the gradient if it is measured, after a step along it.

        The moving average of the weights is then updated too.
        """
        settings, fabric = self.config.optimizer, self.fabric
        self.optimizer.zero_grad(set_to_none=True)
        parts = batch.split(settings.grad_accumulation_steps)
        if self.sharpness is None:
            totals = self.backward(parts)
        else:
            totals = self.sharpness.backward([part.to(fabric.device) for part in parts], self.backward)
        norm = None
        if settings.grad_clip_norm is not None:
            norm = fabric.clip_gradients(
                self.method, self.optimizer, max_norm=settings.grad_clip_norm, error_if_nonfinite=False
            )
        elif measure_norm:
            gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
            norm = torch.stack(torch._foreach_norm(gradients)).norm() / self._loss_scale()
        self.optimizer.step()
        if settings.head_max_norm is not None:
            limit_row_norms(self.method, settings.head_max_norm)
        if self.ema is not None:
            self.ema.update()
        return totals, norm

    def backward(self, parts: Sequence[Batch], sync: bool = True) -> dict[str, Tensor]:
        """Add the gradient of a batch, and return its loss terms.

        Args:
            parts: of the batch, which need not be on the device.
            sync: average the gradients over all processes; where not, they are with those of the next call.
        """
        fabric, totals = self.fabric, dict[str, Tensor]()
        sizes = sum_batch_sizes([len(part) for part in parts], fabric.device)
        for number, part in enumerate(parts):
            later = not sync or number + 1 < len(parts)
            with fabric.no_backward_sync(self.wrapped, enabled=world_size() > 1 and later):
                terms = self.wrapped(part.to(fabric.device))
                if not self.terms_are_checked:  # a method returns the same ones in every step
                    _check_terms(terms, self.config.method)
                    self.terms_are_checked = True
                if len(parts) > 1:
                    terms = {name: value * (sizes[number] / sum(sizes)) for name, value in terms.items()}
                fabric.backward(functools.reduce(operator.add, terms.values()))
            for name, value in terms.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        return totals

    def _loss_scale(self) -> float:
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)  # of 16-mixed
        return 1.0 if scaler is None else scaler.get_scale()

    def seed(self) -> None:
        """Make random draws inside a network, dropout for one, a function of the step.

        Trainings in several threads have no such networks; the state of the random numbers belongs to the turn.
        """
        if not self.turn.alone:
            return
        seed = mix(self.config.seed, _STEP, self.tracker.step, rank())
        # torch.manual_seed would queue a call with its stack trace every time where CUDA is built in but not in use
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)

    def end_step(self, images: int) -> None:
        """Update the counts after a step over ``images`` images of all processes."""
        views, cost = self.method.plan.num_student, self.method.pass_cost(self.config)
        self.tracker.count(images, round(images * views * passes_per_step(self.config) * cost))


def _check_terms(terms: Mapping[str, object], method: str) -> None:
    """Raise LongtailError if loss terms are no scalars that depend on weights; it waits for no device."""
    for name, value in terms.items():
        if not isinstance(value, Tensor) or value.ndim > 0:
            shown = "nothing" if value is None else tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise LongtailError(f"method {method}: loss term '{name}': expected a scalar tensor, got {shown}")
    if not any(isinstance(value, Tensor) and value.requires_grad for value in terms.values()):
        found = ", ".join(terms) or "no terms"
        raise LongtailError(f"method {method}: expected loss terms with a gradient for what is trained, got {found}")


class LoaderSteps:
    """Steps on the batches of a loader, each launched operation by operation."""

    def __init__(self, student: Student, loader: TrainLoader) -> None:
        self.student, self.loader = student, loader

    def context(self) -> AbstractContextManager[object]:
        """Return a context in which the steps, and what reads their results, run."""
        return contextlib.nullcontext()

    def epoch(self, epoch: int, start: int) -> Iterator[float]:
        """Run the steps of an epoch from ``start`` on, and yield the learning rate of each after it."""
        student, tracker = self.student, self.student.tracker
        for batch in self.loader.epoch(epoch, start):
            learning_rate = student.learning_rate(tracker.step)
            set_learning_rate(student.optimizer, learning_rate)
            student.seed()
            terms, norm = student.optimize(batch, measure_norm=tracker.step % _NORM_EVERY == 0)
            if norm is not None:
                tracker.add_norm(norm)
            assert batch.global_batch is not None
            tracker.add_terms(terms, batch.global_batch)
            student.end_step(batch.global_batch)
            student.guard.add(tracker.step, terms)
            yield learning_rate

    def check(self) -> None:
        """Raise LongtailError if a loss that has not been read yet is not finite."""
        self.student.guard.flush()

    def close(self) -> None:
        """Free what the steps hold beside the student: nothing here."""


class DeviceSteps:
    """Steps on batches that are made on the device; the host reads loss terms now and then, many at once.

    Args:
        student: what is trained; its optimizer takes a learning rate that is a tensor.
        loader: the batches.
        record: launch a step as one CUDA graph, recorded once for each size of a batch. Where that fails, steps are
            launched operation by operation, and the reason is logged.
        streams: of the device, for the steps and for the loader; they are given back by :meth:`close`.
    """

    def __init__(self, student: Student, loader: DeviceLoader, record: bool, streams: Streams | None = None) -> None:
        self.student, self.loader = student, loader
        self.record = record and loader.device.type == "cuda"
        self._streams = streams
        self._stream = None if streams is None else streams[0]
        self._graphs: dict[int, Any] = {}
        self._failed: list[Any] = []  # graphs that could not be recorded
        self._launched: dict[int, int] = {}
        self._names: list[str] = []
        self._log = torch.zeros(0)  # (R, T + 1) loss terms and gradient norm of the steps since the last reading
        self._unread: list[tuple[int, int, int]] = []  # step, row and images of each of them
        for group in student.optimizer.param_groups:
            group["lr"] = torch.zeros(1, device=loader.device)[0]

    def context(self) -> AbstractContextManager[object]:
        """Return a context in which the steps, and what reads their results, run: a stream of their own."""
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.loader.device))
        return torch.cuda.stream(self._stream)

    def epoch(self, epoch: int, start: int) -> Iterator[float]:
        """Run the steps of an epoch from ``start`` on, and yield the learning rate of each after it."""
        student, tracker, steps = self.student, self.student.tracker, self.loader.loader.steps
        for row, size in self.loader.epoch(epoch, start):
            if row == 0:
                self._collect()
            student.seed()
            step = tracker.step
            self.launch(size)
            self._unread.append((step, row, size))
            student.end_step(size)
            if tracker.step % steps == 0:
                self._collect()  # waits for the device, so that the time of the epoch is counted in it
            yield student.learning_rate(step)

    def check(self) -> None:
        """Read the loss terms that have not been read yet into the tracker.

        Raises:
            LongtailError: one of them is not finite.
        """
        self._collect()

    def close(self) -> None:
        """Free the graphs and give the streams back; no step may follow.

        Without this a graph would be freed at any later time, as during the recording of another training's.
        """
        with self.student.turn.taken():  # so that no other training records a graph meanwhile
            try:
                self._drop_graphs()
                for stream in self._streams or ():
                    stream.synchronize()
            except RuntimeError as error:  # of a device that has failed before, which has been raised then
                logger.debug("%s", error)
                return
            if self._streams is not None and not self._failed:
                return_streams(self.loader.device, self._streams)
            self._streams = None
            self._failed.clear()

    def launch(self, size: int) -> None:
        """Launch a step over a batch of ``size`` images, as a graph if there is one or can be."""
        if size in self._graphs:
            self._graphs[size].replay()
            return
        launched = self._launched.get(size, 0)
        if self.record and launched >= _WARM_UP:
            with self.student.turn.taken():
                graph = self._recorded(size)
            if graph is not None:
                self._graphs[size] = graph
                graph.replay()
                return
        # in the last step of the warm-up: what is set once, at the first use, is there already
        before = _contents(self.student.method) if self.record and launched == _WARM_UP - 1 else None
        self.step(size)
        self._launched[size] = launched + 1
        if before is not None and (reason := self._reason_against_graph(before)):
            self._forgo_graph(reason)

    def step(self, size: int) -> None:
        """Launch the operations of one step, all of them independent of values that change from step to step."""
        student = self.student
        learning_rate = self.loader.rate()[0]
        for group in student.optimizer.param_groups:
            torch.mul(learning_rate, group["lr_scale"], out=group["lr"])
        terms, norm = student.optimize(self.loader.batch(size), measure_norm=True)
        assert norm is not None
        values = torch.stack([*terms.values(), norm.detach()]).float()
        if not self._names:
            self._names = list(terms)
            self._log = torch.zeros(self.loader.rows, len(values), device=self.loader.device)
        self._log.index_copy_(0, self.loader.counter, values[None])
        self.loader.advance()

    def _recorded(self, size: int) -> Any:
        """Return a graph of the step for batches of ``size``; None, with the reason logged, if it cannot be one."""
        student, started = self.student, time.monotonic()
        before = _contents(student.method)
        student.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # what an automatic collection frees during the recording, another graph for one, would end it
        gc.collect()
        with without_collections():
            try:
                # other threads, which train beside this one, may go on meanwhile
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    self.step(size)
            except RuntimeError as error:
                self._failed.append(graph)
                reason = _describe(error)
                reset_generator(self.loader.device)
            else:
                reason = self._reason_against_graph(before)
                if not reason:
                    if not self._graphs:
                        logger.info("a step is one CUDA graph, recorded in %.1f s", time.monotonic() - started)
                    return graph
        self._forgo_graph(reason)
        return None

    def _reason_against_graph(self, before: _Contents) -> str:
        """Return what the step since ``before`` replaced and a graph would read as it was; empty if nothing."""
        name, after = self.student.config.method, _contents(self.student.method)
        if moved := _differing(before.addresses, after.addresses):
            return f"method {name} replaces its tensor '{moved[0]}' in every step"
        if changed := _differing(before.values, after.values):
            return f"method {name} changes its value '{changed[0]}' in every step, which is no tensor"
        return ""

    def _forgo_graph(self, reason: str) -> None:
        """Launch all further steps operation by operation.

        Those over batches of other sizes too: a graph may not outlive the state of the stream that it was recorded on,
        which a failed recording, or freeing it, takes away. A failed graph is therefore kept until the end.
        """
        self.record = False
        with self.student.turn.taken():
            self._drop_graphs()
        logger.info("a step cannot be one CUDA graph, and is launched operation by operation: %s", reason)
        if self._failed:
            logger.info("the recording was begun, and later trainings of this process may not be recorded either")

    def _drop_graphs(self) -> None:
        if self._graphs and self._stream is not None:
            self._stream.synchronize()
        while self._graphs:
            self._graphs.popitem()[1].reset()

    def _collect(self) -> None:
        """Read the loss terms of the steps since the last reading, and add them to the tracker."""
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        log = self._log[unread[0][1] : unread[-1][1] + 1].clone()  # consecutive rows, which the next steps overwrite
        values = log.cpu()
        for (step, _, _), terms in zip(unread, values, strict=True):
            self.student.guard.check(step + 1, self._names, terms[:-1])
        tracker, clips = self.student.tracker, self.student.config.optimizer.grad_clip_norm is not None
        sizes = torch.tensor([float(size) for _, _, size in unread])
        sums = (values[:, :-1] * sizes[:, None]).sum(dim=0).to(log.device)
        tracker.add_terms(dict(zip(self._names, sums, strict=True)), 1)
        for (step, _, _), norm in zip(unread, log[:, -1], strict=True):
            if clips or step % _NORM_EVERY == 0:
                tracker.add_norm(norm)


def _describe(error: RuntimeError) -> str:
    """Return why a step could not be recorded, and at which line of the code that it runs."""
    # leaving a failed recording raises an error of its own, which does not say why
    cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
    message = (str(cause).splitlines() or [type(cause).__name__])[0]
    for frame in reversed(traceback.extract_tb(cause.__traceback__)):
        path = Path(frame.filename)
        if not {"torch", "lightning_fabric"} & set(path.parts):
            return f"{message} ({'/'.join(path.parts[-2:])}:{frame.lineno})"
    return message


class _Contents(NamedTuple):
    """What a step of a method reads and writes beside the batch, by name."""

    addresses: dict[str, int]
    """Where every tensor lies."""
    values: dict[str, object]
    """Numbers, texts and tuples of them."""


def _contents(method: Method) -> _Contents:
    addresses = {name: tensor.data_ptr() for name, tensor in named_tensors(method).items()}
    values: dict[str, object] = {}
    for path, module in method.named_modules():
        owners: dict[str, object] = {path: module}
        # memories, which are no modules, have attributes too
        owners |= {f"{path}.{name}": value for name, value in vars(module).items() if not isinstance(value, nn.Module)}
        for prefix, owner in owners.items():
            found = getattr(owner, "__dict__", {})
            values |= {f"{prefix}.{name}".strip("."): value for name, value in found.items() if _is_plain(value)}
    return _Contents(addresses, values)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _differing(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Return the sorted names of what is not equal, or is on one side only."""
    common = before.keys() & after.keys()
    # tuples compare their parts by identity first: a NaN that stayed is equal
    return sorted((before.keys() ^ after.keys()) | {name for name in common if (before[name],) != (after[name],)})


def build_steps(
    student: Student, loader: TrainLoader, batches_on_device: bool, view_names: Sequence[Hashable]
) -> LoaderSteps | DeviceSteps:
    """Return the steps of a training; see :func:`batches_on_device` and :class:`DeviceLoader`."""
    if not batches_on_device:
        return LoaderSteps(student, loader)
    config, method, fabric = student.config, student.method, student.fabric
    ahead = method.needs_teacher(config) and method.teacher_is_frozen(config) and loader.cache is None

    def teacher_pass(batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        with fabric.autocast():
            return method.teacher_outputs(batch)

    streams = take_streams(fabric.device)
    try:
        device_loader = DeviceLoader(
            loader,
            fabric.device,
            memory_for_images(config, fabric.device),
            student.learning_rate,
            teacher_pass if ahead else None,
            # the key views are then the teacher's, where it computes keys at all
            method.plan.num_student if ahead and method.needs_teacher_features(config) else None,
            student.turn.views,
            view_names,
            None if streams is None else streams[1],
        )
    except torch.OutOfMemoryError:  # other programs, or trainings beside this one, have taken what the limit leaves
        if config.accelerator.batches == "device":
            raise
        if streams is not None:
            return_streams(fabric.device, streams)
        logger.info("training images are not kept on %s after all: not enough of its memory is free", fabric.device)
        return LoaderSteps(student, loader)
    return DeviceSteps(student, device_loader, config.accelerator.graph, streams)


def batches_on_device(config: Config, loader: TrainLoader, device: torch.device) -> tuple[bool, str]:
    """Return whether batches are made on the device, and what to tell the user of it.

    Raises:
        LongtailError: that is asked for, and cannot be.
    """
    wanted = config.accelerator.batches
    if wanted == "host" or (wanted == "auto" and device.type != "cuda"):
        return False, ""
    reason = reason_against_batches(config, loader, device)
    if not reason:
        return True, f"{len(loader.images):,} training images are kept on {device} and augmented there"
    if wanted == "device":
        raise LongtailError(f"accelerator.batches device: {reason}; use auto")
    return False, f"training images are not kept on {device}: {reason}"


def reason_against_batches(config: Config, loader: TrainLoader, device: torch.device) -> str:
    """Return why the batches of a training cannot be made on the device; empty if they can."""
    if config.precision == "16-mixed":
        return "the scale of the loss in precision 16-mixed is decided on the host"
    return reason_against_device(loader, memory_for_images(config, device))


def memory_for_images(config: Config, device: torch.device) -> float:
    """Return the bytes that images and views may take."""
    if device.type != "cuda":
        return math.inf
    return config.accelerator.memory * torch.cuda.get_device_properties(device).total_memory
