"""What a set looks like before it is trained on: its class counts, and what is wrong with it. Legend: C classes.

Files are read in chunks; only a digest and the size of each image are kept.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from longtail.config import Data, Shots
from longtail.data.dataset import DataDetails, LongTailedData
from longtail.data.image_io import StorageError, UnsupportedFormatError, open_header, read_error, scale_to_8_bits
from longtail.data.images import FileImages, Images
from longtail.data.imbalance import gini, imbalance_factor
from longtail.data.listing import SPLITS, Entries, Listing
from longtail.data.sources import load_data, read_listing
from longtail.data.sources.from_listing import check_readable_classes, raise_listing_errors, split_listing
from longtail.data.sources.unreadable import refusal
from longtail.errors import LongtailError
from longtail.files import write_text
from longtail.registry import SOURCES

_CHUNK = 2048  # files that are read at once
_SMALLEST_BATCH = 2  # BatchNorm needs it
_MISSING = "does not exist"
_NO_SPLIT = "no split"


@dataclass(kw_only=True)
class Inspection:
    """What a set looks like, and its problems."""

    source: str
    splits: dict[str, int]
    """Number of images by split; ``all`` where there are no splits."""
    class_names: list[str]
    """(C,)."""
    class_counts: list[int]
    """(C,) training images, or what else :attr:`counted` says, of each class; as training would split the set."""
    groups: list[str]
    """(C,) the group of each class, one of :attr:`group_names`."""
    imbalance_factor: float | None
    """Count of the largest class over that of the smallest; None where a class has none."""
    gini: float
    """Gini coefficient of the class counts: 0 when all are equal, towards 1 when one class has all."""
    counted: str
    """What the class counts count: training images, for one."""
    group_names: tuple[str, ...]
    """Names of the groups, from head to tail: many, medium and few, for one."""
    sides: dict[str, list[int]] = field(default_factory=dict)
    """Smallest, median and largest width and height in pixels."""
    split_sizes: dict[str, int] = field(default_factory=dict)
    """Number of images by split as training would make them, where the set lacks one; empty if it has all, or if
    training would refuse it."""
    missing: list[str] = field(default_factory=list)
    """Files that are listed, but do not exist; there is an error on them."""
    unreadable: list[dict[str, str]] = field(default_factory=list)
    """Files that cannot be read as images: path and reason."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of files of one split, and of one class where each has one, with the same content."""
    conflicts: list[list[str]] = field(default_factory=list)
    """Groups of files with the same content in several classes, each with its class; some may be leaks too."""
    leaks: list[list[str]] = field(default_factory=list)
    """Groups of files with the same content in several splits: those of the set, or those that training would make."""
    errors: list[str] = field(default_factory=list)
    """What training would refuse the set for."""
    remarks: list[str] = field(default_factory=list)
    root: str | None = None
    """Folder of the image files."""
    fixed: int | None = None
    """Number of files in the table that was asked for."""
    fixed_copies: int | None = None
    """Number of files that are not in that table because another of their class has the same content."""
    fixed_error: str | None = None
    """What training would refuse that table for."""
    details: DataDetails = field(default_factory=DataDetails)
    """What the data say of themselves."""

    @property
    def least(self) -> list[tuple[str, int]]:
        """The five smallest classes with their counts, smallest first."""
        order = sorted(range(len(self.class_counts)), key=lambda index: self.class_counts[index])
        return [(self.class_names[index], self.class_counts[index]) for index in order[:5]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as ``--json`` writes them."""
        values = dataclasses.asdict(self)
        del values["counted"], values["group_names"], values["details"]
        return {
            **values,
            **self.details.values,
            "images": sum(self.splits.values()),
            "classes": len(self.class_names),
            "group_sizes": {group: self.groups.count(group) for group in self.group_names},
            "least": self.least,
        }


def inspect(
    config: Data,
    seed: int,
    shots: Shots,
    tick: Callable[[int], None] = lambda _count: None,
    *,
    fix: Path | None = None,
) -> Inspection:
    """Read every image of a set and report its problems.

    Args:
        config: which set.
        seed: of the tail and the splits, as in training.
        shots: thresholds of the groups of classes.
        tick: called with the number of images after each chunk that was read.
        fix: where to write a table (path, class_name and, where there are splits, split) of the files that can be read;
            of those of one class with the same content it has one, a test image if there is one among them.

    Raises:
        LongtailError: the set is unknown, or cannot be listed at all; or there are no files to write a table of.
    """
    if SOURCES[config.source].listing is not None:
        return _inspect_files(read_listing(config), config, seed, shots, tick, fix)
    if fix is not None:
        raise LongtailError(
            f"--fix {fix}: is a table of image files with one class each, and {config.source} has none; "
            "training leaves out images that cannot be read, up to data.max_unreadable_fraction"
        )
    data = load_data(config, seed)
    inspection = _inspection(config, data.class_names, data.class_counts, data.groups(shots), data)
    inspection.remarks = list(data.remarks)
    inspection.unreadable = [{"path": path, "reason": reason} for path, reason in data.unreadable]
    sets = {"train": data.train, "val": data.val, "test": data.test}
    inspection.splits = {split: len(images) for split, images in sets.items() if images is not None}
    inspection.details = data.details(config)
    files = [(split, images.images) for split, images in sets.items() if images is not None]
    if all(isinstance(images, FileImages) for _, images in files):
        _read_files(inspection, _files_of(files), tick)
        total = sum(inspection.splits.values()) + len(data.unreadable)
        message = refusal(config, [f"{entry['path']}: {entry['reason']}" for entry in inspection.unreadable], total)
        inspection.errors += [] if message is None else [message]
    else:
        _compare_pixels(inspection, data, tick)
    return inspection


def _files_of(splits: Sequence[tuple[str, Images]]) -> Iterator[_File]:
    for split, images in splits:
        assert isinstance(images, FileImages)
        for name in images.names:
            yield _Place(f"{split}: {name}", split), (images.root / name).read_bytes


def _inspect_files(
    listing: Listing, config: Data, seed: int, shots: Shots, tick: Callable[[int], None], fix: Path | None
) -> Inspection:
    seed = seed if config.seed is None else config.seed
    errors, remarks = list(listing.errors), list(listing.remarks)
    splits: dict[str, Entries] | None = None
    if listing.can_be_split:
        try:
            # what it remarks on concerns the tail and the split, and is said by training too
            splits = split_listing(listing, config, seed, remarks)
        except LongtailError as error:
            errors.append(str(error))
    classes = len(listing.class_names)
    labels = listing.training.labels if splits is None else splits["train"].labels
    counts = np.bincount(labels.numpy(), minlength=classes)[:classes].tolist()
    inspection = _inspection(config, listing.class_names, counts, shots.groups(counts), LongTailedData)
    inspection.splits = {split: len(entries) for split, entries in listing.splits.items()}
    inspection.errors, inspection.remarks = errors, remarks
    inspection.root = str(listing.root)
    if splits is None and "all" in listing.splits:
        inspection.counted = "images"  # of every split
    held_out = splits is not None and splits.keys() != listing.splits.keys()
    split_of: dict[str, str] = {}
    if splits is not None and held_out:
        inspection.split_sizes = {split: len(entries) for split, entries in splits.items()}
        split_of = {name: split for split, entries in splits.items() for name in entries.names}
        # of a tail, images are left that are in no split
        split_of |= {name: _NO_SPLIT for name in listing.training.names if name not in split_of}
    names = dict(enumerate(listing.class_names))
    files = (
        (
            _Place(f"{split}: {name}" if split != "all" else name, split_of.get(name, split), names.get(label)),
            (listing.root / name).read_bytes,
        )
        for split, entries in listing.splits.items()
        for name, label in zip(entries.names, entries.labels.tolist(), strict=True)
    )
    groups = _read_files(inspection, files, tick)
    if held_out:
        whole = "all" in listing.splits
        inspection.leaks = [
            [f"{split_of[name]}: {name}" for name in (shown if whole else shown.partition(": ")[2] for shown in group)]
            for group in inspection.leaks
        ]
        if inspection.duplicates or inspection.conflicts:
            inspection.remarks.append(
                f"files with the same content that are in one split with seed {seed} may be in train and test with "
                "another: keep one of each (within a class, --fix FILE.csv does)"
            )
    reasons = {entry["path"]: entry["reason"] for entry in inspection.unreadable}
    if listing.can_be_split:
        shown = [f"{path}: {reason}" for path, reason in reasons.items()]
        refused = refusal(config, shown, sum(inspection.splits.values()))
        inspection.errors += [] if refused is None else [refused]
    if splits is not None:
        inspection.errors += _refusals(listing, config, splits, reasons)
    if fix is not None:
        bad = {*reasons, *inspection.missing}
        copies = _copies(groups)
        inspection.fixed = _write_good(listing, bad | copies, fix)
        inspection.fixed_copies = len(copies)
        inspection.fixed_error = _refusal_of_table(fix, listing.root, config, seed)
    return inspection


def _refusals(listing: Listing, config: Data, splits: Mapping[str, Entries], reasons: Mapping[str, str]) -> list[str]:
    """Return why training would refuse a set that is divided into splits, for the files in it that cannot be read."""
    by_name = {
        name: f"{listing.root / name}: {reasons[shown]}"
        for split, entries in listing.splits.items()
        for name in entries.names
        if (shown := name if split == "all" else f"{split}: {name}") in reasons
    }
    train = sum(name not in by_name for name in splits["train"].names)
    if train < _SMALLEST_BATCH:
        return [f"train: there is a single training image, expected at least {_SMALLEST_BATCH} for a batch"]
    try:
        check_readable_classes(listing, splits["train"], by_name, config.min_images)
    except LongtailError as error:
        return [str(error)]
    if all(name in by_name for name in splits["test"].names):
        return ["there is no test image, or none that can be read; expected some to evaluate on"]
    return []


def _refusal_of_table(table: Path, root: Path, config: Data, seed: int) -> str | None:
    """Return why training would refuse a table of images that can be read; None if it would not."""
    changes: dict[str, Any] = {"source": "list", "train": str(table), "root": str(root)}
    changes |= dict.fromkeys(("val", "test", "image_column", "label_column", "split_column", "class_depth"))
    settings = dataclasses.replace(config, **changes)
    try:
        listing = read_listing(settings)
        raise_listing_errors(listing)
        return next(iter(_refusals(listing, settings, split_listing(listing, settings, seed, []), {})), None)
    except LongtailError as error:
        return str(error)


def _copies(groups: Iterable[Sequence[_Place]]) -> set[str]:
    """Return the files to leave out so that of those of one class with the same content one is left.

    Of a file in several splits that in test stays, then that in val: what is tested on is not changed.
    """
    copies: set[str] = set()
    for group in groups:
        kept: set[str | None] = set()
        for place in sorted(group, key=lambda place: -SPLITS.index(place.split) if place.split in SPLITS else 1):
            if place.class_name in kept:
                copies.add(place.shown)
            kept.add(place.class_name)
    return copies


def _write_good(listing: Listing, bad: set[str], path: Path) -> int:
    """Write the table of the files that are not bad; returns their number."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    whole = set(listing.splits) == {"all"}
    rows.writerow(["path", "class_name"] if whole else ["path", "class_name", "split"])
    count = 0
    for split, entries in listing.splits.items():
        for name, label in zip(entries.names, entries.labels.tolist(), strict=True):
            if (name if whole else f"{split}: {name}") not in bad and label < len(listing.class_names):
                row = [name, listing.class_names[label]]
                rows.writerow(row if whole else [*row, split])
                count += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue(), errors="surrogateescape")
    return count


def _inspection(
    config: Data,
    names: Sequence[str],
    counts: Sequence[int],
    groups: list[str],
    kind: LongTailedData | type[LongTailedData],
) -> Inspection:
    factor = imbalance_factor(counts)
    return Inspection(
        source=config.source,
        splits={},
        class_names=list(names),
        class_counts=list(counts),
        groups=groups,
        imbalance_factor=factor if np.isfinite(factor) else None,
        gini=gini(counts),
        counted=kind.counted,
        group_names=kind.group_names,
    )


class _Place(NamedTuple):
    """Where an image is."""

    shown: str
    """Its name in messages."""
    split: str
    class_name: str | None = None
    """None if it has not one class."""


_File = tuple[_Place, Callable[[], bytes]]
"""Where a file is, and a function that reads it."""


def _read_files(inspection: Inspection, files: Iterable[_File], tick: Callable[[int], None]) -> list[list[_Place]]:
    """Add what is wrong with files to an inspection; returns the groups of those with the same content."""
    widths, heights = collections.Counter[int](), collections.Counter[int]()
    digests: dict[bytes, list[_Place]] = {}
    first: dict[bytes, _Place] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for chunk in _chunks(files):
            for (place, _), (digest, sides, reason) in zip(chunk, pool.map(_examine, chunk), strict=True):
                if reason == _MISSING:
                    inspection.missing.append(place.shown)
                elif reason is not None:
                    inspection.unreadable.append({"path": place.shown, "reason": reason})
                if sides is not None:
                    widths[sides[0]] += 1
                    heights[sides[1]] += 1
                if digest is not None:
                    if digest in first:
                        digests.setdefault(digest, [first[digest]]).append(place)
                    else:
                        first[digest] = place
            tick(len(chunk))
    groups = list(digests.values())
    _add_repeated(inspection, groups, lambda place: f"{place.shown} ({place.class_name})")
    _add_sides(inspection, widths, heights)
    return groups


def _add_repeated(
    inspection: Inspection,
    groups: Iterable[Sequence[_Place]],
    with_class: Callable[[_Place], str],
) -> None:
    for group in groups:
        names = [place.shown for place in group]
        in_splits = len({place.split for place in group} - {_NO_SPLIT}) > 1
        in_classes = len({place.class_name for place in group}) > 1
        if in_classes:
            inspection.conflicts.append([with_class(place) for place in group])
        if in_splits:
            inspection.leaks.append(names)
        if not in_classes and not in_splits:
            inspection.duplicates.append(names)


def _add_sides(inspection: Inspection, widths: collections.Counter[int], heights: collections.Counter[int]) -> None:
    if widths:
        inspection.sides = {"width": _range(widths), "height": _range(heights)}


def _range(counter: collections.Counter[int]) -> list[int]:
    """Return the smallest, the median and the largest value."""
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
    """Return an image file's digest, its width and height, or else why it cannot be read as an image."""
    try:
        content = file[1]()
    except FileNotFoundError:  # which checking the listing has found
        return None, None, _MISSING
    except OSError as error:
        reason = read_error(error)
        if isinstance(reason, StorageError):
            raise StorageError(f"{file[0].shown}: {reason}") from None
        return None, None, str(reason)
    except ValueError as error:  # a name with a null character
        return None, None, f"cannot be read: {error}"
    if not content:
        return None, None, "is empty"
    try:
        with open_header(io.BytesIO(content)) as image:
            sides = image.size
            image.load()
            scale_to_8_bits(image)
    except LongtailError as error:  # a range of values that training refuses
        return None, None, str(error)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return None, None, f"is larger than Pillow decodes safely ({error})"
    except UnsupportedFormatError as error:
        return None, None, str(error)
    except UnidentifiedImageError:
        return None, None, "is not an image that Pillow can read"
    except Exception as error:  # decoders raise all kinds of errors over a damaged file
        return None, None, f"is damaged ({' '.join(str(error).split())[:120]})"
    return hashlib.blake2b(content, digest_size=16).digest(), sides, None


def _compare_pixels(inspection: Inspection, data: LongTailedData, tick: Callable[[int], None]) -> None:
    """Find images with the same pixels, where a set is no folder of files."""
    digests: dict[bytes, list[_Place]] = {}
    widths, heights = collections.Counter[int](), collections.Counter[int]()
    for split, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        if images is None:
            continue
        for indices in torch.arange(len(images)).split(_CHUNK):
            pixels = images.images.take(indices).numpy()
            widths[pixels.shape[3]] += len(pixels)
            heights[pixels.shape[2]] += len(pixels)
            for index, image in zip(indices.tolist(), pixels, strict=True):
                if index in images.images.unreadable:  # in whose place is another image
                    continue
                digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
                class_name = data.class_names[int(images.labels[index])]
                place = _Place(f"{split}: image {int(images.ids[index])} ({class_name})", split, class_name)
                digests.setdefault(digest, []).append(place)
            tick(len(indices))
    repeated = [group for group in digests.values() if len(group) > 1]
    _add_repeated(inspection, repeated, lambda place: place.shown)
    _add_sides(inspection, widths, heights)
    inspection.unreadable = [{"path": path, "reason": reason} for path, reason in data.all_unreadable().items()]


def histogram(counts: Sequence[int], counted: str = "training images", width: int = 64, height: int = 6) -> list[str]:
    """Return a histogram of the class counts, head first, as lines of text on a log scale.

    Args:
        counts: (C,) count of each class, in any order.
        counted: what is counted, for the caption.
        width: most columns; neighbouring classes share one where there are more classes.
        height: in lines.
    """
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
    classes = "1 class" if len(ordered) == 1 else f"{len(ordered):,} classes, head to tail"
    lines.append(f"{'':9}{classes}; {counted}, log scale")
    return lines
