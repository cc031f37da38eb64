"""What ``config.json`` of a saved model holds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from longtail.errors import LongtailError
from longtail.evaluation.temperature_fit import TemperatureFit, describe_temperatures
from longtail.registry import TASKS

_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
_Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture, preprocessing, classes and training of a model. Legend: C classes, K keys, D embedding width."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: Literal[2] = 2
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    """(C,) training images per class; labelled training pixels where every pixel has a label."""
    image_counts: tuple[int, ...] = ()
    """(C,) training images of each class, where ``class_counts`` counts something else and they matter."""
    class_ids: tuple[int, ...] = ()
    """(C,) ids of the classes in the training annotations, where they have ids (COCO, LVIS); empty otherwise, and in
    models that were saved without them."""
    network: str
    task: str = "classification"
    """Name of the task in :data:`longtail.registry.TASKS`."""
    scale: float
    """Scale of the cosine classifier."""
    head: Literal["cosine", "linear", "mixture_ensemble", "experts", "regions"] = "cosine"
    """Type of the classifier: linear after ``longtail rebalance``, mixture_ensemble with ``gml.ensemble_weight``,
    experts of method experts, regions where the classes are those of regions of an image."""
    experts: Annotated[int, Field(ge=1)] = 1
    """Experts of the network, whose features are side by side; 1 is a network as it is."""
    expert_stages: Annotated[int, Field(ge=0)] = 0
    """Last stages that each expert has for itself."""
    mixture_keys: tuple[int, int] = (0, 0)
    """(K, D) of a mixture ensemble."""
    ensemble_weight: float = 0.0
    """Weight of the mixture's log-likelihood beside the classifier's score."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    """Side in pixels of the images."""
    network_size: int | None = None
    """Side in pixels to which images are resized before they enter the network, if another one."""
    stored_size: int
    """Side in pixels to which an image is resized before the centre is cropped."""
    shape: tuple[int, int] | None = None
    """Height and width of most training images where they are not square; other sizes are accepted."""
    sliding_window: int | None = None
    """Side of the square window that slides over an image where pixels have labels; the whole image at once if not
    given, and in models that were saved without it."""
    temperature: _Temperature = 1.0
    """Divisor of the scores, fitted on the validation images; 1 where there were none."""
    class_temperatures: tuple[_Temperature, ...] = ()
    """The same by predicted class, where every shot group has its own; empty otherwise."""
    temperature_fits: dict[str, TemperatureFit] = field(default_factory=dict)
    """The temperature of all classes as ``all``, those of shot groups by name, with 95 % intervals and the number of
    validation images that each rests on; empty without validation images, and in models that were saved without it."""
    predicts_under: Literal["uniform", "train"]
    """The prior in the scores: that of the training set after plain cross-entropy, else uniform."""
    training_info: dict[str, Any] = field(default_factory=dict)
    """Method, recipe, epochs, seed, versions, seconds."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """On the test set, under the uniform prior."""

    def __post_init__(self) -> None:
        TASKS.check(self.task, "task")

    @property
    def calibrated_on(self) -> str:
        """A sentence on the temperatures and the validation images that they rest on; empty if none was recorded."""
        return describe_temperatures(self.temperature_fits)

    @property
    def channels(self) -> int:
        """3 for colour images, 1 for grey ones."""
        return len(self.mean)


PLUGIN_HINT = "(of a plugin? name its file with --plugin)"
"""End of the message on a task or a network of a model that is not known."""


def model_folder(folder: Path | str) -> Path:
    """Return the folder of a model's files, given that folder or the folder of its run.

    Raises:
        LongtailError: there is no model, or a file that could run code lies beside it.
    """
    folder = Path(folder)
    if (folder / "recognizer").is_dir():
        folder = folder / "recognizer"
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        unfinished = (folder / "config.yaml").is_file()
        hint = "the run has not finished; use --resume to continue" if unfinished else "expected a finished run"
        raise LongtailError(f"{folder}: contains no model: {hint}")
    pickle = next((path for path in sorted(folder.iterdir()) if path.suffix.lower() in _PICKLES), None)
    if pickle is not None:
        raise LongtailError(f"{pickle}: may run code when it is read; weights are safetensors: remove it")
    return folder


def read_model_config(folder: Path | str) -> ModelConfig:
    """Read ``config.json`` of a model's folder, or of the folder of its run.

    Raises:
        LongtailError: there is none, or a field of it is wrong.
    """
    path = model_folder(folder) / "config.json"
    try:
        config: ModelConfig = TypeAdapter(ModelConfig).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(first.get("ctx", {}).get("error"), LongtailError):
            raise LongtailError(f"{path}: {first['ctx']['error']} {PLUGIN_HINT}") from None
        where = ".".join(str(part) for part in first["loc"])
        hint = "; it was saved by another version of longtail" if where == "format" else ""
        raise LongtailError(f"{path}: {where}: {first['msg']}{hint}") from None
    except (OSError, ValueError) as error:
        raise LongtailError(f"{path}: cannot be read: {error}") from None
    return config
