"""GML: a student learns from its classifier and from the mixture of a frozen teacher's features.

Source: Suh & Seo, ICML 2023, arXiv 2305.01160. Legend: B samples, K slots, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.errors import LongtailError
from longtail.memory import ClassQueues, queue_sizes
from longtail.methods.base import Method, View
from longtail.nn import Encoder, FrozenEncoder, ProjectionMLP
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
        self._frozen = (FrozenEncoder(teacher), teacher_classifier)
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
    def student_views(config: Config) -> int:
        """Return 2, the classification view and the query view, or 1 where they are one."""
        return 1 if config.gml.share_query else 2

    @classmethod
    def views(cls, config: Config) -> tuple[View, ...]:
        """Classification, query and key, as far as they differ and the key's features are not known already."""
        contrast: View = "contrast"
        separate = cls.student_views(config) - 1 + (not config.gml.share_key and not config.teacher.cache)
        return ("classification", *(contrast,) * separate)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Return the classifier's term, both mixture terms and, where it is on, the distillation."""
        settings = self.config.gml
        size = len(batch)
        # the teacher first: what it allocates is free again before the student's activations are kept for backward,
        # which saves memory and, on a CPU, a sixth of the step
        key_features, teacher_scores = self._teach(batch)
        self.queues.push(key_features, batch.labels, batch.ids, batch.room)
        features = self.encode(batch.views[: self.student_views(self.config)])
        scores = self.classifier(features if settings.classify_all else features[:size])
        labels = batch.labels.repeat(len(scores) // size)
        terms = {"classifier": settings.classifier_weight * posterior_cross_entropy(scores, labels, self.prior.log)}
        slots = self.queues.slots()
        mixture = self.mixture.terms(
            self.query_mlp(features[-size:]),
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
                scores[:size], teacher_scores, settings.distillation_temperature
            )
        return terms

    @torch.no_grad()
    def _teach(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the teacher's features of the key view and, to distil from, its scores of the classification view."""
        if batch.key_features is not None:
            return batch.key_features, batch.teacher_scores
        teacher, classifier = self._frozen
        classification, key = batch.views[0], batch.views[0 if self.config.gml.share_key else -1]
        if self.config.gml.distillation_weight == 0 or classifier is None:
            return teacher(key), None
        if self.config.gml.share_key:
            features = teacher(classification)
            return features, classifier(features)
        features = teacher(torch.cat([classification, key]))
        return features[len(batch) :], classifier(features[: len(batch)])

    def conditional_entropy(self, means: Mapping[str, float]) -> float:
        """Return the mixture's −log p(y|z), or the classifier's where there is no mixture."""
        settings = self.config.gml
        if settings.mixture_weight > 0:
            return means["mixture"] / settings.mixture_weight
        return means["classifier"] / max(settings.classifier_weight, 1e-12)

    def undecayed(self) -> list[nn.Parameter]:
        """Return τ's parameter."""
        return [self.mixture.temperature_logit] if self.config.gml.learn_temperature else []

    def watched(self) -> dict[str, Tensor]:
        """Return τ, the share of the queues that is filled, and how often their contents were replaced."""
        return {
            "temperature": self.mixture.temperature.detach(),
            "queue_fill": self.queues.fill,
            "queue_turnovers": self.queues.turnovers,
        }

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
                self.queues.push(self._frozen[0](batch.views[-1]), batch.labels, batch.ids, batch.room)

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
