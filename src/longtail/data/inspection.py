"""What a set looks like before it is trained on: its tail, and what is wrong with it. Legend: C classes.

Files are read one after the other; of each no more is kept than a digest and its sides.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from longtail.config import Data, Shots
from longtail.data.dataset import LongTailedData
from longtail.data.imbalance import gini, imbalance_factor
from longtail.data.scenes import DenseData, thirds
from longtail.data.sources import LISTINGS, load_data, read_listing
from longtail.errors import LongtailError

_CHUNK = 2048  # files that are under way at once


@dataclass(kw_only=True)
class Inspection:
    """What was found."""

    source: str
    splits: dict[str, int]
    """Images a split; ``all`` where there are no splits."""
    class_names: list[str]
    class_counts: list[int]
    """(C,) training images a class."""
    groups: list[str]
    """(C,) many, medium or few."""
    imbalance_factor: float | None
    """Images of the largest class over images of the smallest; None where one has none."""
    gini: float
    """Of the class counts: 0 when all are equal, towards 1 when one has all."""
    sides: dict[str, list[int]] = field(default_factory=dict)
    """Least, median and largest width and height in pixels."""
    unreadable: list[dict[str, str]] = field(default_factory=list)
    """Files that are no images, with the reason."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of files of one split with the same content."""
    leaks: list[list[str]] = field(default_factory=list)
    """Groups of files with the same content in several splits."""
    errors: list[str] = field(default_factory=list)
    """What keeps the set from being trained on."""
    remarks: list[str] = field(default_factory=list)

    @property
    def counted(self) -> str:
        """What the classes are counted in."""
        return "training pixels" if "head" in self.groups else "training images"

    @property
    def group_names(self) -> tuple[str, ...]:
        """The shot groups, or the thirds by pixels."""
        return ("head", "middle", "tail") if "head" in self.groups else ("many", "medium", "few")

    @property
    def least(self) -> list[tuple[str, int]]:
        """The five smallest classes, smallest first."""
        order = sorted(range(len(self.class_counts)), key=lambda index: self.class_counts[index])
        return [(self.class_names[index], self.class_counts[index]) for index in order[:5]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as ``--json`` holds them."""
        return {
            **dataclasses.asdict(self),
            "images": sum(self.splits.values()),
            "classes": len(self.class_names),
            "group_sizes": {group: self.groups.count(group) for group in self.group_names},
            "least": self.least,
        }


def inspect(config: Data, seed: int, shots: Shots, tick: Callable[[int], None] = lambda _count: None) -> Inspection:
    """Look at every image of a set.

    Args:
        config: which set.
        seed: of the tail and the splits, as in training.
        shots: thresholds of the groups.
        tick: told of every batch of images that was looked at.

    Raises:
        LongtailError: the set is unknown, or cannot be listed at all.
    """
    if config.source in LISTINGS:
        if config.root is not None and not Path(config.root).exists():
            raise LongtailError(f"data.root '{config.root}': there is no such folder")
        listing = read_listing(config)
        trained = listing.splits.get("train", listing.splits.get("all"))
        assert trained is not None
        counts = np.bincount(trained.labels.numpy(), minlength=len(listing.class_names))[: len(listing.class_names)]
        found = _inspection(config, listing.class_names, counts.tolist(), shots)
        found.splits = {split: len(entries) for split, entries in listing.splits.items()}
        found.errors, found.remarks = list(listing.errors), list(listing.remarks)
        files = (
            (f"{split}: {name}" if split != "all" else name, split, listing.root / name)
            for split, entries in listing.splits.items()
            for name in entries.names
        )
        _look(found, ((shown, split, path.read_bytes) for shown, split, path in files), tick)
        return found
    data = load_data(config, seed)
    found = _inspection(config, list(data.class_names), data.class_counts, shots)
    found.remarks = list(data.remarks)
    sets = {"train": data.train, "val": data.val, "test": data.test}
    found.splits = {split: len(images) for split, images in sets.items() if images is not None}
    if isinstance(data, DenseData):  # every mask was looked at when the set was loaded
        found.groups = thirds(data.class_counts)
    else:
        _look_at_pixels(found, data, tick)
    return found


def _inspection(config: Data, names: Sequence[str], counts: Sequence[int], shots: Shots) -> Inspection:
    factor = imbalance_factor(counts)
    return Inspection(
        source=config.source,
        splits={},
        class_names=list(names),
        class_counts=list(counts),
        groups=shots.groups(counts),
        imbalance_factor=factor if np.isfinite(factor) else None,
        gini=gini(counts),
    )


_File = tuple[str, str, Callable[[], bytes]]
"""How a file is named, its split, and what reads it."""


def _look(found: Inspection, files: Iterable[_File], tick: Callable[[int], None]) -> None:
    widths, heights = collections.Counter[int](), collections.Counter[int]()
    digests: dict[bytes, list[tuple[str, str]]] = {}
    first: dict[bytes, tuple[str, str]] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for chunk in _chunks(files):
            for (shown, split, _), (digest, sides, reason) in zip(chunk, pool.map(_examine, chunk), strict=True):
                if reason is not None:
                    found.unreadable.append({"path": shown, "reason": reason})
                if sides is not None:
                    widths[sides[0]] += 1
                    heights[sides[1]] += 1
                if digest is not None:
                    if digest in first:
                        digests.setdefault(digest, [first[digest]]).append((shown, split))
                    else:
                        first[digest] = (shown, split)
            tick(len(chunk))
    _note(found, digests.values(), widths, heights)


def _note(
    found: Inspection,
    groups: Iterable[list[tuple[str, str]]],
    widths: collections.Counter[int],
    heights: collections.Counter[int],
) -> None:
    for group in groups:
        names = [name for name, _ in group]
        (found.leaks if len({split for _, split in group}) > 1 else found.duplicates).append(names)
    if widths:
        found.sides = {"width": _three(widths), "height": _three(heights)}


def _three(counter: collections.Counter[int]) -> list[int]:
    """Return the least, the median and the largest value."""
    values = sorted(counter)
    half, seen = sum(counter.values()) / 2, 0
    median = values[-1]
    for value in values:
        seen += counter[value]
        if seen >= half:
            median = value
            break
    return [values[0], median, values[-1]]


def _chunks(files: Iterable[_File]) -> Iterator[list[_File]]:
    chunk: list[_File] = []
    for file in files:
        chunk.append(file)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _examine(file: _File) -> tuple[bytes | None, tuple[int, int] | None, str | None]:
    """Return a file's digest, its sides, and why it is no image."""
    try:
        content = file[2]()
    except OSError as error:
        return None, None, f"cannot be read: {error.strerror}"
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if not content:
        return None, None, "is empty"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                sides = image.size
                image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return digest, None, f"is larger than Pillow takes for safe ({error})"
    except Exception as error:  # whatever a decoder says of a file that is none of its kind
        return (
            digest,
            None,
            f"is damaged or no image ({' '.join(str(error).split())[:120]})".replace("<_io.BytesIO", "<"),
        )
    return digest, sides, None


def _look_at_pixels(found: Inspection, data: LongTailedData, tick: Callable[[int], None]) -> None:
    """Images that are decoded already: same pixels, same content."""
    import torch

    digests: dict[bytes, list[tuple[str, str]]] = {}
    widths, heights = collections.Counter[int](), collections.Counter[int]()
    for split, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        if images is None:
            continue
        for indices in torch.arange(len(images)).split(_CHUNK):
            pixels = images.images.take(indices).numpy()
            widths[pixels.shape[3]] += len(pixels)
            heights[pixels.shape[2]] += len(pixels)
            for index, image in zip(indices.tolist(), pixels, strict=True):
                digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
                shown = f"{split}: image {int(images.ids[index])} ({data.class_names[int(images.labels[index])]})"
                digests.setdefault(digest, []).append((shown, split))
            tick(len(indices))
    _note(found, (group for group in digests.values() if len(group) > 1), widths, heights)


def histogram(counts: Sequence[int], counted: str = "training images", width: int = 64, height: int = 6) -> list[str]:
    """Return the class counts, head first, as lines of text: a bar of block characters a class, on a log scale."""
    ordered = np.array(sorted(counts, reverse=True), dtype=float)
    edges = np.linspace(0, len(ordered), min(width, len(ordered)) + 1).round().astype(int)
    columns = [ordered[a:b].mean() for a, b in itertools.pairwise(edges)]
    top = np.log10(max(ordered[0], 1) + 1)
    filled = [round(8 * height * np.log10(value + 1) / top) for value in columns]
    lines = []
    for row in reversed(range(height)):
        label = f"{int(ordered[0]):>7,}" if row == height - 1 else f"{int(ordered[-1]):>7,}" if row == 0 else " " * 7
        lines.append(f"{label} │" + "".join(" ▁▂▃▄▅▆▇█"[max(0, min(8, value - 8 * row))] for value in filled).rstrip())
    lines.append(f"{'':7} └{'─' * len(columns)}")
    lines.append(f"{'':9}{len(ordered):,} classes, head to tail; {counted}, log scale")
    return lines
