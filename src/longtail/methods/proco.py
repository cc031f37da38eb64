"""Probabilistic contrastive learning: a von Mises–Fisher distribution a class, estimated while training.

Legend: B samples, V views, C classes, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.errors import LongtailError
from longtail.methods.contrastive import Contrastive
from longtail.nn import Encoder
from longtail.objectives import posterior_cross_entropy
from longtail.objectives.von_mises_fisher import LEAST_DIM, vmf_scores


class ProCo(Contrastive):
    """Du et al., TPAMI 2024, arXiv 2403.06726.

    A class's mean embedding is that over the last epoch and what has passed of this one.
    """

    sums: Tensor
    counts: Tensor
    epoch: Tensor

    def __init__(self, config: Config, encoder: Encoder, class_counts: list[int], *teacher: Any) -> None:
        super().__init__(config, encoder, class_counts, *teacher)
        # sums of the last epoch and of this one; the same on all processes, so that buffers are right for them
        self.register_buffer("sums", torch.zeros(2, len(class_counts), config.contrast.embedding_dim))
        self.register_buffer("counts", torch.zeros(2, len(class_counts)))
        self.register_buffer("epoch", torch.zeros(()))

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where the closed form does not hold."""
        super().check(config, class_counts)
        if config.contrast.embedding_dim < LEAST_DIM:
            raise LongtailError(
                f"contrast.embedding_dim {config.contrast.embedding_dim}: method proco needs at least {LEAST_DIM}, "
                "below which its Bessel function is not exact"
            )

    def compare(self, embeddings: Tensor, labels: Tensor, _scores: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of the posterior under the classes' distributions."""
        self._note(embeddings.detach().float(), labels, batch.done)
        mean = self.sums.sum(dim=0) / self.counts.sum(dim=0).clamp(min=1)[:, None]
        scores = vmf_scores(embeddings, mean, self.config.contrast.temperature)
        return posterior_cross_entropy(scores, labels, self.log_prior())

    def _note(self, embeddings: Tensor, labels: Tensor, done: float) -> None:
        sums = torch.zeros_like(self.sums[1]).index_add_(0, labels, embeddings)
        counts = torch.zeros_like(self.counts[1]).index_add_(0, labels, torch.ones_like(embeddings[:, 0]))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        # without asking the accelerator which epoch it is
        goes_on = (self.epoch == done).to(sums.dtype)
        for buffer, new in ((self.sums, sums), (self.counts, counts)):
            buffer[0] = goes_on * buffer[0] + (1 - goes_on) * buffer[1]
            buffer[1] = goes_on * buffer[1] + new
        self.epoch.fill_(done)
