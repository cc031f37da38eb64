"""What a training leaves: the student's modules, and the model that is made of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.inference.model import TrainedModel
from longtail.inference.model_config import ModelConfig
from longtail.methods.base import Method
from longtail.nn import CosineClassifier, ExpertClassifier, MixtureEnsembleHead, RegionClassifier
from longtail.nn.experts import ExpertBackbone
from longtail.nn.network_name import resolve_network
from longtail.nn.tuning import merge_lora
from longtail.registry import METHODS, TASKS
from longtail.training.weight_average import WeightAverage


def student_modules(method: Method) -> nn.ModuleDict:
    """Return the modules that a moving average is taken of."""
    return nn.ModuleDict({"encoder": method.encoder, "classifier": method.classifier})


def modules_to_save(method: Method, ema: WeightAverage | None) -> nn.ModuleDict:
    """Return encoder and classifier of a method, or of its moving average."""
    student = student_modules(method) if ema is None else ema.module
    assert isinstance(student, nn.ModuleDict)
    classifier = student["classifier"]
    assert isinstance(classifier, CosineClassifier | RegionClassifier)
    return nn.ModuleDict({"encoder": student["encoder"], "classifier": method.head(classifier)})


def build_model(
    student: nn.ModuleDict, config: Config, data: LongTailedData, training_info: dict[str, Any] | None = None
) -> TrainedModel:
    """Return a model that predicts.

    Args:
        student: see :func:`modules_to_save`.
        config: settings of the run.
        data: what it was trained on.
        training_info: what its ``config.json`` tells of the training.
    """
    task, encoder, classifier = TASKS[data.task], merge_lora(student["encoder"]), student["classifier"]
    head: dict[str, Any] = {}
    if isinstance(classifier, MixtureEnsembleHead):
        keys = (len(classifier.keys), classifier.keys.shape[1])
        weight = classifier.ensemble_weight
        head = {"head": "mixture_ensemble", "mixture_keys": keys, "ensemble_weight": weight}
    if isinstance(classifier, RegionClassifier):
        head = {"head": "regions"}
    if isinstance(classifier, ExpertClassifier):
        head = {"head": "experts"}
    backbone = encoder.backbone
    if isinstance(backbone, ExpertBackbone):
        head |= {"experts": backbone.num_experts, "expert_stages": backbone.num_stages}
    model_config = ModelConfig(
        class_names=data.class_names,
        class_counts=tuple(data.class_counts),
        network=resolve_network(config.network),
        scale=config.classifier.scale,
        task=data.task,
        mean=encoder.mean,  # type: ignore[arg-type]
        std=encoder.std,  # type: ignore[arg-type]
        network_size=config.network_size,
        sliding_window=task.default_options(config).sliding_window,
        predicts_under=METHODS[config.method].predicts_under(config),
        training_info=training_info or {},
        metrics={},
        **task.model_geometry(data),
        **head,
    )
    model: TrainedModel = task.model_class(encoder, classifier, model_config)
    return model
