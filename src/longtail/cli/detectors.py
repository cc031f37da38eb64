"""The command that corrects a trained detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtail.cli.checks import check_folder, check_output
from longtail.cli.console import Counter, print_table, show_messages
from longtail.cli.options import CalibrateDetector
from longtail.cli.parsing import parse
from longtail.errors import LongtailError
from longtail.files import write_json_output

if TYPE_CHECKING:
    from longtail.data.detection import Annotations
    from longtail.detector_calibration.calibrate import PowerSearch

_COLUMNS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "rare": "AP rare",
    "common": "AP common",
    "frequent": "AP frequent",
}
_OF_DETECTORS = (
    *("method", "export", "images", "weights", "classes", "class_order", "normalization", "score_threshold"),
    "statistics_images",
)
"""Flags that the correction of a result file does not use."""
_OF_NORCAL = ("power", "counts", "normalization")
_OF_LOGN = ("statistics_images",)


def calibrate_detector(arguments: list[str]) -> None:
    """Correct a trained detector for the long tail of its training set."""
    options = parse(CalibrateDetector, "calibrate-detector", arguments)
    is_results = options.model.endswith(".json")
    power = _check(options, is_results)
    show_messages(options.quiet)
    from longtail.data.detection import AnnotationProblems, read_split
    from longtail.detector_calibration.storage import check_out

    check_out(options.out, options.overwrite)
    problems = AnnotationProblems()
    train = read_split(options.annotations, "train", problems)
    # of one folder with both splits, remarks are made once
    further = AnnotationProblems() if options.validation == options.annotations else problems
    validation = None if options.validation is None else read_split(options.validation, "val", further)
    for remark in problems.remarks():
        _say(options, remark)
    correct = _correct_results if is_results else _correct_model
    record = correct(options, train, validation, power)
    if options.json:
        write_json_output(options.json, record)


def _check(options: CalibrateDetector, is_results: bool) -> float | None:
    """Check what can be checked before anything is read; return the power, None for auto and LogN."""
    check_folder(options.out)
    check_output(options.json, inputs=(options.model, options.annotations, options.validation, options.weights))
    check_output(options.export, "--export", ".onnx")
    if options.score_threshold is not None and not 0 <= options.score_threshold < 1:
        raise LongtailError(
            f"--score_threshold {options.score_threshold:g}: expected a score of at least 0 and below 1"
        )
    if options.statistics_images < 1:
        raise LongtailError(f"--statistics_images {options.statistics_images}: expected at least 1")
    if options.export is not None and options.export.exists() and not options.overwrite:
        raise LongtailError(f"{options.export}: exists already; use --overwrite or another --export")
    if is_results and (flag := _first_given(options, _OF_DETECTORS)):
        raise LongtailError(f"{options.model}: {flag} is for a detector, not for a result file; leave it out")
    other, of_other = ("logn", _OF_LOGN) if options.method == "norcal" else ("norcal", _OF_NORCAL)
    if flag := _first_given(options, of_other):
        raise LongtailError(f"{flag}: is for --method {other}; leave it out")
    if options.images is not None and not options.images.is_dir():
        raise LongtailError(f"--images {options.images}: there is no such folder")
    if options.method == "logn" and _image_folder(options, options.annotations) is None:
        raise LongtailError("--method logn: needs --images, the folder of the training images")
    if options.validation is not None and _image_folder(options, options.validation) is None and not is_results:
        raise LongtailError("--validation: needs --images, the folder of the validation images")
    validation = options.validation  # a folder of annotations has both splits, a file one
    if validation is not None and validation.is_file() and validation.resolve() == options.annotations.resolve():
        raise LongtailError(f"--validation {validation}: is --annotations; expected annotations of other images")
    if options.method == "logn":
        return None
    if options.power == "auto":
        if options.validation is None:
            raise LongtailError("--power auto: needs --validation and --images; or give a power, such as --power 0.5")
        return None
    try:
        power = float(options.power)
    except ValueError:
        power = -1.0
    if not 0 <= power < float("inf"):
        raise LongtailError(f"--power {options.power}: expected auto or a number of at least 0")
    return power


def _first_given(options: CalibrateDetector, names: Sequence[str]) -> str | None:
    """Return the first of some flags that differs from its default."""
    return next((f"--{name}" for name in names if getattr(options, name) != getattr(CalibrateDetector, name)), None)


def _image_folder(options: CalibrateDetector, annotations: Path | None) -> Path | None:
    """Return the folder of the images of annotations: the annotations' own if they are a folder."""
    return annotations if annotations is not None and annotations.is_dir() else options.images


def _correct_model(
    options: CalibrateDetector, train: Annotations, validation: Annotations | None, power: float | None
) -> dict[str, Any]:
    from longtail.detector_calibration.calibrate import map_classes
    from longtail.detector_calibration.heads import check_uncorrected, corrected_copy, layer_names, removes_prior
    from longtail.detector_calibration.running import DetectorRunner, on_device
    from longtail.detector_calibration.storage import check_original, load_detector
    from longtail.detector_calibration.workflow import (
        AnnotatedFolder,
        CorrectionSettings,
        compare,
        find_correction,
        write_detector,
    )
    from longtail.devices import select_device

    check_original(Path(options.model) if options.weights is None else options.weights.parent)
    stored, device = load_detector(options.model, options.weights, options.classes), select_device()
    check_uncorrected(stored.model)
    settings = CorrectionSettings(
        method=options.method,
        power=power,
        count_of=options.counts,
        normalization=options.normalization,
        class_order=options.class_order,
        statistics_images=options.statistics_images,
    )
    trained_on = AnnotatedFolder(train, _image_folder(options, options.annotations))
    tested_on = None
    if validation is not None:
        tested_on = AnnotatedFolder(validation, _image_folder(options, options.validation))

    def runner_of(model: Any) -> DetectorRunner:
        return DetectorRunner(on_device(model, device), stored.processor, options.score_threshold)

    runner = runner_of(stored.model)
    class_map = map_classes(runner.head, train, options.class_order)
    _say(options, f"classes: {class_map.describe()}")
    record: dict[str, Any] = {
        "model": options.model,
        "method": options.method,
        "layers": layer_names(runner.model, runner.head),
        "annotations": str(options.annotations),
        "class_order": class_map.order,
    }
    with Counter(options.quiet) as counter:
        found = find_correction(runner, trained_on, tested_on, settings, counter.add)
        record |= found.record
        if found.search is not None:
            record |= _searched(options, found.search)
        corrected = corrected_copy(stored.model, found.correction)
        if tested_on is not None and tested_on.images is not None:
            # by running both detectors, not from the search
            metrics = compare(runner, runner_of(corrected), train, tested_on, options.class_order, counter.add)
            record |= metrics
            _print_metrics(options, "detector", {"as it is": metrics["before"], "corrected": metrics["after"]})
            if removes_prior(stored.model) and not options.quiet:
                print("as it is: with the training prior removed, NorCal of power 1, whose place a correction takes")
    write_detector(stored, corrected, record, options.out, options.export, options.overwrite)
    used = record.get("power")
    _say(options, f"{options.out}: {options.method}{'' if used is None else f', power {used:g}'}")
    if options.export is not None:
        _say(options, f"{options.export}: the corrected detector")
    return record


def _correct_results(
    options: CalibrateDetector, train: Annotations, validation: Annotations | None, power: float | None
) -> dict[str, Any]:
    import json

    from longtail.detector_calibration.calibrate import POWERS, category_counts
    from longtail.detector_calibration.results import LIMITS, ResultFile
    from longtail.detector_calibration.storage import check_original, write_folder
    from longtail.files import write_text

    check_original(Path(options.model).parent)
    results = ResultFile(Path(options.model), train)
    counts = category_counts(train, options.counts)
    record: dict[str, Any] = {
        "model": options.model,
        "method": "scores divided by counts",
        "limits": LIMITS,
        "counts": options.counts,
        "annotations": str(options.annotations),
        "class_counts": dict(zip(train.class_names, counts.tolist(), strict=True)),
    }
    if validation is not None:
        if validation.category_ids != train.category_ids:
            different = sorted(set(validation.category_ids) ^ set(train.category_ids))
            raise LongtailError(
                f"{options.validation}: its category ids are not those of {options.annotations}: {different[:5]}"
            )
        powers = POWERS if power is None else tuple(sorted({0.0, power}))
        search = results.choose_power(counts, train.image_counts, validation, powers)
        record |= _searched(options, search)
        power = search.best if power is None else power
    assert power is not None
    record["power"] = power
    scaled = results.scaled(counts, power)
    name = Path(options.model).name
    write_folder(
        options.out,
        lambda folder: write_text(folder / name, json.dumps(scaled, ensure_ascii=False)),
        record,
        options.overwrite,
    )
    _say(options, f"{options.out / name}: power {power:g}; {LIMITS}")
    return record


def _searched(options: CalibrateDetector, search: PowerSearch) -> dict[str, Any]:
    """Print a search, and return what is recorded of it."""
    _print_metrics(options, "power", {f"{power:g}": metrics for power, metrics in search.metrics.items()})
    return {"power": search.best, "search": {f"{power:g}": metrics for power, metrics in search.metrics.items()}}


def _print_metrics(options: CalibrateDetector, title: str, rows: dict[str, dict[str, Any]]) -> None:
    if options.quiet:
        return

    def cell(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.1f}"

    print_table(
        [title, *_COLUMNS.values()], [[name, *(cell(row[column]) for column in _COLUMNS)] for name, row in rows.items()]
    )


def _say(options: CalibrateDetector, line: str) -> None:
    if not options.quiet:
        print(line)
