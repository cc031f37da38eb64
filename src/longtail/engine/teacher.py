"""The teacher: trained as a first stage and found again, loaded from a run, or a pretrained timm model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from torch import nn

from longtail.config import Classifier, Config, Contrast, Gml, Segmentation, Shots
from longtail.config import Teacher as TeacherConfig
from longtail.data.dataset import LongTailedData
from longtail.engine.files import INCIDENTAL, flatten
from longtail.engine.processes import rank
from longtail.errors import LongtailError
from longtail.nn.backbones import Encoder, pretrained_encoder
from longtail.segmenter import load_kept


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder with, where it has one for these classes, its classifier."""

    encoder: Encoder
    classifier: nn.Module | None
    seconds: float
    """What training it cost, in this run or in an earlier one; 0 for one that was given."""


def teacher_config(config: Config) -> Config:
    """Return the settings of the first stage: the classifier term alone, logit-adjusted."""
    return config.replace(
        recipe="teacher",
        method="la",
        network=config.network if config.teacher.network == "auto" else config.teacher.network,
        epochs=config.teacher.epochs or config.epochs,
        classifier=dataclasses.asdict(Classifier(scale=config.classifier.scale)),
        data={"contrast_augment": "auto"},
        log=(),
        teacher=TeacherConfig(),
        gml=Gml(),
        contrast=Contrast(),
        segmentation={"points": Segmentation().points, "keys": Segmentation().keys},
        shots=Shots(),
    )


def teacher_folder(config: Config, data: LongTailedData, runs: Path) -> Path:
    """Return where the teacher of such a run is kept: named by everything that it depends on, the images too."""
    settings = teacher_config(config)
    values = {name: value for name, value in flatten(settings.to_dict()).items() if name not in INCIDENTAL}
    told = json.dumps([values, data.fingerprint], sort_keys=True)
    digest = hashlib.blake2b(told.encode(), digest_size=6).hexdigest()
    network = re.sub(r"[^\w.-]+", "-", settings.network)  # a colon is no part of a name everywhere
    return runs / f"{settings.data.source}-{network}-{digest}"


def given_teacher(config: Config, data: LongTailedData, distils: bool) -> Teacher:
    """Return the teacher that ``teacher.source`` names: a run's folder, or ``timm:NAME``.

    Raises:
        LongtailError: the run or model does not exist, does not fit the images, or cannot be distilled from.
    """
    source = config.teacher.source
    if source.startswith("timm:"):
        teacher = Teacher(pretrained_encoder(source.removeprefix("timm:"), len(data.mean)), None, 0.0)
    elif Path(source).is_dir():
        teacher = _from_run(Path(source), data, given=True)
    else:
        raise LongtailError(
            f"teacher.source '{source}': expected train, the folder of a run, or timm:NAME; there is no such folder"
        )
    if distils and teacher.classifier is None:
        raise LongtailError(
            f"teacher.source '{source}': has no classifier for these classes to distil from; "
            f"set {'gml' if config.method == 'gml' else 'classifier'}.distillation_weight to 0"
        )
    return teacher


def trained_teacher(
    config: Config,
    data: LongTailedData,
    runs: Path,
    train: Callable[[Config, Path], object],
    say: Callable[[str], None],
) -> Teacher:
    """Return the teacher of the first stage, trained now or found again.

    Args:
        config: the student's settings.
        data: what it trains on.
        runs: folder that keeps trained teachers.
        train: trains a run into a folder.
        say: tells the user what happens.
    """
    folder = teacher_folder(config, data, runs)
    with _alone(folder):
        if (folder / "recognizer" / "config.json").is_file():
            say(f"teacher: found in {folder}")
        else:
            say(f"teacher: training {teacher_config(config).network} first, kept in {folder}")
            train(teacher_config(config), folder)
    return _from_run(folder, data, given=False)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one run at a time train a teacher; another that wants the same one waits, and then finds it."""
    if rank() > 0:  # the first process has the lock, and trains with the others
        yield
        return
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise LongtailError(f"{folder.parent}: cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def _from_run(folder: Path, data: LongTailedData, given: bool) -> Teacher:
    recognizer = load_kept(folder)
    if recognizer.card.channels != len(data.mean):
        raise LongtailError(
            f"teacher {folder}: expects images of {recognizer.card.channels} channels, these have {len(data.mean)}"
        )
    same_classes = recognizer.card.class_names == data.class_names
    seconds = 0.0 if given else float(recognizer.card.trained["seconds"])
    return Teacher(recognizer.encoder, recognizer.classifier if same_classes else None, seconds)
