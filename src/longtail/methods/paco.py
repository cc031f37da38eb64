"""Parametric contrastive learning, with and without a momentum encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from longtail.config import Config, Weight
from longtail.data.batch import Batch
from longtail.errors import LongtailError
from longtail.losses.contrastive import parametric_contrastive_loss
from longtail.methods.contrastive import QueueContrastive, QueueSettings, self_mask
from longtail.methods.ema import EMAEncoder
from longtail.methods.views import CONTRAST, ViewPlan


@dataclass(frozen=True, kw_only=True)
class GPaCoSettings(QueueSettings):
    """Generalised parametric contrastive learning; its loss has no other term, so weight scales all of it."""

    section: ClassVar[str] = "gpaco"

    sample_weight: Weight = 0.05
    """Weight of a positive sample beside the centre of its class [α]."""


@dataclass(frozen=True, kw_only=True)
class PaCoSettings(GPaCoSettings):
    """Parametric contrastive learning; its loss has no other term, so weight scales all of it."""

    section: ClassVar[str] = "paco"

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the encoder that computes the keys."""


class GPaCo(QueueContrastive):
    """Cui et al., TPAMI 2023, arXiv 2209.12400: all views are queries and keys of one encoder, beside a queue.

    The classifier has no term of its own: its scores, with the log prior added, stand for the class centres.
    """

    settings_class: ClassVar[type[GPaCoSettings]] = GPaCoSettings
    settings: GPaCoSettings

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where a student view would be compared with nothing."""
        super().check(config, class_counts)
        settings = config.section(cls.settings_class)
        if not settings.share_view:
            raise LongtailError(
                f"{settings.section}.share_view false: method {config.method} has no loss for a view that is not "
                f"compared; set it to true, and {settings.section}.views for more views"
            )

    @classmethod
    def view_plan(cls, config: Config) -> ViewPlan:
        """Return the compared views, all classified: the scores of a query stand beside its keys."""
        plan = super().view_plan(config)
        return replace(plan, num_classified=plan.num_student)

    @classmethod
    def reason_against_mixing(cls, config: Config) -> str:  # noqa: ARG003
        """Return that centres and samples are in one softmax, whose positives are of one class."""
        return "has one softmax over classes and samples, in which an image has one class; use la, ce, focal or cb"

    def classification_loss(self, scores: Tensor, labels: Tensor, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return nothing: the scores go into the contrastive loss."""
        return {}

    @classmethod
    def conditional_entropy(cls, config: Config, means: Mapping[str, float], one_per_image: bool) -> None:  # noqa: ARG003
        """Return None: the loss is over centres and samples together."""
        return

    def contrastive_loss(self, embeddings: Tensor, labels: Tensor, scores: Tensor, batch: Batch) -> Tensor:
        """Return the parametric contrastive loss of the compared views, whose scores are the last ones."""
        settings = self.settings
        batch_keys, batch_labels = self.batch_keys(batch, embeddings, labels)
        slots = self.queue.slots()
        keys = torch.cat([embeddings, batch_keys, slots.features])
        log_prior = self.log_prior()
        adjusted = scores[-len(embeddings) :]
        loss = parametric_contrastive_loss(
            adjusted if log_prior is None else adjusted + log_prior,
            embeddings,
            labels,
            keys,
            torch.cat([labels, batch_labels, slots.labels]),
            settings.temperature,
            settings.sample_weight,
            self_mask(embeddings, len(keys)),
        )
        # one view per image goes into the queue, the newest
        newest = (batch_keys if len(batch_keys) else embeddings)[-len(batch) :].detach()
        self.queue.push(newest, batch.labels, batch.ids, batch.max_local_batch)
        return loss

    def batch_keys(self, batch: Batch, queries: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return further keys of this batch with their labels: none."""
        return queries[:0].detach(), labels[:0]


class PaCo(GPaCo):
    """Cui et al., ICCV 2021, arXiv 2107.12028: a momentum encoder computes the keys, from a view of their own."""

    settings_class: ClassVar[type[PaCoSettings]] = PaCoSettings
    settings: PaCoSettings

    def build(self) -> None:
        """Add the momentum encoder."""
        super().build()
        parts = self.config.optimizer.grad_accumulation_steps
        self.ema = EMAEncoder([self.encoder, self.embed], self.settings.momentum, parts)

    @classmethod
    def view_plan(cls, config: Config) -> ViewPlan:
        """Return the student's views and, last, the key view."""
        return replace(super().view_plan(config), keys=(CONTRAST,))

    def batch_keys(self, batch: Batch, queries: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return the momentum encoder's embeddings of the key view."""
        self.ema.update([self.encoder, self.embed])
        return self.ema(batch.views[-1]), batch.labels
