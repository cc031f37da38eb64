"""What a run's own figures say went wrong, in words: a finding, what it was measured by, and what to try.

Every sentence rests on a quantity of the run; where nothing stands out, nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longtail.config import Config
from longtail.objectives.checks import LEAST_TEMPERATURE
from longtail.recognizer import Card


@dataclass(frozen=True)
class Finding:
    """One thing that stands out."""

    what: str
    measured: str
    advice: str


def diagnose(
    card: Card, config: Config, epochs: Sequence[Mapping[str, Any]], judged: Mapping[str, Mapping[str, Any]]
) -> list[Finding]:
    """Return what stands out of a classifier's run, the gravest first.

    Args:
        card: of its recogniser.
        config: its settings.
        epochs: lines of ``metrics.jsonl`` of kind epoch, in order.
        judged: metrics on the test set by prior.
    """
    found = judged[card.predicts_under]
    return [
        finding
        for finding in (
            _unfinished(epochs),
            _blind_tail(card, config, found, judged["uniform"]),
            _overcorrected(found),
            _overfit(config, epochs, found),
            _temperature(config, epochs),
            _queues(config, epochs),
            _boastful(found),
        )
        if finding is not None
    ]


def _unfinished(epochs: Sequence[Mapping[str, Any]]) -> Finding | None:
    losses = [line["classifier"] for line in epochs if "classifier" in line]
    if len(losses) < 8:
        return None
    tail = max(2, len(losses) // 8)
    before, last = sum(losses[-2 * tail : -tail]) / tail, sum(losses[-tail:]) / tail
    if before <= 0 or (before - last) / before < 0.1:
        return None
    return Finding(
        "The training was not finished.",
        f"Over its last {tail} epochs the classifier's loss still fell by {100 * (before - last) / before:.0f} %, from "
        f"{before:.3f} to {last:.3f}.",
        "More epochs; with gml a teacher that was trained longer.",
    )


def _blind_tail(card: Card, config: Config, found: Mapping[str, Any], uniform: Mapping[str, Any]) -> Finding | None:
    many, few = found["many"], found["few"]
    if many is None or few is None or many < 20 or few > 0.5 * many:
        return None
    advice = "A new head on this encoder: longtail rebalance RUN --how crt."
    if card.predicts_under == "train":
        gained = (uniform["few"] or 0) - few
        advice = f"Predict under the uniform prior (few +{gained:.1f} points), or train with --method la."
    elif config.method == "gml" and config.gml.queue_minimum < 8:
        advice = f"More keys a class: gml.queue_minimum above {config.gml.queue_minimum}. {advice}"
    return Finding(
        "The tail is hardly recognised.",
        f"Accuracy in few is {few:.1f} %, in many {many:.1f} %.",
        advice,
    )


def _overcorrected(found: Mapping[str, Any]) -> Finding | None:
    many, medium = found["many"], found["medium"]
    if many is None or medium is None or many > 0.8 * medium:
        return None
    return Finding(
        "The head pays for the rest.",
        f"Accuracy in many is {many:.1f} %, in medium {medium:.1f} %.",
        "Weaker weights of rare classes: --method la instead of a re-weighted loss, or the sampler instance.",
    )


def _overfit(config: Config, epochs: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> Finding | None:
    loss = epochs[-1].get("classifier")
    if loss is None or config.method in {"focal", "cb", "ldam"} or loss > 0.05 or found["balanced_accuracy"] > 80:
        return None
    return Finding(
        "The training images are learned by heart.",
        f"The classifier's loss on them ends at {loss:.3f}, balanced accuracy on the test set at "
        f"{found['balanced_accuracy']:.1f} %.",
        "Stronger augmentation (data.augment), weight decay, a smaller network, or one that starts pretrained.",
    )


def _temperature(config: Config, epochs: Sequence[Mapping[str, Any]]) -> Finding | None:
    tau = epochs[-1].get("temperature")
    if tau is None or not config.gml.learn_temperature or 1.2 * LEAST_TEMPERATURE < tau < 0.8:
        return None
    side = "narrow: every key speaks for itself alone" if tau < 0.5 else "wide: the keys of a class say little"
    return Finding(
        "The mixture's temperature went to its bound.",
        f"τ ended at {tau:.3f}; its components are {side}.",
        "A teacher that was trained longer, or a fixed one: --gml.learn_temperature false.",
    )


def _queues(config: Config, epochs: Sequence[Mapping[str, Any]]) -> Finding | None:
    fill = epochs[-1].get("queue_fill")
    if fill is None or fill > 0.9:
        return None
    return Finding(
        "The queues never filled.",
        f"At the end {100 * fill:.0f} % of their slots held a key.",
        f"Fewer slots: gml.queue_size below {config.gml.queue_size}; or more epochs.",
    )


def _boastful(found: Mapping[str, Any]) -> Finding | None:
    calibration = found.get("calibration")
    if calibration is None or calibration["ece"] < 10:
        return None
    return Finding(
        "Probabilities are not to be taken at their word.",
        f"Confidence and accuracy differ by {calibration['ece']:.0f} % on average.",
        "Validation images to calibrate with: --data.val_fraction 0.1, and --calibration group.",
    )
