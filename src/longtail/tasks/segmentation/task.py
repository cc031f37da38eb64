"""Segmentation: one class per pixel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.sources.segmentation import SegmentationData
from longtail.data.sources.segmentation_transform import SegmentationTransform
from longtail.data.transforms import AnyTransform
from longtail.errors import LongtailError
from longtail.inference.model_config import ModelConfig
from longtail.inference.options import InferenceOptions
from longtail.inference.output import PredictionOutput
from longtail.methods.gml import GMLSettings
from longtail.methods.samples import SampleAdapter
from longtail.nn.segmentation import DECODERS, is_segmentation_network
from longtail.tasks.base import (
    EvaluationRequest,
    Evaluator,
    Metrics,
    PredictionRequest,
    ReportSections,
    Task,
)
from longtail.tasks.evaluate import evaluate_run_under
from longtail.tasks.segmentation.evaluator import SegmentationEvaluator, predict_split
from longtail.tasks.segmentation.pixels import PixelAdapter
from longtail.tasks.segmentation.predict import predict_files
from longtail.tasks.segmentation.segmenter import Segmenter
from longtail.tasks.segmentation.settings import SegmentationSettings

_MIN_CROP, _MAX_CROP = 32, 512  # pixels either way, of a crop that is chosen automatically


class Segmentation(Task[Segmenter]):
    """One class per pixel."""

    name = "segmentation"
    settings_class = SegmentationSettings
    label_kind = "pixels"
    model_class = Segmenter
    columns = (
        ("mean_iou", "mean IoU"),
        ("head", "head IoU"),
        ("middle", "middle IoU"),
        ("tail", "tail IoU"),
        ("boundary_iou", "boundary IoU"),
        ("balanced_accuracy", "mean class accuracy"),
    )
    printed_metrics: ClassVar[Mapping[str, str]] = {**dict(columns), "top1": "pixel accuracy"}
    compared_metrics = ("mean_iou", "tail")
    validation_metrics = ("mean_iou", "tail", "balanced_accuracy", "top1")
    unit = "IoU"

    def auto_config(self, config: Config, data: LongTailedData) -> tuple[Config, list[str]]:
        """Choose the size of the crops."""
        assert isinstance(data, SegmentationData)
        if config.section(SegmentationSettings).crop is not None:
            return config, []
        height, width = (max(_MIN_CROP, min(_MAX_CROP, side)) for side in data.size)
        reason = f"segmentation.crop {height} {width}: most images have {data.size[0]} × {data.size[1]} pixels"
        return config.replace(segmentation={"crop": (height, width)}), [reason]

    def auto_network(self, data: LongTailedData) -> str:  # noqa: ARG002
        """Return a small network."""
        return "upernet:resnet18:64"

    def check(self, config: Config) -> None:
        """Raise LongtailError where method, network or settings do not fit."""
        super().check(config)
        if not is_segmentation_network(config.network):
            raise LongtailError(
                f"network {config.network}: returns one feature vector per image; for {config.data.source} expected "
                f"{' or '.join(DECODERS)}:ENCODER, for example {DECODERS[0]}:{config.network}"
            )
        for name, value, usual in (
            ("augment", config.data.augment, {"auto", "none"}),
            ("image_size", config.data.image_size, {None}),
        ):
            if value not in usual:
                raise LongtailError(
                    f"data.{name} {value}: has no effect on images with masks; set segmentation.crop, .scale, .jitter"
                )
        unsupported = {
            "teacher.cache": config.teacher.cache > 0,
            "classifier.views above 1": config.classifier.views > 1,
            "teacher.views above 1": config.teacher.views > 1,
            "classifier.every_view": config.classifier.every_view,
            f"classifier.init {config.classifier.init}": config.classifier.init != "random",
        }
        if config.method == "gml":
            gml = config.section(GMLSettings)
            unsupported |= {
                "gml.queues batch": gml.queues == "batch",
                "gml.share_query false": not gml.share_query,
                "gml.share_key false": not gml.share_key,
                f"gml.keys {gml.keys}": gml.keys != "teacher",
                "gml.feature_transfer": gml.feature_transfer > 0,
                "gml.ensemble_weight": gml.ensemble_weight > 0,
            }
        first = next((name for name, used in unsupported.items() if used), None)
        if first is not None:
            raise LongtailError(f"{first}: is not supported for segmentation, which uses one view per image")

    def build_transforms(self, config: Config, data: LongTailedData, uses: Sequence[str]) -> list[AnyTransform]:  # noqa: ARG002
        """Return random crops, scales and colours for every view."""
        settings = config.section(SegmentationSettings)
        assert settings.crop is not None
        return [SegmentationTransform(settings.crop, settings.scale, settings.jitter) for _ in uses]

    def sample_adapter(self, config: Config, data: LongTailedData) -> SampleAdapter:
        """Return what makes pixels the samples."""
        assert isinstance(data, SegmentationData)
        settings = config.section(SegmentationSettings)
        return PixelAdapter(settings.pixels_per_image, settings.keys, list(data.draw_counts))

    def teacher_config(self, config: Config) -> Config:
        """Return the configuration without what only the mixture uses."""
        plain = SegmentationSettings()
        return config.replace(
            segmentation={"pixels_per_image": plain.pixels_per_image, "keys": plain.keys},
            classifier={"init": "random"},  # there are no class means of pixels to begin with
        )

    def model_geometry(self, data: LongTailedData) -> dict[str, Any]:
        """Return the size of most images; the network takes any."""
        assert isinstance(data, SegmentationData)
        return {"image_size": data.image_size, "stored_size": data.image_size, "shape": data.size}

    def predict_split(
        self, model: Segmenter, images: ImageSet, options: InferenceOptions
    ) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Yield positions, scores and labels of this process's part of a split."""
        return predict_split(model, images, options)

    def evaluator(
        self,
        model: Segmenter,
        images: ImageSet,
        config: Config,
        priors: Mapping[str, Tensor | None],
        accuracy_only: bool,
    ) -> Evaluator:
        """Return an empty evaluator."""
        return SegmentationEvaluator(model, images, config, priors, accuracy_only)

    def default_options(self, config: Config) -> InferenceOptions:
        """Return the sliding window of the settings."""
        return InferenceOptions(sliding_window=config.section(SegmentationSettings).sliding_window)

    def evaluate_run(
        self, model: Segmenter, config: Config, data: LongTailedData, request: EvaluationRequest
    ) -> tuple[dict[str, Metrics], str, dict[str, Any]]:
        """Return the metrics of a finished run on its test set by prior."""
        if request.test_prior is not None or request.coverage is not None or request.prior == "estimate":
            raise LongtailError(
                "--test_prior, --coverage and --prior estimate are for models that classify whole images"
            )
        options = request.options
        if options.sliding_window is None:
            options = dataclasses.replace(options, sliding_window=self.default_options(config).sliding_window)
        return evaluate_run_under(model, config, data, request.prior, options)

    def predict_files(self, model: Segmenter, files: Sequence[Path], request: PredictionRequest) -> PredictionOutput:
        """Write label images and overlays of image files."""
        return predict_files(model, files, request)

    def report(
        self,
        run: Path,
        model_config: ModelConfig,
        config: Config,  # noqa: ARG002
        test: Mapping[str, Metrics],
        epochs: Sequence[Mapping[str, Any]],  # noqa: ARG002
    ) -> ReportSections:
        """Return what the report of a run shows."""
        # imported here: matplotlib takes a second, and prediction does not need it
        from longtail.tasks.segmentation.report import report_sections

        return report_sections(run, model_config, test, [*self.columns, ("top1", "pixel accuracy")])


SEGMENTATION = Segmentation()
