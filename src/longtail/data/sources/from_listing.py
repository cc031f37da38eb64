"""From a listing of image files to data: its splits, its tail, and images decoded now or when they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from longtail.config import Data
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.image_io import read_size
from longtail.data.images import ArrayImages, FileImages, Images
from longtail.data.imbalance import long_tailed, permuted_by_class, resolve_profile, stratified_split
from longtail.data.listing import Entries, Listing
from longtail.data.size_policy import SAMPLE, SizePolicy, choose_size
from longtail.errors import LongtailError


def raise_listing_errors(listing: Listing) -> None:
    """Raise a LongtailError with the first error of a listing, if there is one."""
    if listing.errors:
        more = len(listing.errors) - 1
        rest = f" (and {more} more problem{'s' * (more > 1)}: longtail inspect lists them)" if more else ""
        raise LongtailError(listing.errors[0] + rest)


def data_from_listing(listing: Listing, config: Data, seed: int) -> LongTailedData:
    """Split a listing, make it long-tailed, and open its images as far as they fit into memory.

    Args:
        listing: checked, see :func:`longtail.data.listing.check`.
        config: fractions of the splits, the tail, image size and memory.
        seed: of the split and the tail.

    Raises:
        LongtailError: the listing has errors, a class has too few images, or a file cannot be read.
    """
    raise_listing_errors(listing)
    names = listing.class_names
    if len(names) < 2:
        raise LongtailError(f"{listing.root}: expected at least two classes, found '{names[0]}' alone")
    remarks = list(listing.remarks)
    splits = dict(listing.splits)
    if "val" in splits and config.val_fraction > 0:
        remarks.append("data.val_fraction is not used: the set has validation images of its own")
    if "all" in splits or "test" not in splits or (config.val_fraction > 0 and "val" not in splits):
        splits = _split(splits, listing, config, seed, remarks)
    splits["train"] = _make_long_tailed(splits["train"], names, config, seed)
    _check_smallest_class(splits["train"], listing, config)
    policy = choose_size(
        config,
        images=sum(len(entries) for entries in splits.values()),
        short_sides=lambda: _short_sides(listing.root, splits["train"].names),
        mean=listing.mean,
        std=listing.std,
    )
    return LongTailedData(
        train=_open(listing, splits["train"], policy, config.max_unreadable_fraction),
        val=_open(listing, splits["val"], policy) if "val" in splits else None,
        test=_open(listing, splits["test"], policy),
        class_names=tuple(names),
        mean=policy.mean,
        std=policy.std,
        image_size=policy.size,
        augment=policy.augment,
        remarks=tuple(remarks),
    )


def _split(
    splits: dict[str, Entries], listing: Listing, config: Data, seed: int, remarks: list[str]
) -> dict[str, Entries]:
    """Hold out a test split, where there is none, and a validation split, where one is asked for and there is none."""
    whole = splits.pop("all") if "all" in splits else splits.pop("train")
    test = 0.0 if "test" in splits else config.test_fraction
    val = 0.0 if "val" in splits else config.val_fraction
    classes = len(listing.class_names)
    counts = torch.bincount(whole.labels, minlength=classes).tolist()
    single = next((index for index, count in enumerate(counts) if count < 2), None)
    if single is not None and test > 0:
        raise LongtailError(
            f"class '{listing.class_names[single]}' has {counts[single]} image{'s' * (counts[single] != 1)} "
            f"below {listing.root}: at least 2 are expected, one to train on and one to test on; "
            "add images or remove the class"
        )
    assignment, short = stratified_split(whole.labels, classes, val, test, seed)
    if short:
        shown = ", ".join(listing.class_names[index] for index in short[:5]) + ("…" if len(short) > 5 else "")
        remarks.append(f"{len(short)} classes have too few images for every split ({shown})")
    numbers = {"train": 0} | ({"val": 1} if val > 0 else {}) | ({"test": 2} if test > 0 else {})
    parts = {name: whole.at(torch.nonzero(assignment == number).flatten()) for name, number in numbers.items()}
    return {**splits, **parts}


def _make_long_tailed(entries: Entries, names: Sequence[str], config: Data, seed: int) -> Entries:
    profile = resolve_profile(config.profile, balanced=False)
    if profile == "natural":
        return entries
    order = permuted_by_class(entries.labels, len(names), seed)
    return entries.at(long_tailed(order, names, profile, config.imbalance, config.class_order, seed))


def _check_smallest_class(train: Entries, listing: Listing, config: Data) -> None:
    counts = torch.bincount(train.labels, minlength=len(listing.class_names)).tolist()
    index = min(range(len(counts)), key=lambda index: counts[index])
    if counts[index] < config.min_images:
        raise LongtailError(
            f"class '{listing.class_names[index]}' has {counts[index]} training images below {listing.root}: at least "
            f"{config.min_images} are expected (data.min_images); add images or remove the class"
        )


def _short_sides(root: Path, names: Sequence[str]) -> list[int]:
    """Return the shorter sides in pixels of evenly spread files, at least :data:`SAMPLE` where there are as many."""
    return [min(read_size(root / name)) for name in names[:: max(1, len(names) // SAMPLE)]]


def _open(listing: Listing, entries: Entries, policy: SizePolicy, max_unreadable_fraction: float = 0.0) -> ImageSet:
    """Decode the images of a split where they fit into memory; otherwise read their headers and decode them later."""
    ids = torch.tensor([path_id(name) for name in entries.names], dtype=torch.int64)
    if policy.in_memory:
        files = FileImages(listing.root, entries.names, policy.stored)
        return ImageSet(ArrayImages(files.take(torch.arange(len(entries)))), entries.labels, ids)
    images: Images = FileImages(listing.root, entries.names, policy.stored, 3, entries.labels, max_unreadable_fraction)
    if listing.check_headers or max_unreadable_fraction == 0:
        # an unreadable file is reported now rather than in the middle of an epoch, or after the training
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda name: read_size(listing.root / name), entries.names):
                pass
    return ImageSet(images, entries.labels, ids)


def path_id(name: str) -> int:
    """Return the id of an image file, a hash of its path below the root: adding a file changes no other file's id."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
