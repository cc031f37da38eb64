"""The user's own image files: a folder of classes, and lists, tables or annotations."""

from __future__ import annotations

from pathlib import Path

from longtail.config import Data
from longtail.data.listing import Listing, read_folder, read_splits
from longtail.data.paths import find_path
from longtail.data.sources import Source
from longtail.errors import LongtailError


def _read_folder(config: Data) -> Listing:
    """Read one sub-folder per class."""
    if config.root is None:
        raise LongtailError("data.root is missing: which folder holds the images? (--data.root FOLDER)")
    for name in ("train", "val", "test", "image_column", "label_column", "split_column"):
        if getattr(config, name) is not None:
            raise LongtailError(f"data.{name}: is for lists and tables, and {config.root} is a folder; leave it out")
    root = find_path(Path(config.root))
    listing = read_folder(root, class_depth=config.class_depth, skip_empty=config.skip_empty)
    listing.check_headers = True
    return listing


def _read_list(config: Data) -> Listing:
    """Read lists, tables or annotations, a file for each split."""
    paths = {"train": config.train, "val": config.val, "test": config.test}
    sources = {split: find_path(Path(path)) for split, path in paths.items() if path is not None}
    if "train" not in sources:
        raise LongtailError("data.train is missing: which list, table or annotations name the training images?")
    root = find_path(Path(config.root)) if config.root is not None else sources["train"].parent
    return read_splits(sources, root, config.image_column, config.label_column, config.split_column)


FOLDER = Source(listing=_read_folder)
LIST = Source(listing=_read_list)
