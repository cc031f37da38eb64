"""Cross-entropy and logit adjustment: the cosine classifier's likelihood with and without the prior."""

from __future__ import annotations

from collections.abc import Mapping

from longtail.config import Config
from longtail.methods.base import Method, Prior


class LogitAdjustment(Method):
    """Cross-entropy of score + log prior, on every view.

    Source: Menon et al., ICLR 2021, arXiv 2007.07314; Ren et al., NeurIPS 2020 (Balanced Softmax).
    """


class Weighted(Method):
    """A loss over the same scores that is no −log p(y|x) any more."""

    @classmethod
    def predicts_under(cls, _config: Config) -> Prior:
        """Return the uniform one: what weighs the classes alike leaves no prior in the scores."""
        return "uniform"

    def conditional_entropy(self, _means: Mapping[str, float]) -> None:
        """Say nothing of it."""
        return


class CrossEntropy(Method):
    """Plain cross-entropy: the scores take the training prior in.

    Judged under the uniform prior it is post-hoc logit adjustment (Menon et al., ICLR 2021, arXiv 2007.07314).
    """

    @classmethod
    def predicts_under(cls, _config: Config) -> Prior:
        """Return the training prior."""
        return "train"

    def log_prior(self) -> None:
        """Add nothing."""
        return
