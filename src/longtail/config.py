"""The settings of a run: typed, checked, and read without importing torch.

A recipe is a YAML file over :class:`Config`; every field is also a flag (``--data.imbalance 50``).
A field that nobody knows, or a value of the wrong type or range, is an error that names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from longtail.errors import LongtailError, nearest
from longtail.methods import METHODS

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Augment = Literal[
    "auto", "none", "digits", "cifar", "cifar-plain", "cifar-rand", "photo", "imagenet", "imagenet-contrast"
]

_STRICT = ConfigDict(extra="forbid")
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images, and how their tail is made."""

    __pydantic_config__ = _STRICT

    source: str = "digits-lt"
    """Which set: digits-lt, cifar10-lt, cifar100-lt, imagenet-lt, places-lt, inat2018, folder (one sub-folder a class),
    list (lists, tables or annotations of one's own), or hub (the library datasets); for segmentation camvid, ade20k or
    masks (images/ and annotations/ of one's own, in ADE20K's layout)."""
    root: str | None = None
    """Folder of the images, or of a local copy of a named set; a named set without it is downloaded."""
    name: str | None = None
    """Name of a set on the Hugging Face Hub."""
    train: str | None = None
    """List (path label a line), table (.csv, .tsv, .parquet) or annotations (.json) of the training images."""
    val: str | None = None
    """The same for validation images."""
    test: str | None = None
    """The same for test images."""
    image_column: str | None = None
    """Column of a table that holds the paths, or the images; looked for under its usual names if not given."""
    label_column: str | None = None
    """Column that holds labels or class names."""
    split_column: str | None = None
    """Column that says train, val or test."""
    profile: Literal["auto", "natural", "exponential", "step", "pareto"] = "auto"
    """How the training images are thinned out; auto: exponential for the balanced named sets, else natural (not)."""
    imbalance: Annotated[float, Field(ge=1)] = 100.0
    """Imbalance factor of a profile: images of the largest class over images of the smallest."""
    class_order: Literal["index", "name", "random"] = "index"
    """Which class a profile makes head and which tail; random follows the seed."""
    seed: int | None = None
    """Seed of the split, the class order and the images that are kept; follows --seed if not given."""
    test_per_class: Positive = 50
    """Test images a class that digits-lt holds out."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each class's training images that a set without validation images holds out, to pick the epoch and to
    calibrate with. Of digits-lt and CIFAR it is taken before the tail is made: a balanced set, and fewer images in the
    head than elsewhere."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each class that a set without a test split holds out."""
    min_images: Positive = 1
    """Least training images a class of one's own set."""
    image_size: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels at which images of files are used; chosen from the images if not given."""
    memory_gib: PositiveFloat = 4.0
    """A set whose decoded images need more is decoded batch by batch instead of once."""
    broken_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the training images that may turn out unreadable while training; they are replaced and named."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode and augment images of files; one a core, at most 8, if not given."""
    sampler: Literal["instance", "class", "sqrt", "progressive", "deferred"] = "instance"
    """Which images an epoch shows: each once, classes equally often, by the root of their size, from the first to the
    second along the training, or the second late."""
    deferred_from: Share = 0.8
    """Share of the training after which the deferred sampler shows classes equally often, and ldam weighs them."""
    augment: Augment = "auto"
    """Augmentation of the classification view; auto takes the source's own."""
    contrast_augment: Augment = "auto"
    """Augmentation of the query and key views; auto is the classification view's, with grey and blur for imagenet."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """SGD."""

    __pydantic_config__ = _STRICT

    learning_rate: PositiveFloat = 0.1
    """Learning rate at its highest."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum."""
    weight_decay: Weight = 5e-4
    """Weight decay; the temperature has none."""
    nesterov: bool = False
    """Nesterov's momentum."""
    clip: PositiveFloat | None = None
    """Largest norm of the gradient; a longer one is shortened to it."""
    accumulate: Positive = 1
    """Parts that a batch is passed in, to save memory; the step is made once for all of them."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a slow average of the student's weights, which is then what is evaluated and kept."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over the training; its durations are shares of the whole, so they follow --epochs."""

    __pydantic_config__ = _STRICT

    name: Literal["constant", "multistep", "cosine", "one-cycle"] = "cosine"
    """Shape of the schedule."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training in which the rate rises linearly to its highest value."""
    milestones: tuple[Share, ...] = (0.8, 0.9)
    """Shares of the training at which multistep multiplies the rate by gamma."""
    gamma: PositiveFloat = 0.1
    """Factor at each milestone."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """The cosine classifier, which every method has."""

    __pydantic_config__ = _STRICT

    scale: PositiveFloat = 30.0
    """Score of class c is scale · cos(feature, weight of c)."""
    adjust: bool = True
    """Add the log prior to the scores while training (ce, focal, cb and ldam never do)."""
    views: Positive = 1
    """Student views a step, each with its own loss (ce, la, focal, cb, ldam; the others have their own layouts)."""
    every_view: bool = False
    """Apply the classifier's term to every student view, not to the classification view alone (the contrastive methods
    and gml; paco and gpaco always do)."""
    distillation_weight: Weight = 0.0
    """Weight of the distillation from the teacher's classifier, for all methods but gml, which has its own."""
    focal_gamma: Weight = 2.0
    """Exponent of the focal loss [γ] (focal)."""
    effective_number_beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Overlap of a class's samples [β] (cb, and ldam late in the training)."""
    largest_margin: Annotated[float, Field(ge=0, lt=2)] = 0.5
    """Margin of the smallest class, in cosines (ldam)."""


@dataclass(frozen=True, kw_only=True)
class Gml:
    """The Gaussian-mixture likelihood; the paper's symbols are in brackets."""

    __pydantic_config__ = _STRICT

    queue_size: Positive | None = None
    """Slots of all class-wise queues together [K]; one a training image, at most 16384, if not given."""
    queue_minimum: Positive = 2
    """Least slots a class [k_m]."""
    embedding_dim: Positive = 32
    """Width of query and key embeddings."""
    temperature: Annotated[float, Field(gt=0.02, lt=1)] = 0.1
    """Temperature at the start [τ₀]; it stays between 0.02 and 1."""
    learn_temperature: bool = True
    """Learn the temperature by leave-one-out maximum likelihood."""
    share_query: bool = True
    """Let the classification view be the query view too: one student pass an image. The paper's recipes have two."""
    share_key: bool = False
    """Let the classification view be the key view too: one teacher pass an image instead of two, with distillation."""
    mix_all: bool = False
    """Let every student view be a query, not the query view alone."""
    queues: Literal["class", "plain", "batch"] = "class"
    """Where the keys are kept: a queue a class, one plain queue for all classes, or none beyond the batch."""
    keys: Literal["teacher", "momentum", "both"] = "teacher"
    """What makes the keys: the frozen teacher, a slow average of the student, or both, one's features beside the
    other's."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of that average."""
    self_pairs: Literal["mixture", "both", "none"] = "mixture"
    """Where a query meets its own image among the keys: in the mixture alone (the paper), where the temperature is
    learned too, or nowhere."""
    borrow: Annotated[int, Field(ge=0)] = 0
    """Further keys for every slot of a class with few images, each moved as far from it as a key of a large class lies
    from that class's mean: the tail borrows the head's spread."""
    join_weight: Weight = 0.0
    """Weight of the mixture's log-likelihood beside the classifier's score at prediction; the recogniser then keeps the
    keys. 1 is the product of both."""
    mixture_weight: Weight = 1.0
    """Weight of both GML terms [β]."""
    classifier_weight: Weight = 1.0
    """Weight of the logit-adjusted cross-entropy [γ]."""
    distillation_weight: Weight | None = None
    """Weight of the distillation from the teacher's classifier [α]; 1 where the teacher has one, if not given."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The contrast term of supcon, paco, gpaco, bcl and proco."""

    __pydantic_config__ = _STRICT

    weight: Weight = 1.0
    """Weight of the term; paco and gpaco have no other."""
    embedding_dim: Positive = 32
    """Width of the embeddings."""
    temperature: PositiveFloat = 0.1
    """Temperature; it is not learned."""
    views: Positive = 1
    """Student views that are compared."""
    share_view: bool = True
    """Let the classification view be one of them. The papers' recipes compare two more."""
    queue_size: Positive = 1024
    """Embeddings of earlier steps that are kept (paco, gpaco)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the slow average that makes the keys (paco)."""
    sample_weight: Weight = 0.05
    """Weight of a positive sample beside its class's centre [α] (paco, gpaco)."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen encoder whose features fill the queues (gml) and whose classifier is distilled."""

    __pydantic_config__ = _STRICT

    source: str = "train"
    """train (a first stage: logit-adjusted cross-entropy), the folder of a run, or timm:NAME (pretrained)."""
    network: str = "auto"
    """Network to train; auto: the student's own."""
    epochs: Positive | None = None
    """Epochs to train it; the student's own number if not given."""
    distillation_temperature: PositiveFloat = 4.0
    """Temperature of the distillation [T]."""
    cache: Annotated[int, Field(ge=0)] = 0
    """Views of every image whose teacher features are computed once and kept on disk; 0 computes them at every step."""


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """What is only of images whose every pixel has a label."""

    __pydantic_config__ = _STRICT

    crop: tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]] | None = None
    """Height and width of what is trained on; the images' own, at most 512, if not given."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    """Least and largest scale at which a training image is shown."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Largest change of brightness, contrast and saturation, as a share."""
    points: Positive = 128
    """Pixels an image that the mixture meets, as queries and as keys, shared out evenly among its classes (gml)."""
    keys: Literal["pixels", "regions", "both"] = "both"
    """What is pushed into the queues: drawn pixels, the mean of every class in an image, or both (gml)."""
    window: Annotated[int, Field(ge=32)] | None = None
    """Side of the square that slides over an image when it is judged; the whole image at once if not given."""
    boundary: PositiveFloat = 0.02
    """Width of the band along outlines that boundary IoU looks at, as a share of the image's diagonal."""


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Shot groups, by training images a class."""

    __pydantic_config__ = _STRICT

    many_above: Positive = 100
    """A class with more is in the group many."""
    few_below: Positive = 20
    """A class with fewer is in the group few; the rest are medium."""

    def groups(self, class_counts: Sequence[int]) -> list[str]:
        """Return many, medium or few for every class, by its training images."""
        return [
            "many" if count > self.many_above else "few" if count < self.few_below else "medium"
            for count in class_counts
        ]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    __pydantic_config__ = _STRICT

    recipe: tyro.conf.SuppressFixed[tyro.conf.Fixed[str]] = "digits-lt"
    """The recipe that this run started from; not a flag."""
    method: str = "gml"
    """Training method: ce (cross-entropy), la (logit adjustment), focal, cb (class-balanced), ldam, supcon, paco,
    gpaco, bcl, proco, gml; for segmentation ce, la, focal, cb, gml, dice, lovasz."""
    network: str = "auto"
    """Student: conv8, resnet8/14/20/32/44/56/110, or any timm model by name; for segmentation upernet:ENCODER or
    segformer:ENCODER, with :WIDTH after it for another than 256; auto chooses by image size."""
    pretrained: str = "none"
    """Weights that a timm model or encoder starts from: none, timm (its own, downloaded at first use), or a file of
    them (.safetensors, .pth). Images are then normalised as they were for these weights."""
    epochs: Positive | Literal["auto"] = 100
    """Passes over the training set; auto: as many as make 20,000 steps, from 30 to 200."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images a step."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Initialisation, order and augmentation follow from it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic."""
    compile: bool = False
    """Compile the networks (torch.compile; needs a C++ compiler on a CPU)."""
    calibration: Literal["single", "group"] = "single"
    """Temperature of the probabilities, fitted on the validation images where there are some: one for all, or one for
    each shot group, by the predicted class."""
    validate_every: Positive = 1
    """Epochs between two looks at the validation images, where there are some."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Least seconds between two writings of last.ckpt."""
    log: tuple[Literal["csv", "tensorboard", "wandb"], ...] = ()
    """Where the metrics go besides metrics.jsonl: csv, tensorboard, wandb (the last two are extras)."""
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    classifier: Classifier = field(default_factory=Classifier)
    gml: Gml = field(default_factory=Gml)
    contrast: Contrast = field(default_factory=Contrast)
    teacher: Teacher = field(default_factory=Teacher)
    segmentation: Segmentation = field(default_factory=Segmentation)
    shots: Shots = field(default_factory=Shots)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise LongtailError(f"method '{self.method}' is not known{nearest(self.method, METHODS)}")
        if self.shots.few_below > self.shots.many_above + 1:
            raise LongtailError(
                f"shots.few_below {self.shots.few_below} and shots.many_above {self.shots.many_above} overlap: "
                "a class cannot be both; lower few_below"
            )
        if self.segmentation.scale[0] > self.segmentation.scale[1]:
            raise LongtailError(f"segmentation.scale {self.segmentation.scale}: expected the least first")

    def replace(self, **changes: Any) -> Config:
        """Return a copy with other values; a dict changes fields of a section."""
        plain = {
            k: dataclasses.replace(getattr(self, k), **v) if isinstance(v, dict) else v for k, v in changes.items()
        }
        return dataclasses.replace(self, **plain)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and values, as they stand in ``config.yaml``."""
        plain: dict[str, Any] = TypeAdapter(Config).dump_python(self, mode="json")
        return plain

    def to_yaml(self) -> str:
        """Return the text of ``config.yaml``; :func:`parse_config` of it gives an equal object."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, kw_only=True)
class About:
    """A recipe's header: where it comes from and what it is expected to reach."""

    __pydantic_config__ = _STRICT

    summary: str
    """One line."""
    paper: str = ""
    """Source of the protocol."""
    command: str = ""
    """The exact command."""
    expected: str = ""
    """Expected score; «paper» marks one that was not run here."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named configuration with its header."""

    name: str
    about: About
    config: Config


def field_names(kind: type = Config, prefix: str = "") -> list[str]:
    """Return every field as it is written in a recipe and on the command line, ``data.imbalance`` for one."""
    names = []
    for f in dataclasses.fields(kind):
        section = _SECTIONS.get(f.name) if kind is Config else None
        names += field_names(section, f"{f.name}.") if section else [prefix + f.name]
    return names


_SECTIONS: dict[str, type] = {
    "data": Data,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "classifier": Classifier,
    "gml": Gml,
    "contrast": Contrast,
    "teacher": Teacher,
    "segmentation": Segmentation,
    "shots": Shots,
}


def parse_config(values: dict[str, Any], where: str = "config") -> Config:
    """Check plain values and return a :class:`Config`; ``where`` opens the message of an error."""
    config: Config = _checked(Config, values, where)
    return config


def checked(config: Config) -> Config:
    """Return a configuration that came from flags with every type and range checked."""
    return parse_config(dataclasses.asdict(config), "flags")


Section = TypeVar("Section")


def checked_section(section: Section, where: str) -> Section:
    """Return a section that came from flags with every type and range checked."""
    found: Section = _checked(type(section), dataclasses.asdict(section), where)  # type: ignore[call-overload]
    return found


def _checked(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise LongtailError(f"{where}: expected fields with values, got {type(values).__name__}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        # of a union's error the parts that are no names tell the branch
        name = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
        if first["type"] == "unexpected_keyword_argument":
            raise LongtailError(f"{where}: there is no field '{name}'{nearest(name, field_names())}") from None
        if isinstance(first.get("ctx", {}).get("error"), LongtailError):
            raise LongtailError(f"{where}: {first['ctx']['error']}") from None
        raise LongtailError(f"{where}: {name}: {first['msg']}, got {first['input']!r}") from None


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """Read a recipe by name, or from a file that ends in ``.yaml``.

    Raises:
        LongtailError: there is no such recipe or file, or a field in it is wrong.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        if name not in recipe_names():
            raise LongtailError(f"recipe '{name}' is not known{nearest(name, recipe_names())}")
        path = RECIPES / f"{name}.yaml"
    values = _read_yaml(path)
    about = _checked(About, values.pop("about", {"summary": f"recipe in {path.name}"}), f"{path.name}: about")
    return Recipe(name=path.stem, about=about, config=parse_config({**values, "recipe": path.stem}, path.name))


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe's values; ``base: NAME`` starts from another recipe's."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise LongtailError(f"recipe {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise LongtailError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise LongtailError(f"recipe {path}: expected fields with values, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if base not in recipe_names():
        raise LongtailError(f"recipe {path}: base '{base}' is not known{nearest(str(base), recipe_names())}")
    below = _read_yaml(RECIPES / f"{base}.yaml")
    below.pop("about", None)
    for key, value in values.items():
        below[key] = {**below[key], **value} if isinstance(value, dict) and isinstance(below.get(key), dict) else value
    return below


def read_config(path: Path) -> Config:
    """Read the ``config.yaml`` of a run."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LongtailError(
            f"{path}: cannot be read as a run's configuration: {' '.join(str(error).split())}"
        ) from None
    return parse_config(values, str(path))
