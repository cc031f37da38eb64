"""The command predict: image files to a table, on the console and in files."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtail.cli.checks import check_folder, check_output, check_run
from longtail.cli.console import print_table
from longtail.cli.options import Predict
from longtail.cli.parsing import parse
from longtail.cli.tables import table_text, write_table
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

LONGEST_CELL = 32_767
"""Characters in a cell that spreadsheets take; Excel cuts off what is longer, or spreads it over further rows."""


def predict(arguments: list[str]) -> None:
    """Predict image files; exit with code 1 where some of them cannot be read."""
    options = parse(Predict, "predict", arguments)
    inference = options.inference_options
    check_output(options.json, inputs=(options.prior,))
    check_output(options.csv, "--csv", ".csv", inputs=(options.prior,))
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
    if options.csv:
        write_table(options.csv, csv_text(output.records, unreadable))
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


def csv_text(records: Sequence[Mapping[str, Any]], unreadable: Sequence[tuple[Path, str]]) -> str:
    """Return predictions as the text of a table, see :func:`longtail.cli.tables.table_text`.

    There is a row for each image: path, class, probability, the next classes (class_2, probability_2 …), set_size and
    set where there are conformal sets, and error, which is empty for an image that was read. A set whose names are
    longer than :data:`LONGEST_CELL` is empty beside its size. Of objects there is a row for each: path, class, score,
    x1, y1, x2, y2 in pixels, error; one with the path alone where nothing was found.

    Args:
        records: one entry per image, as ``--json`` holds them.
        unreadable: path and reason of the images that could not be read.
    """
    if records and "objects" in records[0]:
        header = ["path", "class", "score", "x1", "y1", "x2", "y2"]
        cells = [
            [record["path"], *([each["class"], each["score"], *each["box"]] if each else [""] * 6)]
            for record in records
            for each in record["objects"] or [None]
        ]
    else:
        most, sets = max((len(record["top"]) for record in records), default=1), any("set" in each for each in records)
        header = ["path", "class", "probability"]
        header += [f"{name}_{rank}" for rank in range(2, most + 1) for name in ("class", "probability")]
        header += ["set_size", "set"] if sets else []
        cells = [
            [record["path"]]
            + [value for each in record["top"] for value in (each["class"], each["probability"])]
            + ([len(record["set"]), _set_cell(record["set"])] if sets else [])
            for record in records
        ]
    unread = [[str(path), *[""] * (len(header) - 1), reason] for path, reason in unreadable]
    return table_text([*header, "error"], [*([*row, ""] for row in cells), *unread])


def _set_cell(names: Sequence[str]) -> str:
    cell = ", ".join(names)
    return cell if len(cell) <= LONGEST_CELL else ""


def _refuse_csv(options: Predict) -> None:
    if options.csv is not None:
        raise LongtailError(
            f"--csv {options.csv}: is for models that give classes or objects, and {options.run} labels pixels; use "
            "--json FILE for the area of each class, and --out FOLDER for the label images"
        )


def _predict_run(options: Predict, inference: InferenceOptions) -> PredictionOutput:
    from longtail.devices import select_device
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
    if task.label_kind == "pixels":
        _refuse_csv(options)
    out = options.out or (SEGMENTED if task.label_kind == "pixels" else None)
    return task.predict_files(model.to(select_device()), _find_images(options, out), request)


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
    if model.label_maps:
        _refuse_csv(options)
    out = (options.out or SEGMENTED) if model.label_maps else None
    files = _find_images(options, out)
    if model.finds_objects:
        return _find_with_onnx(model, files, options)
    if out is not None:
        return _segment_with_onnx(model, files, out, options)
    unreadable: dict[Path, str] = {}
    top = []
    for probabilities in model.predict_batches(files, unreadable=unreadable):  # N × C of all images may be gigabytes
        if options.prior is not None:
            probabilities = model.change_prior(probabilities, options.prior)
        order = (-probabilities).argsort(axis=1, kind="stable")[:, : options.top or 3]
        top += [
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
