"""Commands on finished runs: evaluate, predict, export, serve, report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtail.cli.checks import check_folder, check_output, check_run
from longtail.cli.console import print_metrics, print_table, show_messages
from longtail.cli.options import Evaluate, Export, Predict, Report, Serve
from longtail.cli.parsing import parse
from longtail.data.paths import printable
from longtail.errors import LongtailError
from longtail.files import write_json_output
from longtail.inference.options import InferenceOptions
from longtail.inference.output import (
    OBJECT_THRESHOLD,
    OBJECTS_HEADER,
    SEGMENTED,
    PredictionOutput,
    object_records,
    object_rows,
    prediction_table,
    readable_files,
)

if TYPE_CHECKING:
    from longtail.inference.onnx_model import ONNXModel
    from longtail.tasks.base import Task


def evaluate(arguments: list[str]) -> None:
    """Print the metrics of a run on its test set."""
    options = parse(Evaluate, "evaluate", arguments)
    inference = options.inference_options
    results = options.run if options.run.suffix.lower() == ".json" else None
    inputs = (results, options.annotations, options.train_annotations, options.prior, options.test_prior)
    check_output(options.json, inputs=inputs)
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
    metrics = evaluate_run(
        options.run,
        options.prior,
        None if options.root is None else str(options.root),
        inference,
        options.test_prior,
        options.imbalance,
        options.coverage,
    )
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


def predict(arguments: list[str]) -> None:
    """Predict image files; exit with code 1 where some of them cannot be read."""
    options = parse(Predict, "predict", arguments)
    inference = options.inference_options
    check_output(options.json, inputs=(options.prior,))
    is_onnx = options.run.suffix.lower() == ".onnx"
    if not is_onnx:
        check_run(options.run)
    if not options.images:
        raise LongtailError("IMAGES: expected at least one image file or folder")
    if options.top is not None and options.top < 1:
        raise LongtailError(f"--top {options.top}: expected at least 1")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise LongtailError(f"--threshold {options.threshold:g}: expected a score from 0 to 1")
    if options.out is not None:
        check_folder(options.out)
    output = _predict_onnx(options, inference) if is_onnx else _predict_run(options, inference)
    unreadable = sorted(output.unreadable.items())
    if options.json:
        unread = [{"path": str(path), "error": reason} for path, reason in unreadable]
        write_json_output(options.json, [*output.records, *unread])
    if not options.quiet:
        print_table(output.header, output.rows)
        for note in output.notes:
            print(printable(note))
    if unreadable:
        for _, reason in unreadable:
            print(f"longtail: error: {printable(reason)}", file=sys.stderr)
        every = f"{len(unreadable) + len(output.records)} images"
        print(f"longtail: {len(unreadable)} of {every} cannot be read and are not in the table", file=sys.stderr)
        sys.exit(1)


def _predict_run(options: Predict, inference: InferenceOptions) -> PredictionOutput:
    from longtail.registry import TASKS
    from longtail.tasks.base import PredictionRequest, check_inference_options
    from longtail.tasks.loading import load_model

    model = load_model(options.run)
    request = PredictionRequest(
        prior=options.prior or "uniform",
        options=inference,
        coverage=options.coverage,
        top=options.top,
        threshold=options.threshold,
        out=options.out,
        progress=not options.quiet and sys.stderr.isatty(),
    )
    task = TASKS[model.config.task]
    check_inference_options(inference, task.label_kind, "predict")
    out = options.out or (SEGMENTED if task.label_kind == "pixels" else None)
    return task.predict_files(model, _find_images(options, out), request)


def _predict_onnx(options: Predict, inference: InferenceOptions) -> PredictionOutput:
    """Predict with an exported file, without torch."""
    from longtail.inference.onnx_model import ONNXModel

    model = ONNXModel(options.run)
    unsupported = {
        "--out": options.out is not None and not model.label_maps,
        "--coverage": options.coverage is not None,
        "--prior estimate": options.prior == "estimate",
        "--threshold": options.threshold is not None and not model.finds_objects,
        "--sliding_window": inference.sliding_window is not None,
        "--tta_scales": inference.tta_scales != (1.0,),
    }
    for flag, used in unsupported.items():
        if used:
            raise LongtailError(f"{options.run}: {flag} needs the run, not its ONNX file")
    if inference.fixed_tta not in {"none", model.tta}:
        raise LongtailError(
            f"{options.run}: --tta {inference.tta} needs a file with it inside, this one has {model.tta}; use longtail "
            f"export RUN --tta {inference.tta}"
        )
    out = (options.out or SEGMENTED) if model.label_maps else None
    files = _find_images(options, out)
    if model.finds_objects:
        return _find_with_onnx(model, files, options)
    if out is not None:
        return _segment_with_onnx(model, files, out, options)
    unreadable: dict[Path, str] = {}
    probabilities = model.predict(files, unreadable=unreadable)
    if options.prior is not None:
        probabilities = model.change_prior(probabilities, options.prior)
    order = (-probabilities).argsort(axis=1, kind="stable")[:, : options.top or 3]
    top = [
        [(model.class_names[c], float(row[c])) for c in classes]
        for row, classes in zip(probabilities, order, strict=True)
    ]
    return _with_prior(model, options, prediction_table(readable_files(files, unreadable), top, unreadable=unreadable))


def _segment_with_onnx(model: ONNXModel, files: Sequence[Path], out: Path, options: Predict) -> PredictionOutput:
    from longtail.inference.label_images import predict_label_images

    if options.prior is not None:
        model.has_prior(options.prior)  # refused before the first image
    progress = not options.quiet and sys.stderr.isatty()
    output = predict_label_images(
        files, lambda image: model.segment(image, options.prior), model.class_names, out, options.top, progress
    )
    return _with_prior(model, options, output)


def _with_prior(model: ONNXModel, options: Predict, output: PredictionOutput) -> PredictionOutput:
    """Return predictions with a note on the frequencies in the file, where these are not the usual ones."""
    if options.prior is not None or model.prior == "uniform":
        return output
    note = f"probabilities under {_prior_inside(model)}, as the file was exported"
    return dataclasses.replace(output, notes=[*output.notes, note])


def _prior_inside(model: ONNXModel) -> str:
    return "the frequencies of training" if model.prior == "train" else "given frequencies"


def _find_images(options: Predict, out: Path | None = None) -> list[Path]:
    """Return the images that are named, and say which files of folders are none or were written by predictions.

    Args:
        options: of the command.
        out: folder of the output.

    Raises:
        LongtailError: a path does not exist, or a folder has no images, or there are none but written ones.
    """
    from longtail.data.image_io import find_images
    from longtail.data.paths import find_path
    from longtail.inference.pictures import written_pictures

    no_images: list[Path] = []
    found = find_images(options.images, no_images)
    named = {find_path(path) for path in options.images}  # files that are named themselves are predicted in any case
    written = written_pictures([file for file in found if file not in named], out)
    files = [file for file in found if file not in written]
    if not files:
        raise LongtailError(
            f"{options.images[0]}: holds no images but those that longtail predict wrote{_examples(sorted(written))}; "
            "name other images, or these themselves"
        )
    lines = []
    if no_images:
        count = (
            "1 file is no image by its name, and is"
            if len(no_images) == 1
            else (f"{len(no_images):,} files are no images by their names, and are")
        )
        lines.append(f"{count} left out{_examples(no_images)}; convert HEIC and raw photographs to JPEG")
    if written:
        count = "1 picture is" if len(written) == 1 else f"{len(written):,} pictures are"
        lines.append(f"{count} of earlier predictions, and left out{_examples(sorted(written))}")
    for line in [] if options.quiet else lines:
        print(f"longtail: {line}", file=sys.stderr)
    return files


def _examples(paths: Sequence[Path]) -> str:
    return " (" + ", ".join(printable(path.name) for path in paths[:3]) + ("…)" if len(paths) > 3 else ")")


def _find_with_onnx(model: ONNXModel, files: Sequence[Path], options: Predict) -> PredictionOutput:
    """Return the objects that an exported file finds; the class frequencies are those inside it."""
    threshold = OBJECT_THRESHOLD if options.threshold is None else options.threshold
    if threshold < model.score_threshold:
        raise LongtailError(
            f"--threshold {threshold:g}: {options.run} gives scores from {model.score_threshold:g} up; "
            "predict with its run"
        )
    if options.prior is not None and not model.has_prior(options.prior):
        inside = model.prior if isinstance(model.prior, str) else "other frequencies"
        raise LongtailError(
            f"--prior {options.prior}: {options.run} has {inside} inside, which cannot be changed after "
            f"suppression; use longtail export RUN --prior {options.prior}"
        )
    unreadable: dict[Path, str] = {}
    objects = []
    for found in model.find(files, unreadable):
        count = min(int((found.scores >= threshold).sum()), options.top or len(found.scores))
        boxes, labels, scores = (array[:count].tolist() for array in found)
        objects.append(object_records(boxes, labels, scores, model.class_names))
    readable = readable_files(files, unreadable)
    records = [{"path": str(file), "objects": each} for file, each in zip(readable, objects, strict=True)]
    rows = [row for file, each in zip(readable, objects, strict=True) for row in object_rows(file, each)]
    notes = [f"objects with a score of at least {threshold:g}"]
    if model.prior != "uniform":
        notes.append(f"scores under {_prior_inside(model)}")
    return PredictionOutput(records, OBJECTS_HEADER, rows, notes, unreadable)


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
    """Serve a web page that classifies images."""
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
        for difference in differences(records):
            print(difference)
        print(f"report: {page}")
