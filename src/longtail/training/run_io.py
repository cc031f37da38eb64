"""The folder of a run: its settings, its log, and what came out."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from longtail.config import Config, read_config
from longtail.data.dataset import LongTailedData
from longtail.distributed import gather_objects, rank
from longtail.errors import LongtailError
from longtail.files import atomic_write, write_json, write_text
from longtail.inference.model_config import ModelConfig, read_model_config
from longtail.registry import METHODS, SAMPLERS, SOURCES, TRANSFORMS, network_parts, plugins_of
from longtail.run_folder import RESULTS, is_partial, is_run
from longtail.tasks.base import ImageResults
from longtail.training.metric_log import read_metrics

_LOCK = ".training.lock"
_IMAGE_RESULTS = "test_predictions.npz"

INCIDENTAL = frozenset(
    {
        *("device", "compile", "checkpoint_seconds", "log"),
        *("data.root", "data.train", "data.val", "data.test", "data.memory_gib", "data.workers"),
        *("data.cache", "accelerator.batches", "accelerator.memory", "accelerator.graph"),
        *("data.unreadable", "data.max_unreadable_fraction"),
    }
)
"""Settings that do not make it another run: where it is computed, how often it is saved, where its images are."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    config: Config
    model_config: ModelConfig
    test_metrics: dict[str, dict[str, Any]]
    """Metrics on the test set, under the prior ``uniform`` and under ``train``."""
    student_passes: int
    """Images that passed through the student, forward and backward."""
    seconds: float
    """Time to train the student, without evaluation and teacher."""
    teacher_seconds: float

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics under the prior that the method predicts under."""
        return self.test_metrics[self.model_config.predicts_under]

    def image_results(self) -> ImageResults | None:
        """Return what was kept of every test image, see :meth:`longtail.tasks.base.Evaluator.image_results`.

        What is kept under a prior is ``predicted`` too under the one that the method predicts under. None where nothing
        was kept: by a task that keeps none, or by an earlier version.

        Raises:
            LongtailError: the file cannot be read.
        """
        path = self.folder / _IMAGE_RESULTS
        if not path.is_file():
            return None
        try:
            with np.load(path) as stored:
                results = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error):
            raise LongtailError(
                f"{path}: cannot be read; remove it, which costs the comparison its intervals over test images"
            ) from None
        under = self.model_config.predicts_under
        return {**results, "predicted": results[under]} if under in results else results


@contextlib.contextmanager
def run_folder(folder: Path, config: Config, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Make the folder of a run, with its ``config.yaml``, and keep other trainings out of it meanwhile.

    Raises:
        LongtailError: it is not empty and neither ``resume`` nor ``overwrite`` is given, it is another run's or no
            run's, it contains what the new run reads, another process trains in it, or it cannot be written.
    """
    if rank() > 0:  # process 0 does it, and writes
        yield
        return
    check_run_folder(folder, config, resume=resume, overwrite=overwrite)
    with alone_in(folder):
        _create(folder, config, overwrite=overwrite)
        yield


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other trainings and comparisons out of a folder.

    Raises:
        LongtailError: another process trains in it, or the folder that it is in cannot be written.
    """
    # beside the folder, whose content --overwrite removes; a teacher has a lock of its own, which its run waits for
    lock = FileLock(folder.with_name(f".{folder.name}{_LOCK}"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        if not folder.is_dir():
            raise LongtailError(f"{folder}: cannot be written: {error.strerror or error}") from None
        yield  # a folder that was made for this user, in one of others: there is no place for a lock
        return
    _acquire(lock, folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_nobody_trains_in(folder: Path) -> None:
    """Raise LongtailError if another process trains in a folder of this one."""
    for path in (*folder.glob(f".*{_LOCK}"), *folder.glob(f"*/.*{_LOCK}")):
        lock = FileLock(path)
        _acquire(lock, path.with_name(path.name.removeprefix(".").removesuffix(_LOCK)))
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LongtailError(
            f"{folder}: another process trains in it; wait until it has ended, or choose another --out"
        ) from None
    except OSError as error:
        raise LongtailError(f"{folder}: cannot be written: {error.strerror or error}") from None


def check_run_folder(
    folder: Path, config: Config, *, resume: bool, overwrite: bool, settings_are_open: bool = False
) -> None:
    """Raise LongtailError if a run cannot be made in a folder; nothing is changed. See :func:`run_folder`.

    Args:
        folder: of the run.
        config: its settings.
        resume: continue a run that is there.
        overwrite: replace it.
        settings_are_open: some settings have to be chosen yet, so that they are not compared with those of the run.
    """
    try:
        entries = [path for path in folder.iterdir() if not is_partial(path.name)] if folder.exists() else []
    except OSError as error:
        raise LongtailError(f"{folder}: cannot be written: {error.strerror or error}") from None
    if entries:
        # what is only continued is not removed: of settings that cannot be read the reader says why
        if not (folder / "config.yaml").is_file() or ((overwrite or not resume) and not is_run(folder)):
            raise LongtailError(f"{folder}: is not empty and not a run of longtail; choose another --out")
        if overwrite or not resume:
            check_reads_nothing_in(folder, config)
        if not (overwrite or resume):
            raise LongtailError(f"{folder}: contains a run already; use --resume, --overwrite or another --out")
        if not overwrite and not settings_are_open:
            _check_same_run(read_config(folder / "config.yaml"), config, folder)


def _create(folder: Path, config: Config, *, overwrite: bool) -> None:
    try:
        if overwrite and folder.exists():
            # last what a run is recognised by, so that a folder of which a part is left can still be replaced
            for path in sorted(folder.iterdir(), key=lambda path: (path.name == "config.yaml", path.name in RESULTS)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LongtailError(f"{folder}: cannot be written: {error.strerror or error}") from None
    if not (folder / "config.yaml").is_file():
        if plugins := plugin_digests(config):
            write_json(folder / "plugins.json", plugins)
        write_text(folder / "config.yaml", config.to_yaml())


def check_reads_nothing_in(folder: Path, config: Config) -> None:
    """Raise LongtailError if a folder that is to be replaced contains what a run reads: a teacher, weights, or data."""
    data, teacher = config.data, config.teacher
    paths = (
        *(("teacher.source", source) for source in teacher.sources),
        *(("pretrained", config.pretrained), ("teacher.pretrained", teacher.pretrained)),
        *((f"data.{name}", getattr(data, name)) for name in ("root", "train", "val", "test")),
    )
    for name, value in paths:
        if value is None or not Path(value).exists():  # the name of a kind, or what is found missing elsewhere
            continue
        there = Path(value).resolve()
        if folder.resolve() in (there, *there.parents):
            raise LongtailError(
                f"{name} {value}: is in --out ({folder}), which is not overwritten for that; choose another --out"
            )


def write_image_results(folder: Path, results: ImageResults) -> None:
    """Write ``test_predictions.npz``, see :meth:`longtail.tasks.base.Evaluator.image_results`."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # of a path numpy would change the name
            np.savez_compressed(file, **results)  # type: ignore[arg-type]

    atomic_write(folder / _IMAGE_RESULTS, write)


def write_unreadable(folder: Path, data: LongTailedData) -> None:
    """Write ``unreadable.csv``, the path and reason of every image that could not be read; nothing if there is none.

    Every process calls it, since each decodes images of its own; process 0 writes.

    Args:
        folder: of the run.
        data: what it trains and is evaluated on. Of images that are decoded when they are needed, those that have
            failed so far are listed.
    """
    found = {path: reason for each in gather_objects(data.all_unreadable()) for path, reason in each.items()}
    if not found or rank() != 0:
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *found.items()])
    write_text(folder / "unreadable.csv", text.getvalue(), errors="surrogateescape")


def count_unreadable(folder: Path) -> int:
    """Return the number of images that a run could not read."""
    path = folder / "unreadable.csv"
    if not path.is_file():
        return 0
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return sum(1 for _ in csv.reader(file)) - 1


def _check_same_run(there: Config, here: Config, folder: Path) -> None:
    for name, (old, new) in _differences(there, here).items():
        longer = f"use --init {folder} with another --out to go on for longer, " if name == "epochs" else ""
        raise LongtailError(
            f"{folder}: was started with {name} {old}, not {new}; "
            f"resume with the same settings and images, {longer}or use --overwrite or another --out"
        )
    _check_same_plugins(folder, here)


def _differences(there: Config, here: Config) -> dict[str, tuple[Any, Any]]:
    """Return both values of every setting that makes two runs different ones, by its dotted name."""
    old, new = flatten(there.to_dict()), flatten(here.to_dict())
    both = {name: (old.get(name), new.get(name)) for name in dict.fromkeys((*new, *old)) if name not in INCIDENTAL}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def plugin_digests(config: Config) -> list[list[str]]:
    """Return name and digest of each plugin that a run depends on: what they do is not in its settings."""
    data = config.data
    parts = {
        (METHODS.kind, config.method),
        (SOURCES.kind, data.source),
        (SAMPLERS.kind, data.sampler),
        *((TRANSFORMS.kind, name) for name in (data.augment, data.contrast_augment)),
        *network_parts(config.network, config.teacher.network),
    }
    return sorted([name, digest] for name, digest in plugins_of(parts))


def _check_same_plugins(folder: Path, config: Config) -> None:
    """Raise LongtailError if a run was made with other plugins than it would be now; none are kept where none were."""
    path = folder / "plugins.json"
    if not path.is_file():
        return
    there, here = json.loads(path.read_text(encoding="utf-8")), plugin_digests(config)
    for name, digest in (*here, *there):
        if [name, digest] not in there or [name, digest] not in here:
            raise LongtailError(f"{folder}: plugin {name} has changed since this run; use --overwrite or another --out")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def find_finished(folder: Path, config: Config, data: LongTailedData | None = None) -> Run | None:
    """Return a run that finished with these settings; None if there is none.

    Args:
        folder: of the run.
        config: the settings; incidental ones may be others than the run's, see :data:`INCIDENTAL`.
        data: what they stand for now.

    Raises:
        LongtailError: the run was trained or tested on other images than ``data``, or with another plugin than now.
    """
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines or lines[-1]["kind"] != "test" or _differences(read_config(folder / "config.yaml"), config):
        return None
    model_config = read_model_config(folder)
    info = model_config.training_info
    if data is not None:
        _check_same_plugins(folder, config)
        check_same_images(folder, info, data)
    return Run(
        folder,
        config,
        model_config,
        {prior: lines[-1][prior] for prior in ("uniform", "train")},
        info["student_passes"],
        info["seconds"],
        info["teacher_seconds"],
    )


def check_same_images(place: Path, there: Mapping[str, Any], data: LongTailedData) -> None:
    """Raise LongtailError if a run used other images than the data has now.

    Args:
        place: the run, or its checkpoint, for the message.
        there: its :attr:`~longtail.data.dataset.LongTailedData.fingerprints`; earlier versions kept fewer.
        data: what its settings stand for now.
    """
    for (name, now), what in zip(data.fingerprints.items(), ("trained", "validated", "tested"), strict=True):
        if there.get(name, now) != now:
            raise LongtailError(
                f"{place}: was {what} on other images than there are now; restore them, or start again with "
                "--overwrite or another --out"
            )


def read_finished(folder: Path) -> Run:
    """Return the finished run of a folder.

    Raises:
        LongtailError: it is not a run's, or the run has not finished.
    """
    if not (folder / "config.yaml").is_file():
        raise LongtailError(f"{folder}: has no config.yaml: expected the folder of a run")
    run = find_finished(folder, read_config(folder / "config.yaml"))
    if run is None:
        raise no_test_metrics(folder)
    return run


def no_test_metrics(folder: Path) -> LongtailError:
    """Return the error of a folder whose log has no metrics of the test set."""
    try:
        corrected = bool(read_model_config(folder).training_info.get("calibrated"))
    except LongtailError:
        corrected = False
    if corrected:
        return LongtailError(
            f"{folder}: has no test metrics, since its scores were corrected after the training; use longtail evaluate"
        )
    return LongtailError(f"{folder / 'metrics.jsonl'}: has no test metrics; use --resume to finish the run")
