"""Pictures as addresses that hold them, so that a page fetches nothing."""

from __future__ import annotations

import base64
from pathlib import Path


def address(encoded: bytes, kind: str) -> str:
    """Return the address of an encoded image; ``kind`` is jpeg or png."""
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def embedded(file: Path) -> str:
    """Return the address of an image file, .jpg or .png."""
    return address(file.read_bytes(), "png" if file.suffix == ".png" else "jpeg")
