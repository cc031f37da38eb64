"""How certain a fitted temperature is, as it is saved with a model and shown; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TemperatureFit:
    """A temperature, its 95 % interval, and the number of validation images that it rests on."""

    temperature: float
    interval: tuple[float, float]
    images: int


def describe_temperatures(fits: Mapping[str, TemperatureFit]) -> str:
    """Return a sentence on fitted temperatures; empty if there are none.

    Args:
        fits: that over all classes as ``all``, and those of shot groups by name.
    """
    overall = fits.get("all")
    if overall is None:
        return ""
    groups = {name: fit for name, fit in fits.items() if name != "all"}
    text = f"calibrated on {_images(overall.images, 'validation ')}: temperature {_value(overall)}"
    if groups:
        shown = (f"{name} {_value(fit)} on {_images(fit.images)}" for name, fit in groups.items())
        text += "; by shot group of the predicted class " + ", ".join(shown)
    elif overall.temperature == 1:
        text += "; these images do not show that another one is better than 1"
    return text


def _images(count: int, kind: str = "") -> str:
    return f"{count:,} {kind}image{'' if count == 1 else 's'}"


def _value(fit: TemperatureFit) -> str:
    low, high = fit.interval
    return f"{fit.temperature:.2f} (95 % interval {low:.2f} to {high:.2f})"
