"""The report of a run and of a comparison, each one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from longtail.config import Config, read_config
from longtail.data.scenes import thirds
from longtail.engine.books import read_metrics
from longtail.engine.finished import labelled, read_finished, record
from longtail.engine.fit import Run
from longtail.engine.thumbnails import thumbnail
from longtail.errors import LongtailError
from longtail.evaluation.comparison import (
    COLUMNS,
    DENSE_COLUMNS,
    Record,
    columns,
    differences,
    imbalances_of,
    methods_of,
    run_name,
    table,
)
from longtail.files import write_made, write_text
from longtail.recognizer import Card, read_card
from longtail.report import overlays, plots
from longtail.report.addresses import embedded
from longtail.report.diagnosis import Finding, diagnose
from longtail.segmenter import palette


def _render(name: str, **values: Any) -> str:
    pages = Environment(loader=PackageLoader("longtail.report", "."), autoescape=True, trim_blocks=True)
    return pages.get_template(name).render(**values)


def run_report(folder: Path) -> Path:
    """Write ``report.html`` of a finished run and return its path."""
    card = read_card(folder)
    config = read_config(folder / "config.yaml")
    lines = read_metrics(folder / "metrics.jsonl")
    test = next((line for line in reversed(lines) if line["kind"] == "test"), None)
    if test is None:
        raise LongtailError(f"{folder / 'metrics.jsonl'}: has no test metrics; --resume the run")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    dense = card.task == "segmentation"
    shown = _segmented(folder, card, test) if dense else _classified(folder, card, config, test, epochs)
    page = _render(
        "run.html.j2",
        title=f"{config.recipe} · {config.method} · seed {config.seed}",
        card=card,
        figures=[(title, Markup(plots.svg(figure))) for title, figure in [*shown.figures, *_curves(epochs)]],
        shown=shown,
        test=test,
        settings=config.to_yaml(),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What a page says of a kind of model; classes are in order of frequency, head first."""

    counted: str
    """What the classes are counted in."""
    note: str
    columns: Sequence[tuple[str, str]]
    """Metrics with their titles, the main one first."""
    sizes: Mapping[str, int]
    """Classes in each group."""
    figures: Sequence[tuple[str, Figure]]
    header: Sequence[str]
    classes: Sequence[Sequence[Any]]
    examples: Sequence[tuple[str, str]] = ()
    """Captions, and images as addresses that hold them."""
    colors: Sequence[tuple[str, str]] = ()
    """Classes with the colours that they have in these images."""
    findings: Sequence[Finding] = ()
    confusions: Sequence[Sequence[str]] = ()
    """Rows of a table: class, what it is taken for, how often."""
    mistakes: Sequence[tuple[str, Sequence[tuple[str, Markup, str]]]] = ()
    """Headings, each with images as addresses that hold them, their captions, and these as text alone."""


def _classified(
    folder: Path, card: Card, config: Config, test: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]
) -> _Shown:
    groups = config.shots.groups(card.class_counts)
    judged = test[card.predicts_under]
    accuracy, intervals = judged["per_class"], judged.get("per_class_interval", [None] * len(groups))
    trusted = []
    if "calibration" in judged:
        title = f"Reliability: expected calibration error {judged['calibration']['ece']:.1f} %"
        trusted = [
            (title, plots.reliability(judged["calibration"]["diagram"])),
            ("Leaving the least certain out", plots.rejection(judged["calibration"]["rejection"])),
        ]
    order, names, counts, head_first = _head_first(card, groups)
    return _Shown(
        counted="training images",
        note=f"A class is many with more than {config.shots.many_above} training images and few with fewer than "
        f"{config.shots.few_below}.",
        columns=[*COLUMNS[:1], ("top1", "top-1"), ("top5", "top-5"), *COLUMNS[1:]],
        sizes={group: groups.count(group) for group in ("many", "medium", "few")},
        figures=[
            ("The tail", plots.class_histogram(names, counts, head_first)),
            ("Accuracy by class", plots.per_class(names, [accuracy[index] for index in order], head_first)),
            *trusted,
        ],
        header=["class", "training images", "group", "accuracy, %", "95 % interval"],
        classes=[
            [card.class_names[i], f"{card.class_counts[i]:,}", groups[i], accuracy[i], _interval(intervals[i])]
            for i in order
        ],
        findings=diagnose(card, config, epochs, test) if epochs else (),
        confusions=[
            [
                f"{card.class_names[a]} ({card.class_counts[a]:,})",
                f"{card.class_names[b]} ({card.class_counts[b]:,})",
                f"{entry['share']:.0f} % ({entry['images']})",
            ]
            for entry in judged.get("confusions", ())
            for a, b in [(entry["class"], entry["taken_for"])]
        ],
        mistakes=_mistakes(folder, card, judged.get("mistakes", {})),
    )


_KINDS = {
    "to_larger": "A rare class taken for a more frequent one",
    "to_smaller": "A frequent class taken for a rarer one",
    "alike": "Between classes of like frequency",
}


def _mistakes(
    folder: Path, card: Card, mistakes: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[tuple[str, list[tuple[str, Markup, str]]]]:
    """Return a run's surest mistakes by kind, those whose picture is there."""
    shown = []
    for kind, entries in mistakes.items():
        pictures = []
        for entry in entries:
            file = thumbnail(folder, entry["image"])
            if file is not None:
                truth, guess = card.class_names[entry["class"]], card.class_names[entry["taken_for"]]
                sure = f"{entry['confidence']:.0f}\N{NO-BREAK SPACE}%"
                caption = Markup("{}<br><span class=soft>taken for</span> {}, {}").format(truth, guess, sure)
                pictures.append((embedded(file), caption, f"{truth}, taken for {guess}, {sure}"))
        if pictures:
            shown.append((_KINDS[kind], pictures))
    return shown


def _segmented(folder: Path, card: Card, test: Mapping[str, Any]) -> _Shown:
    groups, judged = thirds(card.class_counts), test[card.predicts_under]
    order, names, counts, head_first = _head_first(card, groups)
    iou = judged["per_class"]
    return _Shown(
        counted="labelled training pixels",
        note="Intersections and unions are summed over the set. Head, middle and tail are thirds of the classes by "
        "their training pixels.",
        columns=[*DENSE_COLUMNS, ("top1", "pixel accuracy")],
        sizes={group: groups.count(group) for group in ("head", "middle", "tail")},
        figures=[
            ("The tail", plots.class_histogram(names, counts, head_first, "training pixels")),
            ("IoU by class", plots.per_class(names, [iou[index] for index in order], head_first, "IoU, %")),
        ],
        header=["class", "training pixels", "third", "IoU, %", "accuracy, %", "boundary IoU, %"],
        classes=[
            [
                card.class_names[i],
                f"{card.class_counts[i]:,}",
                groups[i],
                *(judged[name][i] for name in ("per_class", "per_class_accuracy", "per_class_boundary")),
            ]
            for i in order
        ],
        examples=overlays.worst(folder, judged["worst"]),
        colors=[(name, f"rgb{color}") for name, color in zip(card.class_names, palette(len(names)), strict=True)],
    )


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.0f} to {ends[1]:.0f}"


def _head_first(card: Card, groups: Sequence[str]) -> tuple[list[int], list[str], list[int], list[str]]:
    """Return the classes in order of frequency: their numbers, names, counts and groups."""
    order = sorted(range(len(card.class_names)), key=lambda index: -card.class_counts[index])
    return (
        order,
        [card.class_names[index] for index in order],
        [card.class_counts[index] for index in order],
        [groups[index] for index in order],
    )


def _curves(epochs: Sequence[Mapping[str, Any]]) -> list[tuple[str, Figure]]:
    if not epochs:  # a new head alone was trained
        return []
    numbers, last = [line["epoch"] for line in epochs], epochs[-1]
    terms = ("classifier", "contrast", "mixture", "temperature_likelihood", "distillation")
    losses = {name: [line[name] for line in epochs] for name in terms if name in last}
    figures = [("Loss terms", plots.curves(losses, numbers, "loss"))]
    if "temperature" in last:
        values = {"temperature": [line["temperature"] for line in epochs]}
        figures.append(("Temperature τ", plots.curves(values, numbers, "τ")))
    if last.get("information_bits") is not None:
        values = {"H(Y) − E[−log p(y|z)]": [line["information_bits"] for line in epochs]}
        figures.append(("Information between features and labels: a bound", plots.curves(values, numbers, "bits")))
    return figures


_MATCHED = {
    "passes": "The same seeds for every method. Equal compute: every method has the same number of student passes "
    "(images through the student, forward and backward).",
    "epochs": "The same seeds for every method. Equal epochs: a method with more views a step has more student passes.",
}


def comparison_report(records: Sequence[Record], out: Path, match: str) -> Path:
    """Write ``report.html`` and ``comparison.png`` of a comparison and return the page's path."""
    folders = [Path(run_name(record.method, record.seed, record.imbalance)) for record in records]
    runs = [read_finished(out / folder) for folder in folders]
    figure = plots.comparison(records)
    plots.save_png(figure, out / "comparison.png")
    links = [f"{folder}/report.html" for folder in folders]
    _comparison(records, runs, links, out / "report.html", f"Comparison · {out.name}", _MATCHED[match])
    return out / "report.html"


def runs_report(folders: Sequence[Path], page: Path) -> list[Record]:
    """Write a page that sets finished runs side by side, whatever made them, and return their records.

    A record's method is what sets the run apart, see :func:`longtail.engine.finished.labelled`.

    Args:
        folders: of the runs, two or more.
        page: the file to write.

    Raises:
        LongtailError: a run has not ended, or they are not over the same classes.
    """
    found = labelled(folders)
    records = [replace(record(run), method=label) for run, label in zip(found.runs, found.labels, strict=True)]
    links = [
        Path(os.path.relpath(run.folder / "report.html", page.parent)).as_posix()
        if (run.folder / "report.html").is_file()
        else ""
        for run in found.runs
    ]
    names = ", ".join(run.folder.name for run in found.runs)
    title = f"{len(found.runs)} runs" if len(names) > 60 else names
    _comparison(records, found.runs, links, page, title, "", found.settings)
    return records


def _comparison(
    records: Sequence[Record],
    runs: Sequence[Run],
    links: Sequence[str],
    page: Path,
    title: str,
    note: str,
    settings: Mapping[str, Sequence[str]] | None = None,
) -> None:
    header, rows = table(records)
    shown = columns(records)
    dense = shown == DENSE_COLUMNS
    classes = _class_by_class(records, runs) if imbalances_of(records) == [None] else None
    along = None
    if classes is not None:
        unit = "IoU, %" if dense else "accuracy, %"
        along = plots.along_the_tail(classes.means, classes.names, classes.window, unit)
    text = _render(
        "comparison.html.j2",
        title=title,
        header=header,
        rows=rows,
        differences=differences(records),
        seeds=len({record.seed for record in records}),
        note=note,
        columns=shown,
        dense=dense,
        settings=settings or {},
        classes=classes,
        figure=Markup(plots.svg(plots.comparison(records))),
        along=None if along is None else Markup(plots.svg(along)),
        runs=[
            (entry, link, [*(getattr(entry, name) for name, _ in shown), entry.seconds])
            for entry, link in zip(records, links, strict=True)
        ],
    )
    write_made(page, text)


@dataclass(frozen=True)
class _Classes:
    """Every class under every method, in order of frequency, head first."""

    names: Sequence[str]
    means: Mapping[str, Sequence[float | None]]
    """Mean over seeds, by method."""
    window: int
    """Neighbours that a line through them is smoothed over."""
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


def _class_by_class(records: Sequence[Record], runs: Sequence[Run]) -> _Classes | None:
    """Return accuracy or IoU of every class; None where the runs' training sets have other tails.

    Where every seed has another class in the head, places in the tail stand for the classes.
    """
    tails = [_head_first(run.card, [""] * len(run.card.class_names)) for run in runs]
    order, names, _, _ = tails[0]
    places = list(zip(*(tail[2] for tail in tails), strict=True))
    if any(max(counts) > 1 + 1.2 * min(counts) for counts in places):
        return None
    alike = all(tail[0] == order for tail in tails)
    if not alike:
        names = [str(place + 1) for place in range(len(order))]
    means: dict[str, list[float | None]] = {}
    for method in methods_of(records):
        found = [
            [run.metrics["per_class"][index] for index in tail[0]]
            for run, tail, entry in zip(runs, tails, records, strict=True)
            if entry.method == method
        ]
        means[method] = [
            None if any(value is None for value in values) else sum(values) / len(values)
            for values in zip(*found, strict=True)
        ]
    methods = list(means)
    rows = []
    for place, (name, counts) in enumerate(zip(names, places, strict=True)):
        values = [means[method][place] for method in methods]
        gained = [] if len(methods) != 2 else [None if None in values else values[1] - values[0]]  # type: ignore[operator]
        rows.append([name, f"{round(sum(counts) / len(counts)):,}", *values, *gained])
    counted = "training pixels" if runs[0].card.task == "segmentation" else "training images"
    gain = ["second − first"] if len(methods) == 2 else []
    header = ["class" if alike else "place in the tail", counted, *methods, *gain]
    return _Classes(names, means, 1 if len(names) <= 30 else len(names) // 10, header, rows)
