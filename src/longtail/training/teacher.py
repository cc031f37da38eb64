"""The teacher: trained as a first stage and found again, loaded from runs, or a pretrained timm model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor, nn

from longtail.config import Classifier, Config, Mixing, Optimizer, Shots
from longtail.config import Teacher as TeacherConfig
from longtail.data.dataset import LongTailedData
from longtail.distributed import gather_objects, rank
from longtail.errors import LongtailError
from longtail.losses import ClassPrior
from longtail.nn import ClassifierEnsemble, Encoder, EncoderEnsemble, TeacherEncoder
from longtail.nn.encoder import pretrained_encoder
from longtail.randomness import Stream, mix
from longtail.registry import METHODS, TASKS
from longtail.tasks.loading import load_model
from longtail.training.run_io import INCIDENTAL, flatten, plugin_digests
from longtail.training.seen_images import seen_test_images

logger = logging.getLogger(__name__)

_MEMBER = mix(Stream.TEACHERS)


_SHARPNESS = ("sharpness", "rho", "sharpness_below", "sharpness_gamma", "sharpness_weight")
NEVER_OF_TEACHER = frozenset(
    {
        "init",
        *(f"mixing.{field.name}" for field in dataclasses.fields(Mixing)),
        *(f"optimizer.{name}" for name in _SHARPNESS),
    }
)
"""Settings that a teacher does not take from its student, so that students with and without them have one teacher."""


def _plain_steps(optimizer: Optimizer) -> Optimizer:
    plain = Optimizer()
    return dataclasses.replace(optimizer, **{name: getattr(plain, name) for name in _SHARPNESS})


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder with its classifier, if it has one for these classes; or several of them."""

    encoder: TeacherEncoder
    classifier: nn.Module | None
    seconds: float
    """Time to train it, in this run or an earlier one, with its own teachers; 0 for one that was given."""


def teacher_config(config: Config, data: LongTailedData, member: int = 0) -> Config:
    """Return the settings of the first stage: the classification loss only, logit-adjusted.

    A teacher of a later generation has a teacher itself, of the generation before, and is distilled from it as the
    student is from the last (Furlanello et al., *Born-Again Neural Networks*, ICML 2018, arXiv 1805.04770).

    Args:
        config: the student's settings.
        data: what it trains on.
        member: which of ``teacher.count`` teachers; the first has the student's seed, each other one its own. The
            images are the same.
    """
    task, own = TASKS[data.task], config.teacher
    task_settings = tuple(settings for settings in config.settings if type(settings) is task.settings_class)
    first = config.network if own.network == "auto" else own.network
    as_student = own.generations > 1 and own.generation_network == "student"
    network = config.network if as_student else first
    epochs = own.epochs or config.epochs
    classifier = Classifier(scale=config.classifier.scale, init=config.classifier.init, views=own.views)
    before = TeacherConfig()
    given: dict[str, Any] = own.own_settings
    if own.generations > 1:
        classifier = dataclasses.replace(
            classifier,
            distillation_weight=METHODS[config.method].distillation_weight(config) or 1.0,
            distill_every_view=config.classifier.distill_every_view,
        )
        assert isinstance(epochs, int)
        before = TeacherConfig(
            network=first,
            epochs=epochs,
            views=own.views,
            generations=own.generations - 1,
            generation_network=own.generation_network if own.generations > 2 else before.generation_network,
            distillation_temperature=own.distillation_temperature,
            cache=own.cache,
            **given,
        )
    if own.pretrained not in {None, "none"} and not as_student:
        classifier = dataclasses.replace(classifier, init="class_means")
    if own.tune is None and not as_student:
        given = {**given, "tune": _inherited_tune(config, network, given.get("pretrained", config.pretrained))}
    # its scores stand for the likelihood alone, free of the prior of the images that it was shown: that of the data set
    seeds: dict[str, Any] = {"data": {"contrast_augment": "auto", "sampler": "instance"}}
    if member > 0:
        seeds["seed"] = mix(config.seed, _MEMBER, member) % 2**31
        seeds["data"]["seed"] = config.seed if config.data.seed is None else config.data.seed
    return task.teacher_config(
        dataclasses.replace(config, settings=task_settings).replace(
            recipe="teacher",
            init=None,
            minutes=None,
            method="la",
            network=network,
            epochs=epochs,
            second_stage="none",
            second_stage_fraction=Config().second_stage_fraction,
            classifier=dataclasses.asdict(classifier),
            log=(),
            mixing=Mixing(),
            optimizer=_plain_steps(config.optimizer),
            teacher=before,
            shots=Shots(),
            **({} if as_student else given),
            **seeds,
        )
    )


def _inherited_tune(config: Config, network: str, pretrained: str) -> str:
    """Return what of a teacher's encoder is trained where ``teacher.tune`` is not given."""
    if (network, pretrained) == (config.network, config.pretrained) and config.init is None:
        return config.tune
    if pretrained == "none":
        return "full"  # a part of random weights is never trained alone
    # the student's lora or full may have been chosen for its network
    return "auto" if config.tune in {"lora", "full"} else config.tune


def teacher_folder(config: Config, data: LongTailedData, runs: Path, member: int = 0) -> Path:
    """Return the folder of such a run's teacher.

    Its name depends on all settings that matter, on the images, and on the plugins that the teacher's parts are of.
    """
    settings = teacher_config(config, data, member)
    ignored = INCIDENTAL | NEVER_OF_TEACHER
    values = {name: value for name, value in flatten(settings.to_dict()).items() if name not in ignored}
    plugins = plugin_digests(settings)
    content = json.dumps([values, data.fingerprint, *([plugins] if plugins else [])], sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
    network = re.sub(r"[^\w.-]+", "-", settings.network)  # some file systems do not allow a colon
    return runs / f"{settings.data.source}-{network}-{digest}"


def teacher_runs(config: Config, data: LongTailedData, runs: Path) -> list[dict[Path, Config]]:
    """Return every training that a run's teachers take: folder and settings, one generation after the other.

    Args:
        config: the student's settings.
        data: what it trains on.
        runs: folder that keeps trained teachers.
    """
    method = METHODS[config.method]
    if config.teacher.source != "train" or not method.needs_teacher(config):
        return []
    members = range(config.teacher.count)
    last = {teacher_folder(config, data, runs, member): teacher_config(config, data, member) for member in members}
    before = [teacher_runs(settings, data, runs) for settings in last.values()]
    merged = [dict(itertools.chain(*(each.items() for each in stage))) for stage in zip(*before, strict=True)]
    return [*merged, last]


def load_teacher(config: Config, data: LongTailedData, distils: bool) -> Teacher:
    """Return the teacher that ``teacher.source`` names: runs' folders, or ``timm:NAME``.

    Raises:
        LongtailError: the run or model does not exist, does not fit the images, or cannot be distilled from.
    """
    for source in config.teacher.sources:
        seen = seen_test_images(source, config, data)
        if seen is not None:
            logger.warning("teacher.source %s: %s", source, seen)
    return _together([_load(source, data, distils) for source in config.teacher.sources], config)


def _load(source: str, data: LongTailedData, distils: bool) -> Teacher:
    if source.startswith("timm:"):
        teacher = Teacher(pretrained_encoder(source.removeprefix("timm:"), len(data.mean)), None, 0.0)
    elif Path(source).is_dir():
        teacher = _from_run(Path(source), data, given=True)
    else:
        raise LongtailError(
            f"teacher.source '{source}': expected train, ema, the folder of a run, or timm:NAME; there is no such "
            "folder"
        )
    TASKS[data.task].check_teacher(teacher.encoder, source)
    if distils and teacher.classifier is None:
        raise LongtailError(
            f"teacher.source '{source}': has no classifier for these classes to distil from; "
            "set gml.distillation_weight (method gml) or classifier.distillation_weight to 0"
        )
    return teacher


def _together(teachers: Sequence[Teacher], config: Config) -> Teacher:
    """Return several teachers as one: their features one after the other, their probabilities averaged."""
    if len(teachers) == 1:
        return teachers[0]
    encoder = EncoderEnsemble([teacher.encoder for teacher in teachers if isinstance(teacher.encoder, Encoder)])
    classifiers = [teacher.classifier for teacher in teachers if teacher.classifier is not None]
    classifier = None
    if len(classifiers) == len(teachers):
        temperature = config.teacher.distillation_temperature
        classifier = ClassifierEnsemble(classifiers, encoder.widths, temperature).eval()
    return Teacher(encoder, classifier, sum(teacher.seconds for teacher in teachers))


def train_teacher(
    config: Config,
    data: LongTailedData,
    runs: Path,
    train: Callable[[Config, Path], object],
) -> Teacher:
    """Return the teacher of the first stage, or several, trained now or found again.

    Args:
        config: the student's settings.
        data: what it trains on.
        runs: folder that keeps trained teachers.
        train: trains a run into a folder, and its own teacher before it.
    """
    count, generations = config.teacher.count, config.teacher.generations
    teachers = []
    for member in range(count):
        folder, settings = teacher_folder(config, data, runs, member), teacher_config(config, data, member)
        which = f" ({member + 1} of {count})" if count > 1 else ""
        which += f" (generation {generations})" if generations > 1 else ""
        train_once(
            folder,
            functools.partial(train, settings, folder),
            f"teacher{which}: training {settings.network} first, kept in {folder}",
            f"teacher{which}: found in {folder}",
        )
        teachers.append(_from_run(folder, data, given=False))
    return _together(teachers, config)


def train_once(folder: Path, train: Callable[[], object], training: str = "", found: str = "") -> None:
    """Train a teacher into a folder, unless it is there; of several runs that need it, one trains it.

    Args:
        folder: its folder.
        train: trains it.
        training: what to log before it is trained.
        found: what to log where it is there.
    """
    with _exclusive(folder):
        # what process 0 finds once it holds the lock, for which the others wait here
        there = gather_objects((folder / "recognizer" / "config.json").is_file())[0]
        if message := found if there else training:
            logger.info("%s", message)
        if not there:
            train()


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
    info = model.config.training_info
    seconds = 0.0 if given else float(info["seconds"] + info["teacher_seconds"])
    classifier: nn.Module | None = model.classifier if same_classes else None
    if classifier is not None and model.config.predicts_under == "train" and TASKS[data.task].label_kind != "boxes":
        classifier = _WithoutPrior(classifier, model.config.class_counts)
    return Teacher(model.encoder, classifier, seconds)


class _WithoutPrior(nn.Module):
    """A classifier whose scores contain the prior that it was trained under, without it, as students compare scores."""

    def __init__(self, classifier: nn.Module, class_counts: Sequence[int]) -> None:
        super().__init__()
        self.classifier, self.prior = classifier, ClassPrior(class_counts)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C) scores of (B, F) features, or maps of maps."""
        return self.prior.subtracted_from(self.classifier(features))
