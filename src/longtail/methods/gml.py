"""GML: a student learns from its classifier and from the mixture of a frozen teacher's features.

Source: Suh & Seo, ICML 2023, arXiv 2305.01160. Legend: B samples, K slots, C classes, F feature width, D embedding
width. Every part can be taken away or exchanged, to see what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.errors import LongtailError
from longtail.memory import ClassQueues, Slots, queue_sizes
from longtail.methods.base import Head, Method, Taught, View
from longtail.methods.momentum import Momentum
from longtail.methods.pixels import draw_points, features_at, regions
from longtail.nn import CosineClassifier, Encoder, JoinedClassifier, ProjectionMLP
from longtail.objectives import GMLLoss

_Self = TypeVar("_Self", bound="GML")


class GML(Method):
    """Three views an image: classification and query for the student, key for the teacher; the first may be the second.

    Args:
        config: the run's settings.
        encoder: the student.
        class_counts: (C,) training images a class.
        teacher: the frozen encoder, in eval mode.
        teacher_classifier: its classifier, which distillation needs; (B, F) features to (B, C) scores.
        draw_counts: (C,) where pixels are drawn, what they are shared out like: the prior of what the mixture meets.
    """

    def __init__(
        self,
        config: Config,
        encoder: Encoder,
        class_counts: list[int],
        teacher: Encoder | None = None,
        teacher_classifier: nn.Module | None = None,
        draw_counts: list[int] | None = None,
    ) -> None:
        super().__init__(config, encoder, class_counts, teacher, teacher_classifier)
        self.dense = draw_counts is not None
        class_counts = class_counts if draw_counts is None else draw_counts
        settings = config.gml
        if settings.keys != "teacher":
            self.slow = Momentum([encoder], settings.momentum)
        assert teacher is not None or settings.keys == "momentum"
        width = (settings.keys != "teacher") * encoder.num_features
        width += teacher.num_features if teacher is not None and settings.keys != "momentum" else 0
        # the queues are no sub-module either: their contents differ from step to step and must not be overwritten by
        # another process's (see ClassQueues)
        self.queues = ClassQueues(
            class_counts,
            config.batch_size if settings.queues == "batch" else queue_size(config, class_counts),
            settings.queue_minimum,
            width,
            shared=settings.queues != "class",
        )
        self.query_mlp = ProjectionMLP(encoder.num_features, settings.embedding_dim)
        self.key_mlp = ProjectionMLP(width, settings.embedding_dim)
        self.mixture = GMLLoss(class_counts, settings.temperature, settings.learn_temperature, validate=False)
        if settings.borrow:
            self.lending = Lending(config, class_counts, self.queues.sizes)

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where the slots cannot be shared out, or parts contradict one another."""
        settings, size = config.gml, queue_size(config, class_counts)
        if settings.queues == "class":
            try:
                queue_sizes(class_counts, size, settings.queue_minimum)
            except ValueError as error:
                raise LongtailError(
                    f"gml.queue_size {size} with gml.queue_minimum {settings.queue_minimum}: {error}"
                ) from None
        elif settings.borrow:
            raise LongtailError(f"gml.borrow {settings.borrow}: needs gml.queues class, not {settings.queues}")
        if settings.keys != "teacher" and (config.teacher.cache or settings.share_key):
            raise LongtailError(
                f"gml.keys {settings.keys}: the student's average needs a key view of its own at every step; "
                "set teacher.cache to 0 and gml.share_key to false"
            )
        if settings.join_weight and config.optimizer.ema is not None:
            raise LongtailError(
                "gml.join_weight: the mixture's embeddings are the trained student's, not its slow average's; "
                "leave optimizer.ema out"
            )
        if settings.mix_all and settings.share_query:
            raise LongtailError("gml.mix_all: with gml.share_query there is one student view; set that to false")
        if settings.borrow:
            Lending(config, class_counts, torch.tensor(queue_sizes(class_counts, size, settings.queue_minimum)))

    @classmethod
    def distillation_weight(cls, config: Config) -> float:
        """Return the weight of the distillation; the engine has chosen one where none was given."""
        return config.gml.distillation_weight or 0.0

    @classmethod
    def needs_teacher(cls, config: Config) -> bool:
        """Return whether a teacher is trained or loaded first."""
        return config.gml.keys != "momentum" or super().needs_teacher(config)

    @classmethod
    def student_views(cls, config: Config) -> int:
        """Return 2, the classification view and the query view, or 1 where they are one."""
        return 1 if config.gml.share_query else 2

    @classmethod
    def classified_views(cls, config: Config) -> int:
        """Return 1, or all of them."""
        return cls.student_views(config) if config.classifier.every_view else 1

    @classmethod
    def views(cls, config: Config) -> tuple[View, ...]:
        """Classification, query and key, as far as they differ and the key's features are not known already."""
        contrast: View = "contrast"
        separate = cls.student_views(config) - 1 + (not config.gml.share_key and not config.teacher.cache)
        return ("classification", *(contrast,) * separate)

    def classify(self, scores: Tensor, labels: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the classifier's term, weighed."""
        return {"classifier": self.config.gml.classifier_weight * self.loss(scores, labels, batch)}

    def contrast(self, features: Tensor, scores: Tensor, batch: Batch, taught: Taught) -> dict[str, Tensor]:  # noqa: ARG002
        """Return both mixture terms: the batch's keys are pushed first, and are among the keys that it meets."""
        settings = self.config.gml
        assert taught.features is not None
        queries = features if settings.mix_all else features[-len(batch) :]
        views = len(queries) // len(batch)
        labels, ids = batch.labels.repeat(views, *(1,) * (batch.labels.ndim - 1)), batch.ids.repeat(views)
        if batch.dense:
            self._push_pixels(taught.features, batch)
            queries, labels, ids = _points(queries, labels, ids, self.config.segmentation.points)
        else:
            self.queues.push(taught.features, batch.labels, batch.ids, batch.room)
        slots = self.queues.slots()
        if settings.borrow:
            slots = self.lending.spread(slots)
        mixture = self.mixture.terms(
            self.query_mlp(queries),
            labels,
            self.key_mlp(slots.features),
            slots.labels,
            # without ids no pair is known to be one
            None if settings.self_pairs == "both" else ids,
            None if settings.self_pairs == "both" else slots.ids,
            self_pairs=settings.self_pairs != "none",
        )
        terms = {"mixture": settings.mixture_weight * mixture.mixture}
        if settings.learn_temperature and settings.self_pairs != "none":
            terms["temperature_likelihood"] = settings.mixture_weight * mixture.temperature
        return terms

    def _push_pixels(self, maps: Tensor, batch: Batch) -> None:
        """Push features of drawn pixels, of whole regions (a class in an image), or both."""
        settings, found = self.config.segmentation, []
        if settings.keys != "regions":
            found.append(_points(maps, batch.labels, batch.ids, settings.points))
        if settings.keys != "pixels":
            classes = len(self.prior.log)
            found.append((*regions(maps, batch.labels, classes), batch.ids.repeat_interleave(classes)))
        features, labels, ids = (torch.cat(part) for part in zip(*found, strict=True))
        self.queues.push(features, labels, ids, None if batch.room is None else batch.room * len(ids) // len(batch))

    @torch.no_grad()
    def teach(self, batch: Batch) -> Taught:
        """Return the features of the key view and, to distil from, the scores of the classification view."""
        if self.config.gml.keys != "teacher":
            self.slow.update([self.encoder])
        if batch.key_features is not None:
            return Taught(batch.key_features, batch.teacher_scores)
        teacher, classifier = self._frozen
        classification, key = batch.views[0], batch.views[0 if self.config.gml.share_key else -1]
        distils = self.distillation_weight(self.config) > 0 and classifier is not None
        if self.config.gml.keys == "momentum" or teacher is None:
            return Taught(self.slow(key), super().teach(batch).scores)
        if not distils or classifier is None:
            return Taught(self._beside(teacher(key), key), None)
        if self.config.gml.share_key:
            features = teacher(classification)
            return Taught(features, classifier(features))
        features = teacher(torch.cat([classification, key]))
        return Taught(self._beside(features[len(batch) :], key), classifier(features[: len(batch)]))

    def _beside(self, features: Tensor, key: Tensor) -> Tensor:
        """Return the teacher's features, with those of the student's average beside them where both make the keys."""
        return torch.cat([features, self.slow(key)], dim=1) if self.config.gml.keys == "both" else features

    @torch.no_grad()
    def head(self, classifier: CosineClassifier) -> Head:
        """Return the classifier and, where it is asked for, the mixture of the keys as they are now."""
        weight = self.config.gml.join_weight
        if weight == 0:
            return classifier
        slots, training = self.queues.slots(), self.key_mlp.training
        keys = self.key_mlp.eval()(slots.features)
        self.key_mlp.train(training)
        temperature = self.mixture.temperature.detach().clone()
        return JoinedClassifier(classifier, self.query_mlp, keys, slots.labels.clone(), temperature, weight)

    def conditional_entropy(self, means: Mapping[str, float]) -> float:
        """Return the mixture's −log p(y|z), or the classifier's where there is no mixture."""
        settings = self.config.gml
        if settings.mixture_weight > 0 and not self.dense:  # of drawn pixels H(Y) is another one
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
        """Fill every slot with a teacher's feature, K passes in all; an image fills a second slot with another view.

        A plain queue, pixels, and the features of an average that has learned nothing yet, are left to the first steps.
        """
        teacher = self._frozen[0]
        if self.dense or self.config.gml.queues != "class" or self.config.gml.keys != "teacher" or teacher is None:
            return
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
                self.queues.push(teacher(batch.views[-1]), batch.labels, batch.ids, batch.room)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the queues' contents: part of ``state_dict``, but no buffers."""
        return self.queues.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Restore the queues' contents."""
        self.queues.load_state_dict(state)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)
        self.queues.apply(fn)
        return self


class Lending(nn.Module):
    """Lends the spread of classes with many images to the keys of those with few.

    A class with three images has three keys, and a mixture of three narrow bumps says little of where a fourth image
    would lie. How images of a class differ from one another is much the same for many classes (Yin et al., *Feature
    Transfer Learning*, CVPR 2019, arXiv 1803.09014), so a key is joined by copies of itself, each moved by the
    difference between a random key of a large class and that class's mean.

    Args:
        config: the run's settings; the shot groups say which classes are few, and which are many.
        class_counts: (C,) training images a class.
        sizes: (C,) slots a class.

    Raises:
        LongtailError: no class has few images, or none has many.
    """

    def __init__(self, config: Config, class_counts: list[int], sizes: Tensor) -> None:
        super().__init__()
        self.copies = config.gml.borrow
        groups = config.shots.groups(class_counts)
        classes = torch.repeat_interleave(torch.arange(len(sizes)), sizes.cpu())
        few, many = (torch.tensor([group == name for group in groups])[classes] for name in ("few", "many"))
        for name, chosen in (("few", few), ("many", many)):
            if not bool(chosen.any()):
                raise LongtailError(
                    f"gml.borrow: no class is in the shot group {name}, expected one to lend and one to borrow; "
                    "set shots.few_below and shots.many_above, or gml.borrow to 0"
                )
        self.classes = len(sizes)
        self.register_buffer("slot_classes", classes, persistent=False)
        self.register_buffer("few", few.nonzero()[:, 0], persistent=False)
        self.register_buffer("many", many.nonzero()[:, 0], persistent=False)

    slot_classes: Tensor
    few: Tensor
    many: Tensor

    def spread(self, slots: Slots) -> Slots:
        """Return the slots and, after them, the moved copies, each with its origin's label and id."""
        features = slots.features
        filled = (slots.labels >= 0).to(features.dtype)
        # a mean over the filled slots: those that are not hold zeros
        counts = features.new_zeros(self.classes).index_add(0, self.slot_classes, filled).clamp(min=1)
        means = features.new_zeros(self.classes, features.shape[1]).index_add(0, self.slot_classes, features)
        means = means / counts[:, None]
        borrower = self.few.repeat(self.copies)
        lender = self.many[torch.randint(len(self.many), borrower.shape, device=borrower.device)]
        moved = (features[lender] - means[self.slot_classes[lender]]) * filled[lender][:, None]
        return Slots(
            torch.cat([features, features[borrower] + moved]),
            torch.cat([slots.labels, slots.labels[borrower]]),
            torch.cat([slots.ids, slots.ids[borrower]]),
        )


def _points(maps: Tensor, labels: Tensor, ids: Tensor, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, labels and image ids of drawn pixels, (B · P, F), (B · P,) and (B · P,)."""
    rows, columns, drawn = draw_points(labels, points)
    return features_at(maps, rows, columns), drawn.flatten(), ids.repeat_interleave(drawn.shape[1])


def queue_size(config: Config, class_counts: list[int]) -> int:
    """Return K: as it was given, or a slot for every training image, at most 16,384."""
    settings = config.gml
    return settings.queue_size or max(min(16384, sum(class_counts)), settings.queue_minimum * len(class_counts))
