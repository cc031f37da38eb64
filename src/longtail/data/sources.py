"""Where images come from: named sets, lists, tables, folders and the Hub, all giving the same object.

One function adds a set: write it, and put it into :data:`SOURCES`. A set of image files is a :class:`Listing` first, so
that it can be looked at before an image is opened: such a function goes into :data:`LISTINGS` instead.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from longtail.config import Data
from longtail.data.dataset import (
    CIFAR_MEAN,
    CIFAR_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INAT_MEAN,
    INAT_STD,
    ImageSet,
    LongTailedData,
)
from longtail.data.images import ArrayImages, FileImages, Images
from longtail.data.imbalance import long_tailed, permuted_by_class, stratified
from longtail.data.listing import Entries, Listing, check, in_other_style, listed, read_folder
from longtail.data.named import cifar, digits, hub
from longtail.data.pictures import sides
from longtail.data.scenes import ade20k_names, camvid_names, no_names, scenes
from longtail.errors import LongtailError, nearest


def load_data(config: Data, seed: int) -> LongTailedData:
    """Load a set.

    Args:
        config: which set, from where, and its tail.
        seed: of the split and the tail, where ``config.seed`` gives none.

    Raises:
        LongtailError: the set is unknown, cannot be had, or has something wrong in it.
    """
    known = [*SOURCES, *LISTINGS]
    if config.source not in known:
        raise LongtailError(f"data.source '{config.source}' is not known{nearest(config.source, known)}")
    if config.root is not None and not Path(config.root).exists():
        raise LongtailError(f"data.root '{config.root}': there is no such folder")
    seed = seed if config.seed is None else config.seed
    if config.source in SOURCES:
        return SOURCES[config.source](config, seed)
    return _from_listing(read_listing(config), config, seed)


def read_listing(config: Data) -> Listing:
    """Return a set of files as its listing, checked; what is wrong with it is in its ``errors``."""
    listing = LISTINGS[config.source](config)
    check(listing)
    return listing


def _folder(config: Data) -> Listing:
    """One sub-folder a class."""
    if config.root is None:
        raise LongtailError("data.root is missing: which folder holds the images? (--data.root FOLDER)")
    return read_folder(Path(config.root))


def _list(config: Data) -> Listing:
    """One's own lists, tables or annotations, a file a split."""
    given = {"train": config.train, "val": config.val, "test": config.test}
    sources = {split: Path(name) for split, name in given.items() if name is not None}
    if "train" not in sources:
        raise LongtailError("data.train is missing: which list, table or annotations name the training images?")
    root = Path(config.root) if config.root is not None else sources["train"].parent
    return listed(sources, root, config.image_column, config.label_column, config.split_column)


PUBLISHED: dict[str, tuple[int, int, int, dict[str, int]]] = {
    # classes, images of the largest and smallest class, images by split
    "imagenet-lt": (1000, 1280, 5, {"train": 115_846, "val": 20_000, "test": 50_000}),
    "places-lt": (365, 4980, 5, {"train": 62_500, "val": 7_300, "test": 36_500}),
    "inat2018": (8142, 1000, 2, {"train": 437_513, "test": 24_426}),
}
"""What the benchmarks' own papers say of them (Liu et al., CVPR 2019; Van Horn et al., CVPR 2018)."""

_LISTS: dict[str, dict[str, tuple[str, ...]]] = {
    "imagenet-lt": {"train": ("ImageNet_LT_train",), "val": ("ImageNet_LT_val",), "test": ("ImageNet_LT_test",)},
    "places-lt": {"train": ("Places_LT_train",), "val": ("Places_LT_val",), "test": ("Places_LT_test",)},
    # its validation images are what everybody tests on
    "inat2018": {"train": ("iNaturalist18_train", "train2018"), "test": ("iNaturalist18_val", "val2018")},
}


def _benchmark(name: str) -> Callable[[Data], Listing]:
    """A set that is published as lists over another set's images; the lists lie beside the images or are named."""

    def read(config: Data) -> Listing:
        if config.root is None:
            raise LongtailError(f"data.root is missing: which folder holds the images of {name}? (--data.root FOLDER)")
        root = Path(config.root)
        sources = {}
        for split, stems in _LISTS[name].items():
            given = getattr(config, split)
            there = [root / f"{stem}{ending}" for stem in stems for ending in (".txt", ".json")]
            found = Path(given) if given is not None else next((path for path in there if path.is_file()), None)
            if found is None:
                raise LongtailError(
                    f"{name}: found no list {there[0].name} in {root}; put it there or name it with --data.{split} FILE"
                )
            sources[split] = found
        listing = listed(sources, root)
        if name == "places-lt":
            listing = in_other_style(listing, (str, _places_short, _places_long))
        listing.remarks += _unlike_published(listing, name)
        return listing

    return read


def _places_short(path: str) -> str:
    """``data_256/a/airfield/x.jpg`` as ``train/airfield/x.jpg``; the test images lie in ``val/``, flat or by class."""
    parts = path.split("/")
    if parts[0] == "data_256" and len(parts) > 3:
        return "/".join(["train", *parts[2:]])
    return "/".join(["val", *parts[1:]]) if parts[0] == "val_256" else path


def _places_long(path: str) -> str:
    """``train/airfield/x.jpg`` as ``data_256/a/airfield/x.jpg``."""
    parts = path.split("/")
    if parts[0] == "train" and len(parts) > 2:
        return "/".join(["data_256", parts[1][0], *parts[1:]])
    return "/".join(["val_256", *parts[1:]]) if parts[0] == "val" else path


def _unlike_published(listing: Listing, name: str) -> list[str]:
    classes, most, least, splits = PUBLISHED[name]
    counts = torch.bincount(listing.splits["train"].labels)
    there = {
        "classes": len(listing.class_names),
        "in the largest": int(counts.max()),
        "in the smallest": int(counts.min()),
    }
    published = {"classes": classes, "in the largest": most, "in the smallest": least}
    for split, number in splits.items():
        if split in listing.splits:
            there[split], published[split] = len(listing.splits[split]), number
    unlike = [
        f"{what} {there[what]:,}, published {published[what]:,}" for what in there if there[what] != published[what]
    ]
    return [f"not {name} as it was published: {'; '.join(unlike)}"] if unlike else []


def _from_listing(listing: Listing, config: Data, seed: int) -> LongTailedData:
    """Give a listing its splits and its tail, and open its images as far as they fit into memory."""
    if listing.errors:
        more = len(listing.errors) - 1
        rest = f" (and {more} more problem{'s' * (more > 1)}: longtail inspect lists them)" if more else ""
        raise LongtailError(listing.errors[0] + rest)
    names = listing.class_names
    if len(names) < 2:
        raise LongtailError(f"{listing.root}: expected at least two classes, found '{names[0]}' alone")
    remarks = list(listing.remarks)
    splits = dict(listing.splits)
    if "val" in splits and config.val_fraction > 0:
        remarks.append("data.val_fraction is not used: the set has validation images of its own")
    if "all" in splits or "test" not in splits or (config.val_fraction > 0 and "val" not in splits):
        splits = _split(splits, listing, config, seed, remarks)
    splits["train"] = _with_tail(splits["train"], names, config, seed)
    _least(splits["train"], listing, config)
    size = config.image_size or _natural_size(listing.root, splits["train"].names)
    mean, std = {"inat2018": (INAT_MEAN, INAT_STD)}.get(config.source, (IMAGENET_MEAN, IMAGENET_STD))
    opened = _Opener(listing.root, size, config, sum(len(entries) for entries in splits.values()))
    augment = "cifar" if size <= 64 else "photo" if opened.in_memory else "imagenet"
    return LongTailedData(
        train=opened(splits["train"], config.broken_share),
        val=opened(splits["val"]) if "val" in splits else None,
        test=opened(splits["test"]),
        class_names=tuple(names),
        mean=CIFAR_MEAN if size <= 64 else mean,
        std=CIFAR_STD if size <= 64 else std,
        image_size=size,
        augment=augment,
        remarks=tuple(remarks),
    )


def _split(
    splits: dict[str, Entries], listing: Listing, config: Data, seed: int, remarks: list[str]
) -> dict[str, Entries]:
    """Hold a test split out of what there is, where it has none, and a validation split where one is asked for."""
    whole = splits.pop("all") if "all" in splits else splits.pop("train")
    untested = 0.0 if "test" in splits else config.test_fraction
    classes = len(listing.class_names)
    counts = torch.bincount(whole.labels, minlength=classes).tolist()
    alone = next((index for index, count in enumerate(counts) if count < 2), None)
    if alone is not None and untested > 0:
        raise LongtailError(
            f"class '{listing.class_names[alone]}' has {counts[alone]} image{'s' * (counts[alone] != 1)} "
            f"below {listing.root}: at least 2 are expected, one to train on and one to test on; "
            "add images or remove the class"
        )
    wanted = 0.0 if "val" in splits else config.val_fraction
    assignment, short = stratified(whole.labels, classes, wanted, untested, seed)
    if short:
        shown = ", ".join(listing.class_names[index] for index in short[:5]) + ("…" if len(short) > 5 else "")
        remarks.append(f"{len(short)} classes have too few images for every split ({shown})")
    made = {"train": 0} | ({"val": 1} if wanted > 0 else {}) | ({"test": 2} if untested > 0 else {})
    return {**splits, **{name: whole.at(torch.nonzero(assignment == value).flatten()) for name, value in made.items()}}


def _with_tail(entries: Entries, names: Sequence[str], config: Data, seed: int) -> Entries:
    profile = "natural" if config.profile == "auto" else config.profile
    if profile == "natural":
        return entries
    order = permuted_by_class(entries.labels, len(names), seed)
    return entries.at(long_tailed(order, names, profile, config.imbalance, config.class_order, seed))


def _least(train: Entries, listing: Listing, config: Data) -> None:
    counts = torch.bincount(train.labels, minlength=len(listing.class_names)).tolist()
    index = min(range(len(counts)), key=lambda index: counts[index])
    if counts[index] < config.min_images:
        raise LongtailError(
            f"class '{listing.class_names[index]}' has {counts[index]} training images below {listing.root}: at least "
            f"{config.min_images} are expected (data.min_images); add images or remove the class"
        )


class _Opener:
    """Opens every split the same way: decoded into memory where all of them fit, or on demand."""

    def __init__(self, root: Path, size: int, config: Data, images: int) -> None:
        # photographs are kept a little larger than they are used, as in evaluation at 256 and 224
        self.root, self.stored = root, size if size <= 64 else round(size * 256 / 224)
        # the protocol's views of photographs start from the whole image
        whole = config.augment.startswith("imagenet") and size > 64
        self.in_memory = not whole and images * self.stored**2 * 3 <= config.memory_gib * 2**30
        self.headers = config.source == "folder"

    def __call__(self, entries: Entries, broken_share: float = 0.0) -> ImageSet:
        ids = torch.tensor([path_id(name) for name in entries.names], dtype=torch.int64)
        images: Images = FileImages(self.root, entries.names, self.stored, 3, entries.labels, broken_share)
        if self.in_memory:
            strict = FileImages(self.root, entries.names, self.stored)
            images = ArrayImages(strict.take(torch.arange(len(entries))))
        elif self.headers or broken_share == 0:
            # found now, by name, rather than in the middle of an epoch, or when all is trained
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                for _ in pool.map(lambda name: sides(self.root / name), entries.names):
                    pass
        return ImageSet(images, entries.labels, ids)


def _natural_size(root: Path, names: Sequence[str]) -> int:
    """Return 32 or 64 for small images and 224 for photographs, by the median short side of up to 64 files."""
    sample = names[:: max(1, len(names) // 64)]
    short = sorted(min(sides(root / name)) for name in sample)
    median = short[len(short) // 2]
    return 32 if median < 48 else 64 if median < 128 else 224


def path_id(name: str) -> int:
    """Name an image by its path below the root: an order of files, which a new file would shift, is no name."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


SOURCES: dict[str, Callable[[Data, int], LongTailedData]] = {
    "digits-lt": digits,
    "cifar10-lt": cifar(10),
    "cifar100-lt": cifar(100),
    "hub": hub,
    "camvid": scenes(camvid_names, test="test"),
    "ade20k": scenes(ade20k_names, test="val"),
    "masks": scenes(no_names, test="test"),
}
"""Sets that are loaded, by name."""

LISTINGS: dict[str, Callable[[Data], Listing]] = {
    "folder": _folder,
    "list": _list,
    **{name: _benchmark(name) for name in _LISTS},
}
"""Sets of image files that are listed first, by name."""
