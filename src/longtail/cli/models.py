"""Commands on finished runs: evaluate, export, serve, report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtail.cli.checks import check_output, check_run
from longtail.cli.console import print_metrics, print_table, show_messages
from longtail.cli.options import Evaluate, Export, Report, Serve
from longtail.cli.parsing import parse
from longtail.cli.tables import table_text, write_table
from longtail.data.paths import printable
from longtail.errors import LongtailError
from longtail.files import write_json_output

if TYPE_CHECKING:
    from longtail.tasks.base import Task


def evaluate(arguments: list[str]) -> None:
    """Print the metrics of a run on its test set."""
    options = parse(Evaluate, "evaluate", arguments)
    inference = options.inference_options
    results = options.run if options.run.suffix.lower() == ".json" else None
    inputs = (results, options.annotations, options.train_annotations, options.prior, options.test_prior)
    check_output(options.json, inputs=inputs)
    check_output(options.csv, "--csv", ".csv", inputs=inputs)
    if options.annotations is not None or options.run.suffix.lower() == ".json":
        _evaluate_results(options)
        return
    if options.train_annotations is not None:
        raise LongtailError("--train_annotations: is for a file of results, with --annotations")
    check_run(options.run)
    if options.imbalance != Evaluate.imbalance and options.test_prior not in {"forward", "backward"}:
        raise LongtailError(f"--imbalance {options.imbalance:g}: is for --test_prior forward or backward")
    show_messages(options.quiet)
    from longtail.experiments.evaluate import evaluate as evaluate_run
    from longtail.inference.model_config import read_model_config
    from longtail.registry import TASKS
    from longtail.tasks.base import check_inference_options

    task = TASKS[read_model_config(options.run).task]
    check_inference_options(inference, task.label_kind, "evaluate")
    if options.csv is not None and task.label_kind != "image":
        raise LongtailError(
            f"--csv {options.csv}: is for models that classify whole images, which {options.run} does not; use --json "
            "FILE for the metrics of each class"
        )
    metrics = evaluate_run(
        options.run,
        options.prior,
        None if options.root is None else str(options.root),
        inference,
        options.test_prior,
        options.imbalance,
        options.coverage,
        predictions=options.csv is not None,
    )
    if options.csv is not None:
        rows = metrics.pop("predictions")
        write_table(options.csv, table_text(list(rows[0]), [list(row.values()) for row in rows]))
    _show_metrics(options, task, metrics)


def _show_metrics(options: Evaluate, task: Task[Any], metrics: dict[str, Any]) -> None:
    if options.json:
        write_json_output(options.json, metrics)
    if not options.quiet:
        print_metrics(task.name, metrics)
        for line in task.summary_lines(metrics):
            print(printable(line))


def _evaluate_results(options: Evaluate) -> None:
    """Print the metrics of a file of results."""
    if options.annotations is None:
        raise LongtailError(f"{options.run}: is a file of results; name the annotations of its images by --annotations")
    for name in (
        "csv",
        "prior",
        "test_prior",
        "imbalance",
        "coverage",
        "root",
        "sliding_window",
        "tta",
        "tta_flip",
        "tta_scales",
    ):
        if getattr(options, name) != Evaluate.__dataclass_fields__[name].default:
            raise LongtailError(f"--{name}: needs a run, not a file of results; leave it out")
    show_messages(options.quiet)
    from longtail.registry import TASKS

    task = next(TASKS[name] for name in TASKS if TASKS[name].finds_objects)
    metrics = task.evaluate_results(options.run, options.annotations, options.train_annotations)
    _show_metrics(options, task, metrics)


def export(arguments: list[str]) -> None:
    """Write a model as an ONNX file."""
    options = parse(Export, "export", arguments)
    check_output(options.json, inputs=(options.prior,))
    check_run(options.run)
    out = options.out or options.run / "model.onnx"
    check_output(out, "--out", ".onnx")
    if out.exists() and not options.overwrite:
        raise LongtailError(f"{out}: exists already; use --overwrite or another --out")
    from longtail.data.image_io import find_images
    from longtail.registry import TASKS
    from longtail.tasks.loading import load_model

    model = load_model(options.run)
    files = find_images(options.images)
    exported = TASKS[model.config.task].export(model, out, options.prior, files, options.tta)
    height, width, channels = exported.shape
    if options.json:
        write_json_output(options.json, {**dataclasses.asdict(exported), "path": str(exported.path)})
    if not options.quiet:
        augmented = "" if options.tta == "none" else f", test-time augmentation {options.tta}"
        shape = f"({exported.batch}, {height}, {width}, {channels})"
        print(f"{exported.path}: takes {shape} uint8, prior {options.prior}{augmented}")
        kind = "images" if options.images else "random images"
        print(
            f"largest difference of a {exported.compared} from PyTorch's on {exported.images} {kind}: "
            f"{exported.difference:.1e}"
        )
        if exported.note:
            print(exported.note)


def serve(arguments: list[str]) -> None:
    """Serve a web page that classifies images, or finds the objects in them."""
    options = parse(Serve, "serve", arguments)
    check_run(options.run)
    if not 0 <= options.port <= 65_535:
        raise LongtailError(f"--port {options.port}: expected 0 to 65535")
    from longtail.serve import serve as serve_run

    root = None if options.root is None else str(options.root)
    serve_run(options.run, options.host, options.port, root, options.quiet, options.tta, options.allowed_hosts)


def report(arguments: list[str]) -> None:
    """Write the report of a run, or one that compares several runs."""
    options = parse(Report, "report", arguments)
    if not options.runs:
        raise LongtailError("report: expected the folder of a run, or of several")
    for run in options.runs:
        check_run(run)
    if len(options.runs) == 1 and options.out is not None:
        raise LongtailError(
            f"--out {options.out}: is for several runs; the page of one is {options.runs[0]}/report.html"
        )
    page = options.out or Path("comparison.html")
    if len(options.runs) > 1:
        check_output(page, "--out", ".html")
        if len({run.resolve() for run in options.runs}) < len(options.runs):
            raise LongtailError("report: a run is given twice; expected the folders of different runs")
    check_output(options.json)

    from longtail.experiments.compare import as_json
    from longtail.experiments.priors import training_prior_lines
    from longtail.experiments.records import differences, run_record, table
    from longtail.report import run_report, runs_report
    from longtail.training.run_io import read_finished

    if len(options.runs) == 1:
        records, page = [run_record(read_finished(options.runs[0]))], run_report(options.runs[0])
    else:
        records = runs_report(options.runs, page)
    if options.json:
        write_json_output(options.json, as_json(records))
    if not options.quiet:
        print_table(*table(records))
        for line in (*training_prior_lines(records, options.runs), *differences(records)):
            print(line)
        print(f"report: {page}")
