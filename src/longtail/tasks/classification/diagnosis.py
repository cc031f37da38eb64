"""What the figures of a classifier's run show to be wrong: the problem, its evidence, and what to try.

Every finding rests on a quantity of the run; where nothing stands out, nothing is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longtail.config import Config
from longtail.errors import LongtailError
from longtail.inference.model_config import ModelConfig
from longtail.methods.base import Finding
from longtail.nn.backbones import is_suited_to_lora
from longtail.registry import METHODS

_MIN_REST = 0.05
"""A mean loss in nats below which its further fall says nothing: every training image is classified with p > 0.95."""
_MIN_GAIN = 0.05
"""Where between chance (0) and perfect (1) balanced accuracy has to be for findings on classes to mean anything."""


def diagnose(
    model_config: ModelConfig,
    config: Config,
    epochs: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Mapping[str, Any]],
) -> list[Finding]:
    """Return what stands out in a run, the most serious first.

    Args:
        model_config: of its model.
        config: its settings.
        epochs: lines of ``metrics.jsonl`` of kind epoch, in order.
        metrics: metrics on the test set by prior.
    """
    main = metrics[model_config.predicts_under]
    at_chance = _at_chance(model_config, main)
    if at_chance is not None:
        # of a network that has learned nothing, the classes that it names, its confidence, its queues and the slope of
        # its loss say nothing; only that it knows its training images would be another matter
        findings = [at_chance, _overfitting(config, epochs, main)]
    else:
        findings = [
            _not_converged(epochs),
            _tail_not_recognised(model_config, config, main, metrics["uniform"]),
            _head_behind_medium(main),
            _overfitting(config, epochs, main),
            *METHODS[config.method].diagnose(config, epochs),
            _overconfident(model_config, main),
        ]
    return [finding for finding in findings if finding is not None]


def _not_converged(epochs: Sequence[Mapping[str, Any]]) -> Finding | None:
    losses = [line["loss/classifier"] for line in epochs if "loss/classifier" in line]
    if len(losses) < 8:
        return None
    last_part = max(2, len(losses) // 8)
    before, last = sum(losses[-2 * last_part : -last_part]) / last_part, sum(losses[-last_part:]) / last_part
    if before <= _MIN_REST or (before - last) / before < 0.1:
        return None
    return Finding(
        "The training has not converged.",
        f"Over its last {last_part} epochs the classification loss still fell by "
        f"{100 * (before - last) / before:.0f} %, from {before:.3f} to {last:.3f}.",
        "More epochs; with gml a teacher that is trained longer.",
    )


def _at_chance(model_config: ModelConfig, main: Mapping[str, Any]) -> Finding | None:
    accuracy, chance = main["balanced_accuracy"], 100 / len(model_config.class_names)
    if accuracy >= chance + _MIN_GAIN * (100 - chance):
        return None
    return Finding(
        "The network has learned hardly anything.",
        f"Balanced accuracy on the test set is {accuracy:.1f} %, that of a guess {chance:.1f} %.",
        "More epochs (--epochs), or another learning rate (--optimizer.learning_rate).",
    )


def _tail_not_recognised(
    model_config: ModelConfig, config: Config, main: Mapping[str, Any], uniform: Mapping[str, Any]
) -> Finding | None:
    many, few = main["many"], main["few"]
    if many is None or few is None or many < 20:
        return None
    # with a few test images of a few classes chance may have made it so
    low, high = main.get("intervals", {}).get("few") or (few, few)  # a run of an earlier version has none
    if high > 0.5 * many:
        return None
    if model_config.predicts_under == "train":
        gain = (uniform["few"] or 0) - few
        advice = f"Predict under the uniform prior (few +{gain:.1f} points), or train with --method la."
    else:
        advice = f"{METHODS[config.method].advice_for_tail(config)} {_advice_for_tail(model_config, config)}".strip()
    interval = f" (95 % interval {low:.0f} to {high:.0f})" if low < high else ""
    evidence = f"Accuracy in few is {few:.1f} %{interval}, in many {many:.1f} %."
    return Finding("The tail is hardly recognised.", evidence, advice)


def _advice_for_tail(model_config: ModelConfig, config: Config) -> str:
    if config.pretrained == "none" and config.init is None:
        if config.second_stage == "none":
            return "Re-train the classifier on this encoder: longtail rebalance RUN --method crt."
        return "Distil a teacher: --classifier.distillation_weight 1."
    # on the features of a pretrained network a classifier that is re-trained was worse
    if not config.tune.startswith("lora"):
        try:
            if is_suited_to_lora(model_config.network):
                return "Tune with low-rank updates: --tune lora."
        except LongtailError:  # trained with another version of timm, which has this network
            pass
        if config.tune != "full":
            return "Tune all of the network: --tune full."
    return "A larger network, larger images, or more images of the rare classes."


def _head_behind_medium(main: Mapping[str, Any]) -> Finding | None:
    many, medium = main["many"], main["medium"]
    if many is None or medium is None or many > 0.8 * medium:
        return None
    return Finding(
        "Head accuracy is below medium accuracy.",
        f"Accuracy in many is {many:.1f} %, in medium {medium:.1f} %.",
        "Weigh rare classes less: --method la instead of a re-weighted loss, or --data.sampler instance.",
    )


def _overfitting(config: Config, epochs: Sequence[Mapping[str, Any]], main: Mapping[str, Any]) -> Finding | None:
    loss = epochs[-1].get("loss/classifier")
    log_likelihood = METHODS[config.method].conditional_entropy(config, {"classifier": 0.0, "mixture": 0.0}, True)
    if loss is None or log_likelihood is None or loss > 0.05 or main["balanced_accuracy"] > 80:
        return None
    return Finding(
        "The network overfits.",
        f"The classification loss on the training images ends at {loss:.3f}, balanced accuracy on the test set at "
        f"{main['balanced_accuracy']:.1f} %.",
        "Stronger augmentation (data.augment), more weight decay, a smaller network, or one that starts pretrained.",
    )


def _overconfident(model_config: ModelConfig, main: Mapping[str, Any]) -> Finding | None:
    calibration = main.get("calibration")
    if calibration is None or calibration["ece"] < 10:
        return None
    fit, advice = model_config.temperature_fits.get("all"), "Calibrate on validation images: --data.val_fraction 0.1."
    evidence = f"Confidence and accuracy differ by {calibration['ece']:.0f} % on average."
    if fit is not None:
        evidence += f" The temperature rests on {fit.images:,} validation image{'' if fit.images == 1 else 's'}."
        advice = "More validation images (--data.val_fraction), or a temperature per shot group: --calibration group."
    return Finding("Probabilities are poorly calibrated.", evidence, advice)
