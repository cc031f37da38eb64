"""How the scores of one image are computed; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longtail.errors import LongtailError

TTA = Literal["none", "flip", "crops"]
"""Test-time augmentation: over which views of an image the scores are averaged, see :class:`InferenceOptions`."""
TTA_VIEWS: dict[TTA, int] = {"none": 1, "flip": 2, "crops": 10}
"""Views of an image, and so passes through the network."""


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How often, and at which sizes, an image passes through the network; the scores of all passes are averaged."""

    sliding_window: int | None = None
    """Side of a square window that slides over the image by two thirds of itself; that of the run's settings if not
    given, without one the whole image at once. A window as large as the image is the whole image."""
    tta: TTA | Literal["auto"] = "none"
    """Test-time augmentation. ``flip``: the image and its mirror image, 2 times the computation. ``crops``: the centre
    and the four corners, each also mirrored, 10 times the computation. ``auto``: the cheapest of the three that no
    other exceeds by more than noise on a run's validation images. ``crops`` and ``auto`` are for models that classify
    whole images."""
    tta_flip: bool = False
    """The same as ``tta="flip"``; each of the two sets the other."""
    tta_scales: tuple[float, ...] = (1.0,)
    """Test-time augmentation: average over these scales of the image."""

    def __post_init__(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 32:
            raise LongtailError(f"--sliding_window {self.sliding_window}: expected at least 32 pixels")
        if not self.tta_scales or not all(0 < scale <= 8 for scale in self.tta_scales):
            shown = " ".join(map(str, self.tta_scales))
            raise LongtailError(f"--tta_scales {shown}: expected scales above 0 and at most 8")
        if self.tta != "auto":
            check_tta(self.tta, "--tta", "auto")
        if self.tta_flip and self.tta in {"crops", "auto"}:
            raise LongtailError(f"--tta_flip: is the same as --tta flip; remove it, or --tta {self.tta}")
        flip = self.tta_flip or self.tta == "flip"
        object.__setattr__(self, "tta_flip", flip)
        object.__setattr__(self, "tta", "flip" if flip else self.tta)

    @property
    def fixed_tta(self) -> TTA:
        """The test-time augmentation where it must have been chosen.

        Raises:
            LongtailError: it is ``auto``.
        """
        if self.tta == "auto":
            raise LongtailError(
                "--tta auto: is chosen on a run's validation images by longtail evaluate RUN --tta auto; here use "
                "what it reports: none, flip or crops"
            )
        return self.tta


def check_tta(value: str, where: str = "tta", *others: str) -> None:
    """Raise LongtailError if a value is neither a test-time augmentation nor one of ``others``."""
    if value not in TTA_VIEWS:
        raise LongtailError(f"{where} {value}: expected one of {', '.join([*TTA_VIEWS, *others])}")


def check_batch_size(value: int) -> None:
    """Raise LongtailError if a batch has no image."""
    if value < 1:
        raise LongtailError(f"batch_size: expected at least 1, got {value}")
