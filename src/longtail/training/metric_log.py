"""Sums of loss terms on the device, the progress bar, loggers, and a guard against non-finite losses."""

from __future__ import annotations

import collections
import csv
import hashlib
import importlib.util
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longtail.distributed import all_reduce_sum, rank, world_size
from longtail.errors import LongtailError
from longtail.files import write_text

# bars that are updated by hand do not need its thread, and an exception while it starts, a signal's too, would be lost
tqdm.monitor_interval = 0


_TRACKED = ("step", "student_passes", "seconds", "best", "images", "sums", "norms", "epoch_start")
"""What a checkpoint keeps of a :class:`MetricTracker`; what an earlier version has not kept stays as it is at first."""


class MetricTracker:
    """Counts steps, images and loss terms. The sums stay on the device: reading one makes the host wait."""

    def __init__(self) -> None:
        self.step = 0
        self.student_passes = 0
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        self.clear()

    def clear(self) -> None:
        """Start an epoch."""
        self.sums: dict[str, Tensor] = {}
        self.images = 0
        self.norms: list[Tensor] = []
        self.epoch_start = self.seconds

    def add_norm(self, norm: Tensor) -> None:
        """Add the gradient norm of a step."""
        self.norms.append(norm.detach())

    def norm(self) -> float:
        """Return the mean of the gradient norms of the epoch."""
        return torch.stack(self.norms).mean().item() if self.norms else 0.0

    def count(self, images: int, passes: int) -> None:
        """Count a step over ``images`` images, of all processes together."""
        self.step, self.images, self.student_passes = self.step + 1, self.images + images, self.student_passes + passes

    def add_terms(self, terms: Mapping[str, Tensor], images: int) -> None:
        """Add the loss terms of a step over ``images`` images."""
        for name, value in terms.items():
            weighted = value.detach() * images
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted

    def speed(self) -> float:
        """Return images per second in this epoch so far."""
        return self.images / max(self.seconds - self.epoch_start, 1e-9)

    def means(self) -> dict[str, float]:
        """Return the mean of each loss term over the epoch so far, in this process."""
        return {name: (value / self.images).item() for name, value in self.sums.items()}

    def global_means(self) -> dict[str, float]:
        """Return the mean of each loss term over all processes."""
        return {name: (all_reduce_sum(value) / world_size() / self.images).item() for name, value in self.sums.items()}

    def state(self) -> dict[str, Any]:
        """Return everything, as a checkpoint holds it."""
        sums = {name: all_reduce_sum(value) / world_size() for name, value in self.sums.items()}
        return {**{name: getattr(self, name) for name in _TRACKED}, "sums": sums}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore the state of a checkpoint."""
        self.step = state["step"]
        for name in _TRACKED:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.sums = {name: value.to(device) for name, value in self.sums.items()}
        self.norms = [value.to(device) for value in self.norms]


class NonFiniteLossGuard:
    """Stops a run whose loss is not finite, immediately where reading it costs nothing.

    On an accelerator the host would have to wait for each step. There the values are copied asynchronously and read
    when they have arrived, a few steps late; all of them are read before a checkpoint is written.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._pending: collections.deque[tuple[int, list[str], Tensor, Any]] = collections.deque()

    def add(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Check the loss terms of a step.

        Raises:
            LongtailError: one is not finite; the step and the term are named.
        """
        values = torch.stack([value.detach() for value in terms.values()])
        event = None
        if values.device.type == "cuda":
            arrived = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            arrived.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            values = arrived
        self._pending.append((step, list(terms), values, event))
        while self._pending and (self._pending[0][3] is None or self._pending[0][3].query()):
            self.check(*self._pending.popleft()[:3])

    def flush(self) -> None:
        """Check the values that have not been read yet."""
        while self._pending:
            if self._pending[0][3] is not None:
                self._pending[0][3].synchronize()
            self.check(*self._pending.popleft()[:3])

    def check(self, step: int, names: Sequence[str], values: Tensor) -> None:
        """Check (T,) values of the terms of a step, on the host; raises as :meth:`add` does."""
        finite = values.isfinite()
        if not bool(finite.all()):
            bad = finite.tolist().index(False)
            saved = self.out / "last.ckpt"
            kept = f"{saved} is from an earlier step" if saved.is_file() else "there is no earlier checkpoint"
            raise LongtailError(
                f"{self.out}: the loss term '{names[bad]}' is {values[bad].item()} at step {step}; lower "
                f"optimizer.learning_rate or set optimizer.grad_clip_norm ({kept})"
            )


class Progress:
    """The progress bar: epoch, loss terms, learning rate, images per second, and the time left."""

    def __init__(self, name: str, done: int, total: int, quiet: bool) -> None:
        # a log file gets a line now and then, not one per step
        self.every = 0.5 if sys.stderr.isatty() else 20.0
        self.shown = time.monotonic()
        self.bar = tqdm(
            desc=name,
            initial=done,
            total=total,
            disable=quiet or rank() > 0,
            unit="step",
            mininterval=self.every,
            maxinterval=self.every,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(
        self, epoch: int, epochs: int, learning_rate: float, tracker: MetricTracker, flush: Callable[[], None]
    ) -> None:
        """Show a step; ``flush`` is called before the tracker is read."""
        now = time.monotonic()
        if not self.bar.disable and now - self.shown >= self.every:
            self.shown = now
            flush()
            shown = {
                "epoch": f"{epoch + 1}/{epochs}",
                **{name: f"{value:.3f}" for name, value in tracker.means().items()},
            }
            shown |= {"lr": f"{learning_rate:.4f}", "images/s": f"{tracker.speed():.0f}"}
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update()


class MetricLogger:
    """Writes ``metrics.jsonl``, and the same names to further loggers; one process writes.

    Args:
        out: folder of the run.
        also: csv (``metrics.csv``, epochs only), tensorboard, wandb.
        name: of the run, for wandb.
        step: at which the run starts or is resumed; lines of later steps are dropped.
    """

    def __init__(self, out: Path, also: Sequence[str], name: str, step: int) -> None:
        self.out, self.also = out, tuple(also)
        self.path = out / "metrics.jsonl"
        self._board: Any = None
        self._wandb: Any = None
        if rank() > 0:
            return
        if "tensorboard" in also:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
        if "wandb" in also:
            import wandb

            # the same folder is the same run, resumed or not
            identity = hashlib.blake2b(str(out.resolve()).encode(), digest_size=6).hexdigest()
            self._wandb = wandb.init(project="longtail", name=name, dir=str(out), id=identity, resume="allow")
        if self.path.is_file():
            lines = read_metrics(self.path)
            kept = [line for line in lines if line["kind"] in {"epoch", "validation"} and line["step"] <= step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            if "csv" in self.also:
                self._write_csv(kept)

    def add(self, line: dict[str, Any]) -> None:
        """Write a line; a number that is not finite, such as a gradient norm that overflowed in 16 bits, as None."""
        if rank() > 0:
            return
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise LongtailError(f"{self.path}: cannot be written: {error.strerror}") from None
        if "csv" in self.also and line["kind"] == "epoch":
            self._write_csv(read_metrics(self.path))
        numbers = {f"{line['kind']}/{k}": v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, line["step"])
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])

    def _write_csv(self, lines: Iterable[Mapping[str, Any]]) -> None:
        epochs = [line for line in lines if line["kind"] == "epoch"]
        names = list(dict.fromkeys(name for line in epochs for name in line if name != "kind"))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(epochs)
        write_text(self.out / "metrics.csv", text.getvalue())

    def close(self) -> None:
        """Close the loggers."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_logs(also: Sequence[str]) -> None:
    """Raise LongtailError where the package of a logger is missing; the message names the extra."""
    for extra in also:
        try:
            there = extra == "csv" or importlib.util.find_spec(extra) is not None
        except ValueError:  # set to None in sys.modules
            there = False
        if not there:
            raise LongtailError(f"log {extra}: the package is not installed: pip install 'longtail[{extra}]'")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; a last line that a crash truncated is left out."""
    lines: Iterable[str] = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
