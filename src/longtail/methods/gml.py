"""GML: a student learns from its classifier and from the mixture of a frozen teacher's features.

Source: Suh & Seo, ICML 2023, arXiv 2305.01160. Legend: B samples, K slots, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.errors import LongtailError
from longtail.memory import ClassQueues, queue_sizes
from longtail.methods.base import Method, View
from longtail.nn import Encoder, ProjectionMLP
from longtail.objectives import GMLLoss, distillation, posterior_cross_entropy

_Self = TypeVar("_Self", bound="GML")


class GML(Method):
    """Three views an image: classification and query for the student, key for the teacher.

    Args:
        config: the run's settings.
        encoder: the student.
        class_counts: (C,) training images a class.
        teacher: the frozen encoder, in eval mode.
        teacher_classifier: its classifier, which distillation needs; (B, F) features to (B, C) scores.
    """

    needs_teacher: ClassVar[bool] = True

    def __init__(
        self,
        config: Config,
        encoder: Encoder,
        class_counts: list[int],
        teacher: Encoder,
        teacher_classifier: nn.Module | None,
    ) -> None:
        super().__init__(config, encoder, class_counts)
        settings = config.gml
        size = queue_size(config, class_counts)
        # not sub-modules: the teacher never changes and stays on disk, and the queues' contents, which differ from
        # step to step, must not be overwritten by another process's (see ClassQueues)
        self._frozen = (teacher.eval().requires_grad_(False), teacher_classifier)
        self.queues = ClassQueues(class_counts, size, settings.queue_minimum, teacher.num_features)
        self.query_mlp = ProjectionMLP(encoder.num_features, settings.embedding_dim)
        self.key_mlp = ProjectionMLP(teacher.num_features, settings.embedding_dim)
        self.mixture = GMLLoss(class_counts, settings.temperature, settings.learn_temperature, validate=False)

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where the slots cannot be shared out."""
        size = queue_size(config, class_counts)
        try:
            queue_sizes(class_counts, size, config.gml.queue_minimum)
        except ValueError as error:
            raise LongtailError(
                f"gml.queue_size {size} with gml.queue_minimum {config.gml.queue_minimum}: {error}"
            ) from None

    @staticmethod
    def student_views(_config: Config) -> int:
        """Return 2: the classification view and the query view."""
        return 2

    @classmethod
    def views(cls, _config: Config) -> tuple[View, ...]:
        """Classification, query, key."""
        return ("classification", "contrast", "contrast")

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Return the classifier's term, both mixture terms and, where it is on, the distillation."""
        settings = self.config.gml
        classification, query, key = batch.views
        size = len(batch.labels)
        teacher, teacher_classifier = self._frozen
        # the teacher first: what it allocates is free again before the student's activations are kept for backward,
        # which saves memory and, on a CPU, a sixth of the step
        with torch.no_grad():
            if settings.distillation_weight > 0 and teacher_classifier is not None:
                teacher_features = teacher(torch.cat([classification, key]))
                teacher_scores = teacher_classifier(teacher_features[:size])
                key_features = teacher_features[size:]
            else:
                key_features, teacher_scores = teacher(key), None
            self.queues.push(key_features, batch.labels, batch.ids)
        features = self.encoder(torch.cat([classification, query]))
        scores = self.classifier(features[:size])
        terms = {
            "classifier": settings.classifier_weight * posterior_cross_entropy(scores, batch.labels, self.prior.log)
        }
        slots = self.queues.slots()
        mixture = self.mixture.terms(
            self.query_mlp(features[size:]),
            batch.labels,
            self.key_mlp(slots.features),
            slots.labels,
            batch.ids,
            slots.ids,
        )
        terms["mixture"] = settings.mixture_weight * mixture.mixture
        if settings.learn_temperature:
            terms["temperature_likelihood"] = settings.mixture_weight * mixture.temperature
        if teacher_scores is not None:
            terms["distillation"] = settings.distillation_weight * distillation(
                scores, teacher_scores, settings.distillation_temperature
            )
        return terms

    def undecayed(self) -> list[nn.Parameter]:
        """Return τ's parameter."""
        return [self.mixture.temperature_logit] if self.config.gml.learn_temperature else []

    def watched(self) -> dict[str, Tensor]:
        """Return τ."""
        return {"temperature": self.mixture.temperature.detach()}

    @torch.no_grad()
    def fill(self, draw: Callable[[Sequence[Tensor], int], Iterator[Batch]], labels: Tensor) -> None:
        """Fill every slot with a teacher's feature, K passes in all; an image fills a second slot with another view."""
        sizes = self.queues.sizes.tolist()
        rounds: dict[int, list[Tensor]] = {}
        for index, size in enumerate(sizes):
            positions = torch.nonzero(labels == index).flatten()
            if len(positions) == 0:
                continue
            for taken in range(0, size, len(positions)):
                rounds.setdefault(taken // len(positions), []).append(positions[: size - taken])
        for number in sorted(rounds, reverse=True):
            for batch in draw(torch.cat(rounds[number]).split(256), number):
                self.queues.push(self._frozen[0](batch.views[-1]), batch.labels, batch.ids)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the queues' contents: part of ``state_dict``, but no buffers."""
        return self.queues.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Restore the queues' contents."""
        self.queues.load_state_dict(state)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self._frozen:
            if module is not None:
                module._apply(fn)
        if hasattr(self, "queues"):
            self.queues.apply(fn)
        return self


def queue_size(config: Config, class_counts: list[int]) -> int:
    """Return K: as it was given, or a slot for every training image, at most 16,384."""
    settings = config.gml
    return settings.queue_size or max(min(16384, sum(class_counts)), settings.queue_minimum * len(class_counts))
