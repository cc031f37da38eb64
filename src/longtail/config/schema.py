"""The settings of a run: typed, checked, and read without importing torch.

:class:`Config` holds what every run has. The settings of a method or of a task live beside it, as a subclass of
:class:`~longtail.config.Settings`, and make a section of their own: ``gml.queue_size`` in a recipe,
``--gml.queue_size`` on the command line. A field that does not exist, or a value of the wrong type or range, is an
error that names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from pydantic import Field, TypeAdapter, ValidationError

from longtail.config.optimization import Mixing, Optimizer, Schedule
from longtail.config.sections import Settings, check_settings
from longtail.config.teacher import Teacher
from longtail.config.types import STRICT, Fraction, Positive, PositiveFloat, Weight, check_tune
from longtail.errors import LongtailError, did_you_mean
from longtail.registry import METHODS, SAMPLERS, TASKS, TRANSFORMS

SettingsType = TypeVar("SettingsType", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images, and how they are made long-tailed."""

    __pydantic_config__ = STRICT

    source: str = "digits-lt"
    """Data set: digits-lt, cifar10-lt, cifar100-lt, imagenet-lt, places-lt, inat2018, camvid, ade20k, bccd; or a kind
    of your own data: folder (one sub-folder per class), list (lists, tables or annotation files), hub (the library
    datasets), masks (images/ and annotations/ with a label for every pixel, in ADE20K's layout), boxes (objects in
    COCO's, LVIS's, Pascal VOC's or YOLO's layout)."""
    root: str | None = None
    """Folder of the images, or of a local copy of a named set; a named set without it is downloaded."""
    name: str | None = None
    """Name of a data set on the Hugging Face Hub."""
    train: str | None = None
    """List (path label per line), table (.csv, .tsv, .parquet) or annotations (.json) of the training images."""
    val: str | None = None
    """The same for the validation images."""
    test: str | None = None
    """The same for the test images."""
    image_column: str | None = None
    """Column of a table that holds the paths or the images; the usual names are tried if not given."""
    label_column: str | None = None
    """Column that holds labels or class names."""
    split_column: str | None = None
    """Column that says train, val or test, or one of their synonyms."""
    class_depth: Positive | None = None
    """Own folders: number of folders in the name of a class; what lies deeper belongs to it. Every folder with images
    is a class if not given."""
    skip_empty: bool = False
    """Own folders: leave out class folders without images instead of refusing them."""
    ignore_value: Annotated[int, Field(ge=0, le=65_535)] | None = None
    """Masks: a value, such as 255, of pixels that are not labelled, besides 0."""
    profile: Literal["auto", "natural", "exponential", "step", "pareto"] = "auto"
    """How the training images are subsampled to a long tail; auto: exponential for named sets that are balanced, else
    natural (all images)."""
    imbalance: Annotated[float, Field(ge=1)] = 100.0
    """Imbalance factor of the profile: images of the largest class divided by images of the smallest."""
    class_order: Literal["index", "name", "random"] = "index"
    """Which classes a profile makes head and which tail; random follows the seed."""
    seed: int | None = None
    """Seed of the split, of a random class order and of the images that are kept; --seed if not given."""
    test_per_class: Positive = 50
    """Test images per class that digits-lt holds out."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of each class's training images to hold out for validation where the set has no validation images; they
    choose the epoch and calibrate the probabilities. For digits-lt and CIFAR they are taken before the tail is made, so
    that the validation set is balanced."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of each class to hold out for testing where the set has no test split."""
    min_images: Positive = 1
    """Smallest number of training images per class that is accepted for your own data."""
    image_size: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels at which image files are used; chosen from the images if not given."""
    memory_gib: PositiveFloat = 4.0
    """Decode a set once and keep it in memory if it needs no more than this; otherwise decode batch by batch."""
    unreadable: Literal["skip", "error"] = "skip"
    """Images of your own that cannot be read, or whose mask cannot: skip leaves them out, or replaces one that fails
    during training by another of its class, and lists all in unreadable.csv of the run's folder; error refuses the
    set."""
    max_unreadable_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Largest fraction of the images that may be unreadable and skipped; a set with more is refused."""
    cache: str = "auto"
    """Folder for what is computed once per image (resized copies of image files, features of a frozen network); auto:
    LONGTAIL_CACHE or the user's folder of caches; none: keep nothing."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode and augment image files; one per core, at most 8, if not given."""
    sampler: str = "instance"
    """How often an epoch shows each class: instance (every image once), class (all classes equally often), sqrt (by the
    square root of the class size), progressive (from instance to class over the training), deferred (class towards the
    end), repeat_factor (images of rare classes repeated, as published for LVIS)."""
    deferred_from: Fraction = 0.8
    """Fraction of the training after which the deferred sampler shows all classes equally often; below 1, at least in
    its last epoch."""
    repeat_threshold: PositiveFloat = 0.001
    """Fraction of the images that a class must be in not to be repeated by the repeat_factor sampler."""
    augment: str = "auto"
    """Augmentation of the classification view: none, digits, cifar, cifar-plain, cifar-rand, photo, imagenet,
    imagenet-contrast; auto: the data source's own."""
    contrast_augment: str = "auto"
    """Augmentation of the query and key views; auto: that of the classification view, with grey scale and blur for
    imagenet."""

    def __post_init__(self) -> None:
        SAMPLERS.check(self.sampler, "data.sampler")
        for name in ("augment", "contrast_augment"):
            if getattr(self, name) != "auto":
                TRANSFORMS.check(getattr(self, name), f"data.{name}")


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The cosine classifier, which every method has."""

    __pydantic_config__ = STRICT

    scale: PositiveFloat = 30.0
    """Scale of the cosine: the score of class c is scale · cos(feature, weight of c)."""
    init: Literal["random", "class_means", "text"] = "random"
    """Initial weights: random; or for an encoder that is pretrained, class_means (the normalised mean feature of every
    class) or text (the class names' embeddings by the text tower of the same CLIP or SigLIP model; extra clip)."""
    logit_adjustment: bool = True
    """Add the log prior to the scores in training (never done by ce, focal, cb and ldam)."""
    views: Positive = 1
    """Augmented views of each image per step, each with its own loss (ce, la, focal, cb, ldam, experts)."""
    every_view: bool = False
    """Apply the classification loss to every student view instead of the classification view only (contrastive methods
    and gml; always on for paco and gpaco)."""
    distillation_weight: Weight = 0.0
    """Weight of the distillation from the teacher's classifier (gml has its own setting)."""
    distill_every_view: bool = False
    """Distil every view that is classified instead of the first only."""
    agreement_weight: Weight = 0.0
    """Weight of the Jensen-Shannon divergence between the posteriors of the views that are classified, of which there
    must be two or more: classifier.views 2, or classifier.every_view (contrastive methods and gml)."""


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Shot groups, by the number of training images per class."""

    __pydantic_config__ = STRICT

    many_above: Positive = 100
    """Classes with more training images are in the group many."""
    few_below: Positive = 20
    """Classes with fewer training images are in the group few; the rest are medium."""

    def groups(self, class_counts: Sequence[int]) -> list[str]:
        """Return many, medium or few for every class.

        Args:
            class_counts: (C,) training images per class.
        """
        return [
            "many" if count > self.many_above else "few" if count < self.few_below else "medium"
            for count in class_counts
        ]


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """How an accelerator is used; what is learned is the same but for rounding."""

    __pydantic_config__ = STRICT

    batches: Literal["auto", "device", "host"] = "auto"
    """Where training batches are made: device: the images are kept in the accelerator's memory as bytes and augmented
    there; host: by this machine's cores. auto: on a CUDA device where the images fit."""
    memory: Annotated[float, Field(gt=0, le=0.9)] = 0.25
    """Fraction of the accelerator's memory that images and prepared views may take."""
    graph: bool = True
    """Record a training step as a CUDA graph and launch it whole, where batches are made on the device."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run."""

    __pydantic_config__ = STRICT

    recipe: tyro.conf.SuppressFixed[tyro.conf.Fixed[str]] = "digits-lt"
    """The recipe that this run started from; not a flag."""
    settings: tyro.conf.SuppressFixed[tyro.conf.Fixed[tuple[Any, ...]]] = ()
    """Settings of methods and tasks that are not the defaults; see :meth:`section`. Not a flag."""
    method: str = "gml"
    """Training method: auto (the one that measured best, see docs/evidence), ce (cross-entropy), la (logit adjustment),
    focal, cb (class-balanced), ldam, experts, supcon, paco, gpaco, bcl, proco, gml; for labels of pixels ce, la, focal,
    cb, gml, dice, lovasz; for boxes ce, la, gml, seesaw."""
    network: str = "auto"
    """Student network: conv8, resnet8/14/20/32/44/56/110 (with x2 or x4 behind it that many times as wide), or any timm
    model, optionally with arguments, "vit_small_patch16_224(drop_path_rate=0.1)", or from the Hub (hf-hub:OWNER/NAME)
    or a folder (local-dir:FOLDER); for labels of pixels upernet:ENCODER or segformer:ENCODER, optionally with :WIDTH of
    the decoder (default 256); for boxes fasterrcnn:ENCODER or retinanet:ENCODER, optionally with :WIDTH of the pyramid
    (default 128). auto: chosen by the image size."""
    pretrained: str = "none"
    """Initial weights of a timm model: none, a file (.safetensors, .pth), timm (its own, downloaded at first use), or
    auto (its own, from the Hub's local cache, an installed package of weights or the network). Images are then
    normalised as for these weights."""
    init: str | None = None
    """Start from the weights of another run instead: the folder of a finished run, or of a saved model. Its encoder and
    the classifier's weights of the classes that both have, by name; images are normalised as there, and network auto is
    its network. The schedule is new: for a training that goes on for longer, or with more classes."""
    tune: str = "full"
    """What is trained of the encoder: full, norm (normalisation layers and biases), last:N (the last N blocks of a timm
    model), lora or lora:R (low-rank updates of rank R, default 8), adapter or adapter:W (bottlenecks of width W,
    default 64, in every block of a timm model), or head (nothing: features are computed once, and only the classifier
    is trained); auto: lora for a pretrained network of whole images that has more than half of its parameters in layers
    that can have low-rank updates, otherwise full, also with init."""
    feature_views: Positive = 1
    """Views of every training image whose features tune head computes and keeps: the image itself, and augmented
    ones."""
    network_size: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels to which images are resized before they enter the network; their own size if not given."""
    epochs: Positive | Literal["auto"] = 100
    """Passes over the training set; auto: as many as make 20,000 steps, between 30 and 200, or for a pretrained network
    1,000 steps, between 3 and 30. In a comparison they are those of the method with the most student passes an epoch;
    the others have more, so that the passes are equal (--budget epochs: the same)."""
    minutes: PositiveFloat | None = None
    """Time that the whole command may take: the speed of this machine is measured, and tune, the size of images and
    epochs are chosen to fit, unless you set them (pretrained networks that classify whole images)."""
    second_stage: Literal["none", "crt", "lws", "reweight"] = "none"
    """New classifier on the frozen encoder in the last epochs of the training (decoupled training): none, crt
    (class-balanced sampling), lws (a factor for the score of every class) or reweight (class-balanced weights of the
    loss)."""
    second_stage_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the epochs that are the second stage's; each takes the features of one augmented view per image."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images per step."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of initialisation, order and augmentation."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Numerical precision."""
    compile: bool = False
    """Compile the networks with torch.compile (on a CPU this needs a C++ compiler)."""
    calibration: Literal["single", "group"] = "single"
    """Temperature scaling of the probabilities on the validation images, if there are any: one temperature, or one per
    shot group of the predicted class."""
    validate_every: Positive = 1
    """Epochs between two evaluations on the validation images, if there are any."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Minimum number of seconds between two checkpoints."""
    log: tuple[Literal["csv", "tensorboard", "wandb"], ...] = ()
    """Loggers besides metrics.jsonl: csv, tensorboard, wandb (the last two are extras)."""
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    mixing: Mixing = field(default_factory=Mixing)
    classifier: Classifier = field(default_factory=Classifier)
    teacher: Teacher = field(default_factory=Teacher)
    accelerator: Accelerator = field(default_factory=Accelerator)
    shots: Shots = field(default_factory=Shots)

    def __post_init__(self) -> None:
        if self.method != "auto":
            METHODS.check(self.method, "method")
        if self.second_stage != "none" and self.epochs == 1:
            raise LongtailError(
                f"second_stage {self.second_stage}: takes at least one of the epochs and leaves at least one to the "
                "first stage; set epochs to 2 or more"
            )
        check_tune(self.tune, "tune")
        if self.shots.few_below > self.shots.many_above + 1:
            raise LongtailError(
                f"shots.few_below {self.shots.few_below} and shots.many_above {self.shots.many_above} overlap: "
                "a class cannot be both; lower few_below"
            )

    def section(self, kind: type[SettingsType]) -> SettingsType:
        """Return the settings of a method or task.

        Args:
            kind: their type, ``GMLSettings`` for one.
        """
        return next((settings for settings in self.settings if type(settings) is kind), kind())

    def replace(self, **changes: Any) -> Config:
        """Return a copy with other values; a dict changes fields of a section, ``replace(gml={"queue_size": 64})``."""
        plain: dict[str, Any] = {}
        sections = {type(settings): settings for settings in self.settings}
        for name, value in changes.items():
            if name in _CORE_FIELDS:
                plain[name] = dataclasses.replace(getattr(self, name), **value) if isinstance(value, dict) else value
                continue
            kind = settings_type(name)
            if kind is None:
                raise LongtailError(f"there is no field '{name}'{did_you_mean(name, field_names())}")
            sections[kind] = dataclasses.replace(self.section(kind), **value)
        return dataclasses.replace(self, settings=_without_defaults(sections.values()), **plain)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and values, as they stand in ``config.yaml``: the method's settings in full."""
        plain: dict[str, Any] = TypeAdapter(Config).dump_python(
            dataclasses.replace(self, settings=()), mode="json", exclude={"settings"}
        )
        sections = {settings.section: settings for settings in self.settings}
        own = settings_type(self.method)
        if own is not None:
            sections.setdefault(self.method, own())
        for name in sorted(sections):
            plain[name] = TypeAdapter(type(sections[name])).dump_python(sections[name], mode="json")
        return plain

    def to_yaml(self) -> str:
        """Return the text of ``config.yaml``; :func:`parse_config` of it gives an equal object."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


FLAGS = "flags"
"""In place of a file's name: the values came from the command line."""
_CORE_FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.name != "settings"}
_CORE_SECTIONS: dict[str, type] = {
    "data": Data,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "mixing": Mixing,
    "classifier": Classifier,
    "teacher": Teacher,
    "accelerator": Accelerator,
    "shots": Shots,
}


def first_stage_epochs(config: Config) -> int:
    """Return the epochs of the first stage: all, or those that a second stage leaves, at least one for either.

    >>> [first_stage_epochs(Config(epochs=epochs, second_stage="crt")) for epochs in (2, 14, 200)]
    [1, 13, 180]

    Args:
        config: settings of the run; ``epochs`` is resolved.
    """
    assert isinstance(config.epochs, int)
    if config.second_stage == "none":
        return config.epochs
    second = max(1, round(config.second_stage_fraction * config.epochs))
    return max(1, config.epochs - second)


def settings_type(name: str) -> type[Settings] | None:
    """Return the type of the settings of a method or task; None where it has none of its own, or does not exist.

    Raises:
        LongtailError: they cannot be a section, or their section is not the name of a method or task.
    """
    registry = METHODS if name in METHODS else TASKS if name in TASKS else None
    return None if registry is None else _own_settings(registry.kind, name, registry[name].settings_class)


def _own_settings(kind: str, name: str, settings: Any) -> type[Settings] | None:
    if settings is None:
        return None
    check_settings(settings, f"{kind} '{name}'")
    own: type[Settings] = settings
    if own.section == name:
        return own
    if own.section not in METHODS and own.section not in TASKS:
        raise LongtailError(
            f"{kind} '{name}': {own.__name__}.section is '{own.section}', expected '{name}', the name that "
            "it is registered under"
        )
    return None  # inherited from another method, whose section it is


def check_part(kind: str, name: str, part: Any) -> None:
    """Raise LongtailError if a method or a task cannot have its name, or its settings cannot be a section.

    Args:
        kind: method or task.
        name: of the part.
        part: the method or task.
    """
    if name in _CORE_FIELDS or name in {"auto", "settings"}:
        raise LongtailError(f"{kind} '{name}': is the name of a setting or of a value of one; choose another name")
    other = TASKS if kind == METHODS.kind else METHODS
    if name in other:
        raise LongtailError(f"{kind} '{name}': a {other.kind} has the name already; choose another name")
    _own_settings(kind, name, part.settings_class)


def settings_types() -> dict[str, type[Settings]]:
    """Return the settings of every method and task that has some, by section; imports all of them."""
    kinds = {name: settings_type(name) for name in (*METHODS, *TASKS)}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _without_defaults(sections: Iterator[Settings] | Any) -> tuple[Settings, ...]:
    """Return the sections that are not all defaults, in order of name: equal configurations are then equal objects."""
    return tuple(sorted((s for s in sections if s != type(s)()), key=lambda settings: settings.section))


def field_names() -> list[str]:
    """Return every field as it is written in a recipe and on the command line, ``data.imbalance`` for one."""
    names = [name for name in _CORE_FIELDS if name not in _CORE_SECTIONS]
    for section, kind in {**_CORE_SECTIONS, **settings_types()}.items():
        names += [f"{section}.{f.name}" for f in dataclasses.fields(kind)]
    return names


def parse_config(values: dict[str, Any], where: str = "config") -> Config:
    """Check plain values and return a :class:`Config`.

    Args:
        values: as :meth:`Config.to_dict` returns them; what is missing takes its default.
        where: begins the message of an error: the name of a file for one, or :data:`FLAGS`.

    Raises:
        LongtailError: a field does not exist, or its value has the wrong type or range.
    """
    if not isinstance(values, dict):
        raise LongtailError(f"{where}: expected fields with values, got {_kind_of(values)}")
    core = {name: value for name, value in values.items() if name in _CORE_FIELDS}
    sections = []
    for name in values.keys() - core.keys():
        kind = settings_type(str(name))
        if kind is None:
            raise LongtailError(f"{where}: there is no field '{name}'{did_you_mean(str(name), field_names())}")
        sections.append(validate(kind, values[name], where, f"{name}."))
    config: Config = validate(Config, core, where)
    return dataclasses.replace(config, settings=_without_defaults(sections))


def validate(kind: Any, values: Any, where: str, prefix: str = "") -> Any:
    """Return an object of type ``kind`` from plain values, every type and range checked.

    Args:
        kind: a dataclass.
        values: a dict, by field.
        where: begins the message of an error.
        prefix: begins the name of a field in it, ``data.`` for one.
    """
    if not isinstance(values, dict):
        section = f"{prefix[:-1]}: " if prefix else ""
        raise LongtailError(f"{where}: {section}expected fields with values, got {_kind_of(values)}")
    try:
        result = TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        # for a union pydantic names the branch too, in parts that are no identifiers
        name = prefix + ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
        if first["type"] == "unexpected_keyword_argument":
            raise LongtailError(f"{where}: there is no field '{name}'{did_you_mean(name, field_names())}") from None
        by_flags = where == FLAGS
        if isinstance(first.get("ctx", {}).get("error"), LongtailError):
            raise LongtailError(f"{'' if by_flags else f'{where}: '}{first['ctx']['error']}") from None
        expected = _expected(first["msg"], first["input"])
        if by_flags:
            raise LongtailError(f"--{name} {first['input']}: {expected}") from None
        raise LongtailError(f"{where}: {name}: {expected}, got {_shown(first['input'])}") from None
    _check_no_switch(values, result, where, prefix)
    return result


def _check_no_switch(values: dict[str, Any], result: Any, where: str, prefix: str) -> None:
    """Raise LongtailError for a yes or no, which YAML has for True and False, that was taken for 1 or 0."""
    for name, value in values.items():
        read = getattr(result, name)
        if isinstance(value, dict) and dataclasses.is_dataclass(read):
            _check_no_switch(value, read, where, f"{prefix}{name}.")
        elif isinstance(value, bool) and not isinstance(read, bool):
            raise LongtailError(f"{where}: {prefix}{name}: expected a number, got {value}")


def _kind_of(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _expected(message: str, value: Any) -> str:
    """Return a message of pydantic on a value in the form of ours: what was expected."""
    wanted = message.removeprefix("Input should be ").split(", unable to ")[0]
    if wanted == "a valid tuple":
        return "expected a list" + (f", such as [{value}]" if isinstance(value, int | float | str) else "")
    if wanted.startswith("a dictionary or an instance of "):
        return "expected fields with values"
    if wanted == message:
        return message
    return f"expected {'a value ' if wanted.startswith(('greater', 'less')) else ''}{wanted}"


def validate_section(section: Any, where: str) -> Any:
    """Return a dataclass that came from flags with every type and range checked."""
    return validate(type(section), dataclasses.asdict(section), FLAGS, f"{where}.")
