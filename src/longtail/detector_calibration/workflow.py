"""The steps of correcting a stored detector: find a correction, compare before and after, write what was corrected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longtail.data.detection import Annotations
from longtail.detector_calibration.calibrate import (
    Method,
    PowerSearch,
    category_counts,
    choose_power,
    evaluate_corrections,
    logit_statistics,
    make_correction,
)
from longtail.detector_calibration.classes import ClassOrder, CountOf
from longtail.detector_calibration.running import DetectorRunner
from longtail.detector_calibration.storage import StoredDetector, export_detector, write_folder
from longtail.errors import LongtailError
from longtail.evaluation.detector_scores import LogitCorrection, Normalization

Progress = Callable[[int], object]


class AnnotatedFolder(NamedTuple):
    """Annotations and the folder of their images."""

    annotations: Annotations
    images: Path | None


@dataclass(frozen=True, kw_only=True)
class CorrectionSettings:
    """What is done to a detector; see :func:`~longtail.detector_calibration.calibrate.calibrate_detector`."""

    method: Method = "norcal"
    power: float | None = None
    """NorCal; if None the best on the validation images."""
    count_of: CountOf = "images"
    normalization: Normalization = "foreground"
    class_order: ClassOrder = "auto"
    statistics_images: int = 1000
    """LogN: number of training images, drawn at random."""


class FoundCorrection(NamedTuple):
    """A correction, and what is recorded of it."""

    correction: LogitCorrection
    record: dict[str, Any]
    search: PowerSearch | None
    """Of the power, where it was searched for."""


def find_correction(
    runner: DetectorRunner,
    train: AnnotatedFolder,
    validation: AnnotatedFolder | None,
    settings: CorrectionSettings,
    progress: Progress | None = None,
) -> FoundCorrection:
    """Return the correction of a detector.

    Args:
        runner: of the detector as it is.
        train: of the training set; its images are needed for LogN.
        validation: of images that were not trained on, which are needed where a power is searched for.
        settings: what to do.
        progress: called with 1 after each image.

    Raises:
        LongtailError: images are needed and not given or missing, or the annotations' classes are not the detector's.
    """
    statistics = search = None
    power, record = settings.power, dict[str, Any]()
    if settings.method == "logn":
        images = _images(train, "LogN needs the training images")
        statistics = logit_statistics(runner, train.annotations, images, settings.statistics_images, progress=progress)
        record["proposals"] = statistics.count
    else:
        counts = category_counts(train.annotations, settings.count_of).tolist()
        record |= {"counts": settings.count_of, "normalization": settings.normalization}
        record["class_counts"] = dict(zip(train.annotations.class_names, counts, strict=True))
        if power is None:
            images = _images(validation, "a power is chosen on validation images")
            assert validation is not None
            search = choose_power(
                runner,
                train.annotations,
                validation.annotations,
                images,
                count_of=settings.count_of,
                normalization=settings.normalization,
                class_order=settings.class_order,
                progress=progress,
            )
            power = search.best
        record["power"] = power
    correction = make_correction(
        runner.head,
        train.annotations,
        settings.method,
        power,
        statistics,
        settings.count_of,
        settings.normalization,
        settings.class_order,
    )
    return FoundCorrection(correction, record, search)


def _images(folder: AnnotatedFolder | None, needed: str) -> Path:
    if folder is None or folder.images is None:
        raise LongtailError(f"images: {needed}, and their folder is not given")
    return folder.images


def compare(
    before: DetectorRunner,
    after: DetectorRunner,
    train: Annotations,
    validation: AnnotatedFolder,
    class_order: ClassOrder = "auto",
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the metrics of a detector ``before`` and ``after`` its correction, by running both on validation images.

    Args:
        before: runs the detector as it is.
        after: runs the corrected one.
        train: annotations of the training set, which say what classes are rare.
        validation: of images that were not trained on.
        class_order: see :func:`~longtail.detector_calibration.classes.match_classes`.
        progress: called with 1 after each image.

    Raises:
        LongtailError: an image is missing, or the annotations' classes are not the detector's.
    """
    images = _images(validation, "the metrics are those on validation images")
    metrics = {}
    for name, runner in (("before", before), ("after", after)):
        (metrics[name],) = evaluate_corrections(
            runner, [None], train, validation.annotations, images, class_order, progress
        )
    return metrics


def write_detector(
    stored: StoredDetector, corrected: Any, record: dict[str, Any], out: Path, export: Path | None, overwrite: bool
) -> None:
    """Write a corrected detector and its record to a folder, and as an ONNX file, which may be in the folder.

    Args:
        stored: the detector as it was read.
        corrected: the corrected model.
        record: see :data:`~longtail.detector_calibration.storage.NOTE`.
        out: the folder.
        export: the .onnx file, if there is to be one.
        overwrite: replace a folder that an earlier call wrote.

    Raises:
        LongtailError: there is something else already, or one of them cannot be written.
    """
    place = out.resolve()
    inside = export is not None and place in export.resolve().parents
    if export is not None and not inside:
        export_detector(corrected, export)

    def write(folder: Path) -> None:
        stored.save(corrected, folder)
        if export is not None and inside:  # the folder takes the place of what is there
            export_detector(corrected, folder / export.resolve().relative_to(place))

    write_folder(out, write, record, overwrite)
