"""Detection: boxes of objects, each with a class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from longtail.config import Config
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.detection import DetectionData, DetectionTransform
from longtail.data.transforms import AnyTransform
from longtail.errors import LongtailError
from longtail.evaluation.detection_matches import coco_library
from longtail.inference.export import Exported
from longtail.inference.model import Prior
from longtail.inference.model_config import ModelConfig
from longtail.inference.options import TTA, InferenceOptions
from longtail.inference.output import PredictionOutput
from longtail.methods.gml import GMLSettings
from longtail.methods.samples import SampleAdapter
from longtail.nn import Encoder, TeacherEncoder
from longtail.nn.detection import DETECTORS, DetectionNetwork, FasterRCNN, is_detection_network
from longtail.tasks.base import EvaluationRequest, Evaluator, Metrics, PredictionRequest, ReportSections, Task
from longtail.tasks.detection.console import check_evaluation, metric_lines
from longtail.tasks.detection.detector import Detector
from longtail.tasks.detection.error_images import save_error_images
from longtail.tasks.detection.evaluate_results import evaluate_results
from longtail.tasks.detection.evaluator import DetectionEvaluator, predict_split
from longtail.tasks.detection.predict import find_objects, predict_files
from longtail.tasks.detection.regions import RegionAdapter
from longtail.tasks.detection.settings import DetectionSettings
from longtail.tasks.evaluate import evaluate_run_under

_MIRROR = 0.5  # probability of the mirror image


class Detection(Task[Detector]):
    """Boxes of objects, each with a class."""

    name = "detection"
    settings_class = DetectionSettings
    label_kind = "boxes"
    model_class = Detector
    columns = (
        ("ap", "AP"),
        ("ap50", "AP50"),
        ("ap75", "AP75"),
        ("frequent", "AP frequent"),
        ("common", "AP common"),
        ("rare", "AP rare"),
    )
    printed_metrics: ClassVar[Mapping[str, str]] = {
        **dict(columns),
        "ap_small": "AP small",
        "ap_medium": "AP medium",
        "ap_large": "AP large",
        "ar": "AR",
    }
    compared_metrics = ("ap", "ap50")
    validation_metrics = ("ap", "ap50")
    unit = "AP"
    finds_objects = True

    def auto_network(self, data: LongTailedData) -> str:  # noqa: ARG002
        """Return a small network."""
        return "fasterrcnn:resnet18"

    def auto_config(self, config: Config, data: LongTailedData) -> tuple[Config, list[str]]:  # noqa: ARG002
        """Choose what of gml has one possible value: there is one view of an image, and nothing to distil."""
        if config.method != "gml":
            return config, []
        gml, reasons = config.section(GMLSettings), []
        if not gml.share_key:
            config = config.replace(gml={"share_key": True})
            reasons.append("gml.share_key true: an image with boxes has one view")
        if gml.distillation_weight is None:
            config = config.replace(gml={"distillation_weight": 0.0})
            reasons.append("gml.distillation_weight 0: a teacher's scores of regions are not distilled")
        return config, reasons

    def check(self, config: Config) -> None:
        """Raise LongtailError where method, network or settings do not fit, or what evaluates a run is missing."""
        super().check(config)
        _check_network(config)
        coco_library()  # so that a missing extra is not found after a training
        unsupported = {
            f"tune {config.tune}": config.tune != "full",
            f"init {config.init}": config.init is not None,
            f"classifier.init {config.classifier.init}": config.classifier.init != "random",
            "network_size": config.network_size is not None,
            f"data.augment {config.data.augment}": config.data.augment not in {"auto", "none"},
            "classifier.views above 1": config.classifier.views > 1,
            "classifier.distillation_weight": config.classifier.distillation_weight > 0,
        }
        if config.method == "gml":
            unsupported |= _unsupported_of_gml(config)
        first = next((name for name, used in unsupported.items() if used), None)
        if first is not None:
            raise LongtailError(f"{first}: is not supported for detection; leave it out")

    def prepare_encoder(self, encoder: Encoder, config: Config, data: LongTailedData) -> None:
        """Fit the anchors to the size of the images, and freeze what stays as it was pretrained."""
        network, settings = encoder.backbone, config.section(DetectionSettings)
        assert isinstance(network, DetectionNetwork)
        network.set_image_size(data.image_size)
        is_pretrained = config.pretrained != "none"
        network.freeze(
            is_pretrained if settings.freeze_batch_norm is None else settings.freeze_batch_norm,
            is_pretrained if settings.freeze_early is None else settings.freeze_early,
        )

    def build_transforms(self, config: Config, data: LongTailedData, uses: Sequence[str]) -> list[AnyTransform]:
        """Return random scales, crops, mirror images and colours for every view."""
        assert isinstance(data, DetectionData)
        settings = config.section(DetectionSettings)
        transform = DetectionTransform(data.image_size, data.max_objects, settings.scale, _MIRROR, settings.jitter)
        return [transform for _ in uses]

    def sample_adapter(self, config: Config, data: LongTailedData) -> SampleAdapter:
        """Return what makes regions the samples."""
        return RegionAdapter(config.section(DetectionSettings), config.network, data.class_counts)

    def teacher_config(self, config: Config) -> Config:
        """Return the configuration with random class layers: there are no class means of regions to begin with."""
        return config.replace(classifier={"init": "random"})

    def check_teacher(self, encoder: TeacherEncoder, source: str) -> None:
        """Raise LongtailError if a teacher that is given has no features of boxes."""
        if not isinstance(encoder, Encoder) or not isinstance(encoder.backbone, FasterRCNN):
            raise LongtailError(
                f"teacher.source '{source}': has no features of boxes; expected train, or the folder of a run of "
                "fasterrcnn:ENCODER"
            )

    def model_geometry(self, data: LongTailedData) -> dict[str, Any]:
        """Return the side of the letterboxed images, the training images of each class, and the ids of the classes."""
        assert isinstance(data, DetectionData)
        return {
            "image_size": data.image_size,
            "stored_size": data.image_size,
            "image_counts": tuple(data.image_counts),
            "class_ids": data.annotations.class_ids,
        }

    def predict_split(
        self,
        model: Detector,
        images: ImageSet,
        options: InferenceOptions,  # noqa: ARG002
    ) -> Iterable[tuple[Tensor, Any, Tensor]]:
        """Yield positions and regions of this process's part of a split."""
        return predict_split(model, images)

    def evaluator(
        self,
        model: Detector,
        images: ImageSet,
        config: Config,  # noqa: ARG002
        priors: Mapping[str, Tensor | None],
        accuracy_only: bool,
    ) -> Evaluator:
        """Return an empty evaluator."""
        return DetectionEvaluator(model, images, priors, accuracy_only)

    def evaluate_run(
        self, model: Detector, config: Config, data: LongTailedData, request: EvaluationRequest
    ) -> tuple[dict[str, Metrics], str, dict[str, Any]]:
        """Return the metrics of a finished run on its test set by prior."""
        check_evaluation(request)
        return evaluate_run_under(model, config, data, request.prior)

    def evaluate_results(self, results: Path, annotations: Path, train_annotations: Path | None) -> dict[str, Any]:
        """Return the metrics of a result file in COCO's format."""
        return evaluate_results(results, annotations, train_annotations)

    def summary_lines(self, metrics: Mapping[str, Any]) -> list[str]:
        """Return the interval of AP, and the classes if they are few."""
        return metric_lines(metrics)

    def save_examples(self, run: Path, images: ImageSet, metrics: Metrics) -> None:
        """Write pictures of false detections and missed objects to the run's folder."""
        save_error_images(run, images, metrics["examples"])

    def predict_files(self, model: Detector, files: Sequence[Path], request: PredictionRequest) -> PredictionOutput:
        """Return the objects of image files; write drawings of them if a folder is given."""
        return predict_files(model, files, request)

    def find_objects(self, model: Detector, image: Image.Image, prior: Prior) -> list[dict[str, Any]]:
        """Return the objects of one image."""
        return find_objects(model, image, prior)

    def export(self, model: Detector, path: Path, prior: Prior, images: Sequence[Path], tta: TTA) -> Exported:
        """Write a detector as an ONNX file."""
        from longtail.tasks.detection.export import export_onnx

        return export_onnx(model, path, prior, images, tta)

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
        from longtail.tasks.detection.report import report_sections

        return report_sections(run, model_config, test, [*self.columns, ("ar", "AR")])


def _check_network(config: Config) -> None:
    """Raise LongtailError if the network finds no boxes, or does not fit the method or the settings."""
    kind, settings = config.network.partition(":")[0], config.section(DetectionSettings)
    if not is_detection_network(config.network):
        raise LongtailError(
            f"network {config.network}: returns one feature vector per image; for {config.data.source} expected "
            f"{' or '.join(f'{name}:ENCODER' for name in DETECTORS)}, for example fasterrcnn:{config.network}"
        )
    if config.method == "seesaw" and not DETECTORS[kind].background:
        raise LongtailError(
            f"method seesaw: compares the classes of a softmax, and {kind} does not have one; use "
            "fasterrcnn:ENCODER, or method la"
        )
    if settings.federated is not None and DETECTORS[kind].background:
        raise LongtailError(
            f"detection.federated {settings.federated}: needs a yes or no for each class, and {kind} does not have "
            "it; use retinanet:ENCODER, or leave it out"
        )
    if config.method == "gml":
        own = config.teacher.network
        network = config.network if own == "auto" else own
        for field, name in (("network", config.network), ("teacher.network", network)):
            if name.partition(":")[0] != "fasterrcnn":
                raise LongtailError(
                    f"{field} {name}: has no features of boxes, which are the keys of method gml; use "
                    "fasterrcnn:ENCODER, or method la"
                )


def _unsupported_of_gml(config: Config) -> dict[str, bool]:
    """Return settings of the mixture and its teacher that need other views or features than those of regions."""
    gml, teacher = config.section(GMLSettings), config.teacher
    return {
        "gml.share_query false": not gml.share_query,
        f"gml.keys {gml.keys}": gml.keys != "teacher",
        "gml.queues batch": gml.queues == "batch",
        "gml.feature_transfer": gml.feature_transfer > 0,
        "gml.ensemble_weight": gml.ensemble_weight > 0,
        "gml.distillation_weight above 0": (gml.distillation_weight or 0) > 0,
        "teacher.cache": teacher.cache > 0,
        "teacher.count above 1": teacher.count > 1,
        "more than one teacher.source": len(teacher.sources) > 1,
        "teacher.generations above 1": teacher.generations > 1,
        "teacher.views above 1": teacher.views > 1,
        f"teacher.tune {teacher.tune}": teacher.tune not in {None, "auto", "full"},
        "teacher.network_size": teacher.network_size is not None,
    }


DETECTION = Detection()
"""Boxes of objects, each with a class."""
