"""Cross-entropy and logit adjustment: the cosine classifier's likelihood with and without the prior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from longtail.data.loaders import Batch
from longtail.methods.base import Method, Prior
from longtail.objectives import posterior_cross_entropy


class LogitAdjustment(Method):
    """Cross-entropy of score + log prior, on every view.

    Source: Menon et al., ICLR 2021, arXiv 2007.07314; Ren et al., NeurIPS 2020 (Balanced Softmax).
    """

    def log_prior(self) -> Tensor | None:
        """Return what is added to the scores in training, (C,)."""
        return self.prior.log

    def loss(self, scores: Tensor, labels: Tensor, _batch: Batch) -> Tensor:
        """Return the loss of (B, C) scores, a scalar."""
        return posterior_cross_entropy(scores, labels, self.log_prior())

    def conditional_entropy(self, means: Mapping[str, float]) -> float | None:
        """Return the mean of −log p(y|x)."""
        return means["classifier"]

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean loss over all views."""
        scores = self.classifier(self.encode(batch.views))
        return {"classifier": self.loss(scores, batch.labels.repeat(len(batch.views)), batch)}


class Weighted(LogitAdjustment):
    """A loss over the same scores that is no −log p(y|x) any more."""

    def conditional_entropy(self, _means: Mapping[str, float]) -> None:
        """Say nothing of it."""
        return


class CrossEntropy(LogitAdjustment):
    """Plain cross-entropy: the scores take the training prior in."""

    predicts_under: ClassVar[Prior] = "train"

    def log_prior(self) -> None:
        """Add nothing."""
        return
