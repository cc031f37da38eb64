"""Settings of detection; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from longtail.config import Positive, Settings, Weight
from longtail.errors import LongtailError

Part = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class DetectionSettings(Settings):
    """Boxes of objects."""

    section: ClassVar[str] = "detection"

    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.6, 1.6)
    """Smallest and largest random scale of a training image: below 1 it is zoomed out, above 1 cropped."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Largest random change of brightness, contrast and saturation, as a fraction."""
    freeze_batch_norm: bool | None = None
    """Keep BatchNorm of the encoder as it is, since the few images of a step give poor statistics; with pretrained
    weights, if not given."""
    freeze_early: bool | None = None
    """Keep the encoder's layers up to a quarter of the resolution as they are; with pretrained weights, if not
    given."""
    regions_per_image: Annotated[int, Field(ge=8)] = 64
    """Regions of each image that the classes are learned from (fasterrcnn)."""
    objects: Part = 0.25
    """Largest fraction of these that are objects; the rest is background."""
    box_weight: Weight = 1.0
    """Weight of the loss of the boxes beside that of the classes."""
    focal_gamma: Weight = 2.0
    """Exponent of the sigmoid focal loss [γ] (retinanet)."""
    focal_alpha: Part | None = 0.25
    """Weight of objects in it, and 1 − it of all else [α]; no weights if not given (retinanet)."""
    federated: Positive | None = None
    """Classes that a step learns from, those of its objects and others drawn by the root of their counts (federated
    loss); all if not given (retinanet)."""

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise LongtailError(f"detection.scale {self.scale}: expected the smaller value first")
        if self.regions_per_image > 0 and int(self.regions_per_image * self.objects) < 1:
            least = math.ceil(1e4 / self.regions_per_image) / 1e4
            raise LongtailError(
                f"detection.objects {self.objects:g}: of {self.regions_per_image} regions of an image that is less "
                f"than one, so that no object is learned; expected at least {least:g}, or more "
                "detection.regions_per_image"
            )
