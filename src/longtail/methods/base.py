"""What a method is: encoder, heads and memory, and the loss terms of a step.

Legend: B samples, V student views, F feature width, C classes, H and W sides in pixels.

Every method gives each class a log-likelihood score, adds the log prior, and takes the posterior's cross-entropy. What
one does differently is in a few hooks: :meth:`Method.loss` for the classifier's scores, :meth:`Method.contrast` for
what is learned from the features beside it.

Where every pixel has a label, features are maps, (B, F, h, w), and scores and labels have a row a pixel: (B, C, H, W)
and (B, H, W). The hooks are the same.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.nn import CosineClassifier, Encoder, FrozenEncoder, JoinedClassifier
from longtail.nn.segmentation import to_pixels, to_squares
from longtail.objectives import ClassPrior, distillation, posterior_cross_entropy

Prior = Literal["uniform", "train"]
View = Literal["classification", "contrast"]
Head = CosineClassifier | JoinedClassifier

_Self = TypeVar("_Self", bound="Method")


class Taught(NamedTuple):
    """What the teacher made of a batch."""

    features: Tensor | None
    """(B, F) of the key view, where a method has keys; maps (B, F, h, w)."""
    scores: Tensor | None
    """(B, C) of the classification view, where the method distils; of maps (B, C, h, w)."""


class Method(nn.Module, ABC):
    """An encoder with a cosine classifier, and the losses that train them.

    Args:
        config: the run's settings.
        encoder: images to features.
        class_counts: (C,) training images a class.
        teacher: the frozen encoder, in eval mode, where :meth:`needs_teacher`.
        teacher_classifier: its classifier, which distillation needs; (B, F) features to (B, C) scores.
        draw_counts: (C,) where pixels are drawn, what they are shared out like; ``class_counts`` are then the pixels'.
    """

    def __init__(
        self,
        config: Config,
        encoder: Encoder,
        class_counts: list[int],
        teacher: Encoder | None = None,
        teacher_classifier: nn.Module | None = None,
        draw_counts: list[int] | None = None,  # noqa: ARG002
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.classifier = CosineClassifier(encoder.num_features, len(class_counts), config.classifier.scale)
        self.prior = ClassPrior(class_counts)
        # not sub-modules: the teacher never changes and stays on disk
        self._frozen = (None if teacher is None else FrozenEncoder(teacher), teacher_classifier)

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where the settings do not fit the data; called before anything is made."""

    @classmethod
    def predicts_under(cls, config: Config) -> Prior:
        """Return the prior under which the method's own predictions are made.

        Plain cross-entropy learns p(y|x) with the training prior in it; the others learn scores that are free of it.
        """
        return "uniform" if config.classifier.adjust else "train"

    @classmethod
    def distillation_weight(cls, config: Config) -> float:
        """Return the weight of the distillation."""
        return config.classifier.distillation_weight

    @classmethod
    def needs_teacher(cls, config: Config) -> bool:
        """Return whether a teacher is trained or loaded first."""
        return cls.distillation_weight(config) > 0

    @classmethod
    def student_views(cls, config: Config) -> int:
        """Return how many views of an image go through the student, forward and backward, a step."""
        return config.classifier.views

    @classmethod
    def classified_views(cls, config: Config) -> int:
        """Return how many of them, the first, the classifier's term is taken of."""
        return cls.student_views(config)

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

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss terms by name, weighted: their sum is what is minimised."""
        # the teacher first: what it allocates is free again before the student's activations are kept for backward,
        # which saves memory and, on a CPU, a sixth of the step
        taught = self.teach(batch)
        features = self.encode(batch.views[: self.student_views(self.config)])
        size = len(batch)
        views, labels = self.classified_views(self.config), batch.labels
        scores = self.classifier(features[: size * views])
        terms = self.classify(
            to_pixels(scores, *labels.shape[1:]) if batch.dense else scores,
            labels.repeat(views, *(1,) * (labels.ndim - 1)),
            batch,
        )
        terms |= self.contrast(features, scores, batch, taught)
        if taught.scores is not None:
            known = (to_squares(labels) if batch.dense else labels) >= 0
            terms["distillation"] = self.distillation_weight(self.config) * distillation(
                scores[:size], taught.scores, self.config.teacher.distillation_temperature, known
            )
        return terms

    @torch.no_grad()
    def teach(self, batch: Batch) -> Taught:
        """Return what the teacher makes of the batch, as far as the method asks for it."""
        teacher, classifier = self._frozen
        if self.distillation_weight(self.config) == 0:
            return Taught(None, None)
        if batch.teacher_scores is not None:
            return Taught(None, batch.teacher_scores)
        assert teacher is not None
        assert classifier is not None
        return Taught(None, classifier(teacher(batch.views[0])))

    def log_prior(self) -> Tensor | None:
        """Return what is added to the scores in training, (C,)."""
        return self.prior.log if self.config.classifier.adjust else None

    def loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return the loss of (B, C) scores, or (B, C, H, W), a scalar."""
        return posterior_cross_entropy(scores, labels, self.log_prior())

    def classify(self, scores: Tensor, labels: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the classifier's term, of the scores of all classified views."""
        return {"classifier": self.loss(scores, labels, batch)}

    def contrast(self, features: Tensor, scores: Tensor, batch: Batch, taught: Taught) -> dict[str, Tensor]:  # noqa: ARG002
        """Return what is learned from the features beside the classifier.

        Args:
            features: (V · B, F) of all student views.
            scores: of the classified ones.
            batch: whose views these are.
            taught: what the teacher made of it.
        """
        return {}

    def head(self, classifier: CosineClassifier) -> Head:
        """Return what the recogniser predicts with: the trained classifier, or its slow average, and what joins it."""
        return classifier

    def conditional_entropy(self, means: Mapping[str, float]) -> float | None:
        """Return the estimate of H(Y|Z) in nats that the mean terms hold, −log p(y|z), where they hold one."""
        return means.get("classifier")

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

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self._frozen:
            if module is not None:
                module._apply(fn)
        return self
