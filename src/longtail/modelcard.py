"""The page that goes with a model's files: what it was trained on and how, what it reaches, and where its limits are.

It is the README.md of a recogniser's folder, with the header that the Hugging Face Hub reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from longtail.recognizer import Card

_RANKED = 5  # classes at either end of the tail that are named


def model_card(card: Card) -> str:
    """Return the page of a recogniser or segmenter as Markdown."""
    dense = card.task == "segmentation"
    kind = "Segmenter" if dense else "Recognizer"
    header: dict[str, Any] = {
        "library_name": "longtail",
        "pipeline_tag": "image-segmentation" if dense else "image-classification",
        "tags": ["longtail", "long-tailed-recognition", "class-imbalance", str(card.trained.get("method", ""))],
    }
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# A long-tailed {kind.lower()}", ""]
    lines += [*_data(card), *_training(card), *_reaches(card), *_limits(card)]
    example = ["", "## Use", "", "```python", f"from longtail import {kind}", ""]
    example += [f'model = {kind}.from_pretrained("this folder, or its name on the Hub")']
    example += [
        'list(model.segment(["image.png"]))' if dense else 'model.predict(["image.png"], prior="uniform").names'
    ]
    return "\n".join([*lines, *example, "```", ""])


def _data(card: Card) -> list[str]:
    counts, counted = card.class_counts, "labelled pixels" if card.task == "segmentation" else "images"
    order = sorted(range(len(counts)), key=lambda index: -counts[index])

    def named(indices: list[int]) -> str:
        return ", ".join(f"{_plain(card.class_names[index])} {counts[index]:,}" for index in indices)

    source = card.trained.get("data")
    lines = ["## Data", "", f"{len(counts)} classes, {sum(counts):,} training {counted}"]
    lines[-1] += f", from {source}." if source else "."
    if len(order) <= 2 * _RANKED:
        return [*lines, f"{counted.capitalize()} a class: {named(order)}.", ""]
    return [*lines, f"The most frequent: {named(order[:_RANKED])}; the rarest: {named(order[-_RANKED:])}.", ""]


def _training(card: Card) -> list[str]:
    told = card.trained
    lines = [
        "## Training",
        "",
        f"longtail {told.get('longtail', '?')}, method {told.get('method', '?')}, network {card.network}, "
        f"{told.get('epochs', '?')} epochs, seed {told.get('seed', '?')}, {told.get('student_passes', 0):,} images "
        f"through the network, {told.get('seconds', 0):.0f} s.",
    ]
    if "rebalanced" in told:
        lines.append(f"Its head was made anew: {told['rebalanced']}.")
    calibrated = card.temperature != 1
    lines.append(
        f"Probabilities were calibrated on validation images: temperature {card.temperature:.2f}."
        if calibrated
        else "Probabilities were not calibrated: there were no validation images."
    )
    return [*lines, ""]


def _reaches(card: Card) -> list[str]:
    found = card.metrics
    if not found:
        return []
    names = {
        "balanced_accuracy": "balanced accuracy",
        "top1": "top-1",
        "many": "many",
        "medium": "medium",
        "few": "few",
    }
    if card.task == "segmentation":
        names = {"mean_iou": "mean IoU", "head": "head IoU", "middle": "middle IoU", "tail": "tail IoU"}
        names |= {"boundary_iou": "boundary IoU", "balanced_accuracy": "mean class accuracy", "top1": "pixel accuracy"}
    lines = [
        "## On the test set",
        "",
        "Under the uniform prior, in percent; intervals know of the test images' number alone.",
    ]
    lines += ["", "| measure | % | 95 % interval |", "| --- | --- | --- |"]
    for name, title in names.items():
        value, interval = found.get(name), found.get("intervals", {}).get(name)
        shown = "" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"
        lines.append(f"| {title} | {'n/a' if value is None else f'{value:.1f}'} | {shown} |")
    if "calibration" in found:
        groups = ", ".join(f"{name} {values['ece']:.1f}" for name, values in found["calibration"]["groups"].items())
        lines += ["", f"Expected calibration error {found['calibration']['ece']:.1f} % ({groups})."]
    return [*lines, ""]


def _limits(card: Card) -> list[str]:
    order = sorted(range(len(card.class_names)), key=lambda index: card.class_counts[index])
    rarest = _plain(card.class_names[order[0]])
    lines = [
        "## Limits",
        "",
        f"- It knows these {len(card.class_names)} classes and no other: an image of anything else gets one of their "
        "names.",
        f"- Of the rarest class, {rarest}, it has seen {card.class_counts[order[0]]:,} in training; a figure of so "
        "small a class rests on few test images.",
        "- Predictions assume class frequencies, all alike unless told otherwise; give those of the place of use as "
        "`prior`.",
    ]
    accuracy = card.metrics.get("per_class")
    if accuracy:
        blind = [_plain(card.class_names[index]) for index in order if accuracy[index] == 0]
        if blind:
            more = f" and {len(blind) - 10} more" if len(blind) > 10 else ""
            lines.append(f"- On the test set it never recognised: {', '.join(blind[:10])}{more}.")
    return lines


def _plain(name: str) -> str:
    """Return a class name as Markdown shows it literally."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>#|!~" else character for character in name)
