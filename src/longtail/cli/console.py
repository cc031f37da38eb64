"""What commands print: tables, metrics, progress, log messages. Imports no torch."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from longtail.data.paths import printable
from longtail.registry import TASKS


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: bool = False) -> None:
    """Print a table; the first column, or with ``left`` all columns, are aligned left."""
    rows = [[printable(cell) for cell in row] for row in rows]  # names of files and classes may hold anything
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for index, row in enumerate([header, *rows]):
        cells = [
            cell.ljust(w) if i == 0 or left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if index == 0:
            print("  ".join("─" * width for width in widths))


def print_metrics(task: str, metrics: Mapping[str, Any]) -> None:
    """Print the metrics on a test set under each prior.

    Args:
        task: name of the task.
        metrics: as ``evaluate --json`` holds them.
    """
    titles = dict(TASKS[task].printed_metrics)
    if "target_accuracy" in metrics:
        titles = {"target_accuracy": "accuracy at target", **titles}
    rows = [
        ["training" if prior == "train" else prior, *(_percent(values.get(name)) for name in titles)]
        for prior, values in metrics["priors"].items()
    ]
    print_table(["prior", *titles.values()], rows)


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


class Counter:
    """A progress bar for a number of images that is not known in advance."""

    def __init__(self, quiet: bool) -> None:
        from tqdm import tqdm

        self.bar = tqdm(unit="image", disable=quiet or not sys.stderr.isatty(), leave=False)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, count: int) -> None:
        """Count some images."""
        self.bar.update(count)


class _ConsoleHandler(logging.Handler):
    """Writes messages to standard error without breaking a progress bar; of several processes, the first one writes."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if os.environ.get("RANK", "0") == "0":
            tqdm.write(printable(self.format(record)), file=sys.stderr)


def show_messages(quiet: bool) -> None:
    """Print the messages of the package to standard error, or with ``quiet`` warnings only."""
    logger = logging.getLogger("longtail")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _ConsoleHandler)]
    logger.addHandler(_ConsoleHandler())
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
