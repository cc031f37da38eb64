"""The report of a run and of a comparison, each one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from longtail import plots
from longtail.config import Config, read_config
from longtail.data.class_order import head_first
from longtail.experiments.labels import label_runs
from longtail.experiments.records import (
    Record,
    columns,
    differences,
    imbalances_of,
    methods_of,
    recommendation,
    run_name,
    run_record,
    table,
)
from longtail.files import write_json_output, write_text
from longtail.inference.model_config import read_model_config
from longtail.registry import METHODS, TASKS
from longtail.report import plots as comparison_plots
from longtail.training.metric_log import read_metrics
from longtail.training.run_io import Run, count_unreadable, no_test_metrics, read_finished

_FOR_ANY_DATA = frozenset({"folder", "masks", "boxes"})
"""Recipes for a user's own images."""


def _render(name: str, **values: Any) -> str:
    pages = Environment(loader=PackageLoader("longtail.report", "."), autoescape=True, trim_blocks=True)
    return pages.get_template(name).render(**values)


def run_report(folder: Path) -> Path:
    """Write ``report.html`` of a finished run and return its path."""
    model_config = read_model_config(folder)
    config = read_config(folder / "config.yaml")
    lines = read_metrics(folder / "metrics.jsonl")
    test = next((line for line in reversed(lines) if line["kind"] == "test"), None)
    if test is None:
        raise no_test_metrics(folder)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    first = next((line for line in reversed(lines) if line["kind"] == "first_stage"), None)
    shown = TASKS[model_config.task].report(folder, model_config, config, test, epochs)
    page = _render(
        "run.html.j2",
        title=f"{_data_name(config)} · {config.method} · seed {config.seed}",
        model=model_config,
        figures=[
            (title, Markup(plots.svg(figure, title))) for title, figure in [*shown.figures, *_curves(config, epochs)]
        ],
        shown=shown,
        test=test,
        first_stage=None if first is None else first[METHODS[config.method].predicts_under(config)],
        second_stage=config.second_stage,
        unreadable=count_unreadable(folder),
        settings=config.to_yaml(),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _data_name(config: Config) -> str:
    """Return the recipe of a run or, where it is one for any images, the name of what it was trained on."""
    own = config.data.root or config.data.train or config.data.name
    return Path(own).resolve().name if own is not None and config.recipe in _FOR_ANY_DATA else config.recipe


def _curves(config: Config, epochs: Sequence[Mapping[str, Any]]) -> list[tuple[str, Figure]]:
    """Return plots of the loss terms, of the method's metrics and of the mutual information over the epochs."""
    if not epochs:  # only a new classifier was trained
        return []
    numbers, last = [line["epoch"] for line in epochs], epochs[-1]
    terms = [name for name in last if name.startswith("loss/")]
    losses = {name.removeprefix("loss/"): [line[name] for line in epochs] for name in terms}
    figures = [("Loss terms", plots.curves(losses, numbers, "loss"))]
    for name, label in METHODS[config.method].plotted_metrics.items():
        if name in last:
            values = {name.replace("_", " "): [line[name] for line in epochs]}
            figures.append((name.replace("_", " ").capitalize(), plots.curves(values, numbers, label)))
    if last.get("information_bits") is not None:
        values = {"H(Y) − E[−log p(y|z)]": [line["information_bits"] for line in epochs]}
        title = "Mutual information between features and labels: a lower bound"
        figures.append((title, plots.curves(values, numbers, "bits")))
    return figures


_BUDGETS = {
    "passes": "The same seeds for every method. Equal compute: every method has the same number of student passes "
    "(images through the student, forward and backward; one of a network with experts counts as its operations).",
    "epochs": "The same seeds for every method. Equal epochs: a method with more views a step has more student passes.",
}


def comparison_report(records: Sequence[Record], out: Path, budget: str) -> Path:
    """Write ``report.html`` and ``comparison.png`` of a comparison and return the page's path."""
    folders = [Path(run_name(record.method, record.seed, record.imbalance)) for record in records]
    runs = [read_finished(out / folder) for folder in folders]
    figure = comparison_plots.comparison(records)
    plots.save_png(figure, out / "comparison.png")
    links = [quote(f"{folder}/report.html") for folder in folders]
    _comparison(records, runs, links, out / "report.html", f"Comparison · {out.name}", _BUDGETS[budget], "--seeds 3")
    return out / "report.html"


def runs_report(folders: Sequence[Path], page: Path) -> list[Record]:
    """Write a page that sets finished runs side by side, whatever made them, and return their records.

    A record's method is what sets the run apart, see :func:`longtail.experiments.labels.label_runs`.

    Args:
        folders: of the runs, two or more.
        page: the file to write.

    Raises:
        LongtailError: a run has not ended, or they are not over the same classes.
    """
    labelled = label_runs(folders)
    records = [
        replace(run_record(run), method=label) for run, label in zip(labelled.runs, labelled.labels, strict=True)
    ]
    links = [
        quote(Path(os.path.relpath(run.folder / "report.html", page.parent)).as_posix(), errors="surrogateescape")
        if (run.folder / "report.html").is_file()
        else ""
        for run in labelled.runs
    ]
    names = ", ".join(run.folder.name for run in labelled.runs)
    title = f"{len(labelled.runs)} runs" if len(names) > 60 else names
    _comparison(records, labelled.runs, links, page, title, "", "train further seeds", labelled.settings)
    return records


def _comparison(
    records: Sequence[Record],
    runs: Sequence[Run],
    links: Sequence[str],
    page: Path,
    title: str,
    note: str,
    more_seeds: str,
    settings: Mapping[str, Sequence[str]] | None = None,
) -> None:
    header, rows = table(records)
    shown = columns(records)
    task = TASKS[records[0].task]
    classes = _class_by_class(records, runs) if imbalances_of(records) == [None] else None
    along, along_heading = None, f"{task.unit[0].upper()}{task.unit[1:]} along the tail"
    if classes is not None:
        along = comparison_plots.along_the_tail(classes.means, classes.names, classes.window, f"{task.unit}, %")
    text = _render(
        "comparison.html.j2",
        title=title,
        header=header,
        rows=rows,
        differences=differences(records),
        advice=recommendation(records, more_seeds),
        seeds=len({record.seed for record in records}),
        training_prior=list(dict.fromkeys(entry.method for entry in records if entry.predicts_under == "train")),
        note=note,
        columns=shown,
        unit=task.unit,
        main_metric=shown[0][1] if len(task.compared_metrics) == 1 else "",
        settings=settings or {},
        classes=classes,
        figure=Markup(plots.svg(comparison_plots.comparison(records), "Every run")),
        along=None if along is None else Markup(plots.svg(along, along_heading)),
        along_heading=along_heading,
        runs=[
            (entry, link, [*(entry.metrics[name] for name, _ in shown), entry.seconds])
            for entry, link in zip(records, links, strict=True)
        ],
    )
    write_json_output(page, text)


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
    orders = [head_first(run.model_config.class_counts) for run in runs]
    order, names = orders[0], [runs[0].model_config.class_names[index] for index in orders[0]]
    tails = [
        [run.model_config.class_counts[index] for index in order_of] for run, order_of in zip(runs, orders, strict=True)
    ]
    places = list(zip(*tails, strict=True))
    if any(max(counts) > 1 + 1.2 * min(counts) for counts in places):
        return None
    alike = all(other == order for other in orders)
    if not alike:
        names = [str(place + 1) for place in range(len(order))]
    means: dict[str, list[float | None]] = {}
    for method in methods_of(records):
        by_place = [
            [run.metrics["per_class"][index] for index in order_of]
            for run, order_of, entry in zip(runs, orders, records, strict=True)
            if entry.method == method
        ]
        means[method] = [
            None if any(value is None for value in values) else sum(values) / len(values)
            for values in zip(*by_place, strict=True)
        ]
    methods = list(means)
    rows = []
    for place, (name, counts) in enumerate(zip(names, places, strict=True)):
        values = [means[method][place] for method in methods]
        gains = [] if len(methods) != 2 else [None if None in values else values[1] - values[0]]  # type: ignore[operator]
        rows.append([name, f"{round(sum(counts) / len(counts)):,}", *values, *gains])
    counted = f"training {TASKS[runs[0].model_config.task].model_class.card_text.counted}"
    gain = ["second − first"] if len(methods) == 2 else []
    header = ["class" if alike else "place in the tail", counted, *methods, *gain]
    return _Classes(names, means, 1 if len(names) <= 30 else len(names) // 10, header, rows)
