"""What a method is: encoder, heads and memory, and the loss terms of a step. Legend: B samples, C classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.nn import CosineClassifier, Encoder
from longtail.objectives import ClassPrior

Prior = Literal["uniform", "train"]
View = Literal["classification", "contrast"]


class Method(nn.Module, ABC):
    """An encoder with a cosine classifier, and the losses that train them.

    Args:
        config: the run's settings.
        encoder: images to features.
        class_counts: (C,) training images a class.

    Attributes:
        predicts_under: the prior under which the method's own predictions are made. Plain cross-entropy learns
            p(y|x) with the training prior in it; the others learn scores that are free of it.
    """

    predicts_under: ClassVar[Prior] = "uniform"
    needs_teacher: ClassVar[bool] = False

    def __init__(self, config: Config, encoder: Encoder, class_counts: list[int]) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.classifier = CosineClassifier(encoder.num_features, len(class_counts), config.classifier.scale)
        self.prior = ClassPrior(class_counts)

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where the settings do not fit the data; called before anything is made."""

    @staticmethod
    def student_views(config: Config) -> int:
        """Return how many views of an image go through the student, forward and backward, a step."""
        return config.classifier.views

    @classmethod
    def views(cls, config: Config) -> tuple[View, ...]:
        """Return what each view of a batch is for, which decides how it is augmented."""
        classification: View = "classification"
        return (classification,) * cls.student_views(config)

    def encode(self, views: Sequence[Tensor]) -> Tensor:
        """Return the features of all views, one view's after the other's.

        A pass a view: BatchNorm's statistics are then a view's own, and a CPU's caches hold more of what a layer hands
        on, which saves a seventh of the time.
        """
        return torch.cat([self.encoder(view) for view in views])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return :meth:`training_step`'s terms; the engine calls this, so that wrappers around the module see it."""
        return self.training_step(batch)

    @abstractmethod
    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss terms by name, weighted: their sum is what is minimised."""

    def conditional_entropy(self, means: Mapping[str, float]) -> float | None:  # noqa: ARG002
        """Return the estimate of H(Y|Z) in nats that the mean terms hold, −log p(y|z), where they hold one."""
        return None

    def undecayed(self) -> list[nn.Parameter]:
        """Return the parameters that weight decay must not touch."""
        return []

    def watched(self) -> dict[str, Tensor]:
        """Return further scalars worth a line in the log."""
        return {}

    def fill(self, draw: Callable[[Sequence[Tensor], int], Iterator[Batch]], labels: Tensor) -> None:
        """Fill what must not start empty; called once, before the first step.

        Args:
            draw: gives batches of the training images at some positions, in the last view of a given round.
            labels: (N,) labels of the training images.
        """
