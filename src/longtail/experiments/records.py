"""Records of runs, and their comparison over methods and seeds: means, standard deviations, paired differences."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from longtail.registry import TASKS
from longtail.tasks.base import ImageResults
from longtail.training.run_io import Run

_RESAMPLES = 10_000
_CHEAPER = 0.9  # of the cost
_ROUNDING = 1e-9  # points, of a difference of two metrics


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run: what it was, what it cost, and its metrics."""

    method: str
    seed: int
    metrics: Mapping[str, float | None]
    """Metrics in percent, None where a group has no class; the names are those of the task's columns and more, without
    those that the version that trained the run did not compute."""
    seconds: float
    """Time to train the student."""
    student_passes: int
    """Images through the student, forward and backward."""
    teacher_seconds: float
    """Time to train the teacher, 0 where there is none."""
    epochs: int
    predicts_under: Literal["uniform", "train"]
    """The prior that the method's predictions assume."""
    imbalance: float | None = None
    """Imbalance factor, where the comparison has several."""
    task: str = "classification"
    test_images: str | None = None
    """Hash of the test images; None where the version that trained the run kept none."""
    num_test_images: int | None = None
    """Test images; None where the record is of an earlier version."""
    half_widths: Mapping[str, float] = field(default_factory=dict)
    """Half widths of the 95 % intervals over test images of the compared metrics that have one, in points."""
    side_by_side: bool = False
    """Whether others were trained on the same device meanwhile, on which the seconds then depend."""
    image_results: ImageResults | None = field(default=None, compare=False, repr=False)
    """Of every test image, see :meth:`longtail.training.run_io.Run.image_results`; None where the run kept none, and
    after JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the metrics beside the rest, without those of single images."""
        left_out = {"metrics", "image_results"}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        return {"method": values.pop("method"), "seed": values.pop("seed"), **self.metrics, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Return the record of plain values, see :meth:`to_dict`."""
        own = {f.name for f in dataclasses.fields(cls)} - {"metrics", "image_results"}
        metrics = {name: value for name, value in values.items() if name not in own}
        return cls(metrics=metrics, **{name: value for name, value in values.items() if name in own})


def run_record(run: Run) -> Record:
    """Return the record of a finished run."""
    task = TASKS[run.model_config.task]
    names = dict.fromkeys(("balanced_accuracy", "top1", *(name for name, _ in task.columns)))
    intervals = {name: run.metrics.get("intervals", {}).get(name) for name in task.compared_metrics}
    return Record(
        method=run.config.method,
        seed=run.config.seed,
        metrics={name: run.metrics[name] for name in names if name in run.metrics},
        epochs=run.model_config.training_info["epochs"],
        predicts_under=run.model_config.predicts_under,
        student_passes=run.student_passes,
        seconds=run.seconds,
        teacher_seconds=run.teacher_seconds,
        task=run.model_config.task,
        test_images=run.model_config.training_info.get("test_images"),
        num_test_images=run.metrics.get("images"),
        # the longer side: the other may end at 0 or 100 %
        half_widths={
            name: max(run.metrics[name] - ends[0], ends[1] - run.metrics[name])
            for name, ends in intervals.items()
            if ends is not None
        },
        side_by_side=run.model_config.training_info.get("side_by_side", False),
        image_results=run.image_results(),
    )


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
    """A paired difference of a metric, in points, with its 95 % intervals.

    The t-interval is over seeds. The percentiles of the bootstrap (resampled pairs) are given beside it: with three to
    five seeds they are too narrow, since values that were not drawn cannot be resampled. There is no interval over
    seeds for one of them, nor where the difference is the same with every seed, which says as little.

    Where every seed has the same test images, intervals over seeds are on these images alone. ``sampling`` is then how
    far other test images would change the difference, and :attr:`overall` covers both.
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
    measure: str = ""
    """Title of the metric, where it is not the only one that is compared."""
    num_test_images: int | None = None
    """Test images, where those of all seeds are known to be the same."""
    sampling: float | None = None
    """Half width of the difference's 95 % interval over these test images, in points, where it is known; with several
    seeds without the part that changes from seed to seed."""
    sampling_is_bound: bool = False
    """Whether it was computed as if the errors of both methods were independent, since what was predicted of each
    image is not known. The more of their errors are common, the smaller it is."""

    @property
    def overall(self) -> tuple[float, float] | None:
        """The 95 % interval over seeds and test images; None where either is not known, or other images with each seed.

        Both half widths are added as those of independent errors are (Zou and Donner, 2008,
        https://doi.org/10.1002/sim.3095).
        """
        if self.low is None or self.sampling is None or self.sampling_is_bound:
            return None
        half = math.hypot(self.mean - self.low, self.sampling)
        return self.mean - half, self.mean + half

    @property
    def shown(self) -> bool:
        """Whether the interval that covers both seeds and test images excludes 0.

        Where every seed has other test images that is the one over seeds; False where the images' share is not known.
        """
        covers_images = None if self.low is None or self.high is None else (self.low, self.high)
        interval = covers_images if self.num_test_images is None else self.overall
        return interval is not None and not interval[0] <= 0 <= interval[1]

    def __str__(self) -> str:
        of = "" if self.imbalance is None else f"imbalance {self.imbalance:g}, "
        of += f"{self.measure}, " if self.measure else ""
        text = f"{of}{self.method} − {self.baseline}: {_signed(self.mean)} points"
        if self.low is None or self.high is None:
            same = f"the same with all {self.seeds} seeds, so its spread is not known: more seeds"
            doubt = "one seed says nothing about its spread" if self.seeds == 1 else same
            if self.seeds == 1 and self.sampling is not None and not self.sampling_is_bound:
                of_images = _interval(self.mean - self.sampling, self.mean + self.sampling)
                doubt += f"; over test images alone 95 % interval {of_images}"
            return f"{text} ({doubt})"
        assert self.bootstrap_low is not None
        assert self.bootstrap_high is not None
        where = f"over {self.seeds} seeds"
        if self.num_test_images is not None:
            where += f" on the same {self.num_test_images:,} test images"
        if self.overall is not None:
            where += f", over other test images too {_interval(*self.overall)}"
        elif self.sampling is not None:
            where += f" (other images: up to ±{self.sampling:.1f} more)"
        verdict = "no difference shown" if self.low <= 0 <= self.high else "a difference"
        if self.num_test_images is not None and verdict == "a difference" and not self.shown:
            verdict += " on these images" + ("" if self.overall is None else ", not shown for others")
        return (
            f"{text}, 95 % interval {_interval(self.low, self.high)} "
            f"(bootstrap {_interval(self.bootstrap_low, self.bootstrap_high)}) {where}: {verdict}"
        )


def _interval(low: float, high: float) -> str:
    return f"{_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def methods_of(records: Sequence[Record]) -> list[str]:
    """Return the methods in the order in which they first ran."""
    return list(dict.fromkeys(record.method for record in records))


def imbalances_of(records: Sequence[Record]) -> list[float | None]:
    """Return the imbalance factors in the order in which they first ran; None alone where there is one setting."""
    return list(dict.fromkeys(record.imbalance for record in records))


def summarize(records: Sequence[Record], method: str, name: str) -> Summary | None:
    """Return mean and deviation of a metric or cost over a method's seeds; None where any of its values is."""
    values = [
        record.metrics[name] if name in record.metrics else getattr(record, name, None)
        for record in records
        if record.method == method
    ]
    numbers = [float(value) for value in values if value is not None]
    if not values or len(numbers) < len(values):
        return None
    return Summary(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def differences(records: Sequence[Record], baseline: object = None) -> list[Difference]:
    """Return every method against each that stands before it, or all against ``baseline``, paired by seed.

    Runs on other test images are no pair. There is one difference per pair and compared metric of the task.
    """
    results: list[Difference] = []
    measures = TASKS[records[0].task].compared_metrics if records else ()
    for imbalance, measure in itertools.product(imbalances_of(records), measures):
        here = [record for record in records if record.imbalance == imbalance]
        methods = methods_of(here)
        for position, method in enumerate(methods):
            for other in methods[:position] if baseline is None else methods:
                if other != method and baseline in {None, other}:
                    difference = _difference(here, method, other, imbalance, measure)
                    results += [] if difference is None else [difference]
    return results


def _difference(
    records: Sequence[Record], method: str, baseline: str, imbalance: float | None, measure: str
) -> Difference | None:
    ours, theirs = ({r.seed: r for r in records if r.method == name} for name in (method, baseline))
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    same = [pair for pair in pairs if len({each.test_images for each in pair} - {None}) <= 1]
    both = ((a.metrics.get(measure), b.metrics.get(measure)) for a, b in same)
    gaps = [a - b for a, b in both if a is not None and b is not None]
    if not gaps:
        return None
    task = TASKS[records[0].task]
    title = dict(task.columns)[measure] if len(task.compared_metrics) > 1 else ""
    mean = statistics.fmean(gaps)
    images, sampling, is_bound = _same_test_images(same, measure)
    difference = Difference(
        *(method, baseline, mean, None, None, len(gaps)),
        imbalance=imbalance,
        measure=title,
        num_test_images=images,
        sampling=sampling,
        sampling_is_bound=is_bound,
    )
    if len(gaps) == 1 or (abs(mean) > _ROUNDING and max(gaps) - min(gaps) < _ROUNDING):
        return difference
    import numpy as np
    from scipy.stats import t

    half = float(t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    drawn = np.random.default_rng(0).choice(gaps, (_RESAMPLES, len(gaps))).mean(axis=1)
    low, high = (float(value) for value in np.percentile(drawn, [2.5, 97.5]))
    return replace(difference, low=mean - half, high=mean + half, bootstrap_low=low, bootstrap_high=high)


def _same_test_images(pairs: Sequence[tuple[Record, Record]], measure: str) -> tuple[int | None, float | None, bool]:
    """Return the last three fields of the :class:`Difference` of some pairs."""
    records = [record for pair in pairs for record in pair]
    if records[0].test_images is None or len({record.test_images for record in records}) > 1:
        return None, None, False
    images = records[0].num_test_images
    of_images = [(ours.image_results, theirs.image_results) for ours, theirs in pairs]
    kept = [(ours, theirs) for ours, theirs in of_images if ours is not None and theirs is not None]
    if len(kept) == len(pairs):
        ours, theirs = zip(*kept, strict=True)
        sampling = TASKS[records[0].task].sampling_half_width(measure, ours, theirs)
        if sampling is not None:
            return images, sampling, False
    # a mean over seeds varies with the images no more than the values of single seeds do on average
    squares = [record.half_widths.get(measure, math.nan) ** 2 for record in records]
    bound = math.sqrt(2 * statistics.fmean(squares))
    return images, None if math.isnan(bound) else bound, True


def recommendation(records: Sequence[Record], more_seeds: str = "--seeds 3") -> str:
    """Return one line that says which method to take; empty for a single method.

    It is the best in the task's main metric, or the cheapest (teacher included) of the methods that are not shown to be
    worse, cost at least a tenth less, and less with every seed than the best with any. The cost is the time; where runs
    were trained side by side it is the student passes, and one with a teacher is not cheaper than one without. Where
    the spread of its lead over a method is not known, it is the best, with that doubt; or those that are as good as
    shown.

    Args:
        records: of runs over the same classes.
        more_seeds: how to get more seeds where this is run, for the line that says that they are needed.
    """
    methods = methods_of(records)
    if len(methods) < 2 or imbalances_of(records) != [None]:
        return ""
    measure, title = TASKS[records[0].task].columns[0]
    means = {method: summarize(records, method, measure) for method in methods}
    scores = {method: summary.mean for method, summary in means.items() if summary is not None}
    if len(scores) < 2:
        return ""
    best = max(scores, key=lambda method: scores[method])

    timed = not any(record.side_by_side for record in records)

    def costs(method: str) -> list[float]:
        own = [record for record in records if record.method == method]
        return [r.seconds + r.teacher_seconds if timed else float(r.student_passes) for r in own]

    def has_teacher(method: str) -> bool:
        return any(record.teacher_seconds > 0 for record in records if record.method == method)

    def cost(method: str) -> float:
        return statistics.fmean(costs(method))

    gaps = {method: _difference(records, best, method, None, measure) for method in scores if method != best}
    lows = {
        method: None if gap is None else gap.low if gap.overall is None else gap.overall[0]
        for method, gap in gaps.items()
    }
    unpaired = [method for method, gap in gaps.items() if gap is None or gap.seeds < 2]
    unknown = [method for method, low in lows.items() if low is None]
    as_good = [method for method, low in lows.items() if low is not None and low <= 0]

    # times of equal work differ by chance: a method is cheaper if it takes a tenth less, with every seed
    cheaper = [
        method
        for method in as_good
        if cost(method) < _CHEAPER * cost(best)
        and max(costs(method)) < min(costs(best))
        and (timed or has_teacher(best) or not has_teacher(method))
    ]
    taken = min([best, *cheaper], key=cost)
    if unknown:
        why = f"fewer than two seeds and sets of test images in common with {', '.join(unpaired)}"
        if len({record.seed for record in records}) == 1:
            why = "one seed"
        elif not unpaired:
            why, more_seeds = f"the same lead over {', '.join(unknown)} with every seed", "more seeds"
        shown = f"{title} {scores[best]:.1f}"
        tied = [method for method in scores if f"{scores[method]:.1f}" == f"{scores[best]:.1f}"]
        if len(tied) > 1:
            return f"equal: {' and '.join(tied)} ({shown}); {why}, so this may be chance: {more_seeds}"
        return f"best: {best} ({shown}); {why}, so differences may be chance: {more_seeds}"
    if taken == best:
        doubt = f", but not shown to be better than {', '.join(as_good)}" if as_good else ""
        return f"take {best}: best {title}, {scores[best]:.1f}{doubt}"
    compared = f"not shown to be worse than {best} ({scores[best]:.1f}), and cheaper"
    return f"take {taken}: {title} {scores[taken]:.1f}, {compared}"


def markdown(records: Sequence[Record], baseline: object = None) -> list[str]:
    """Return the comparison as lines of Markdown: the table, and the differences, or those from one method alone."""
    header, rows = table(records)
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return [*lines, "", *(f"- {difference}" for difference in differences(records, baseline))]


def columns(records: Sequence[Record]) -> Sequence[tuple[str, str]]:
    """Return the fields that a table of these records shows, with their titles: those that all of them have."""
    if not records:
        return ()
    names = TASKS[records[0].task].columns
    return [(name, title) for name, title in names if all(name in record.metrics for record in records)]


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
