"""Cross-entropy and logit adjustment: the cosine classifier's likelihood without and with the prior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from longtail.config import Config, first_stage_epochs
from longtail.data.samplers import ends_balanced
from longtail.evaluation.class_frequencies import PriorName
from longtail.methods.base import LabelKind, Method
from longtail.nn.network_name import is_decoder_network


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


def shown_prior(config: Config) -> PriorName:
    """Return the class frequencies that a loss without a prior learns: those of the images that are shown at last.

    Pixels and objects are not balanced by a sampler, which draws whole images.
    """
    balanced = ends_balanced(config.data.sampler, config.data.deferred_from, first_stage_epochs(config))
    return "uniform" if balanced and not is_decoder_network(config.network) else "train"


class CrossEntropy(Method):
    """Plain cross-entropy: the scores contain the prior of the images that are shown.

    Evaluated under the uniform prior it is post-hoc logit adjustment (Menon et al., ICLR 2021, arXiv 2007.07314).
    """

    label_kinds: ClassVar[frozenset[LabelKind]] = frozenset({"image", "pixels", "boxes"})

    @classmethod
    def predicts_under(cls, config: Config) -> PriorName:
        """Return the prior of the images that the training ends with: that of the training set, or the uniform one."""
        return shown_prior(config)

    def log_prior(self) -> None:
        """Return None: nothing is added to the scores."""
        return
