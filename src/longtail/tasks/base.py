"""What a task is: from the data set's labels to the saved model, its metrics, its predictions and its part of a report.

The trainer, the command line, the report and the export ask the task and know none by name. A new task is a folder here
(or a plugin) that registers an instance in :data:`longtail.registry.TASKS`, and a data source whose data names it.

Legend: N images, C classes, H and W sides in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from PIL import Image
from torch import Tensor

from longtail.config import Config, Settings
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.transforms import AnyTransform
from longtail.errors import LongtailError
from longtail.inference.model import Prior, TrainedModel
from longtail.inference.model_config import ModelConfig
from longtail.inference.options import TTA, InferenceOptions
from longtail.inference.output import PredictionOutput
from longtail.methods.base import Finding, LabelKind
from longtail.methods.samples import SampleAdapter
from longtail.nn import Encoder, TeacherEncoder
from longtail.registry import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from longtail.inference.export import Exported

Model = TypeVar("Model", bound=TrainedModel)
Metrics = dict[str, Any]
"""Metrics of a split under one prior, in percent."""
ImageResults = Mapping[str, "NDArray[Any]"]
"""Arrays of N integers, of every image of a split, in its order."""


class Evaluator(ABC):
    """Accumulates the metrics of a split under several priors, as torchmetrics does; counts add up over processes."""

    @abstractmethod
    def update(self, positions: Tensor, scores: Any, labels: Tensor) -> None:
        """Add some images.

        Args:
            positions: (B,) where they are in the split.
            scores: (B, C), or (B, C, H, W), free of any prior; or whatever else the task's ``predict_split`` yields of
                B images.
            labels: (B,), or (B, H, W); −1 where there is none. Empty where the evaluator has the annotations.
        """

    @abstractmethod
    def compute(self) -> dict[str, Metrics]:
        """Return the metrics over all processes, by prior."""

    def image_results(self) -> ImageResults:
        """Return what a run keeps of every image of its test set, over all processes; by default nothing.

        Comparisons give it to :meth:`Task.sampling_half_width`. What depends on a prior has its name.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What ``longtail evaluate`` is asked for beyond the metrics under the uniform and the training prior."""

    prior: str = "uniform"
    """uniform, train, estimate (from the test images without their labels), or a file of class frequencies."""
    options: InferenceOptions = field(default_factory=InferenceOptions)
    test_prior: str | None = None
    """Class frequencies that the test set is weighted to have: forward, backward, uniform, train, or a file."""
    imbalance: float = 100.0
    """Imbalance factor of a forward or backward test prior."""
    coverage: float | None = None
    """Coverage of conformal sets, in (0, 1)."""
    predictions: bool = False
    """Of models that classify whole images: also return ``predictions``, for every test image its ``path``, ``label``,
    predicted ``class``, the ``probability`` of that and the ``label_probability``, the most confident errors first."""


@dataclass(frozen=True, kw_only=True)
class PredictionRequest:
    """What ``longtail predict`` is asked for."""

    prior: str = "uniform"
    options: InferenceOptions = field(default_factory=InferenceOptions)
    coverage: float | None = None
    top: int | None = None
    """Classes to show per image, 3 if not given; of models that find objects: objects, all if not given."""
    threshold: float | None = None
    """Lowest score of an object, in [0, 1]; for models that find objects."""
    out: Path | None = None
    """Folder for the files that the task writes, if it writes any."""
    progress: bool = False
    """Show a progress bar."""


@dataclass(frozen=True, kw_only=True)
class ReportSections:
    """What the report of a run says of its task; classes are in order of frequency, head first."""

    counted: str
    """What the classes are counted in."""
    note: str
    """How the metrics are defined."""
    columns: Sequence[tuple[str, str]]
    """Metrics with their titles, the main one first."""
    group_sizes: Mapping[str, int]
    """Classes in each group."""
    figures: Sequence[tuple[str, Figure]]
    """Plots with their headings."""
    header: Sequence[str]
    """Columns of the table of the classes."""
    classes: Sequence[Sequence[Any]]
    """Rows of the table of the classes."""
    examples: Sequence[tuple[str, str]] = ()
    """Captions, and images as data URIs."""
    examples_note: str = ""
    """What the examples show."""
    colors: Sequence[tuple[str, str]] = ()
    """Classes with their colours in the examples."""
    findings: Sequence[Finding] = ()
    confusions: Sequence[Sequence[str]] = ()
    """Rows of a table: class, predicted class, how often."""
    errors: Sequence[tuple[str, Sequence[tuple[str, Any, str]]]] = ()
    """Headings, each with images as data URIs, their captions, and these as plain text."""
    errors_note: str = (
        "Test images with their class, the predicted class and its probability; one image per class, its most "
        "confident error."
    )
    """What the errors show."""
    errors_width: float = 6.0
    """Of an image of an error, in rem; small copies, of 6 rem, show their pixels."""


class Task(ABC, Generic[Model]):
    """A task, whose models are of type ``Model``."""

    name: ClassVar[str]
    settings_class: ClassVar[type[Settings] | None] = None
    """The task's own settings, a section of the recipe."""
    label_kind: ClassVar[LabelKind] = "image"
    """What a label is of: a whole image, every pixel, or boxes."""
    model_class: type[Model]
    """What is saved and predicts."""
    columns: ClassVar[Sequence[tuple[str, str]]]
    """Metrics that comparisons show, with their titles; the first is the main one."""
    printed_metrics: ClassVar[Mapping[str, str]]
    """Metrics that the command line prints, with their titles."""
    compared_metrics: ClassVar[Sequence[str]]
    """Metrics whose paired differences are reported."""
    validation_metrics: ClassVar[Sequence[str]]
    """Metrics of the validation images that are logged; the first chooses the epoch."""
    unit: ClassVar[str] = "accuracy"
    """What a class's own metric is called."""
    finds_objects: ClassVar[bool] = False
    """Whether its models find objects in an image, see :meth:`find_objects`."""

    def auto_config(self, config: Config, data: LongTailedData) -> tuple[Config, list[str]]:  # noqa: ARG002
        """Return the configuration with the task's open settings chosen, and the reason of every choice."""
        return config, []

    def auto_network(self, data: LongTailedData) -> str:
        """Return a network for the size of the images."""
        return "conv8" if data.image_size <= 12 else "resnet32" if data.image_size <= 64 else "resnet18"

    def check(self, config: Config) -> None:
        """Raise LongtailError where method or network do not fit the task."""
        if self.label_kind not in METHODS[config.method].label_kinds:
            fitting = [name for name in METHODS if self.label_kind in METHODS[name].label_kinds]
            raise LongtailError(
                f"method {config.method}: does not train networks for {self.name}, which {config.data.source} is for; "
                f"use one of {', '.join(fitting)}"
            )
        if self.label_kind != "image" and config.second_stage != "none":
            raise LongtailError(
                f"second_stage {config.second_stage}: re-trains a classifier of whole images, and is not supported for "
                f"{self.name}; set it to none"
            )

    @abstractmethod
    def build_transforms(self, config: Config, data: LongTailedData, uses: Sequence[str]) -> list[AnyTransform]:
        """Return the augmentation of every view, by what the view is for.

        Raises:
            LongtailError: they do not go together, or do not fit the images.
        """

    def prepare_encoder(self, encoder: Encoder, config: Config, data: LongTailedData) -> None:
        """Change an encoder with its initial weights into what is trained; called again it changes nothing."""

    def sample_adapter(self, config: Config, data: LongTailedData) -> SampleAdapter:  # noqa: ARG002
        """Return what a sample is for the method."""
        return SampleAdapter()

    def teacher_config(self, config: Config) -> Config:
        """Return the configuration without what has no effect on a teacher, so that runs can share it."""
        return config

    def check_teacher(self, encoder: TeacherEncoder, source: str) -> None:
        """Raise LongtailError if a teacher that is given, as ``source`` says, does not fit the task."""

    def model_geometry(self, data: LongTailedData) -> dict[str, Any]:
        """Return the fields of a :class:`ModelConfig` that say how images are brought to the network's size."""
        import torch

        images = data.test.images
        stored = images.take(torch.zeros(1, dtype=torch.int64)).shape[-1] if len(images) else data.image_size
        return {"image_size": data.image_size, "stored_size": stored}

    def calibrate(self, model: Model, images: ImageSet, config: Config) -> Model:  # noqa: ARG002
        """Return the model with its probabilities calibrated on validation images."""
        return model

    @abstractmethod
    def predict_split(
        self, model: Model, images: ImageSet, options: InferenceOptions
    ) -> Iterable[tuple[Tensor, Any, Tensor]]:
        """Yield positions, scores and labels of this process's part of a split, see :meth:`Evaluator.update`."""

    @abstractmethod
    def evaluator(
        self,
        model: Model,
        images: ImageSet,
        config: Config,
        priors: Mapping[str, Tensor | None],
        accuracy_only: bool,
    ) -> Evaluator:
        """Return an empty evaluator.

        Args:
            model: what is evaluated.
            images: the split.
            config: settings of the run.
            priors: (C,) log priors by name; None is the uniform one.
            accuracy_only: leave out what a look at the validation images does not need.
        """

    def default_options(self, config: Config) -> InferenceOptions:  # noqa: ARG002
        """Return the inference options that a run's settings ask for."""
        return InferenceOptions()

    @abstractmethod
    def evaluate_run(
        self, model: Model, config: Config, data: LongTailedData, request: EvaluationRequest
    ) -> tuple[dict[str, Metrics], str, dict[str, Any]]:
        """Return the metrics of a finished run on its test set by prior, the main prior, and further results.

        Raises:
            LongtailError: the request does not fit the task.
        """

    def summary_lines(self, metrics: Mapping[str, Any]) -> list[str]:  # noqa: ARG002
        """Return lines that ``longtail evaluate`` prints below its table, from what its ``--json`` holds."""
        return []

    def sampling_half_width(
        self,
        metric: str,  # noqa: ARG002
        ours: Sequence[ImageResults],  # noqa: ARG002
        theirs: Sequence[ImageResults],  # noqa: ARG002
    ) -> float | None:
        """Return the half width of a difference's 95 % interval over test images; None where it is not known.

        Args:
            metric: one of :attr:`compared_metrics`, whose mean over some runs is compared with that over others.
            ours: of the runs, what their :meth:`Evaluator.image_results` were; ``predicted`` is what they have under
                the prior that the run's method predicts under.
            theirs: of the other runs, the same test images.
        """
        return None

    def save_examples(self, run: Path, images: ImageSet, metrics: Metrics) -> None:
        """Write images of the test set that a report will show to the run's folder."""

    @abstractmethod
    def predict_files(self, model: Model, files: Sequence[Path], request: PredictionRequest) -> PredictionOutput:
        """Return predictions of image files.

        Raises:
            LongtailError: the request does not fit the task, or a file cannot be read.
        """

    def find_objects(self, model: Model, image: Image.Image, prior: Prior) -> list[dict[str, Any]]:
        """Return the objects of an image, the highest score first, as JSON holds them; for a web page.

        Each has ``class``, ``score`` in [0, 1], ``box`` (x1, y1, x2, y2 in pixels of the image) and ``color`` as CSS
        writes it. Only where :attr:`finds_objects`.

        Args:
            model: what finds them.
            image: in RGB.
            prior: class frequencies of the objects where it comes from.
        """
        raise NotImplementedError

    def evaluate_results(self, results: Path, annotations: Path, train_annotations: Path | None) -> dict[str, Any]:
        """Return the metrics of predictions that any program has written to a file, as ``evaluate --json`` holds them.

        Only where :attr:`finds_objects`.

        Args:
            results: a list of objects in COCO's format for results.
            annotations: of the images, in COCO's or LVIS's format.
            train_annotations: of the training images, by which classes are rare, common or frequent.

        Raises:
            LongtailError: a file cannot be read, or they do not fit together.
        """
        raise NotImplementedError

    def export(self, model: Model, path: Path, prior: Prior, images: Sequence[Path], tta: TTA) -> Exported:
        """Write a model as an ONNX file, and compare it with PyTorch.

        Args:
            model: what to export, on the CPU.
            path: the file to write.
            prior: class frequencies that its predictions assume.
            images: files to compare on; random images if there are none.
            tta: test-time augmentation that is part of the file.

        Raises:
            LongtailError: the extra is missing, an option does not fit the task, or the file's predictions differ from
                PyTorch's.
        """
        from longtail.inference.export import export_onnx

        return export_onnx(model, path, prior, images, tta)

    @abstractmethod
    def report(
        self,
        run: Path,
        model_config: ModelConfig,
        config: Config,
        test: Mapping[str, Metrics],
        epochs: Sequence[Mapping[str, Any]],
    ) -> ReportSections:
        """Return what the report of a run shows.

        Args:
            run: its folder.
            model_config: of its model.
            config: its settings.
            test: metrics on the test set by prior.
            epochs: lines of ``metrics.jsonl`` of kind epoch, in order.
        """


def check_inference_options(options: InferenceOptions, label_kind: LabelKind, where: Path | str) -> None:
    """Raise LongtailError if there are inference options that are not for such models.

    Args:
        options: how the scores of an image are computed.
        label_kind: what a label is of.
        where: begins the message.
    """
    if label_kind == "boxes" and options.tta != InferenceOptions().tta:
        raise LongtailError(f"{where}: --tta {options.tta} is not for models that find boxes; leave it out")
    if label_kind == "pixels":
        if options.tta in {"crops", "auto"}:
            raise LongtailError(
                f"{where}: --tta {options.tta} is for models that classify whole images; use --tta flip"
            )
        return
    for name in ("sliding_window", "tta_scales"):
        if getattr(options, name) != getattr(InferenceOptions(), name):
            raise LongtailError(f"{where}: --{name} is for models that label pixels")


def log_priors(
    model: TrainedModel, frequencies: Mapping[str, Sequence[float]] | None = None
) -> dict[str, Tensor | None]:
    """Return (C,) log priors by name: uniform, train, and those of given class frequencies."""
    specs: dict[str, Any] = {"uniform": "uniform", "train": "train", **(frequencies or {})}
    return {name: model.log_prior(spec) for name, spec in specs.items()}
