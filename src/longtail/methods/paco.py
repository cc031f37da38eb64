"""Parametric contrastive learning, with and without a momentum encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.methods.base import View
from longtail.methods.contrastive import Remembering, themselves
from longtail.methods.momentum import Momentum
from longtail.nn import Encoder
from longtail.objectives.contrastive import parametric_contrastive_loss


class GPaCo(Remembering):
    """Cui et al., TPAMI 2023, arXiv 2209.12400: all views are queries and keys, of one encoder; the queue remembers.

    The classifier has no term of its own: its scores, the log prior added, stand for the class centres.
    """

    @classmethod
    def classified_views(cls, config: Config) -> int:
        """Return all of them: a query's own scores stand beside its keys."""
        return cls.student_views(config)

    def classify(self, scores: Tensor, labels: Tensor, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Return nothing: the scores go into the contrast term."""
        return {}

    def conditional_entropy(self, _means: object) -> None:
        """Say nothing of it: the loss is over centres and samples together."""
        return

    def compare(self, embeddings: Tensor, labels: Tensor, scores: Tensor, batch: Batch) -> Tensor:
        """Return the parametric contrastive loss of the compared views, whose scores are the last of the classified."""
        now, now_labels = self.keys(batch, embeddings, labels)
        slots = self.queue.slots()
        # a copy: the push below writes into what backward needs
        keys = torch.cat([embeddings, now, slots.features.clone()])
        log_prior = self.log_prior()
        adjusted = scores[-len(embeddings) :]
        loss = parametric_contrastive_loss(
            adjusted if log_prior is None else adjusted + log_prior,
            embeddings,
            labels,
            keys,
            torch.cat([labels, now_labels, slots.labels]),
            self.config.contrast.temperature,
            self.config.contrast.sample_weight,
            themselves(embeddings, len(keys)),
        )
        # one view an image goes into the queue, the newest
        kept = (now if len(now) else embeddings)[-len(batch) :].detach()
        self.queue.push(kept, batch.labels, batch.ids, batch.room)
        return loss

    def keys(self, batch: Batch, queries: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return further keys of this batch with their labels: none."""
        return queries[:0].detach(), labels[:0]


class PaCo(GPaCo):
    """Cui et al., ICCV 2021, arXiv 2107.12028: the keys are a slow average's of a view of their own."""

    def __init__(self, config: Config, encoder: Encoder, class_counts: list[int], *teacher: Any) -> None:
        super().__init__(config, encoder, class_counts, *teacher)
        self.slow = Momentum([self.encoder, self.embed], config.contrast.momentum)

    @classmethod
    def views(cls, config: Config) -> tuple[View, ...]:
        """Return the student's views and, last, the key's."""
        return (*super().views(config), "contrast")

    def keys(self, batch: Batch, queries: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return the slow average's embeddings of the key view."""
        self.slow.update([self.encoder, self.embed])
        return self.slow(batch.views[-1]), batch.labels
