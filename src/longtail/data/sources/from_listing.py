"""From a listing of image files to data: its splits, its tail, and images decoded once or when they are needed."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL
import torch
from torch import Tensor

from longtail.config import Data
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.image_io import StorageError, read_size
from longtail.data.images import ArrayImages, CopiedImages, FileImages, Images
from longtail.data.imbalance import long_tailed, permuted_by_class, remarks_on_tail, resolve_profile
from longtail.data.listing import Entries, Listing
from longtail.data.row_store import RowStore, RowStoreError, cache_folder, content_hash
from longtail.data.size_policy import SAMPLE, SizePolicy, choose_size
from longtail.data.sources.hold_out import check_smallest_class, held_out_fractions, hold_out
from longtail.data.sources.unreadable import Unreadable, decode_readable, without
from longtail.errors import LongtailError

_SQUARES = 1  # changes when the same files are to become other squares
_PART_BYTES = 2**24  # of the copies that are written at once
_WORTH_SAYING = 5.0  # seconds of decoding

logger = logging.getLogger(__name__)


def raise_listing_errors(listing: Listing) -> None:
    """Raise a LongtailError with the first error of a listing, if there is one."""
    if listing.errors:
        more = len(listing.errors) - 1
        rest = f" (and {more} more problem{'s' * (more > 1)}: longtail inspect lists them)" if more else ""
        raise LongtailError(listing.errors[0] + rest)


def data_from_listing(listing: Listing, config: Data, seed: int) -> LongTailedData:
    """Split a listing, make it long-tailed, and open its images as far as they fit into memory.

    Where all views are made from squares of one size, copies of these are kept on disk: the next run decodes only the
    files that are new or changed. They are read from there, mapped to memory.

    Args:
        listing: checked, see :func:`longtail.data.listing.check`.
        config: fractions of the splits, the tail, image size, memory, and where copies are kept.
        seed: of the split and the tail.

    Raises:
        LongtailError: the listing has errors, a class has too few images, or a file cannot be read.
    """
    raise_listing_errors(listing)
    remarks = list(listing.remarks)
    splits = split_listing(listing, config, seed, remarks)
    policy = choose_size(
        config,
        images=sum(len(entries) for entries in splits.values()),
        short_sides=lambda: _short_sides(listing.root, splits["train"].names),
        mean=listing.mean,
        std=listing.std,
    )
    unreadable = Unreadable(config, sum(len(entries) for entries in splits.values()))
    folder = cache_folder(config.cache)
    sets = None
    if folder is not None and policy.squares:
        sets = _copied(listing, splits, policy, folder / "images", remarks, unreadable)
    if sets is None:
        unreadable = Unreadable(config, unreadable.total)
        sets = {name: _open(listing, name, entries, policy, unreadable) for name, entries in splits.items()}
    unreadable.check(remarks)
    check_readable_classes(listing, splits["train"], dict(unreadable.found), config.min_images)
    return LongTailedData(
        train=sets["train"],
        val=sets.get("val"),
        test=sets["test"],
        class_names=tuple(listing.class_names),
        mean=policy.mean,
        std=policy.std,
        image_size=policy.size,
        augment=policy.augment,
        remarks=tuple(remarks),
        unreadable=tuple(unreadable.found),
    )


def check_readable_classes(listing: Listing, train: Entries, unreadable: Mapping[str, str], min_images: int) -> None:
    """Raise LongtailError if a class has too few training images that can be read; the message names the first file.

    Args:
        listing: class names and root.
        train: the training images.
        unreadable: reasons, which name the file, by path below the root; of images of any split.
        min_images: the setting ``data.min_images``.
    """
    if not unreadable:
        return
    kept = torch.tensor([name not in unreadable for name in train.names])
    lost = [
        (label, unreadable[name])
        for name, label in zip(train.names, train.labels.tolist(), strict=True)
        if name in unreadable
    ]
    check_smallest_class(train.labels[kept], listing.class_names, f"below {listing.root}", min_images, lost)


def split_listing(listing: Listing, config: Data, seed: int, remarks: list[str]) -> dict[str, Entries]:
    """Return the images of each split, the training images with the tail; no image file is opened.

    Args:
        listing: without errors on its images, see :attr:`Listing.can_be_split`.
        config: fractions of the splits, and the tail.
        seed: of the split and the tail.
        remarks: where to say what a user should know about the splits.

    Raises:
        LongtailError: there are too few classes, or a class has too few images.
    """
    names = listing.class_names
    if len(names) < 2:
        beside = f"; {listing.beside}" if listing.beside else ""
        raise LongtailError(f"{listing.root}: expected at least two classes, found '{names[0]}' alone{beside}")
    splits = dict(listing.splits)
    test, val = held_out_fractions(splits, config, remarks)
    if "all" in splits or test or val:
        splits = _hold_out(splits, listing, config, test, val, seed, remarks)
    splits["train"] = _make_long_tailed(splits["train"], names, config, seed, remarks)
    check_smallest_class(splits["train"].labels, names, f"below {listing.root}", config.min_images)
    return splits


def _hold_out(
    splits: dict[str, Entries],
    listing: Listing,
    config: Data,
    test: float,
    val: float,
    seed: int,
    remarks: list[str],
) -> dict[str, Entries]:
    """Hold out a test split, where there is none, and a validation split, where one is asked for and there is none."""
    whole = splits.pop("all") if "all" in splits else splits.pop("train")
    counts = torch.bincount(whole.labels, minlength=len(listing.class_names)).tolist()
    single = next((index for index, count in enumerate(counts) if count < 2), None)
    if single is not None and test > 0:
        own_test = "a test split (a folder test beside train, or a table: --data.test TABLE)"
        if max(counts) < 2:
            raise LongtailError(
                f"{listing.root}: there are no test images, and no class has a second image that could be one; add "
                f"images to some of the classes, or {own_test}"
            )
        way = f"or give {own_test}"
        if "all" in listing.splits:  # which longtail split takes
            root = f" --data.root {shlex.quote(str(listing.root))}"
            data = shlex.quote(str(listing.root)) if config.train is None else shlex.quote(config.train) + root
            way = (
                f"or train on it without a test image: longtail split {data}{_flags_of_reading(config)} --val 0 --out "
                f"split.csv, then longtail train split.csv{root}"
            )
        raise LongtailError(
            f"class '{listing.class_names[single]}' has {counts[single]} image{'s' * (counts[single] != 1)} "
            f"below {listing.root}: at least 2 are expected, one to train on and one to test on; add images, remove "
            f"the class, {way}"
        )
    parts = hold_out(whole.labels, listing.class_names, test, val, seed, remarks)
    return {**splits, **{name: whole.at(positions) for name, positions in parts.items()}}


def _flags_of_reading(config: Data) -> str:
    """Return the flags without which another command would read the files of a set in another way."""
    names = ("image_column", "label_column", "split_column", "class_depth")
    values = {name: value for name in names if (value := getattr(config, name)) is not None}
    flags = [f" --data.{name} {shlex.quote(str(value))}" for name, value in values.items()]
    return "".join(flags) + " --data.skip_empty" * config.skip_empty


def _make_long_tailed(entries: Entries, names: Sequence[str], config: Data, seed: int, remarks: list[str]) -> Entries:
    profile = resolve_profile(config.profile, balanced=False)
    if profile == "natural":
        return entries
    order = permuted_by_class(entries.labels, len(names), seed)
    kept = entries.at(long_tailed(order, names, profile, config.imbalance, config.class_order, seed))
    remarks += remarks_on_tail(order, kept.labels, names, profile, config.imbalance, config.class_order, seed)
    return kept


def _short_sides(root: Path, names: Sequence[str]) -> list[int]:
    """Return the shorter sides in pixels of evenly spread files, at least :data:`SAMPLE` where there are as many."""
    sides: list[int] = []
    failure: LongtailError | None = None
    for name in names[:: max(1, len(names) // SAMPLE)]:
        try:
            sides.append(min(read_size(root / name)))
        except LongtailError as error:  # what is done about it is decided when the images are opened
            failure = failure or error
    if not sides and failure is not None:
        raise failure
    return sides


def _copied(
    listing: Listing,
    splits: dict[str, Entries],
    policy: SizePolicy,
    folder: Path,
    remarks: list[str],
    unreadable: Unreadable,
) -> dict[str, ImageSet] | None:
    """Return the splits as copies on disk, and decode what is missing there; None where copies cannot be kept.

    Args:
        listing: the images' folder.
        splits: the images.
        policy: side of the squares.
        folder: where the copies are.
        remarks: where to say how many images were decoded, if any, and where the copies are or why there are none.
        unreadable: gathers the files that cannot be read; they are left out, and have no copy.

    Raises:
        LongtailError: more files cannot be read than ``unreadable`` accepts.
    """
    # paths below another folder may be the same, and sizes and times too where an archive sets these
    depends_on = [str(listing.root.resolve()), policy.stored, _SQUARES, PIL.__version__]
    store = RowStore(folder, content_hash(*depends_on), (policy.stored, policy.stored, 3), "uint8")
    sets = {
        name: ImageSet(FileImages(listing.root, entries.names, policy.stored), entries.labels, _ids(entries))
        for name, entries in splits.items()
    }
    images, decoded = sum(map(len, sets.values())), 0
    copied: dict[str, ImageSet] = {}

    def decode(files: FileImages, positions: Tensor) -> Iterator[Tensor]:
        nonlocal decoded
        started = time.monotonic()
        for part in positions.split(max(1, _PART_BYTES // store.row_bytes)):
            squares, reasons = decode_readable(files, part)
            if reasons:
                raise _FoundUnreadable(reasons)
            yield squares
            decoded += len(part)
            left = (time.monotonic() - started) / len(part) * (len(positions) - len(part))
            if decoded == len(part) and left > _WORTH_SAYING:
                logger.info("decoding %s images: about %.0f s", f"{len(positions):,}", left)

    try:
        keys = {name: split.keys() for name, split in sets.items()}
        needed = int((store.find(torch.cat(list(keys.values()))) < 0).sum()) * store.row_bytes
        free = _free_bytes(folder) if needed else 0
        if free < 2 * needed:
            remarks.append(
                f"no resized copies of the images are kept: {_mib(needed)} are needed, and {folder} has {_mib(free)} "
                "free, less than twice that; --data.cache names another folder"
            )
            return None
        for name, split in sets.items():
            good = torch.arange(len(split))
            files = split.images
            assert isinstance(files, FileImages)
            while True:
                part = files.at(good)
                try:
                    rows = store.fill(keys[name][good], functools.partial(decode, part), wait=True)
                    break
                except _FoundUnreadable as error:
                    unreadable.add({part.names[index]: reason for index, reason in error.reasons.items()})
                    good = without(good, error.reasons)
            copies = CopiedImages(part, store, rows, lazy=not policy.in_memory)
            copied[name] = ImageSet(copies, split.labels[good], split.ids[good])
    except RowStoreError as error:
        remarks.append(f"no resized copies of the images are kept: {error}")
        return None
    if decoded:
        remarks.append(
            f"{decoded:,} of {images:,} images were decoded, and their resized copies are kept in {folder} "
            f"({_mib(len(store) * store.row_bytes)})"
        )
    return copied


def _free_bytes(folder: Path) -> int:
    """Return the free space of the disk where a folder is or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _mib(size: int) -> str:
    return f"{size / 2**20:,.{1 if size < 10 * 2**20 else 0}f} MiB"


def _ids(entries: Entries) -> Tensor:
    return torch.tensor([path_id(name) for name in entries.names], dtype=torch.int64)


class _FoundUnreadable(Exception):  # noqa: N818
    """Ends the filling of a store: there is no row for an image that cannot be read.

    Args:
        reasons: by position in the images.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def _open(listing: Listing, split: str, entries: Entries, policy: SizePolicy, unreadable: Unreadable) -> ImageSet:
    """Decode the images of a split where they fit into memory; otherwise read their headers and decode them later."""
    files = FileImages(
        listing.root, entries.names, policy.stored, 3, entries.labels, unreadable.config.max_unreadable_fraction
    )
    positions = torch.arange(len(entries))
    if policy.in_memory:
        squares, reasons = decode_readable(files, positions)
    elif listing.check_headers or split != "train" or unreadable.refuses:
        # an unreadable file is found now rather than in the middle of an epoch, or after the training
        reasons = _unreadable_headers(files)
    else:
        reasons = {}
    unreadable.add({entries.names[index]: reason for index, reason in reasons.items()})
    good = without(positions, reasons)
    images: Images
    if policy.in_memory:
        images = ArrayImages(squares.permute(0, 3, 1, 2))
    else:
        images = files.at(good)
        images.max_unreadable_fraction = 0.0 if unreadable.refuses else unreadable.config.max_unreadable_fraction
    return ImageSet(images, entries.labels[good], _ids(entries)[good])


def _unreadable_headers(files: FileImages) -> dict[int, str]:
    def fails(name: str) -> str | None:
        try:
            read_size(files.root / name)
        except StorageError:
            raise
        except LongtailError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(fails, files.names))
    return {index: reason for index, reason in enumerate(results) if reason is not None}


def path_id(name: str) -> int:
    """Return the id of an image file, a hash of its path below the root: adding a file changes no other file's id."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
