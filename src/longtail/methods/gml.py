"""GML: a student learns from its classifier and from the mixture of a frozen teacher's features.

Source: Suh & Seo, ICML 2023, arXiv 2305.01160. Legend: B samples, K slots, C classes, F feature width, D embedding
width. Every part can be switched off or exchanged, to measure what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from longtail.config import Config, Positive, Settings, Weight
from longtail.data.batch import Batch
from longtail.errors import LongtailError
from longtail.losses import GMLLoss
from longtail.losses.checks import MIN_TEMPERATURE
from longtail.memory import ClassQueues, queue_sizes
from longtail.methods.base import Finding, Head, LabelKind, Method, TeacherOutput
from longtail.methods.ema import EMAEncoder
from longtail.methods.experts import give_experts, operations_of_experts
from longtail.methods.feature_transfer import FeatureTransfer
from longtail.methods.samples import TrainedClassifier
from longtail.methods.views import CLASSIFICATION, CONTRAST, ViewPlan
from longtail.nn import CosineClassifier, Encoder, MixtureEnsembleHead, ProjectionMLP

_Self = TypeVar("_Self", bound="GML")

MAX_AUTO_QUEUE = 16384
"""Largest queue that is chosen automatically, in slots."""


@dataclass(frozen=True, kw_only=True)
class GMLSettings(Settings):
    """The Gaussian-mixture likelihood; the paper's symbols are in brackets."""

    section: ClassVar[str] = "gml"

    queue_size: Positive | None = None
    """Slots of all class-wise queues together [K]; one per training sample, at most 16384, if not given."""
    queue_minimum: Positive = 2
    """Minimum number of slots per class [k_m]."""
    embedding_dim: Positive = 32
    """Width of query and key embeddings."""
    temperature: Annotated[float, Field(gt=0.02, lt=1)] = 0.1
    """Initial temperature [τ₀]; it stays between 0.02 and 1."""
    learn_temperature: bool = True
    """Learn the temperature by leave-one-out maximum likelihood."""
    share_query: bool = True
    """Use the classification view as the query view too: one student pass per image. The paper's recipes use two."""
    share_key: bool = False
    """Use the classification view as the key view too: one teacher pass per image instead of two, with distillation."""
    query_all_views: bool = False
    """Use every student view as a query instead of the query view only."""
    queues: Literal["class", "shared", "batch"] = "class"
    """Where the keys are kept: a queue per class, one queue shared by all classes, or the current batch only (with
    optimizer.grad_accumulation_steps, its parts so far)."""
    keys: Literal["teacher", "momentum", "both"] = "teacher"
    """What computes the keys: the frozen teacher, a moving average of the student, or both, their features
    concatenated."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of that moving average."""
    self_pairs: Literal["mixture", "both", "none"] = "mixture"
    """Where the query's own image is among its keys: in the mixture term only (the paper), in the temperature term too,
    or nowhere."""
    feature_transfer: Annotated[int, Field(ge=0)] = 0
    """Additional keys per slot of a class in few, each moved by the difference between a key of a class in many and the
    mean of that class; 0: none."""
    ensemble_weight: Weight = 0.0
    """Weight of the mixture's log-likelihood beside the classifier's score at prediction; the saved model then contains
    the keys. 1 is the product of both."""
    stages: Annotated[int, Field(ge=0)] | None = None
    """Last stages of the network that the mixture's queries and the classifier each have for themselves: two experts on
    one stem, with gml.ensemble_weight predicting together. 0: a projection of the features each; all shared if not
    given."""
    mixture_weight: Weight = 1.0
    """Weight of both GML terms [β]."""
    classifier_weight: Weight = 1.0
    """Weight of the logit-adjusted cross-entropy [γ]."""
    distillation_weight: Weight | None = None
    """Weight of the distillation from the teacher's classifier [α]; 1 where the teacher has one, if not given."""

    @property
    def num_experts(self) -> int:
        """2 where the classifier and the mixture have stages of their own, or 1."""
        return 1 if self.stages is None else 2


class GML(Method):
    """Three views per image: classification and query for the student, key for the teacher; the first can be shared."""

    settings_class: ClassVar[type[GMLSettings]] = GMLSettings
    settings: GMLSettings
    label_kinds: ClassVar[frozenset[LabelKind]] = frozenset({"image", "pixels", "boxes"})
    plotted_metrics: ClassVar[Mapping[str, str]] = {"temperature": "τ"}

    def build(self) -> None:
        """Add the queues, the embeddings and the mixture."""
        settings, teacher = self.settings, self.teacher
        class_counts = self.adapter.sample_counts(self.class_counts)
        if settings.keys != "teacher":
            self.ema = EMAEncoder([self.encoder], settings.momentum, self.config.optimizer.grad_accumulation_steps)
        assert teacher is not None or settings.keys == "momentum"
        width = (settings.keys != "teacher") * self.encoder.num_features
        width += teacher.num_features if teacher is not None and settings.keys != "momentum" else 0
        # the queues are not sub-modules: their contents differ from step to step and must not be overwritten by those
        # of another process (see ClassQueues)
        self.queues = ClassQueues(
            class_counts,
            self.config.batch_size if settings.queues == "batch" else queue_size(settings, class_counts),
            settings.queue_minimum,
            width,
            shared=settings.queues != "class",
        )
        self.query_mlp = ProjectionMLP(self.encoder.num_features // settings.num_experts, settings.embedding_dim)
        self.key_mlp = ProjectionMLP(width, settings.embedding_dim)
        self.mixture = GMLLoss(class_counts, settings.temperature, settings.learn_temperature, validate=False)
        if settings.feature_transfer:
            self.feature_transfer = FeatureTransfer(
                settings.feature_transfer, self.config.shots.groups(class_counts), self.queues.sizes
            )

    def build_classifier(self, num_features: int) -> TrainedClassifier:
        """Return the classifier of the features that are its own."""
        return super().build_classifier(num_features // self.settings.num_experts)

    @classmethod
    def prepare_encoder(cls, encoder: Encoder, config: Config) -> None:
        """Give the classifier and the mixture last stages of their own, where they have them."""
        settings = config.section(GMLSettings)
        if settings.stages is not None:
            give_experts(encoder, config, settings.num_experts, settings.stages)

    @classmethod
    def pass_cost(cls, config: Config) -> float:
        """Return the operations of both experts together, as a multiple of the network's alone."""
        settings = config.section(GMLSettings)
        return 1.0 if settings.stages is None else operations_of_experts(config, settings.num_experts, settings.stages)

    def training_scores(self, features: Tensor) -> Tensor:
        """Return the scores of the features, of those that are the classifier's own."""
        return super().training_scores(features.chunk(self.settings.num_experts, dim=1)[0])

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where the slots cannot be shared out, or settings contradict one another."""
        settings = config.section(GMLSettings)
        if settings.keys != "momentum" and config.teacher.source == "ema":
            raise LongtailError(
                f"gml.keys {settings.keys}: needs a frozen teacher, which teacher.source ema is not; set gml.keys to "
                "momentum, or teacher.source to train"
            )
        super().check(config, class_counts)
        size = queue_size(settings, class_counts)
        if settings.queues == "class":
            try:
                queue_sizes(class_counts, size, settings.queue_minimum)
            except ValueError as error:
                raise LongtailError(
                    f"gml.queue_size {size} with gml.queue_minimum {settings.queue_minimum}: {error}"
                ) from None
        elif settings.feature_transfer:
            raise LongtailError(
                f"gml.feature_transfer {settings.feature_transfer}: needs gml.queues class, not {settings.queues}"
            )
        if settings.keys != "teacher" and (config.teacher.cache or settings.share_key):
            raise LongtailError(
                f"gml.keys {settings.keys}: the moving average of the student needs its own key view at every step; "
                "set teacher.cache to 0 and gml.share_key to false"
            )
        if settings.ensemble_weight and config.second_stage != "none":
            raise LongtailError(
                f"gml.ensemble_weight: second_stage {config.second_stage} replaces the classifier that the mixture is "
                "joined with; set one of them to 0 or none"
            )
        if settings.ensemble_weight and config.optimizer.ema_decay is not None:
            raise LongtailError(
                "gml.ensemble_weight: the embeddings of the mixture are those of the trained student, not of its "
                "moving average; leave optimizer.ema_decay out"
            )
        if settings.stages is not None:
            cls._check_experts(config, settings)
        if settings.query_all_views and settings.share_query:
            raise LongtailError(
                "gml.query_all_views: there is one student view with gml.share_query; set gml.share_query to false"
            )
        if settings.feature_transfer:
            sizes = torch.tensor(queue_sizes(class_counts, size, settings.queue_minimum))
            FeatureTransfer(settings.feature_transfer, config.shots.groups(class_counts), sizes)

    @staticmethod
    def _check_experts(config: Config, settings: GMLSettings) -> None:
        if settings.ensemble_weight == 0:
            raise LongtailError(
                f"gml.stages {settings.stages}: the mixture is an expert only if it predicts too; set "
                "gml.ensemble_weight to 1, or leave gml.stages out"
            )
        if config.tune == "head":
            raise LongtailError(
                "gml.stages: tune head trains no stages; use --tune full or last:N, or leave gml.stages out"
            )
        if config.teacher.source == "ema":
            raise LongtailError(
                "gml.stages: the moving average of teacher.source ema has no classifier of a part of the features; use "
                "teacher.source train, or leave gml.stages out"
            )

    @classmethod
    def auto_config(
        cls, config: Config, class_counts: list[int], teacher_knows_classes: Callable[[], bool]
    ) -> tuple[Config, list[str]]:
        """Choose the size of the queues and the weight of the distillation."""
        settings, reasons = config.section(GMLSettings), []
        if settings.queue_size is None and settings.queues != "batch":
            slots = queue_size(settings, class_counts)
            config = config.replace(gml={"queue_size": slots})
            reasons.append(f"gml.queue_size {slots}: one slot per training sample, at most {MAX_AUTO_QUEUE:,}")
        if settings.distillation_weight is None:
            if config.teacher.source == "ema":
                weight, reason = 1.0, "the moving average of the student has a classifier"
            elif settings.keys == "momentum":
                weight, reason = 0.0, "there is no teacher where the student's moving average computes the keys"
            elif any(source.startswith("timm:") for source in config.teacher.sources):
                weight, reason = 0.0, "a pretrained teacher has no classifier for these classes"
            elif not teacher_knows_classes():
                weight, reason = 0.0, "the teacher was trained on other classes"
            else:
                weight, reason = 1.0, "the teacher has a classifier for these classes"
            config = config.replace(gml={"distillation_weight": weight})
            reasons.append(f"gml.distillation_weight {weight:g}: {reason}")
        return config, reasons

    @classmethod
    def distillation_weight(cls, config: Config) -> float:
        """Return the weight of the distillation; :meth:`auto_config` has chosen one where none was given."""
        return config.section(GMLSettings).distillation_weight or 0.0

    @classmethod
    def needs_teacher(cls, config: Config) -> bool:
        """Return whether a teacher is trained or loaded first."""
        return config.section(GMLSettings).keys != "momentum" or super().needs_teacher(config)

    @classmethod
    def needs_teacher_features(cls, config: Config) -> bool:  # noqa: ARG003
        """Return True: keys are made of them."""
        return True

    @classmethod
    def view_plan(cls, config: Config) -> ViewPlan:
        """Return classification, query and key, as far as they differ and the key's features are not cached."""
        settings, classifier = config.section(GMLSettings), config.classifier
        student = (CLASSIFICATION,) if settings.share_query else (CLASSIFICATION, CONTRAST)
        return ViewPlan(
            student=student,
            keys=() if settings.share_key or config.teacher.cache else (CONTRAST,),
            num_classified=len(student) if classifier.every_view else 1,
            distill_every_view=classifier.distill_every_view,
            share_key=settings.share_key,
        )

    @classmethod
    def teacher_is_frozen(cls, config: Config) -> bool:
        """Return whether no key is computed by a moving average of the student."""
        return config.section(GMLSettings).keys == "teacher" and super().teacher_is_frozen(config)

    @classmethod
    def reason_against_mixing(cls, config: Config) -> str:
        """Return why a view that is a query or a key is classified too: queries and keys have one class each."""
        settings = config.section(GMLSettings)
        if settings.share_query or settings.query_all_views or config.classifier.every_view:
            return (
                "compares the classified view with keys of its class; set gml.share_query, gml.query_all_views and "
                "classifier.every_view to false"
            )
        if settings.share_key and not config.teacher.cache:
            return "takes its keys from the classified view, and a key has one class; set gml.share_key to false"
        return ""

    def classification_loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the classifier's term, weighted."""
        return {"classifier": self.settings.classifier_weight * self.loss(scores, labels, batch)}

    def auxiliary_loss(
        self,
        features: Tensor,
        scores: Tensor,  # noqa: ARG002
        batch: Batch,
        teacher_output: TeacherOutput,
    ) -> dict[str, Tensor]:
        """Return both mixture terms: the keys of the batch are pushed first and take part."""
        settings = self.settings
        assert teacher_output.features is not None
        if settings.queues == "batch" and batch.part == 0:
            self.queues.clear()
        # keys before queries: where pixels are drawn, the order of the draws is part of a run's reproducibility
        self.queues.push(*self.adapter.keys(teacher_output.features, batch))
        queried = features if settings.query_all_views else features[-len(batch) :]
        queries, labels, ids, _ = self.adapter.queries(queried, batch)
        slots = self.queues.slots()
        if settings.feature_transfer:
            slots = self.feature_transfer(slots)
        mixture = self.mixture.terms(
            self.query_mlp(queries.chunk(settings.num_experts, dim=1)[-1]),
            labels,
            self.key_mlp(slots.features),
            slots.labels,
            # without ids no pair counts as one image with itself
            *((None, None) if settings.self_pairs == "both" else (ids, slots.ids)),
            self_pairs=settings.self_pairs != "none",
        )
        terms = {"mixture": settings.mixture_weight * mixture.mixture}
        if settings.learn_temperature and settings.self_pairs != "none":
            terms["temperature_likelihood"] = settings.mixture_weight * mixture.temperature
        return terms

    @torch.no_grad()
    def teacher_outputs(self, batch: Batch) -> TeacherOutput:
        """Return the features of the key view and, to distil from, the scores of the classification view."""
        if self.settings.keys != "teacher":
            self.ema.update([self.encoder])
        teacher, classifier = self.teacher, self.teacher_classifier
        distilled, key = self.distilled_views(batch), batch.views[0 if self.settings.share_key else -1]
        distils = self.distillation_weight(self.config) > 0 and classifier is not None
        if self.settings.keys == "momentum" or teacher is None:
            return TeacherOutput(self.ema(key), super().teacher_outputs(batch).scores)
        if not distils or classifier is None:
            return TeacherOutput(self._with_ema_features(self.adapter.encode_keys(teacher, key, batch), key), None)
        if self.settings.share_key:
            features = teacher(torch.cat(distilled))
            return TeacherOutput(features[: len(batch)], classifier(features))
        features = teacher(torch.cat([*distilled, key]))
        size = len(features) - len(batch)
        return TeacherOutput(self._with_ema_features(features[size:], key), classifier(features[:size]))

    def _with_ema_features(self, features: Tensor, key: Tensor) -> Tensor:
        """Return the teacher's features, with those of the moving average appended where both compute the keys."""
        return torch.cat([features, self.ema(key)], dim=1) if self.settings.keys == "both" else features

    @torch.no_grad()
    def head(self, classifier: TrainedClassifier) -> Head:
        """Return the classifier or, with ``ensemble_weight``, its ensemble with the mixture of the current keys."""
        weight = self.settings.ensemble_weight
        if weight == 0:
            return classifier
        assert isinstance(classifier, CosineClassifier)
        slots, training = self.queues.slots(), self.key_mlp.training
        keys = self.key_mlp.eval()(slots.features)
        self.key_mlp.train(training)
        temperature = self.mixture.temperature.detach().clone()
        return MixtureEnsembleHead(classifier, self.query_mlp, keys, slots.labels, temperature, weight)

    @classmethod
    def conditional_entropy(cls, config: Config, means: Mapping[str, float], one_per_image: bool) -> float | None:
        """Return the mixture's −log p(y|z), or the classifier's where there is no mixture and no image is mixed."""
        settings = config.section(GMLSettings)
        if settings.mixture_weight > 0 and one_per_image:  # H(Y) of drawn pixels is another one
            return means["mixture"] / settings.mixture_weight
        if config.mixing.kind != "none":
            return None
        return means["classifier"] / max(settings.classifier_weight, 1e-12)

    @classmethod
    def diagnose(cls, config: Config, epochs: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """Return what the temperature and the queues show at the end of training."""
        settings, findings = config.section(GMLSettings), []
        tau, fill = epochs[-1].get("temperature"), epochs[-1].get("queue_fill")
        if tau is not None and settings.learn_temperature and not 1.2 * MIN_TEMPERATURE < tau < 0.8:
            narrow = "narrow: the nearest key decides alone"
            wide = "wide: all keys of a class count nearly alike"
            findings.append(
                Finding(
                    "The temperature of the mixture is at its bound.",
                    f"τ ended at {tau:.3f}; the mixture components are {narrow if tau < 0.5 else wide}.",
                    "A teacher that is trained longer, or a fixed temperature: --gml.no_learn_temperature.",
                )
            )
        if fill is not None and fill <= 0.9 and settings.queues != "batch":
            findings.append(
                Finding(
                    "The queues were never full.",
                    f"At the end {100 * fill:.0f} % of their slots held a key.",
                    f"Fewer slots: gml.queue_size below {settings.queue_size}; or more epochs.",
                )
            )
        return findings

    @classmethod
    def advice_for_tail(cls, config: Config) -> str:
        """Return the setting for more keys per class."""
        minimum = config.section(GMLSettings).queue_minimum
        return f"More keys per class: gml.queue_minimum above {minimum}." if minimum < 8 else ""

    def no_weight_decay(self) -> list[nn.Parameter]:
        """Return the parameter of the temperature."""
        return [self.mixture.temperature_logit] if self.settings.learn_temperature else []

    def metrics_to_log(self) -> dict[str, Tensor]:
        """Return the temperature, the filled fraction of the queues, and how often their contents were replaced."""
        return {
            "temperature": self.mixture.temperature.detach(),
            "queue_fill": self.queues.fill,
            "queue_turnovers": self.queues.turnovers,
        }

    @torch.no_grad()
    def init_memory(self, draw: Callable[[Sequence[Tensor], int], Iterator[Batch]], labels: Tensor) -> None:
        """Fill every slot with a teacher feature, K passes in all; an image fills a second slot with another view.

        A shared queue, pixels, and the features of a moving average that has learned nothing yet are left to the first
        steps.
        """
        teacher, settings = self.teacher, self.settings
        filled = settings.queues == "class" and settings.keys == "teacher" and self.adapter.one_per_image
        if not filled or teacher is None:
            return
        rounds: dict[int, list[Tensor]] = {}
        for index, size in enumerate(self.queues.sizes.tolist()):
            positions = torch.nonzero(labels == index).flatten()
            if len(positions) == 0:
                continue
            for start in range(0, size, len(positions)):
                rounds.setdefault(start // len(positions), []).append(positions[: size - start])
        for number in sorted(rounds, reverse=True):
            for batch in draw(torch.cat(rounds[number]).split(256), number):
                self.queues.push(teacher(batch.views[-1]), batch.labels, batch.ids, batch.max_local_batch)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the contents of the queues: part of ``state_dict``, but not buffers."""
        return self.queues.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Restore the contents of the queues."""
        self.queues.load_state_dict(state)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)
        self.queues.apply(fn)
        return self


def queue_size(settings: GMLSettings, class_counts: list[int]) -> int:
    """Return K: the given size, or one slot per training sample, at most :data:`MAX_AUTO_QUEUE`."""
    automatic = max(min(MAX_AUTO_QUEUE, sum(class_counts)), settings.queue_minimum * len(class_counts))
    return settings.queue_size or automatic
