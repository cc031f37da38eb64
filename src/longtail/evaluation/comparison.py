"""What several seeds say about several methods: means, spreads and paired differences."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_RESAMPLES = 10_000


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
    imbalance: float | None = None
    """Imbalance factor, where the comparison has several."""
    mean_iou: float | None = None
    """Of a segmentation, as the rest below; ``balanced_accuracy`` is then the mean class accuracy."""
    head: float | None = None
    """Mean IoU of the third of the classes with the most pixels."""
    middle: float | None = None
    tail: float | None = None
    boundary_iou: float | None = None


def run_name(method: str, seed: int, imbalance: float | None) -> str:
    """Return the folder of a run within its comparison."""
    return f"{method}-seed{seed}" if imbalance is None else f"{method}-imbalance{imbalance:g}-seed{seed}"


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over seeds (n − 1 in the denominator; None for one seed)."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class Difference:
    """A paired difference of balanced accuracy or IoU, in points, with two 95 % intervals over seeds.

    The t-interval decides whether a difference is shown. The bootstrap's percentiles (resampled pairs) stand beside it:
    of three to five seeds they are narrower than is right, since what was not drawn cannot be resampled.
    """

    method: str
    baseline: str
    mean: float
    low: float | None
    high: float | None
    seeds: int
    bootstrap_low: float | None = None
    bootstrap_high: float | None = None
    imbalance: float | None = None
    measure: str = "balanced_accuracy"

    def __str__(self) -> str:
        where = "" if self.imbalance is None else f"imbalance {self.imbalance:g}, "
        where += "" if self.measure == "balanced_accuracy" else f"{dict(DENSE_COLUMNS)[self.measure]}, "
        text = f"{where}{self.method} − {self.baseline}: {_signed(self.mean)} points"
        if self.low is None or self.high is None:
            return f"{text} (one seed says nothing about its spread)"
        assert self.bootstrap_low is not None
        assert self.bootstrap_high is not None
        verdict = "no difference shown" if self.low <= 0 <= self.high else "a difference"
        return (
            f"{text}, 95 % interval {_signed(self.low)} to {_signed(self.high)} "
            f"(bootstrap {_signed(self.bootstrap_low)} to {_signed(self.bootstrap_high)}) over {self.seeds} seeds: "
            f"{verdict}"
        )


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def methods_of(records: Sequence[Record]) -> list[str]:
    """Return the methods in the order in which they first ran."""
    return list(dict.fromkeys(record.method for record in records))


def imbalances_of(records: Sequence[Record]) -> list[float | None]:
    """Return the imbalance factors in the order in which they first ran; None alone where there is one setting."""
    return list(dict.fromkeys(record.imbalance for record in records))


def summarize(records: Sequence[Record], method: str, name: str) -> Summary | None:
    """Return mean and deviation of a field over a method's seeds; None where any of its values is."""
    values = [getattr(record, name) for record in records if record.method == method]
    if not values or any(value is None for value in values):
        return None
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def differences(records: Sequence[Record], baseline: object = None) -> list[Difference]:
    """Return every method against each that stands before it, or all against ``baseline``, paired by seed.

    Of segmentations there are two differences a pair, in mean IoU and in that of the tail.
    """
    found = []
    measures = ("mean_iou", "tail") if _dense(records) else ("balanced_accuracy",)
    for imbalance, measure in itertools.product(imbalances_of(records), measures):
        here = [record for record in records if record.imbalance == imbalance]
        methods = methods_of(here)
        for position, method in enumerate(methods):
            for other in methods[:position] if baseline is None else methods:
                if other != method and baseline in {None, other}:
                    difference = _difference(here, method, other, imbalance, measure)
                    found += [] if difference is None else [difference]
    return found


def _difference(
    records: Sequence[Record], method: str, baseline: str, imbalance: float | None, measure: str
) -> Difference | None:
    ours, theirs = ({r.seed: getattr(r, measure) for r in records if r.method == name} for name in (method, baseline))
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not pairs:
        return None
    mean = statistics.fmean(pairs)
    if len(pairs) == 1:
        return Difference(method, baseline, mean, None, None, 1, imbalance=imbalance, measure=measure)
    import numpy as np
    from scipy.stats import t

    half = float(t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    drawn = np.random.default_rng(0).choice(pairs, (_RESAMPLES, len(pairs))).mean(axis=1)
    low, high = (float(value) for value in np.percentile(drawn, [2.5, 97.5]))
    return Difference(method, baseline, mean, mean - half, mean + half, len(pairs), low, high, imbalance, measure)


def markdown(records: Sequence[Record], baseline: object = None) -> list[str]:
    """Return the comparison as lines of Markdown: the table, and the differences, or those from one method alone."""
    header, rows = table(records)
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return [*lines, "", *(f"- {difference}" for difference in differences(records, baseline))]


COLUMNS = (
    ("balanced_accuracy", "balanced accuracy"),
    ("many", "many"),
    ("medium", "medium"),
    ("few", "few"),
)
DENSE_COLUMNS = (
    ("mean_iou", "mean IoU"),
    ("head", "head IoU"),
    ("middle", "middle IoU"),
    ("tail", "tail IoU"),
    ("boundary_iou", "boundary IoU"),
    ("balanced_accuracy", "mean class accuracy"),
)


def _dense(records: Sequence[Record]) -> bool:
    return bool(records) and records[0].mean_iou is not None


def columns(records: Sequence[Record]) -> tuple[tuple[str, str], ...]:
    """Return the fields that a table of these records shows, with their titles."""
    return DENSE_COLUMNS if _dense(records) else COLUMNS


def table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the comparison: mean ± standard deviation over seeds."""
    factors = imbalances_of(records)
    several = factors != [None]
    header = ["method", *(title for _, title in columns(records)), "epochs", "student passes", "seconds", "teacher s"]
    rows = []
    for factor in factors:
        here = [record for record in records if record.imbalance == factor]
        for method in methods_of(here):
            cells = [str(summarize(here, method, name) or "n/a") for name, _ in columns(records)]
            costs = [
                summarize(here, method, name) for name in ("epochs", "student_passes", "seconds", "teacher_seconds")
            ]
            formats = ("{:.0f}", "{:,.0f}", "{:.1f}", "{:.1f}")
            cells += [form.format(cost.mean) for form, cost in zip(formats, costs, strict=True) if cost is not None]
            rows.append([*([f"{factor:g}"] if several and factor is not None else []), method, *cells])
    return [*(["imbalance"] if several else []), *header], rows
