"""What ``longtail evaluate`` and ``predict`` print of calibration, estimated priors and conformal sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longtail.evaluation.label_shift import MAX_BBSE_CLASSES, MAX_EXACT_CLASSES
from longtail.evaluation.temperature_fit import TemperatureFit, describe_temperatures

# images per class below which the intervals of an estimate were too narrow on simulated data (85 % instead of 95 %)
_MIN_IMAGES_PER_CLASS = 10


def trust_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return lines on calibration, estimated class frequencies and conformal sets, as far as they were computed."""
    fits = {name: TemperatureFit(**entry) for name, entry in metrics.get("temperature_fits", {}).items()}
    lines = [describe_temperatures(fits)] if fits else []
    weighted = "target_calibration" in metrics
    on = " on the test set weighted to the target" if weighted else ""
    if "calibration" in metrics:
        calibration = metrics["target_calibration" if weighted else "calibration"]
        groups = ", ".join(f"{name} {values['ece']:.1f}" for name, values in calibration["groups"].items())
        lines.append(
            f"calibration under the {metrics['prior']} prior{on}: expected calibration error "
            f"{calibration['ece']:.1f} % ({groups}), class-wise {calibration['class_ece']:.2f} %, "
            f"NLL {calibration['nll']:.3f}, Brier {calibration['brier']:.3f}"
        )
    names = metrics.get("class_names", ())
    lines += estimate_lines(metrics.get("estimates", {}), names)
    if "estimates" in metrics and len(names) > MAX_BBSE_CLASSES:
        lines.append(f"no estimate by bbse: with more than {MAX_BBSE_CLASSES:,} classes it would take too long")
    if "conformal" in metrics:
        sets = metrics["conformal"]
        lines += [
            f"conformal sets at coverage {100 * sets['coverage']:g} %{on}, {name}: contain the true class in "
            f"{sets[name]['covered']:.1f} %, {sets[name]['size']:.1f} classes on average"
            for name in ("all", "many", "medium", "few")
            if name in sets
        ]
        if "validation_images" in sets:
            lines.append(conformal_line(sets))
    return lines


def conformal_line(sets: Mapping[str, Any]) -> str:
    """Return what conformal sets rest on, from :func:`~longtail.tasks.classification.calibration.conformal_images`."""
    line = f"conformal thresholds rest on {sets['validation_images']:,} validation images"
    if "coverage_interval" in sets:
        low, high = sets["coverage_interval"]
        line += (
            f", the fewest of a class {sets['fewest_per_class']:,}, whose coverage is then between {low:.0f} and "
            f"{high:.0f} % (95 % interval)"
        )
    if sets["classes_below_minimum"]:
        line += f"; classes with fewer than {sets['minimum_per_class']} are in every set: "
        line += str(sets["classes_below_minimum"])
    return line


def estimate_lines(estimates: Mapping[str, Mapping[str, Any]], class_names: Sequence[str]) -> list[str]:
    """Return lines on estimated class frequencies, by method."""
    lines = []
    if estimates and len(class_names) > MAX_EXACT_CLASSES:
        lines.append(
            f"with more than {MAX_EXACT_CLASSES:,} classes the intervals of class frequencies are too narrow for "
            "classes that are confused"
        )
    for method, entry in estimates.items():
        rows = list(zip(entry["frequencies"], entry["low"], entry["high"], class_names, strict=True))
        shown = ", ".join(f"{name} {q:.3f} ({low:.3f} to {high:.3f})" for q, low, high, name in sorted(rows)[:-4:-1])
        lines.append(f"class frequencies estimated by {method}, the largest with 95 % intervals: {shown}")
        if entry.get("prior_strength") is not None:
            power = entry["power"]
            towards = "uniform" if power == 0 else f"the training frequencies to the power {power:.2f}"
            lines.append(
                f"  regularised towards {towards}, with {entry['prior_strength']:.2g} times the images' weight"
            )
        images = entry.get("validation_images")
        if images:
            line = f"  rests on {images:,} validation images"
            if images < _MIN_IMAGES_PER_CLASS * len(class_names):
                line += f", fewer than {_MIN_IMAGES_PER_CLASS} per class: the interval may be too narrow"
            lines.append(line)
        elif images == 0:
            lines.append("  rests on no validation images: the scores are not corrected")
    return lines
