"""Images as ``data:`` URIs, so that an HTML page contains them and fetches nothing. Imports no torch."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Literal

from PIL import Image

from longtail.data.image_io import to_rgb


def encode_data_uri(encoded: bytes, kind: str) -> str:
    """Return an encoded image as a ``data:`` URI.

    Args:
        encoded: content of an image file.
        kind: its MIME subtype, jpeg or png.
    """
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def image_data_uri(image: Image.Image, max_side: int, format: Literal["PNG", "JPEG"] = "PNG", quality: int = 80) -> str:
    """Return an RGB copy of an image as a ``data:`` URI, shrunk where it is larger than ``max_side``.

    Args:
        image: any Pillow image; it is not changed.
        max_side: longest side in pixels.
        format: how the copy is encoded.
        quality: of JPEG, from 1 to 95; PNG ignores it.
    """
    small = to_rgb(image)
    small.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    small.save(buffer, format, **({"quality": quality} if format == "JPEG" else {}))
    return encode_data_uri(buffer.getvalue(), format.lower())


def file_data_uri(path: Path) -> str:
    """Return an image file (.png, .jpg or .jpeg) as a ``data:`` URI, byte for byte."""
    return encode_data_uri(path.read_bytes(), "png" if path.suffix.lower() == ".png" else "jpeg")
