"""Masks as COCO writes them, run-length encoded: runs of pixels outside and inside in turn, column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longtail.errors import LongtailError


def check_runs(mask: Mapping[str, Any], size: Sequence[int]) -> None:
    """Raise LongtailError where run-length encoded pixels are not those of the image, on which COCO's tools hang.

    Args:
        mask: with ``size`` (height, width) and ``counts``, a list of runs or compressed.
        size: height and width of the image.
    """
    height, width = map(int, size)
    if list(mask["size"]) != [height, width]:
        raise LongtailError(
            f"segmentation: its size is {mask['size']}, expected that of the image, [{height}, {width}] (height, width)"
        )
    counts = mask["counts"]
    runs = _decompress(counts) if isinstance(counts, str | bytes) else [int(run) for run in counts]
    if runs is None or min(runs, default=0) < 0:
        covered = "are damaged"
    elif sum(runs) == height * width:
        return
    else:
        covered = f"are of {sum(runs):,} pixels"
    raise LongtailError(f"segmentation: its counts {covered}, expected those of {height * width:,} pixels")


def _decompress(counts: str | bytes) -> list[int] | None:
    """Return the runs that COCO's compressed counts stand for; None if they are damaged.

    A run is written in characters of five bits each, the lowest first; from the third run on it is the difference from
    the run before the last.
    """
    codes = [ord(code) - 48 for code in counts] if isinstance(counts, str) else [code - 48 for code in counts]
    if not codes or min(codes) < 0 or max(codes) > 63 or codes[-1] & 32:
        return None
    runs: list[int] = []
    value = shift = 0
    for code in codes:
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
