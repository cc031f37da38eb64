"""What test-time augmentation gains on validation images. Legend: N images, C classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longtail.data.dataset import ImageSet
from longtail.errors import LongtailError
from longtail.inference.options import TTA, TTA_VIEWS
from longtail.inference.recognizer import Recognizer
from longtail.tasks.classification.evaluator import collect_logits


class Gain(NamedTuple):
    """A difference of balanced accuracy between two predictions of the same images, in points."""

    balanced_accuracy: float
    low: float
    """Of the 95 % interval."""
    high: float


@dataclass(frozen=True)
class TTAChoice:
    """Test-time augmentation that is used, and why."""

    tta: TTA
    requested: str
    gains: Mapping[TTA, Gain] = field(default_factory=dict)
    """Gains over no augmentation; empty without validation images."""
    images: int = 0
    """Number of validation images."""

    def as_json(self) -> dict[str, Any]:
        """Return what ``evaluate --json`` holds."""
        gains = {
            name: {"balanced_accuracy": gain.balanced_accuracy, "interval": [gain.low, gain.high]}
            for name, gain in self.gains.items()
        }
        return {"used": self.tta, "requested": self.requested, "validation_images": self.images, "gains": gains}


def paired_gain(before: Tensor, after: Tensor, labels: Tensor) -> Gain:
    """Return the gain of balanced accuracy with its 95 % interval.

    The interval is that of a sum of independent differences, whose variance is estimated as their sum of squares. This
    is the variance where there is no gain, so that an interval above zero is McNemar's test, with weights 1 / (C n_c)
    that make every class count the same. A class may have a single image.

    Args:
        before: (N,) bool, whether each image is predicted correctly.
        after: (N,) bool, the same of the other prediction.
        labels: (N,) classes.
    """
    counts = torch.bincount(labels).double()
    weights = 1 / (counts[labels] * (counts > 0).sum())
    differences = 100 * weights * (after.double() - before.double())
    gain, margin = float(differences.sum()), 1.96 * math.sqrt(float(differences.square().sum()))
    return Gain(gain, gain - margin, gain + margin)


def choose_tta(model: Recognizer, images: ImageSet | None, requested: TTA | Literal["auto"]) -> TTAChoice:
    """Return the test-time augmentation that was requested, or chosen, with what it gains on validation images.

    ``auto`` starts from none, and goes on to ``flip`` and to ``crops`` where that gains more than noise.

    Args:
        model: what predicts.
        images: validation images.
        requested: ``none``, ``flip``, ``crops`` or ``auto``.

    Raises:
        LongtailError: ``auto`` without validation images.
    """
    if requested == "none":
        return TTAChoice("none", requested)
    if images is None or len(images) == 0:
        if requested == "auto":
            raise LongtailError(
                "--tta auto: needs validation images, and the run had none; train with some (--data.val_fraction 0.1), "
                "or use --tta flip, crops or none"
            )
        return TTAChoice(requested, requested)
    candidates: tuple[TTA, ...] = ("flip", "crops") if requested == "auto" else (requested,)
    labels = images.labels

    def correct(tta: TTA) -> Tensor:
        return collect_logits(model, images, tta)[0].argmax(dim=1).cpu() == labels

    plain = correct("none")
    chosen, best, gains = "none" if requested == "auto" else requested, plain, {}
    for tta in candidates:
        predicted = correct(tta)
        gains[tta] = paired_gain(plain, predicted, labels)
        if requested == "auto" and paired_gain(best, predicted, labels).low > 0:
            chosen, best = tta, predicted
    return TTAChoice(chosen, requested, gains, len(labels))


def tta_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return a line on what test-time augmentation gains, from what ``evaluate --json`` holds."""
    if "tta" not in metrics:
        return []
    choice = metrics["tta"]
    used, gains = choice["used"], choice["gains"]
    line = f"test-time augmentation {used}"
    if choice["requested"] == "auto":
        line += ", chosen automatically"
    if used != "none":
        line += f" ({TTA_VIEWS[used]} times the computation)"
    if not gains:
        return [f"{line}: its gain is not known, because the run had no validation images"]
    shown = ", ".join(
        f"{name} {entry['balanced_accuracy']:+.1f} ({entry['interval'][0]:+.1f} to {entry['interval'][1]:+.1f})"
        for name, entry in gains.items()
    )
    line += f": gain of balanced accuracy on {choice['validation_images']:,} validation images {shown}"
    if not any(entry["interval"][0] > 0 for entry in gains.values()):
        line += ", not more than noise" + ("" if used == "none" else "; --tta none is faster")
    return [line]
