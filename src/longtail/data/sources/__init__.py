"""Where images come from: named sets, folders, lists, tables and the Hugging Face Hub, all loaded as one type.

A source is a :class:`Source` in :data:`longtail.registry.SOURCES`. One that consists of image files returns a
:class:`~longtail.data.listing.Listing`, which can be checked before an image is opened, and which gets its splits, its
tail and its image size in :mod:`longtail.data.sources.from_listing`; any other returns the finished data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtail.config import Data
from longtail.data.dataset import LongTailedData
from longtail.data.listing import Listing, check
from longtail.data.paths import find_path
from longtail.data.sources.from_listing import data_from_listing, raise_listing_errors, split_listing
from longtail.errors import LongtailError
from longtail.registry import SOURCES


@dataclass(frozen=True)
class Source:
    """A data set, or a kind of them; exactly one of ``load`` and ``listing`` is given."""

    load: Callable[[Data, int], LongTailedData] | None = None
    """(settings, seed) to the data."""
    listing: Callable[[Data], Listing] | None = None
    """Settings to the image files, which are then checked, split and opened."""
    write_split: Callable[[Data, Path, float, float, int], dict[str, Any]] | None = None
    """Writes what ``longtail split`` asks for, where it is not a table of image files: (settings, folder, fraction for
    validation, fraction for testing, seed) to what :func:`longtail.data.splits.write_split` returns."""
    balanced: bool = False
    """Whether it is balanced as published, so that it is made long-tailed unless another profile is asked for."""
    makes_tail: bool = False
    """Whether ``load`` makes the tail that ``data.profile`` and ``data.imbalance`` ask for; one that is ``balanced``
    does."""

    def __post_init__(self) -> None:
        if (self.load is None) == (self.listing is None):
            raise TypeError("Source: expected either load or listing")


def check_source(config: Data) -> None:
    """Raise LongtailError if the source is unknown, or its image files cannot be listed; no image is read."""
    if _source(config).listing is not None:
        raise_listing_errors(read_listing(config))


def load_data(config: Data, seed: int) -> LongTailedData:
    """Load a set.

    Args:
        config: which set, from where, and its tail.
        seed: of the split and the tail, where ``config.seed`` gives none.

    Raises:
        LongtailError: the set is unknown, cannot be read or downloaded, or has something wrong in it.
    """
    source = _source(config)
    seed = seed if config.seed is None else config.seed
    if source.load is not None:
        data = source.load(config, seed)
        if config.profile not in {"auto", "natural"} and not (source.makes_tail or source.balanced):
            raise LongtailError(
                f"data.profile {config.profile}: source {config.source} makes no tail of its images; leave it out"
            )
        counts = data.class_counts
        if source.balanced and config.profile != "natural" and config.imbalance >= 2 and min(counts) == max(counts):
            raise LongtailError(
                f"data.imbalance {config.imbalance:g}: source {config.source} has {max(counts)} images of every class; "
                "a source that is balanced makes the tail itself (longtail.data.imbalance.long_tailed)"
            )
        return data
    return data_from_listing(read_listing(config), config, seed)


def split_sizes(config: Data, seed: int) -> tuple[dict[str, int], LongTailedData | None]:
    """Return the number of images of each split; no image file is opened.

    Args:
        config: which set, from where, and its tail.
        seed: see :func:`load_data`.

    Returns:
        Sizes by split, and the data where it had to be loaded, None for image files.

    Raises:
        LongtailError: as :func:`load_data`.
    """
    source = _source(config)
    if source.listing is not None:
        listing = read_listing(config)
        raise_listing_errors(listing)
        splits = split_listing(listing, config, seed if config.seed is None else config.seed, [])
        return {name: len(entries) for name, entries in splits.items()}, None
    data = load_data(config, seed)
    sets = {"train": data.train, "val": data.val, "test": data.test}
    return {name: len(images) for name, images in sets.items() if images is not None}, data


def read_listing(config: Data) -> Listing:
    """Return the image files of a set, checked; what is wrong with them is in the listing's ``errors``.

    Raises:
        LongtailError: the set is unknown, consists of no image files, or its files cannot be listed at all.
    """
    source = _source(config)
    if source.listing is None:
        raise LongtailError(f"{config.source}: has its own splits; expected a folder, a list or a table")
    listing = source.listing(config)
    check(listing)
    return listing


def is_balanced(name: str) -> bool:
    """Return whether a source is balanced as published, so that a tail is made for it by default.

    Raises:
        LongtailError: there is no source of that name.
    """
    return SOURCES[name].balanced


def _source(config: Data) -> Source:
    source = SOURCES[config.source]
    if config.root is not None and not find_path(Path(config.root)).exists():
        raise LongtailError(f"data.root '{config.root}': there is no such folder")
    return source
