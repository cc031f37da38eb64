"""Settings of segmentation; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from longtail.config import Positive, PositiveFloat, Settings
from longtail.errors import LongtailError


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings(Settings):
    """Labels of pixels."""

    section: ClassVar[str] = "segmentation"

    crop: tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]] | None = None
    """Height and width of the training crops; those of the images, at least 32 and at most 512, if not given."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    """Smallest and largest random scale of a training image."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Largest random change of brightness, contrast and saturation, as a fraction."""
    pixels_per_image: Positive = 128
    """Pixels per image that are queries and keys of the mixture, drawn evenly from its classes (gml)."""
    keys: Literal["pixels", "regions", "both"] = "both"
    """What is pushed into the queues: drawn pixels, the mean feature of every class in an image, or both (gml)."""
    sliding_window: Annotated[int, Field(ge=32)] | None = None
    """Side of the square window that slides over an image in evaluation and prediction; the whole image at once if not
    given."""
    boundary: PositiveFloat = 0.02
    """Width of the band along outlines that boundary IoU considers, as a fraction of the image's diagonal."""

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise LongtailError(f"segmentation.scale {self.scale}: expected the smaller value first")
