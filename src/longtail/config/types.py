"""Types of settings: numbers with a range, what is tuned, and how strictly a section is read."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import ConfigDict, Field

from longtail.errors import LongtailError

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

STRICT = ConfigDict(extra="forbid")
"""A field that does not exist is an error."""

_TUNE = re.compile(r"auto|full|norm|head|last:0*[1-9]\d*|(lora|adapter)(:0*[1-9]\d*)?", re.ASCII)


def check_tune(tune: str, where: str) -> None:
    """Raise LongtailError, which begins with ``where``, if that is not a part of an encoder that can be tuned."""
    if not _TUNE.fullmatch(tune):
        raise LongtailError(
            f"{where} '{tune}': expected auto, full, norm, last:N, lora, lora:R, adapter, adapter:W or head, with "
            "numbers of at least 1"
        )
