"""Supervised contrastive learning beside logit adjustment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.errors import LongtailError
from longtail.losses.contrastive import supcon_loss
from longtail.methods.contrastive import Contrastive, ContrastiveSettings, self_mask


@dataclass(frozen=True, kw_only=True)
class SupConSettings(ContrastiveSettings):
    """Supervised contrastive learning."""

    section: ClassVar[str] = "supcon"


class SupCon(Contrastive):
    """Khosla et al., NeurIPS 2020, arXiv 2004.11362, within the batch; the classifier is logit-adjusted."""

    settings_class = SupConSettings
    positives: Tensor

    def build(self) -> None:
        """Add the fraction of a batch with positives, for the log."""
        super().build()
        self.register_buffer("positives", self.prior.log_prior.new_ones(()), persistent=False)

    @classmethod
    def check(cls, config: Config, class_counts: list[int]) -> None:
        """Raise LongtailError where no image can ever have a positive."""
        super().check(config, class_counts)
        if config.section(SupConSettings).views == 1 and max(class_counts) < 2:
            raise LongtailError(
                "method supcon: no class has two images, so with supcon.views 1 no image has a positive; "
                "set supcon.views to 2"
            )

    def contrastive_loss(self, embeddings: Tensor, labels: Tensor, scores: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Return the supervised contrastive loss; a batch without positives adds nothing."""
        own = self_mask(embeddings, len(embeddings))
        same = (labels[:, None] == labels[None]) & ~own
        self.positives.copy_(same.any(dim=1).float().mean())
        return supcon_loss(embeddings, labels, embeddings, labels, self.settings.temperature, own)

    def metrics_to_log(self) -> dict[str, Tensor]:
        """Return the fraction of the last batch that had a positive."""
        return {"with_positives": self.positives}
