"""How the scores of one image are computed; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from longtail.errors import LongtailError


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How often, and at which sizes, an image passes through the network; the scores of all passes are averaged."""

    sliding_window: int | None = None
    """Side of a square window that slides over the image by two thirds of itself; the whole image at once if not
    given."""
    tta_flip: bool = False
    """Test-time augmentation: average with the scores of the mirrored image."""
    tta_scales: tuple[float, ...] = (1.0,)
    """Test-time augmentation: average over these scales of the image."""

    def __post_init__(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 32:
            raise LongtailError(f"--sliding_window {self.sliding_window}: expected at least 32 pixels")
        if not self.tta_scales or min(self.tta_scales) <= 0 or max(self.tta_scales) > 8:
            shown = " ".join(map(str, self.tta_scales))
            raise LongtailError(f"--tta_scales {shown}: expected scales above 0 and at most 8")
