"""The teacher: trained as a first stage and found again, loaded from a run, or a pretrained timm model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from torch import nn

from longtail.config import Classifier, Config, Mixing, Optimizer, Shots
from longtail.config import Teacher as TeacherConfig
from longtail.data.dataset import LongTailedData
from longtail.distributed import rank
from longtail.errors import LongtailError
from longtail.nn import Encoder
from longtail.nn.encoder import pretrained_encoder
from longtail.registry import TASKS
from longtail.tasks.loading import load_model
from longtail.training.run_io import INCIDENTAL, flatten

logger = logging.getLogger(__name__)


_SHARPNESS = ("sharpness", "rho", "sharpness_below", "sharpness_gamma", "sharpness_weight")
NEVER_OF_TEACHER = frozenset(
    {
        "init",
        *(f"mixing.{field.name}" for field in dataclasses.fields(Mixing)),
        *(f"optimizer.{name}" for name in _SHARPNESS),
    }
)
"""Settings that a teacher does not take from its student, so that students with and without them have one teacher."""
_ADDED = {"optimizer.head_weight_decay", "optimizer.norm_weight_decay", "optimizer.head_max_norm"}


def _plain_steps(optimizer: Optimizer) -> Optimizer:
    plain = Optimizer()
    return dataclasses.replace(optimizer, **{name: getattr(plain, name) for name in _SHARPNESS})


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder with its classifier, if it has one for these classes."""

    encoder: Encoder
    classifier: nn.Module | None
    seconds: float
    """Time to train it, in this run or an earlier one; 0 for one that was given."""


def teacher_config(config: Config, data: LongTailedData) -> Config:
    """Return the settings of the first stage: the classification loss only, logit-adjusted."""
    task = TASKS[data.task]
    task_settings = tuple(settings for settings in config.settings if type(settings) is task.settings_class)
    return task.teacher_config(
        dataclasses.replace(config, settings=task_settings).replace(
            recipe="teacher",
            init=None,
            minutes=None,
            method="la",
            network=config.network if config.teacher.network == "auto" else config.teacher.network,
            epochs=config.teacher.epochs or config.epochs,
            classifier=dataclasses.asdict(Classifier(scale=config.classifier.scale, init=config.classifier.init)),
            data={"contrast_augment": "auto"},
            log=(),
            mixing=Mixing(),
            optimizer=_plain_steps(config.optimizer),
            teacher=TeacherConfig(),
            shots=Shots(),
        )
    )


def teacher_folder(config: Config, data: LongTailedData, runs: Path) -> Path:
    """Return the folder of such a run's teacher: its name depends on all settings that matter, and on the images."""
    settings = teacher_config(config, data)
    ignored = INCIDENTAL | NEVER_OF_TEACHER
    values = {name: value for name, value in flatten(settings.to_dict()).items() if name not in ignored}
    # what was added to the settings later, and is not set, has no part in the name: earlier teachers are found again
    values = {name: value for name, value in values.items() if name not in _ADDED or value is not None}
    content = json.dumps([values, data.fingerprint], sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
    network = re.sub(r"[^\w.-]+", "-", settings.network)  # some file systems do not allow a colon
    return runs / f"{settings.data.source}-{network}-{digest}"


def load_teacher(config: Config, data: LongTailedData, distils: bool) -> Teacher:
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
            "set gml.distillation_weight (method gml) or classifier.distillation_weight to 0"
        )
    return teacher


def train_teacher(
    config: Config,
    data: LongTailedData,
    runs: Path,
    train: Callable[[Config, Path], object],
) -> Teacher:
    """Return the teacher of the first stage, trained now or found again.

    Args:
        config: the student's settings.
        data: what it trains on.
        runs: folder that keeps trained teachers.
        train: trains a run into a folder.
    """
    folder = teacher_folder(config, data, runs)
    with _exclusive(folder):
        if (folder / "recognizer" / "config.json").is_file():
            logger.info("teacher: found in %s", folder)
        else:
            logger.info("teacher: training %s first, kept in %s", teacher_config(config, data).network, folder)
            train(teacher_config(config, data), folder)
    return _from_run(folder, data, given=False)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one run at a time train a teacher; another run that needs the same one waits, and then finds it."""
    if rank() > 0:  # process 0 holds the lock, and trains together with the others
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
    model = load_model(folder)
    if model.config.channels != len(data.mean):
        raise LongtailError(
            f"teacher {folder}: expects images of {model.config.channels} channels, these have {len(data.mean)}"
        )
    same_classes = model.config.class_names == data.class_names
    seconds = 0.0 if given else float(model.config.training_info["seconds"])
    return Teacher(model.encoder, model.classifier if same_classes else None, seconds)
