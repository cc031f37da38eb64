"""Product of experts: classifiers with last stages of their own on one stem, each trained under another prior.

Legend: N samples, E experts, C classes, F feature width of an expert, π_c the class frequencies of the training set.

Expert e is trained as logit adjustment with τ_e times the log prior,

    L_e = −log [ π_y^τ_e exp(s_ey) / Σ_c π_c^τ_e exp(s_ec) ],

so its scores contain what Bayes' rule has left over, (1 − τ_e) log π_c: τ 0 is cross-entropy, an expert of the head; 1
is the balanced one; 2 over-corrects, an expert of the tail. Each is predicted with without that remainder, and their
product under any prior p is

    log p(y|x) = 1/E Σ_e [ s_ey − (1 − τ_e) log π_y ] + log p(y) + const.

Where the mean of the τ is 1, as for 0, 1, 2, the remainders cancel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from longtail.config import Config, Settings, Weight
from longtail.data.batch import Batch
from longtail.errors import LongtailError
from longtail.losses import agreement, distillation, posterior_cross_entropy
from longtail.methods.base import Method, TeacherOutput
from longtail.nn import Encoder, ExpertClassifier
from longtail.nn.experts import ExpertBackbone, relative_operations, split_experts


@dataclass(frozen=True, kw_only=True)
class ExpertsSettings(Settings):
    """Product of experts."""

    section: ClassVar[str] = "experts"

    strengths: tuple[Weight, ...] = (0.0, 1.0, 2.0)
    """Factor of the log prior in each expert's loss [τ], one for each expert: 0 is cross-entropy, 1 logit adjustment,
    more than 1 favours the tail."""
    stages: Annotated[int, Field(ge=0)] = 2
    """Last stages of the network that each expert has for itself; the others are shared. Blocks count as stages in a
    vision transformer. 0: all are shared, and each expert has a projection of the features, for any network."""
    self_distillation_weight: Weight = 0.0
    """Weight of the distillation of the product of the experts, held constant, into each of them."""

    def __post_init__(self) -> None:
        if len(self.strengths) < 2:
            raise LongtailError(
                f"experts.strengths: expected at least two, one for each expert, got {len(self.strengths)}; one expert "
                "is method la"
            )


def give_experts(encoder: Encoder, config: Config, count: int, stages: int) -> None:
    """Split an encoder into experts, unless it is: independent ones from random weights, else copies of its own."""
    if isinstance(encoder.backbone, ExpertBackbone):
        return
    scratch = config.pretrained == "none" and config.init is None and config.tune == "full"
    split_experts(encoder, count, stages, independent=scratch)


def operations_of_experts(config: Config, count: int, stages: int) -> float:
    """Return the operations of a network with experts, as a multiple of those of the network alone.

    A network that is still to be chosen is taken to be ResNet-32; those that are chosen have as many stages.
    """
    return relative_operations("resnet32" if config.network == "auto" else config.network, count, stages)


class ProductOfExperts(Method):
    """Experts with several strengths of the log prior, and their product as the prediction.

    The terms of the loss are means over the experts. Distillation, from a teacher or among the experts, compares scores
    without the prior that an expert's contain.

    Source: Sanchez Aimar et al., *Balanced Product of Calibrated Experts for Long-Tailed Recognition* (BalPoE), CVPR
    2023, arXiv 2206.05260. Stages of their own: Wang et al. (RIDE), ICLR 2021, arXiv 2010.01809. The experts' product
    as the teacher of each: Lan et al., *Knowledge Distillation by On-the-Fly Native Ensemble*, NeurIPS 2018, arXiv
    1806.04606; for a long tail Zhao et al. (MDCS), ICCV 2023, arXiv 2308.09922, by way of two views.
    """

    settings_class = ExpertsSettings
    settings: ExpertsSettings
    classifier: ExpertClassifier

    def build_classifier(self, num_features: int) -> ExpertClassifier:
        """Return the classifiers of the experts, with what their scores will contain of the log prior."""
        strengths = torch.tensor(self.settings.strengths)
        classifier = ExpertClassifier(
            num_features, len(self.prior.class_counts), self.config.classifier.scale, len(strengths)
        )
        if self.config.classifier.logit_adjustment:
            # a class without training images has no part in any expert's loss
            log_prior = self.prior.log_prior.masked_fill(self.prior.class_counts == 0, 0.0)
            classifier.contained_log_prior.copy_((1 - strengths)[:, None] * log_prior)
        return classifier

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where nothing of an expert's own would be trained."""
        super().check(config, class_counts)
        if config.tune == "head":
            raise LongtailError(
                "tune head: method experts trains last stages, or projections, of the experts' own; use --tune full or "
                "last:N, or method la"
            )

    @classmethod
    def prepare_encoder(cls, encoder: Encoder, config: Config) -> None:
        """Give the encoder its experts."""
        settings = config.section(ExpertsSettings)
        give_experts(encoder, config, len(settings.strengths), settings.stages)

    @classmethod
    def pass_cost(cls, config: Config) -> float:
        """Return the operations of all experts together, as a multiple of the network's alone."""
        settings = config.section(ExpertsSettings)
        return operations_of_experts(config, len(settings.strengths), settings.stages)

    @classmethod
    def losses_are_per_image(cls) -> bool:
        """Return True: distillation among the experts is of each image's scores too."""
        return True

    def training_scores(self, features: Tensor) -> Tensor:
        """Return the scores of each expert, (N, E, C) of (N, E · F) features."""
        return self.classifier.expert_scores(features)

    def loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return the mean over the experts of their losses."""
        log_prior = self.log_prior()
        losses = [
            posterior_cross_entropy(scores[:, index], labels, log_prior, strength)
            for index, strength in enumerate(self.settings.strengths)
        ]
        return torch.stack(losses).mean()

    def auxiliary_loss(
        self,
        features: Tensor,  # noqa: ARG002
        scores: Tensor,
        batch: Batch,
        teacher_output: TeacherOutput,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Return the distillation of the product of the experts into each, if it is asked for."""
        weight = self.settings.self_distillation_weight
        if weight == 0:
            return {}
        scores = self.classifier.without_prior(scores)
        counted = (batch.labels >= 0).repeat(len(scores) // len(batch))
        return {"self_distillation": weight * self._distill(scores, scores.mean(dim=1), counted)}

    def distillation_loss(self, scores: Tensor, teacher_scores: Tensor, counted: Tensor) -> Tensor:
        """Return the mean over the experts of the distillation of the same scores into each."""
        scores = self.classifier.without_prior(scores)
        if self.predicts_under(self.config) == "train" and self.config.teacher.source != "ema":
            # all of it: without logit adjustment no expert has a strength of its own
            scores = self.prior.subtracted_from(scores.flatten(0, 1)).view(scores.shape)
        return self._distill(scores, teacher_scores, counted)

    def _distill(self, scores: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        """Return the mean over the experts of the distillation of a target, (N, C), into their scores, (N, E, C)."""
        experts = scores.shape[1]
        return distillation(
            scores.flatten(0, 1),
            target.repeat_interleave(experts, dim=0),
            self.config.teacher.distillation_temperature,
            counted.repeat_interleave(experts),
        )

    def agreement_loss(self, scores: Tensor, counted: Tensor) -> Tensor:
        """Return the mean over the experts of the divergence between the views, under the prior of the training set."""
        # every expert's posterior is then that of the same images; of (V, B, E, C)
        scores = self.classifier.without_prior(scores).flatten(1, 2)
        return agreement(scores, self.log_prior(), counted.repeat_interleave(len(self.settings.strengths)))

    @classmethod
    def conditional_entropy(cls, config: Config, means: Mapping[str, float], one_per_image: bool) -> None:  # noqa: ARG003
        """Return None: every expert's loss is under another prior."""
        return
