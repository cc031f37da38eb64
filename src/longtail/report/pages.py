"""The report of a run and of a comparison, each one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from longtail.config import read_config
from longtail.engine.books import read_metrics
from longtail.errors import LongtailError
from longtail.evaluation.comparison import Record, differences, run_name, table
from longtail.files import write_text
from longtail.recognizer import Recognizer
from longtail.report import plots


def _render(name: str, **values: Any) -> str:
    pages = Environment(loader=PackageLoader("longtail.report", "."), autoescape=True, trim_blocks=True)
    return pages.get_template(name).render(**values)


def run_report(folder: Path) -> Path:
    """Write ``report.html`` of a finished run and return its path."""
    card = Recognizer.load(folder).card
    config = read_config(folder / "config.yaml")
    lines = read_metrics(folder / "metrics.jsonl")
    test = next((line for line in reversed(lines) if line["kind"] == "test"), None)
    if test is None:
        raise LongtailError(f"{folder / 'metrics.jsonl'}: has no test metrics; --resume the run")
    order = sorted(range(len(card.class_names)), key=lambda index: -card.class_counts[index])
    groups = config.shots.groups(card.class_counts)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    names = [
        name
        for name in ("classifier", "contrast", "mixture", "temperature_likelihood", "distillation")
        if name in epochs[-1]
    ]
    numbers = [line["epoch"] for line in epochs]
    names_in_order = [card.class_names[index] for index in order]
    head_first = [groups[index] for index in order]
    accuracy = test[card.predicts_under]["per_class"]
    figures = [
        ("The tail", plots.class_histogram(names_in_order, [card.class_counts[index] for index in order], head_first)),
        (
            "Accuracy by class",
            plots.per_class_accuracy(names_in_order, [accuracy[index] for index in order], head_first),
        ),
        ("Loss terms", plots.curves({name: [line[name] for line in epochs] for name in names}, numbers, "loss")),
    ]
    if "temperature" in epochs[-1]:
        values = {"temperature": [line["temperature"] for line in epochs]}
        figures.append(("Temperature τ", plots.curves(values, numbers, "τ")))
    if epochs[-1].get("information_bits") is not None:
        values = {"H(Y) − E[−log p(y|z)]": [line["information_bits"] for line in epochs]}
        figures.append(("Information between features and labels: a bound", plots.curves(values, numbers, "bits")))
    classes = [(card.class_names[index], card.class_counts[index], groups[index], accuracy[index]) for index in order]
    page = _render(
        "run.html.j2",
        title=f"{config.recipe} · {config.method} · seed {config.seed}",
        card=card,
        config=config,
        test=test,
        group_sizes={group: groups.count(group) for group in plots.GROUP_COLORS},
        figures=[(title, Markup(plots.svg(figure))) for title, figure in figures],
        classes=classes,
        settings=config.to_yaml(),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def comparison_report(records: Sequence[Record], out: Path, match: str) -> Path:
    """Write ``report.html`` and ``comparison.png`` of a comparison and return the page's path."""
    figure = plots.comparison(records)
    plots.save_png(figure, out / "comparison.png")
    header, rows = table(records)
    runs = [(record, f"{run_name(record.method, record.seed, record.imbalance)}/report.html") for record in records]
    page = _render(
        "comparison.html.j2",
        title=f"Comparison · {out.name}",
        header=header,
        rows=rows,
        differences=differences(records),
        seeds=len({record.seed for record in records}),
        match=match,
        figure=Markup(plots.svg(figure)),
        runs=runs,
    )
    write_text(out / "report.html", page)
    return out / "report.html"
