"""Probabilistic contrastive learning: a von Mises–Fisher distribution per class, estimated during training.

Legend: B samples, V views, C classes, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.distributed import all_reduce_sum
from longtail.errors import LongtailError
from longtail.losses import posterior_cross_entropy
from longtail.losses.checks import valid_labels
from longtail.losses.von_mises_fisher import MIN_DIM, vmf_scores
from longtail.methods.contrastive import Contrastive, ContrastiveSettings


@dataclass(frozen=True, kw_only=True)
class ProCoSettings(ContrastiveSettings):
    """Probabilistic contrastive learning."""

    section: ClassVar[str] = "proco"


class ProCo(Contrastive):
    """Du et al., TPAMI 2024, arXiv 2403.06726.

    The mean embedding of a class is that over the last epoch and the part of this one that has passed. A sample with
    label −1 is left out; another label out of range raises a ValueError on a CPU, and is left out on an accelerator.
    """

    settings_class = ProCoSettings
    sums: Tensor
    counts: Tensor
    epoch: Tensor

    def build(self) -> None:
        """Add the sums of embeddings by class."""
        super().build()
        classes = len(self.class_counts)
        # sums of the last epoch and of this one; equal in all processes, so they may be buffers
        self.register_buffer("sums", torch.zeros(2, classes, self.settings.embedding_dim))
        self.register_buffer("counts", torch.zeros(2, classes))
        self.register_buffer("epoch", torch.zeros(()))

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where the closed form does not hold."""
        super().check(config, class_counts)
        dim = config.section(ProCoSettings).embedding_dim
        if dim < MIN_DIM:
            raise LongtailError(
                f"proco.embedding_dim {dim}: method proco needs at least {MIN_DIM}, "
                "below which its expansion of the Bessel function is not accurate"
            )

    def contrastive_loss(self, embeddings: Tensor, labels: Tensor, scores: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return the cross-entropy of the posterior under the distributions of the classes."""
        self._update(embeddings.detach().float(), labels, batch.epoch_fraction)
        mean = self.sums.sum(dim=0) / self.counts.sum(dim=0).clamp(min=1)[:, None]
        log_likelihood = vmf_scores(embeddings, mean, self.settings.temperature)
        return posterior_cross_entropy(log_likelihood, labels, self.log_prior())

    def _update(self, embeddings: Tensor, labels: Tensor, epoch_fraction: float | Tensor) -> None:
        labels = valid_labels(labels, self.counts.shape[1])
        # an ignored sample adds zeros to the first class: selecting the others would give tensors of a size that
        # depends on values, for which the host would have to wait
        ignored, index = labels < 0, labels.clamp(min=0)
        embeddings = embeddings.masked_fill(ignored[:, None], 0.0)
        sums = all_reduce_sum(torch.zeros_like(self.sums[1]).index_add_(0, index, embeddings))
        counts = all_reduce_sum(torch.zeros_like(self.counts[1]).index_add_(0, index, (~ignored).to(sums.dtype)))
        # without asking the accelerator which epoch it is
        same_epoch = (self.epoch == epoch_fraction).to(sums.dtype)
        for buffer, new in ((self.sums, sums), (self.counts, counts)):
            buffer[0] = same_epoch * buffer[0] + (1 - same_epoch) * buffer[1]
            buffer[1] = same_epoch * buffer[1] + new
        self.epoch.fill_(epoch_fraction)
