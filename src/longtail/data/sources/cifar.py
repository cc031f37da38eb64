"""CIFAR-10 and CIFAR-100, made long-tailed; the test set stays balanced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from longtail.config import Data
from longtail.data.dataset import CIFAR_MEAN, CIFAR_STD, ImageSet, LongTailedData
from longtail.data.images import ArrayImages
from longtail.data.imbalance import hold_out_balanced, long_tailed, permuted_by_class, resolve_profile
from longtail.data.row_store import user_cache
from longtail.data.sources import Source
from longtail.data.sources.hf_rows import DatasetRows, load_hf_dataset
from longtail.errors import LongtailError

_Split = tuple[Callable[[Tensor], Tensor], Tensor]
"""A function from positions to (N, 3, 32, 32) uint8 pixels, and all labels."""


def load_cifar_lt(config: Data, seed: int, classes: int) -> LongTailedData:
    """Load CIFAR from Parquet files below ``config.root``, or in torchvision's layout, downloaded without a root."""
    root = None if config.root is None else Path(config.root)
    if root is not None and any(root.rglob("*.parquet")):
        splits, names = _from_parquet(root, classes)
    else:
        splits, names = _from_torchvision(root, classes)
    (train_pixels, train_labels), (test_pixels, test_labels) = splits
    val, order = hold_out_balanced(permuted_by_class(train_labels, classes, seed), config.val_fraction)
    profile = resolve_profile(config.profile, balanced=True)
    train = long_tailed(order, names, profile, config.imbalance, config.class_order, seed)
    test = torch.arange(len(test_labels))
    return LongTailedData(
        train=ImageSet(ArrayImages(train_pixels(train)), train_labels[train], train),
        val=None if val is None else ImageSet(ArrayImages(train_pixels(val)), train_labels[val], val),
        test=ImageSet(ArrayImages(test_pixels(test)), test_labels, test),
        class_names=tuple(names),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        image_size=32,
        augment="cifar",
    )


def _from_parquet(root: Path, classes: int) -> tuple[list[_Split], list[str]]:
    """Read the Hub's layout from a local folder; only the images that are kept are decoded."""
    where = f"data.root '{root}'"
    tables = load_hf_dataset(str(root.resolve()), where)
    splits: list[_Split] = []
    names: list[str] = []
    for split in ("train", "test"):
        if split not in tables:
            raise LongtailError(f"{where}: there is no split '{split}', only {', '.join(tables)}")
        rows = DatasetRows(tables[split], ("img", "image"), ("fine_label", "label", "labels"), where)
        labels = rows.labels
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            raise LongtailError(f"{where}, split {split}: expected labels 0 to {classes - 1} in '{rows.label_column}'")
        names = rows.names or [str(index) for index in range(classes)]
        splits.append((functools.partial(rows.pixels, size=32), labels))
    return splits, names


def _from_torchvision(root: Path | None, classes: int) -> tuple[list[_Split], list[str]]:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if classes == 10 else CIFAR100
    folder = user_cache() if root is None else root
    splits: list[_Split] = []
    names: list[str] = []
    for train in (True, False):
        try:
            dataset = kind(str(folder), train=train, download=root is None)
        except RuntimeError:
            if root is None:
                raise LongtailError(
                    f"{folder}: holds a broken {kind.base_folder}; remove it and download it again, in one process"
                ) from None
            raise LongtailError(
                f"data.root '{root}': found neither parquet files nor an unbroken {kind.base_folder}; "
                "leave --data.root out to download the set"
            ) from None
        except OSError as error:
            raise LongtailError(
                f"CIFAR-{classes} could not be downloaded ({' '.join(str(error).split())}); "
                "give a local copy with --data.root FOLDER"
            ) from None
        pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
        splits.append((pixels.__getitem__, torch.tensor(dataset.targets, dtype=torch.int64)))
        names = list(dataset.classes)
    return splits, names


CIFAR10 = Source(load=functools.partial(load_cifar_lt, classes=10), balanced=True)
CIFAR100 = Source(load=functools.partial(load_cifar_lt, classes=100), balanced=True)
