"""What several seeds say about several methods: means, spreads and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run; accuracies in percent, None where a shot group has no class."""

    method: str
    seed: int
    balanced_accuracy: float
    top1: float
    many: float | None
    medium: float | None
    few: float | None
    seconds: float
    """Training the student."""
    student_passes: int
    """Images through the student, forward and backward."""
    teacher_seconds: float
    """Training the teacher, 0 where there is none."""
    epochs: int
    predicts_under: Literal["uniform", "train"]
    """The prior that the method's predictions assume."""


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over seeds (n − 1 in the denominator; None for one seed)."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class Difference:
    """A paired difference of balanced accuracy, in points, with its 95 % t-interval over seeds."""

    method: str
    baseline: str
    mean: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        text = f"{self.method} − {self.baseline}: {_signed(self.mean)} points"
        if self.low is None or self.high is None:
            return f"{text} (one seed says nothing about its spread)"
        verdict = "no difference shown" if self.low <= 0 <= self.high else "a difference"
        return f"{text}, 95 % interval {_signed(self.low)} to {_signed(self.high)} over {self.seeds} seeds: {verdict}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def methods_of(records: Sequence[Record]) -> list[str]:
    """Return the methods in the order in which they first ran."""
    return list(dict.fromkeys(record.method for record in records))


def summarize(records: Sequence[Record], method: str, name: str) -> Summary | None:
    """Return mean and deviation of a field over a method's seeds; None where any of its values is."""
    values = [getattr(record, name) for record in records if record.method == method]
    if not values or any(value is None for value in values):
        return None
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def differences(records: Sequence[Record]) -> list[Difference]:
    """Return every method against each that stands before it, paired by seed."""
    methods = methods_of(records)
    found = []
    for position, method in enumerate(methods):
        for baseline in methods[:position]:
            here = {r.seed: r.balanced_accuracy for r in records if r.method == method}
            there = {r.seed: r.balanced_accuracy for r in records if r.method == baseline}
            pairs = [here[seed] - there[seed] for seed in here if seed in there]
            mean = statistics.fmean(pairs)
            half = None
            if len(pairs) > 1:
                from scipy.stats import t

                half = float(t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
            low, high = (None, None) if half is None else (mean - half, mean + half)
            found.append(Difference(method, baseline, mean, low, high, len(pairs)))
    return found


def markdown(records: Sequence[Record], baseline: object = None) -> list[str]:
    """Return the comparison as lines of Markdown: the table, and the differences, or those from one method alone."""
    header, rows = table(records)
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    shown = [difference for difference in differences(records) if baseline in {None, difference.baseline}]
    return [*lines, "", *(f"- {difference}" for difference in shown)]


COLUMNS = (
    ("balanced_accuracy", "balanced accuracy"),
    ("many", "many"),
    ("medium", "medium"),
    ("few", "few"),
)


def table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the comparison: mean ± standard deviation over seeds."""
    header = ["method", *(title for _, title in COLUMNS), "epochs", "student passes", "seconds", "teacher s"]
    rows = []
    for method in methods_of(records):
        cells = [str(summarize(records, method, name) or "n/a") for name, _ in COLUMNS]
        epochs, passes = (summarize(records, method, name) for name in ("epochs", "student_passes"))
        seconds, teacher = (summarize(records, method, name) for name in ("seconds", "teacher_seconds"))
        assert epochs is not None
        assert passes is not None
        assert seconds is not None
        assert teacher is not None
        rows.append(
            [method, *cells, f"{epochs.mean:.0f}", f"{passes.mean:,.0f}", f"{seconds.mean:.1f}", f"{teacher.mean:.1f}"]
        )
    return header, rows
