"""The model card: what a model was trained on and how, what it reaches, and its limits.

It is the README.md of a model's folder, with the header that the Hugging Face Hub reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from longtail.data.class_order import head_first
from longtail.inference.model_config import ModelConfig

_LISTED = 5  # classes at either end of the tail that are listed


@dataclass(frozen=True, kw_only=True)
class ModelCardText:
    """What the card says of a kind of model."""

    kind: str
    """Name of the Python class."""
    pipeline_tag: str
    """The Hub's name of the task."""
    counted: str
    """What the classes are counted in."""
    metrics: Mapping[str, str]
    """Metrics with their titles."""
    usage: str
    """A line of Python that predicts with ``model``."""
    calibrates: bool = True
    """Whether training calibrates its probabilities on validation images."""


def model_card(config: ModelConfig, text: ModelCardText) -> str:
    """Return the model card as Markdown."""
    header: dict[str, Any] = {
        "library_name": "longtail",
        "pipeline_tag": text.pipeline_tag,
        "tags": ["longtail", "long-tailed-recognition", "class-imbalance", str(config.training_info.get("method", ""))],
    }
    title = f"# A long-tailed {text.kind.lower()}"
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", title, ""]
    lines += [*_data(config, text), *_training(config, text), *_metrics(config, text), *_limits(config)]
    lines += ["", "## Use", "", "```python", f"from longtail import {text.kind}", ""]
    lines += [f'model = {text.kind}.from_pretrained("this folder, or its name on the Hub")', text.usage]
    return "\n".join([*lines, "```", ""])


def _data(config: ModelConfig, text: ModelCardText) -> list[str]:
    counts, order = config.class_counts, head_first(config.class_counts)

    def listed(indices: list[int]) -> str:
        return ", ".join(f"{_escaped(config.class_names[index])} {counts[index]:,}" for index in indices)

    source = config.training_info.get("data")
    lines = ["## Data", "", f"{len(counts)} classes, {sum(counts):,} training {text.counted}"]
    lines[-1] += f", from {source}." if source else "."
    if len(order) <= 2 * _LISTED:
        return [*lines, f"{text.counted.capitalize()} per class: {listed(order)}.", ""]
    return [*lines, f"The most frequent: {listed(order[:_LISTED])}; the rarest: {listed(order[-_LISTED:])}.", ""]


def _experts(config: ModelConfig) -> str:
    if config.experts == 1:
        return ""
    factor = config.training_info.get("pass_cost", 1)
    own = f"whose last {config.expert_stages} stages are" if config.expert_stages else "with projections of"
    cost = f"{factor:g} times the operations of the network alone, as which its passes are counted"
    return f" with {config.experts} experts, {own} their own ({cost})"


def _training(config: ModelConfig, text: ModelCardText) -> list[str]:
    info = config.training_info
    lines = [
        "## Training",
        "",
        f"longtail {info.get('longtail', '?')}, method {info.get('method', '?')}, "
        f"network {config.network}{_experts(config)}, "
        f"{info.get('epochs', '?')} epochs, seed {info.get('seed', '?')}, {info.get('student_passes', 0):,} images "
        f"through the network, {info.get('seconds', 0):.0f} s.",
    ]
    if "second_stage" in info:
        kind = info["second_stage"]["classifier"]
        lines.append(f"Its classifier was trained in a second stage, on the frozen encoder: {kind}.")
    if "rebalanced" in info:
        lines.append(f"Its classifier was re-trained afterwards: {info['rebalanced']}.")
    if info.get("calibrated"):
        lines.append("Its scores were corrected for rare classes afterwards, without training.")
    if config.calibrated_on:
        lines.append(f"Probabilities were {config.calibrated_on}.")
    elif config.temperature != 1:
        lines.append(f"Probabilities were calibrated on validation images: temperature {config.temperature:.2f}.")
    else:
        lines.append(f"Probabilities were not calibrated{': there were no validation images' * text.calibrates}.")
    return [*lines, ""]


def _metrics(config: ModelConfig, text: ModelCardText) -> list[str]:
    metrics = config.metrics
    if not metrics:
        return []
    lines = [
        "## On the test set",
        "",
        "Under the uniform prior, in percent; the intervals account for the number of test images only.",
        "",
        "| measure | % | 95 % interval |",
        "| --- | --- | --- |",
    ]
    for name, title in text.metrics.items():
        value, interval = metrics.get(name), metrics.get("intervals", {}).get(name)
        shown = "" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"
        lines.append(f"| {title} | {'n/a' if value is None else f'{value:.1f}'} | {shown} |")
    if "calibration" in metrics:
        groups = metrics["calibration"]["groups"]
        shown = ", ".join(f"{name} {values['ece']:.1f}" for name, values in groups.items())
        lines += ["", f"Expected calibration error {metrics['calibration']['ece']:.1f} % ({shown})."]
    return [*lines, ""]


def _limits(config: ModelConfig) -> list[str]:
    tail_first = head_first(config.class_counts)[::-1]
    rarest = tail_first[0]
    lines = [
        "## Limits",
        "",
        f"- It knows these {len(config.class_names)} classes only: an image of anything else gets one of their names.",
        f"- The rarest class, {_escaped(config.class_names[rarest])}, has {config.class_counts[rarest]:,} in training; "
        "the accuracy of a class this small rests on few test images.",
        "- Predictions assume class frequencies, uniform unless told otherwise; give those of the place of use as "
        "`prior`.",
    ]
    accuracy = config.metrics.get("per_class")
    if accuracy:
        never = [_escaped(config.class_names[index]) for index in tail_first if accuracy[index] == 0]
        if never:
            more = f" and {len(never) - 10} more" if len(never) > 10 else ""
            lines.append(f"- Never recognised on the test set: {', '.join(never[:10])}{more}.")
    return lines


def _escaped(name: str) -> str:
    """Return a class name as Markdown shows it literally."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>#|!~" else character for character in name)
