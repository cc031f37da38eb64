"""Classification: one class per image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.transforms import AnyTransform, build_transform
from longtail.errors import LongtailError
from longtail.evaluation.paired import paired_half_width
from longtail.inference.model_config import ModelConfig
from longtail.inference.options import InferenceOptions
from longtail.inference.output import PredictionOutput
from longtail.inference.recognizer import Recognizer
from longtail.registry import TRANSFORMS
from longtail.tasks.base import (
    EvaluationRequest,
    Evaluator,
    ImageResults,
    Metrics,
    PredictionRequest,
    ReportSections,
    Task,
    check_inference_options,
)
from longtail.tasks.classification.calibration import calibrate
from longtail.tasks.classification.console import trust_lines
from longtail.tasks.classification.error_images import save_error_images
from longtail.tasks.classification.evaluate import evaluate_run
from longtail.tasks.classification.evaluator import ClassificationEvaluator, predict_split
from longtail.tasks.classification.predict import predict_files
from longtail.tasks.classification.tta import tta_lines


class Classification(Task[Recognizer]):
    """One class per image."""

    name = "classification"
    model_class = Recognizer
    columns = (
        ("balanced_accuracy", "balanced accuracy"),
        ("many", "many"),
        ("medium", "medium"),
        ("few", "few"),
        ("worst_tenth", "worst tenth"),
        ("worst_class", "worst class"),
        ("harmonic_mean", "harmonic mean"),
    )
    printed_metrics: ClassVar[Mapping[str, str]] = {
        "balanced_accuracy": "balanced accuracy",
        "top1": "top1",
        "top5": "top5",
        "many": "many",
        "medium": "medium",
        "few": "few",
        "worst_tenth": "worst tenth",
        "worst_class": "worst class",
        "harmonic_mean": "harmonic mean",
    }
    compared_metrics = ("balanced_accuracy",)
    validation_metrics = ("balanced_accuracy", "top1")

    def build_transforms(self, config: Config, data: LongTailedData, uses: Sequence[str]) -> list[AnyTransform]:
        """Return the augmentation of every view, by what the view is for."""
        names = {"classification": config.data.augment, "contrast": config.data.contrast_augment}
        used = [names[use] for use in uses]
        transforms = [TRANSFORMS[name] for name in used]
        if len({transform.per_image for transform in transforms}) > 1:
            raise LongtailError(
                f"data.augment {names['classification']} and data.contrast_augment {names['contrast']} do not go "
                "together: one of them augments image by image, the other whole batches"
            )
        if len(data.mean) == 1 and any(transform.needs_color for transform in transforms):
            grey = sorted(name for name in TRANSFORMS if not TRANSFORMS[name].needs_color)
            raise LongtailError(
                f"data.augment {used[0]}: needs images in colour, these are grey; use {', '.join(grey)}"
            )
        return [build_transform(name, data.image_size) for name in used]

    def calibrate(self, model: Recognizer, images: ImageSet, config: Config) -> Recognizer:
        """Return the model with a temperature fitted on validation images."""
        return calibrate(model, images, config)

    def predict_split(
        self, model: Recognizer, images: ImageSet, options: InferenceOptions
    ) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Yield positions, scores and labels of this process's part of a split."""
        check_inference_options(options, self.label_kind, self.name)
        return predict_split(model, images, options.fixed_tta)

    def evaluator(
        self,
        model: Recognizer,
        images: ImageSet,
        config: Config,
        priors: Mapping[str, Tensor | None],
        accuracy_only: bool,
    ) -> Evaluator:
        """Return an empty evaluator."""
        return ClassificationEvaluator(model, images, config, priors, accuracy_only)

    def evaluate_run(
        self, model: Recognizer, config: Config, data: LongTailedData, request: EvaluationRequest
    ) -> tuple[dict[str, Metrics], str, dict[str, Any]]:
        """Return the metrics of a finished run by prior, the main prior, and further results."""
        check_inference_options(request.options, self.label_kind, "evaluate")
        return evaluate_run(model, config, data, request)

    def summary_lines(self, metrics: Mapping[str, Any]) -> list[str]:
        """Return lines on test-time augmentation, calibration, estimated class frequencies and conformal sets."""
        return [*tta_lines(metrics), *trust_lines(metrics)]

    def sampling_half_width(
        self, metric: str, ours: Sequence[ImageResults], theirs: Sequence[ImageResults]
    ) -> float | None:
        """Return the half width of a difference's 95 % interval over test images."""
        runs = (*ours, *theirs)
        if metric != "balanced_accuracy" or any(run.keys() < {"labels", "predicted"} for run in runs):
            return None
        labels = ours[0]["labels"]
        if any((run["labels"] != labels).any() for run in (*ours, *theirs)):
            return None
        right = [[run["predicted"] == labels for run in runs] for runs in (ours, theirs)]
        return paired_half_width(labels, *right)

    def save_examples(self, run: Path, images: ImageSet, metrics: Metrics) -> None:
        """Write the images of the most confident errors to the run's folder."""
        save_error_images(run, images, metrics.get("errors", {}))

    def predict_files(self, model: Recognizer, files: Sequence[Path], request: PredictionRequest) -> PredictionOutput:
        """Return classes and probabilities of image files."""
        return predict_files(model, files, request)

    def report(
        self,
        run: Path,
        model_config: ModelConfig,
        config: Config,
        test: Mapping[str, Metrics],
        epochs: Sequence[Mapping[str, Any]],
    ) -> ReportSections:
        """Return what the report of a run shows."""
        # imported here: matplotlib takes a second, and prediction does not need it
        from longtail.tasks.classification.report import report_sections

        return report_sections(run, model_config, config, test, epochs)


CLASSIFICATION = Classification()
