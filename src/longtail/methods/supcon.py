"""Supervised contrastive learning beside logit adjustment."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longtail.config import Config
from longtail.data.loaders import Batch
from longtail.errors import LongtailError
from longtail.methods.contrastive import Contrastive, themselves
from longtail.nn import Encoder
from longtail.objectives.contrastive import supcon_loss


class SupCon(Contrastive):
    """Khosla et al., NeurIPS 2020, arXiv 2004.11362, within the batch; the classifier is logit-adjusted."""

    positives: Tensor

    def __init__(self, config: Config, encoder: Encoder, class_counts: list[int], *teacher: Any) -> None:
        super().__init__(config, encoder, class_counts, *teacher)
        self.register_buffer("positives", self.prior.log.new_ones(()), persistent=False)

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where no image can ever have a positive."""
        super().check(config, class_counts)
        if config.contrast.views == 1 and max(class_counts) < 2:
            raise LongtailError(
                "method supcon: no class has two images, so that with contrast.views 1 no image has a positive; "
                "set contrast.views to 2"
            )

    def compare(self, embeddings: Tensor, labels: Tensor, _scores: Tensor, _batch: Batch) -> Tensor:
        """Return the supervised contrastive loss; a batch without positives adds nothing."""
        own = themselves(embeddings, len(embeddings))
        same = (labels[:, None] == labels[None]) & ~own
        self.positives.copy_(same.any(dim=1).float().mean())
        return supcon_loss(embeddings, labels, embeddings, labels, self.config.contrast.temperature, own)

    def watched(self) -> dict[str, Tensor]:
        """Return the share of the last batch that had a positive."""
        return {"with_positives": self.positives}
