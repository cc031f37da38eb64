"""ImageNet-LT, Places-LT and iNaturalist 2018: lists, published apart, over the images of another set.

The lists lie in the folder of the images, or are named by ``data.train``, ``data.val`` and ``data.test``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longtail.config import Data
from longtail.data.dataset import INAT_MEAN, INAT_STD
from longtail.data.listing import Entries, Listing, read_splits
from longtail.data.sources import Source
from longtail.errors import LongtailError


@dataclass(frozen=True)
class _Benchmark:
    name: str
    lists: dict[str, tuple[str, ...]]
    """Names of the lists by split, without suffix; several where several are in circulation."""
    classes: int
    largest: int
    """Training images of the largest class."""
    smallest: int
    images: dict[str, int]
    """By split."""
    path_styles: tuple[Callable[[str], str], ...] = ()
    """From the paths in the lists to the ways in which the images are unpacked."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, config: Data) -> Listing:
        """Read the lists."""
        if config.root is None:
            raise LongtailError(
                f"data.root is missing: which folder holds the images of {self.name}? (--data.root FOLDER)"
            )
        root = Path(config.root)
        listing = read_splits({split: self._list(split, config, root) for split in self.lists}, root)
        if self.path_styles:
            _use_existing_paths(listing, self.path_styles)
        listing.remarks += self._differences(listing)
        listing.mean, listing.std = self.mean, self.std
        return listing

    def _list(self, split: str, config: Data, root: Path) -> Path:
        configured: str | None = getattr(config, split)
        if configured is not None:
            return Path(configured)
        candidates = [root / f"{stem}{suffix}" for stem in self.lists[split] for suffix in (".txt", ".json")]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise LongtailError(
                f"{self.name}: found no list {candidates[0].name} in {root}; put it there or name it with "
                f"--data.{split} FILE"
            )
        return path

    def _differences(self, listing: Listing) -> list[str]:
        """Return a remark if the numbers of classes and images are not the published ones."""
        counts = torch.bincount(listing.splits["train"].labels)
        published = {"classes": self.classes, "in the largest": self.largest, "in the smallest": self.smallest}
        actual = {
            "classes": len(listing.class_names),
            "in the largest": int(counts.max()),
            "in the smallest": int(counts.min()),
        }
        for split, images in self.images.items():
            if split in listing.splits:
                actual[split], published[split] = len(listing.splits[split]), images
        differences = [
            f"{what} {actual[what]:,}, published {published[what]:,}"
            for what in actual
            if actual[what] != published[what]
        ]
        return [f"not {self.name} as it was published: {'; '.join(differences)}"] if differences else []


def _use_existing_paths(listing: Listing, styles: Sequence[Callable[[str], str]]) -> None:
    """Rewrite the paths of a listing in the first style in which any of some 20 files of each split exists."""
    sample = {split: entries.names[:20] for split, entries in listing.splits.items()}
    for style in styles:
        exists = [(listing.root / style(name)).exists() for names in sample.values() for name in names]
        if any(exists):
            for split, entries in listing.splits.items():
                listing.splits[split] = Entries([style(name) for name in entries.names], entries.labels)
            break


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


# numbers of images from Liu et al. (CVPR 2019) and Van Horn et al. (CVPR 2018)
IMAGENET_LT = Source(
    listing=_Benchmark(
        name="imagenet-lt",
        lists={"train": ("ImageNet_LT_train",), "val": ("ImageNet_LT_val",), "test": ("ImageNet_LT_test",)},
        classes=1000,
        largest=1280,
        smallest=5,
        images={"train": 115_846, "val": 20_000, "test": 50_000},
    )
)
PLACES_LT = Source(
    listing=_Benchmark(
        name="places-lt",
        lists={"train": ("Places_LT_train",), "val": ("Places_LT_val",), "test": ("Places_LT_test",)},
        classes=365,
        largest=4980,
        smallest=5,
        images={"train": 62_500, "val": 7_300, "test": 36_500},
        path_styles=(str, _places_short, _places_long),
    )
)
INAT2018 = Source(
    listing=_Benchmark(
        name="inat2018",
        # its validation images are what is tested on in the literature
        lists={"train": ("iNaturalist18_train", "train2018"), "test": ("iNaturalist18_val", "val2018")},
        classes=8142,
        largest=1000,
        smallest=2,
        images={"train": 437_513, "test": 24_426},
        mean=INAT_MEAN,
        std=INAT_STD,
    )
)
