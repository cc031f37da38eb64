"""Class scores of a trained detector, corrected for the long tail of its training set: NorCal and LogN.

Both are affine in the logits of each class, before suppression, so that they can be written into the weights of the
class layer (:mod:`longtail.detector_calibration`). The functions here are for scores that are at hand as arrays.

**NorCal** (Pan et al., On Model Calibration for Long-Tailed Object Detection and Instance Segmentation, NeurIPS 2021,
arXiv 2107.02170). With a softmax over C classes and the background, which is left as it is,

    p'(c) = p(c) / a_c / (Σ_k p(k) / a_k + p(background)),    a_c = (N_c / r)^power,

and with a sigmoid, whose background is 1 − p of each class by itself,

    p'(c) = p(c) / a_c / (p(c) / a_c + 1 − p(c)):

in both cases the logit of class c loses ``log a_c``. N_c are the training images of a class, as in the paper, or its
objects. The constant r does not change the ratios between classes, but those between all classes and the background,
so it has to be chosen:

* ``foreground`` (default): the classes together keep their frequency against the background: the power changes the
  frequencies of the classes among objects from N_c to N_c^(1 − power) and nothing else, r^power = ΣN_k / ΣN_k^(1 −
  power). Multiplying all counts by a number changes nothing.
* ``paper``: r = 1, as in the paper and its code. All scores fall, by N_c^power against the background, so score
  thresholds have to be lowered (the paper's results on LVIS keep detections down to a score of 1e-4).

A class without a count (none in the training set; a label that no category has) is treated as the most frequent one,
which no power raises above another.

**LogN** (Zhao et al., Logit Normalization for Long-tail Object Detection, IJCV 2024, arXiv 2203.17020). With mean μ_c
and standard deviation σ_c of the logit of class c over the proposals of training images,

    z'_c = (z_c − μ_c + β) / σ_c,    β = min_k μ_k over the classes without the background,

and the logits of the background, and of outputs that no category uses, as they are. The paper's proposals are those of
its training steps; here they are those of inference (all boxes, anchors or queries of which the detector computes class
scores), which need no annotations.

Legend: P proposals, C classes without the background, L = C or C + 1 outputs.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from longtail.errors import LongtailError

Background = Literal["first", "last"] | None
"""Which output of a softmax is the background; None for sigmoids, which have none."""
Normalization = Literal["foreground", "paper"]
"""What r is, see above."""
Scores = TypeVar("Scores", Tensor, np.ndarray[Any, Any])
SMALLEST_DEVIATION = 1e-6
"""LogN divides by no smaller standard deviation."""


class LogitCorrection(NamedTuple):
    """Corrected logits = ``scale`` · logits + ``shift``, by output; that of the background is scale 1, shift 0."""

    scale: Tensor
    """(L,) float64, positive."""
    shift: Tensor
    """(L,) float64."""

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every logit as it is."""
        return bool((self.scale == 1).all() and (self.shift == 0).all())

    def apply(self, logits: Tensor) -> Tensor:
        """Return corrected logits of (…, L) logits, of the same dtype; the same tensor if nothing changes."""
        if self.is_identity:
            return logits
        shift = self.shift.to(logits)
        if bool((self.scale == 1).all()):
            return logits + shift
        return torch.addcmul(shift, logits, self.scale.to(logits))


def norcal_shift(counts: Tensor, power: float, normalization: Normalization = "foreground") -> Tensor:
    """Return what NorCal adds to the logits of the classes, (C,) float64: −power · log(N_c / r).

    Args:
        counts: (C,) training images, or objects, of each class; 0 where there are none.
        power: exponent γ of the counts, at least 0; with 0 the result is zeros.
        normalization: which r.

    Raises:
        LongtailError: a negative power, negative counts, or no class with a count.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if not (power >= 0 and math.isfinite(power)):
        raise LongtailError(f"power {power}: expected 0 or more")
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise LongtailError("counts: expected finite numbers of at least 0")
    present = counts > 0
    if not bool(present.any()):
        raise LongtailError("counts: expected a class with training objects; all are 0")
    if power == 0:
        return torch.zeros_like(counts)
    log_counts = torch.where(present, counts, counts.max()).log()
    shift = -power * log_counts
    if normalization == "paper":
        return shift
    known = log_counts[present]
    return shift + known.logsumexp(0) - ((1 - power) * known).logsumexp(0)


def with_background(shift: Tensor, background: Background, value: float = 0.0) -> Tensor:
    """Return (L,) values of all outputs, from (C,) of the classes and ``value`` for the background."""
    if background is None:
        return shift
    extra = shift.new_full((1,), value)
    return torch.cat([extra, shift] if background == "first" else [shift, extra])


def norcal_correction(
    counts: Tensor, power: float, background: Background, normalization: Normalization = "foreground"
) -> LogitCorrection:
    """Return NorCal as a correction of L logits; the arguments are those of :func:`norcal_shift`."""
    shift = with_background(norcal_shift(counts, power, normalization), background)
    return LogitCorrection(torch.ones_like(shift), shift)


def norcal(
    probabilities: Scores,
    counts: Tensor | np.ndarray[Any, Any],
    power: float,
    background: Background,
    normalization: Normalization = "foreground",
    inplace: bool = False,
) -> Scores:
    """Return the probabilities of proposals corrected by NorCal.

    >>> import numpy as np
    >>> p = np.array([[0.50, 0.30, 0.20]])  # background, a class of 900 images, a class of 100
    >>> norcal(p, np.array([900, 100]), power=0.5, background="first", normalization="paper").round(4)
    array([[0.9434, 0.0189, 0.0377]])

    Args:
        probabilities: (…, L), a softmax with the background or sigmoids without it; an array or a tensor.
        counts: (C,) training images, or objects, of each class.
        power: exponent of the counts; 0 returns the probabilities bit by bit.
        background: which of the L outputs is the background; None for sigmoids.
        normalization: see the top of this module.
        inplace: overwrite ``probabilities``, which saves the memory of a copy.

    Raises:
        LongtailError: the counts are not those of the classes, or see :func:`norcal_shift`.
    """
    values = torch.as_tensor(probabilities)
    shift = norcal_shift(torch.as_tensor(counts), power, normalization)
    _check_outputs(values, len(shift), background)
    corrected = values if inplace else values.clone()
    if power != 0:
        factors = with_background(shift, background).exp().to(corrected)
        if background is None:
            rest = 1 - corrected
            corrected.mul_(factors)
            corrected.div_(rest.add_(corrected))
        else:
            corrected.mul_(factors)
            corrected.div_(corrected.sum(dim=-1, keepdim=True))
    return corrected if isinstance(probabilities, Tensor) else corrected.numpy()


class LogitStatistics:
    """Mean and deviation of the logits of each output over any number of proposals, in batches.

    Sums of squared deviations are merged (Chan et al., 1983), in float64, so that no mean of squares is subtracted.

    Args:
        num_outputs: L.
    """

    def __init__(self, num_outputs: int) -> None:
        self.count = 0
        self.mean = torch.zeros(num_outputs, dtype=torch.float64)
        self._squares = torch.zeros(num_outputs, dtype=torch.float64)

    def update(self, logits: Tensor | np.ndarray[Any, Any]) -> None:
        """Add (…, L) logits."""
        values = torch.as_tensor(logits).detach().reshape(-1, len(self.mean)).double().cpu()
        if len(values) == 0:
            return
        mean = values.mean(dim=0)
        self._merge(len(values), mean, (values - mean).square_().sum(dim=0))

    def merge(self, other: LogitStatistics) -> None:
        """Add what another one has seen, for example in another process."""
        if other.count:
            self._merge(other.count, other.mean, other._squares)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        difference = mean - self.mean
        self._squares = self._squares + squares + difference.square() * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    @property
    def deviation(self) -> Tensor:
        """(L,) float64 standard deviation, of the proposals as they are (divided by their number)."""
        return (self._squares / max(self.count, 1)).sqrt()


def logn_correction(
    statistics: LogitStatistics, background: Background, has_category: Tensor | None = None
) -> LogitCorrection:
    """Return LogN as a correction of L logits.

    Args:
        statistics: of the logits of training proposals.
        background: which of the L outputs is the background; None for sigmoids.
        has_category: (C,) bool, whether an output stands for a category; all do if not given. The others, as COCO's
            labels without a category, have logits that no object has raised: they take no part in β, and stay as they
            are.

    Raises:
        LongtailError: there are fewer than two proposals, no output has a category, or they are another number.
    """
    if statistics.count < 2:
        raise LongtailError(f"LogN: needs the logits of at least 2 proposals, got {statistics.count}; use more images")
    classes = class_outputs(len(statistics.mean), background)
    mean = statistics.mean[classes]
    deviation = statistics.deviation[classes].clamp(min=SMALLEST_DEVIATION)
    used = torch.ones_like(mean, dtype=torch.bool) if has_category is None else has_category.to(mean.device)
    if used.shape != mean.shape or not bool(used.any()):
        raise LongtailError(
            f"LogN: {int(used.sum())} of {len(used)} outputs have a category; expected some of {len(mean)}"
        )
    scale = torch.where(used, 1 / deviation, 1.0)
    shift = torch.where(used, (mean[used].min() - mean) / deviation, 0.0)
    return LogitCorrection(with_background(scale, background, 1.0), with_background(shift, background))


def logn(logits: Scores, statistics: LogitStatistics, background: Background) -> Scores:
    """Return logits of proposals corrected by LogN.

    Args:
        logits: (…, L); an array or a tensor.
        statistics: of the logits of training proposals.
        background: which of the L outputs is the background; None for sigmoids.

    Raises:
        LongtailError: the statistics are of another number of outputs, or of fewer than two proposals.
    """
    values = torch.as_tensor(logits)
    if values.shape[-1] != len(statistics.mean):
        raise LongtailError(
            f"logits: {values.shape[-1]} outputs, expected the {len(statistics.mean)} of the statistics"
        )
    corrected = logn_correction(statistics, background).apply(values)
    return corrected if isinstance(logits, Tensor) else corrected.numpy()


def scale_scores(scores: Scores, labels: Tensor | np.ndarray[Any, Any], counts: Tensor, power: float) -> Scores:
    """Return the scores of detections divided by their class's count to a power.

    This is less than NorCal: where only the score of the detected class was kept, the other classes and the background
    of the same box are unknown, so nothing can be renormalised. Scores are divided by (N_c / N_min)^power, so that
    those of the rarest class stay as they are and none exceeds 1; average precision depends on no common factor.

    Args:
        scores: (D,) of D detections.
        labels: (D,) int64 in [0, C).
        counts: (C,) training images, or objects, of each class.
        power: exponent of the counts; 0 returns the scores bit by bit.

    Raises:
        LongtailError: see :func:`norcal_shift`.
    """
    shift = norcal_shift(counts, power, "paper")
    factors = (shift - shift.max()).exp()
    values = torch.as_tensor(scores)
    scaled = values.clone() if power == 0 else (values * factors[torch.as_tensor(labels)]).to(values)
    return scaled if isinstance(scores, Tensor) else scaled.numpy()


def class_outputs(num_outputs: int, background: Background) -> slice:
    """Return where the C classes are among L outputs."""
    return {None: slice(0, num_outputs), "first": slice(1, num_outputs), "last": slice(0, num_outputs - 1)}[background]


def _check_outputs(values: Tensor, classes: int, background: Background) -> None:
    expected = classes + (background is not None)
    if values.shape[-1] != expected:
        extra = "" if background is None else " and the background"
        raise LongtailError(
            f"scores: {values.shape[-1]} outputs, but the counts are of {classes} classes: expected {expected}, "
            f"one for each class{extra}"
        )
