"""A method with a student and a teacher of 2,000 parameters, batches for it, and a teacher that records its passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.data.dataset import LongTailedData
from longtail.data.loader import TrainLoader
from longtail.data.transforms import build_transform
from longtail.methods.base import Method
from longtail.nn import CosineClassifier, Encoder
from longtail.registry import METHODS


def new_encoder() -> Encoder:
    return Encoder("conv8-tiny", [0.3], [0.4])


def build_method(
    config: Config, data: LongTailedData, teacher: Encoder | None = None, classifier: nn.Module | None = None
) -> Method:
    """Return the method of ``config`` in training mode, with the given teacher or, where it needs one, a new one."""
    torch.manual_seed(0)
    method_class = METHODS[config.method]
    method_class.check(config, data.class_counts)
    student = new_encoder()
    if teacher is None and method_class.needs_teacher(config):
        teacher = new_encoder()
        classifier = CosineClassifier(teacher.num_features, 10)
    return method_class(config, student, data.class_counts, teacher, classifier).train()


def new_loader(data: LongTailedData, views: int) -> TrainLoader:
    return TrainLoader(data.train, 64, [build_transform("digits", 8)] * views, seed=0)


def batches(method: Method, data: LongTailedData) -> list[Batch]:
    """Return the batches of the first epoch, with the views that the method needs."""
    return list(new_loader(data, len(method.plan.uses)).epoch(0))


class Pass(NamedTuple):
    """A forward pass of a teacher."""

    images: int
    training: bool
    with_grad: bool


class RecordingBackbone(nn.Module):
    """A linear map of the pixels that records its passes."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 6)
        self.passes: list[Pass] = []

    def forward(self, images: Tensor) -> Tensor:
        self.passes.append(Pass(len(images), self.training, torch.is_grad_enabled()))
        features: Tensor = self.linear(images.flatten(1))
        return features


def recording_teacher() -> tuple[Encoder, RecordingBackbone]:
    """Return an encoder of 8 × 8 images and its backbone."""
    backbone = RecordingBackbone()

    def build(*_: Any) -> nn.Module:
        return backbone

    return Encoder("recording", [0.3], [0.4], build=build), backbone
