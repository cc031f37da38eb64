"""What a training leaves: the student's modules, and the model that is made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.errors import LongtailError
from longtail.inference.model import TrainedModel
from longtail.inference.model_config import ModelConfig
from longtail.methods.base import Method
from longtail.methods.samples import TrainedClassifier
from longtail.nn import (
    CosineClassifier,
    Encoder,
    ExpertClassifier,
    LinearClassifier,
    MixtureEnsembleHead,
    RegionClassifier,
)
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
    assert isinstance(classifier, TrainedClassifier)
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
    task, encoder, head = TASKS[data.task], merge_lora(student["encoder"]), student["classifier"]
    assert isinstance(encoder, Encoder)
    model: TrainedModel = task.model_class(encoder, head, _model_config(encoder, head, config, data, training_info))
    return model


def check_head(method: Method, config: Config, data: LongTailedData) -> None:
    """Raise LongtailError if the model that a method leaves could not be read again: it is built by its settings."""
    head, name = method.head(method.classifier), config.method
    allowed = ", ".join(kind.__name__ for kind in _KINDS)
    for module in (method.classifier, head, getattr(head, "classifier", head)):
        if type(module) not in _KINDS:
            raise LongtailError(
                f"method {name}: its classifier or head is a {type(module).__name__}, which a saved model cannot have; "
                f"expected one of {allowed}, and no class derived from it"
            )
    model_config = _model_config(method.encoder, head, config, data, None)
    with torch.device("meta"):  # without memory or random numbers
        built = TASKS[data.task].model_class.build_classifier(model_config, method.encoder)
    shapes, expected = ({n: tuple(t.shape) for n, t in module.state_dict().items()} for module in (head, built))
    for tensor in dict.fromkeys((*expected, *shapes)):
        if shapes.get(tensor) != expected.get(tensor):
            raise LongtailError(
                f"method {name}: '{tensor}' of its head is {shapes.get(tensor)}, expected {expected.get(tensor)}: a "
                f"{type(head).__name__} of the features of the network and the classes"
            )


_KINDS = {
    CosineClassifier: "cosine",
    ExpertClassifier: "experts",
    LinearClassifier: "linear",
    RegionClassifier: "regions",
    MixtureEnsembleHead: "mixture_ensemble",
}
"""What a saved model calls each type of head; a class derived from one would be read as that one."""


def _model_config(
    encoder: Encoder, head: nn.Module, config: Config, data: LongTailedData, training_info: dict[str, Any] | None
) -> ModelConfig:
    fields: dict[str, Any] = {"head": _KINDS[type(head)]}
    scaled = head
    if isinstance(head, MixtureEnsembleHead):
        scaled = head.classifier
        fields |= {"mixture_keys": (len(head.keys), head.keys.shape[1]), "ensemble_weight": head.ensemble_weight}
    backbone, task = encoder.backbone, TASKS[data.task]
    if isinstance(backbone, ExpertBackbone):
        fields |= {"experts": backbone.num_experts, "expert_stages": backbone.num_stages}
    return ModelConfig(
        class_names=data.class_names,
        class_counts=tuple(data.class_counts),
        network=resolve_network(config.network),
        scale=scaled.scale if isinstance(scaled, CosineClassifier) else config.classifier.scale,
        task=data.task,
        mean=encoder.mean,
        std=encoder.std,
        network_size=config.network_size,
        sliding_window=task.default_options(config).sliding_window,
        predicts_under=METHODS[config.method].predicts_under(config),
        training_info=training_info or {},
        metrics={},
        **task.model_geometry(data),
        **fields,
    )
