"""What a training method is: encoder, heads and memory, and the loss terms of a step.

Legend: B samples, V student views, F feature width, C classes, H and W sides in pixels.

Every method gives each class a log-likelihood score, adds the log prior, and takes the cross-entropy of the posterior.
What a method does differently is in a few hooks: :meth:`Method.loss` for the scores of the classifier,
:meth:`Method.auxiliary_loss` for what is learned from the features beside it.

Where labels are maps, one per pixel, features are maps, (B, F, h, w), and scores and labels have one row per pixel:
(B, C, H, W) and (B, H, W). The hooks are the same; a :class:`SampleAdapter` translates between the two resolutions.
Where labels are boxes, the adapter draws regions, whose features and labels take the place of those of images.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from longtail.config import Config, Settings
from longtail.data.batch import Batch
from longtail.errors import LongtailError
from longtail.evaluation.class_frequencies import PriorName
from longtail.losses import ClassPrior, agreement, distillation
from longtail.methods.ema import EMAEncoder
from longtail.methods.samples import SampleAdapter, TrainedClassifier
from longtail.methods.views import CLASSIFICATION, ViewPlan
from longtail.nn import Encoder, MixtureEnsembleHead, TeacherEncoder, freeze
from longtail.nn.encoder import EncoderEnsemble, FrozenEncoder

LabelKind = Literal["image", "pixels", "boxes"]
"""What a label is of: a whole image, every pixel of it, or boxes in it."""
Head = TrainedClassifier | MixtureEnsembleHead
"""What predicts."""

_Self = TypeVar("_Self", bound="Method")


@dataclass(frozen=True)
class Finding:
    """One problem that the figures of a run show."""

    problem: str
    evidence: str
    advice: str


class TeacherOutput(NamedTuple):
    """What the teacher computes for a batch."""

    features: Tensor | None
    """(B, F) of the key view, where a method has keys; maps (B, F, h, w); see :meth:`SampleAdapter.encode_keys`."""
    scores: Tensor | None
    """(D · B, C) of the D distilled views, one view after the other; maps (D · B, C, h, w)."""


def view_after_view(scores: Tensor) -> Tensor:
    """Return (D · B, C) scores, one view after another, of (B, D, C)."""
    return scores.transpose(0, 1).flatten(0, 1)


def _prepared_output(batch: Batch) -> TeacherOutput | None:
    """Return the teacher's outputs that came with a batch; None if there are none."""
    features, scores = batch.key_features, batch.teacher_scores
    if features is None and scores is None:
        return None
    return TeacherOutput(features, None if scores is None else view_after_view(scores))


class Method(nn.Module, ABC):
    """An encoder with a cosine classifier, and the losses that train them.

    Args:
        config: settings of the run.
        encoder: images to features.
        class_counts: (C,) training images per class.
        teacher: the frozen encoder, or several, in eval mode, where :meth:`needs_teacher`.
        teacher_classifier: its classifier, which distillation needs; (B, F) features to (B, C) scores.
        adapter: what a sample is.
    """

    settings_class: ClassVar[type[Settings] | None] = None
    """The method's own settings, a section of the recipe."""
    label_kinds: ClassVar[frozenset[LabelKind]] = frozenset({"image"})
    """What labels may be of: whole images, every pixel, boxes."""
    settings: Settings
    """They, where there are any."""
    plotted_metrics: ClassVar[Mapping[str, str]] = {}
    """What of :meth:`metrics_to_log` a report plots over the epochs, with the label of its axis."""

    def __init__(
        self,
        config: Config,
        encoder: Encoder,
        class_counts: list[int],
        teacher: TeacherEncoder | None = None,
        teacher_classifier: nn.Module | None = None,
        adapter: SampleAdapter | None = None,
    ) -> None:
        super().__init__()
        self.prepare_encoder(encoder, config)
        self.config, self.class_counts, self.plan = config, class_counts, self.view_plan(config)
        if self.settings_class is not None:
            self.settings = config.section(self.settings_class)
        self.adapter = SampleAdapter() if adapter is None else adapter
        self.encoder = encoder
        self.prior = ClassPrior(class_counts)
        # not sub-modules: the teacher never changes and stays out of checkpoints
        self._teacher = (None if teacher is None else freeze(teacher), teacher_classifier)
        self.classifier = self.build_classifier(encoder.num_features)
        if config.teacher.source == "ema" and self.distillation_weight(config) > 0:
            parts = config.optimizer.grad_accumulation_steps
            self.mean_teacher = EMAEncoder([encoder, self.classifier], config.teacher.ema_decay, parts, warm_up=True)
        self.build()

    @property
    def teacher(self) -> FrozenEncoder | EncoderEnsemble | None:
        """The frozen encoder, or several; None where there is none."""
        return self._teacher[0]

    @property
    def teacher_classifier(self) -> nn.Module | None:
        """The classifier of its features, (B, F) to (B, C) scores; None where it has none for these classes."""
        return self._teacher[1]

    def build(self) -> None:
        """Add the method's own modules, buffers and memories; called once, at the end of the construction.

        Classes between this one and a method may add theirs too: call ``super().build()`` first.
        """

    def build_classifier(self, num_features: int) -> TrainedClassifier:
        """Return the classifier of (N, F) features, as it is before the training."""
        return self.adapter.build_classifier(num_features, len(self.prior.class_counts), self.config)

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:  # noqa: ARG003
        """Raise LongtailError where the settings do not fit the data; called before anything is built."""
        if config.teacher.source == "ema" and cls.needs_teacher(config):
            raise LongtailError(
                f"teacher.source ema: method {config.method} needs a trained teacher; use train, a folder or timm:NAME"
            )
        weight = config.classifier.agreement_weight
        if weight and cls.view_plan(config).num_classified < 2:
            raise LongtailError(
                f"classifier.agreement_weight {weight:g}: method {config.method} classifies one view of each image, "
                "expected two or more; set classifier.views 2 (ce, la, focal, cb, ldam, experts), or "
                "classifier.every_view with a second student view (contrastive methods; gml with --gml.no_share_query)"
            )
        distilled = cls.view_plan(config).num_distilled if cls.distillation_weight(config) else 0
        if 0 < config.teacher.cache < distilled:
            raise LongtailError(
                f"teacher.cache {config.teacher.cache}: {distilled} views of an image are distilled in a step; set it "
                f"to {distilled} or more, or to 0 for new views in every step"
            )

    @classmethod
    def prepare_encoder(cls, encoder: Encoder, config: Config) -> None:
        """Change an encoder with its initial weights into what the method trains; called again it changes nothing.

        Raises:
            LongtailError: the network cannot be changed that way.
        """

    @classmethod
    def pass_cost(cls, config: Config) -> float:  # noqa: ARG003
        """Return the operations of a student pass, as a multiple of those of the network alone."""
        return 1.0

    @classmethod
    def auto_config(
        cls,
        config: Config,
        class_counts: list[int],  # noqa: ARG003
        teacher_knows_classes: Callable[[], bool],  # noqa: ARG003
    ) -> tuple[Config, list[str]]:
        """Return the configuration with the method's open settings chosen, and the reason of every choice.

        Args:
            config: settings of the run.
            class_counts: (C,) training images per class.
            teacher_knows_classes: tells whether the teacher has a classifier for these classes.
        """
        return config, []

    @classmethod
    def predicts_under(cls, config: Config) -> PriorName:
        """Return the prior under which the method's own predictions are made.

        Plain cross-entropy learns p(y|x) with the training prior in it; the others learn scores that are free of it.
        """
        return "uniform" if config.classifier.logit_adjustment else "train"

    @classmethod
    def distillation_weight(cls, config: Config) -> float:
        """Return the weight of the distillation."""
        return config.classifier.distillation_weight

    @classmethod
    def needs_teacher(cls, config: Config) -> bool:
        """Return whether a teacher is trained or loaded first."""
        return cls.distillation_weight(config) > 0 and config.teacher.source != "ema"

    @classmethod
    def needs_teacher_features(cls, config: Config) -> bool:  # noqa: ARG003
        """Return whether :meth:`teacher_outputs` has features too, not scores alone."""
        return False

    @classmethod
    def view_plan(cls, config: Config) -> ViewPlan:
        """Return which views of an image a step has, and what takes them."""
        views = config.classifier.views
        return ViewPlan(
            student=(CLASSIFICATION,) * views,
            num_classified=views,
            distill_every_view=config.classifier.distill_every_view,
        )

    @classmethod
    def teacher_is_frozen(cls, config: Config) -> bool:
        """Return whether :meth:`teacher_outputs` depends on nothing that training changes; it can then be called ahead
        of the step, for many batches at once.
        """
        return config.teacher.source != "ema"

    @classmethod
    def losses_are_per_image(cls) -> bool:
        """Return whether the loss is a mean over the images of a loss of each one's scores, and nothing else is learned
        from the features, as where images are compared.
        """
        return cls.auxiliary_loss is Method.auxiliary_loss

    @classmethod
    def reason_against_mixing(cls, config: Config) -> str:  # noqa: ARG003
        """Return why the classified views cannot be views of mixed images, and what to do; empty if they can."""
        if cls.losses_are_per_image():
            return ""
        return "learns from images of one class each; use la, ce, focal or cb"

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of :meth:`training_step`; the trainer calls this, so that wrappers of the module see it."""
        return self.training_step(batch)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss terms by name, weighted: their sum is minimised."""
        # the teacher first: its memory is free again before the student's activations are kept for backward, which
        # saves memory and, on a CPU, a sixth of the step
        teacher_output = _prepared_output(batch) or self.teacher_outputs(batch)
        student_views = batch.views[: self.plan.num_student]
        features, batch, encoder_terms = self.adapter.encode(self.encoder, student_views, batch)
        size, views, labels = len(batch), self.plan.num_classified, batch.labels
        scores = self.training_scores(features if views == len(student_views) else features[: size * views])
        if batch.gradient_weights is not None:
            weights = batch.gradient_weights.repeat(views).view(-1, *(1,) * (scores.ndim - 1))
            scores.register_hook(lambda gradient: gradient * weights.to(gradient.dtype))
        targets = batch.targets(len(self.prior.class_counts))
        targets = targets if views == 1 else targets.repeat(views, *(1,) * (targets.ndim - 1))
        terms = self.classification_loss(self.adapter.upsample_scores(scores, labels), targets, batch)
        terms |= encoder_terms | self.auxiliary_loss(features, scores, batch, teacher_output)
        weight = self.config.classifier.agreement_weight
        if teacher_output.scores is None and weight == 0:
            return terms
        counted = self.adapter.downsample_labels(labels) >= 0
        if teacher_output.scores is not None:
            distilled = self.plan.num_distilled
            terms["distillation"] = self.distillation_strength(batch) * self.distillation_loss(
                scores if distilled == views else scores[: size * distilled],
                teacher_output.scores,
                counted.repeat(distilled, *(1,) * (counted.ndim - 1)),
            )
        if weight > 0:
            terms["agreement"] = weight * self.agreement_loss(scores.unflatten(0, (views, -1)), counted)
        return terms

    def training_scores(self, features: Tensor) -> Tensor:
        """Return the scores that the losses are of, (N, C) of the (N, F) features of the classified views."""
        scores: Tensor = self.classifier(features)
        return scores

    def distillation_loss(self, scores: Tensor, teacher_scores: Tensor, counted: Tensor) -> Tensor:
        """Return the distillation of the teacher, not weighted.

        A teacher's scores are free of the prior, and those of a student that learns the training prior are compared
        without it; those of its own moving average contain it too.

        Args:
            scores: (N, C) of the distilled views, as :meth:`training_scores` returns them.
            teacher_scores: (N, C).
            counted: (N,) bool, the samples to include.
        """
        if self.predicts_under(self.config) == "train" and self.config.teacher.source != "ema":
            scores = self.prior.subtracted_from(scores)
        return distillation(scores, teacher_scores, self.config.teacher.distillation_temperature, counted)

    def agreement_loss(self, scores: Tensor, counted: Tensor) -> Tensor:
        """Return the divergence between the posteriors of the V classified views, not weighted.

        Args:
            scores: (V, B, C), of :meth:`training_scores`.
            counted: (B,) bool, the samples to include.
        """
        return agreement(scores, self.log_prior(), counted)

    @torch.no_grad()
    def teacher_outputs(self, batch: Batch) -> TeacherOutput:
        """Return what the teacher computes for the batch, as far as the method needs it.

        Not called where its outputs came with the batch, cached or computed ahead of the step.
        """
        teacher, classifier = self.teacher, self.teacher_classifier
        if self.distillation_weight(self.config) == 0:
            return TeacherOutput(None, None)
        if self.config.teacher.source == "ema":
            return TeacherOutput(None, self._mean_teacher_scores(batch))
        assert teacher is not None
        assert classifier is not None
        return TeacherOutput(None, torch.cat([classifier(teacher(view)) for view in self.distilled_views(batch)]))

    def _mean_teacher_scores(self, batch: Batch) -> Tensor:
        """Return the scores that the moving average of the student gives the distilled views.

        Where there are several views, each learns from the next one's scores: student and average then see different
        augmentations of an image, as in the paper.
        """
        self.mean_teacher.update([self.encoder, self.classifier])
        views = self.distilled_views(batch)
        return torch.cat([self.mean_teacher(view) for view in (*views[1:], views[0])])

    def distillation_strength(self, batch: Batch) -> float | Tensor:
        """Return the weight of the distillation at a batch.

        From a moving average it grows by exp(−5 (1 − t/r)²) over the first fraction r of the training, since the
        average has learned nothing yet (Tarvainen & Valpola, NeurIPS 2017).
        """
        weight, ramp = self.distillation_weight(self.config), self.config.teacher.ema_warmup
        if self.config.teacher.source != "ema" or ramp == 0:
            return weight
        left = 1 - torch.as_tensor(batch.epoch_fraction) / ramp
        return weight * torch.exp(-5 * left.clamp(min=0) ** 2)

    def distilled_views(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the views whose scores the student learns from the teacher."""
        return batch.views[: self.plan.num_distilled]

    def log_prior(self) -> Tensor | None:
        """Return what is added to the scores in training, (C,)."""
        return self.prior.log_prior if self.config.classifier.logit_adjustment else None

    def loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return the loss of (B, C) scores, or (B, C, H, W), a scalar; of mixed images labels are probabilities."""
        return self.adapter.classifier_loss(scores, labels, self.log_prior())

    def classification_loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the classifier's term, of the scores of all classified views."""
        return {"classifier": self.loss(scores, labels, batch)}

    def auxiliary_loss(
        self,
        features: Tensor,  # noqa: ARG002
        scores: Tensor,  # noqa: ARG002
        batch: Batch,  # noqa: ARG002
        teacher_output: TeacherOutput,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the terms that are learned from the features beside the classifier.

        Args:
            features: (V · B, F) of all student views.
            scores: of the classified views.
            batch: the batch.
            teacher_output: what the teacher computes for it.
        """
        return {}

    def head(self, classifier: TrainedClassifier) -> Head:
        """Return the head that predicts: the trained classifier or its moving average, and what joins it."""
        return classifier

    @classmethod
    def conditional_entropy(cls, config: Config, means: Mapping[str, float], one_per_image: bool) -> float | None:  # noqa: ARG003
        """Return the estimate of H(Y|Z) in nats that the mean loss terms contain, −log p(y|z); None if they have none,
        as those of mixed images, which have no single label.

        Args:
            config: settings of the run.
            means: mean loss terms by name.
            one_per_image: whether a sample is an image.
        """
        return means.get("classifier") if config.mixing.kind == "none" else None

    def entropy_estimate(self, means: Mapping[str, float]) -> float | None:
        """Return :meth:`conditional_entropy` of the mean loss terms; None where a sample may have no class."""
        if not self.adapter.classes_only:
            return None
        return self.conditional_entropy(self.config, means, self.adapter.one_per_image)

    @classmethod
    def diagnose(cls, config: Config, epochs: Sequence[Mapping[str, Any]]) -> list[Finding]:  # noqa: ARG003
        """Return the problems of this method that the lines of ``metrics.jsonl`` of kind epoch show."""
        return []

    @classmethod
    def advice_for_tail(cls, config: Config) -> str:  # noqa: ARG003
        """Return which of the method's settings help a tail that is hardly recognised; empty if none does."""
        return ""

    def no_weight_decay(self) -> list[nn.Parameter]:
        """Return the parameters that have no weight decay."""
        return []

    def metrics_to_log(self) -> dict[str, Tensor]:
        """Return further scalars to log once per epoch."""
        return {}

    def init_memory(self, draw: Callable[[Sequence[Tensor], int], Iterator[Batch]], labels: Tensor) -> None:
        """Fill memories that must not start empty; called once, before the first step.

        Args:
            draw: gives batches of the training images at some positions, in the last view of a given round.
            labels: (N,) labels of the training images.
        """

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self._teacher:
            if module is not None:
                module._apply(fn)
        return self
