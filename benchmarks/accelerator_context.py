"""What every phase of ``accelerator.py`` needs: the device, the time left, the paper's recipe, its files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longtail.config import Config, load_recipe

SOURCES = Path(__file__).parents[1] / "src"
SMALL = "conv8-tiny"  # the network of a rehearsal
RESERVE = 10.0  # seconds that are left for the end of the script


@dataclasses.dataclass
class Context:
    """What every phase needs."""

    out: Path
    """Folder of the results: a few files, which travel back."""
    runs: Path
    """Folder of the trainings, which do not."""
    pack: Path
    images: str
    """The set in the pack."""
    seeds: tuple[int, ...]
    epochs: int
    jobs: int
    rehearse: bool
    device: torch.device
    started: float
    """When the process started, of ``time.monotonic``."""
    minutes: float
    commit: str = ""
    models: dict[str, Path] = dataclasses.field(default_factory=dict)
    """Folders of finished models, by the key of their training."""
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Measured, of a step of a variant alone."""
    gains: dict[int, float] = dataclasses.field(default_factory=dict)
    """Measured, by the number of trainings side by side."""
    steps: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Measurements of steps, by variant."""
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What is written beside them."""

    @property
    def now(self) -> float:
        """Seconds since the process started."""
        return time.monotonic() - self.started

    @property
    def limit(self) -> float:
        """Seconds since the process started at which everything has to be written."""
        return 60 * self.minutes - RESERVE

    def say(self, *words: object) -> None:
        """Print a line with the time."""
        print(f"[{self.now:6.1f}]", *words, flush=True)

    def write(self, name: str, result: Mapping[str, Any]) -> None:
        """Write a file of results, with what it was measured on; a reader sees the old one or the new one."""
        values = {**self.origin(), "seconds": round(self.now, 1), **result}
        write_json(self.out / f"{name}.json", values)

    def origin(self) -> dict[str, Any]:
        """Return the command, the machine, and the version of the code."""
        command = " ".join(["python benchmarks/accelerator.py", *sys.argv[1:]])
        return {"command": command, "hardware": hardware(self.device), "commit": self.commit}

    def recipe(self, **changes: Any) -> Config:
        """Return the paper's recipe on the packed images."""
        config = load_recipe("cifar100-lt").config
        config = config.replace(
            epochs=self.epochs,
            data={"source": f"{self.images}-packed", "root": str(self.pack)},
            device="cpu" if self.rehearse else "cuda",
            precision="32-true" if self.rehearse else "bf16-mixed",
            accelerator={"batches": "device", "memory": 0.25 / self.jobs},
            checkpoint_seconds=1e6,
        ).replace(**changes)
        if self.rehearse:
            config = config.replace(network=SMALL, teacher={"network": SMALL}, gml={"queue_size": 400})
        return config


class Remarks(logging.Handler):
    """Keeps what the package says, by the thread that it was said in."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: dict[int, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.lines.setdefault(record.thread or 0, []).append(record.getMessage())

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to the package, which says nothing elsewhere meanwhile."""
        logger = logging.getLogger("longtail")
        level, propagate = logger.level, logger.propagate
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate


def about_graph(remarks: Sequence[str]) -> str:
    """Return what a training has said of its steps: that they are CUDA graphs, or why not."""
    said = [line for line in remarks if "one CUDA graph" in line]
    return "; ".join(said) or "launched operation by operation"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file in one go."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def hardware(device: torch.device) -> str:
    """Return the name of the device, and the version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__.partition('+')[0]}"


def version_of_sources() -> str:
    """Return the commit; where git does not know it, a hash of the sources."""
    command = ["git", "-C", str(SOURCES), "describe", "--always", "--dirty", "--abbrev=9"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        digest = hashlib.blake2b(digest_size=6)
        for path in sorted(SOURCES.rglob("*.py")):
            digest.update(path.read_bytes())
        return f"sources {digest.hexdigest()}"


def one_line(error: BaseException) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
