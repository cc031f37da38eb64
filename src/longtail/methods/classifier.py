"""Cross-entropy and logit adjustment: the cosine classifier's likelihood without and with the prior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from longtail.config import Config
from longtail.evaluation.class_frequencies import PriorName
from longtail.methods.base import LabelKind, Method


class LogitAdjustment(Method):
    """Cross-entropy of score + log prior, on every view.

    Source: Menon et al., ICLR 2021, arXiv 2007.07314; Ren et al., NeurIPS 2020 (Balanced Softmax).
    """

    label_kinds: ClassVar[frozenset[LabelKind]] = frozenset({"image", "pixels", "boxes"})


class ReweightedLoss(Method):
    """A loss over the same scores that is not −log p(y|x)."""

    @classmethod
    def predicts_under(cls, config: Config) -> PriorName:  # noqa: ARG003
        """Return uniform: a loss that weighs all classes alike leaves no prior in the scores."""
        return "uniform"

    def log_prior(self) -> None:
        """Return None: nothing is added to the scores."""
        return

    @classmethod
    def conditional_entropy(cls, config: Config, means: Mapping[str, float], one_per_image: bool) -> None:  # noqa: ARG003
        """Return None."""
        return


class CrossEntropy(Method):
    """Plain cross-entropy: the scores contain the training prior.

    Evaluated under the uniform prior it is post-hoc logit adjustment (Menon et al., ICLR 2021, arXiv 2007.07314).
    """

    label_kinds: ClassVar[frozenset[LabelKind]] = frozenset({"image", "pixels", "boxes"})

    @classmethod
    def predicts_under(cls, config: Config) -> PriorName:  # noqa: ARG003
        """Return the training prior."""
        return "train"

    def log_prior(self) -> None:
        """Return None: nothing is added to the scores."""
        return
