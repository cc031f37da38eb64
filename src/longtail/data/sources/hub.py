"""Sets of the Hugging Face Hub by name, and local folders of Parquet files or images in its layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longtail.config import Data
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.images import ArrayImages, EncodedImages
from longtail.data.imbalance import long_tailed, permuted_by_class, resolve_profile, stratified_split
from longtail.data.listing import split_of
from longtail.data.size_policy import SAMPLE, SizePolicy, choose_size
from longtail.data.sources import Source
from longtail.data.sources.hf_rows import DatasetRows, load_hf_dataset
from longtail.data.sources.unreadable import Unreadable, decode_readable, without
from longtail.errors import LongtailError

_IMAGE_COLUMNS = ("image", "img", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


@dataclass(frozen=True)
class _Part:
    """Rows of a table that make a split."""

    rows: DatasetRows
    positions: Tensor
    """(N,) int64."""

    @property
    def labels(self) -> Tensor:
        return self.rows.labels[self.positions]


def load_hub(config: Data, seed: int) -> LongTailedData:
    """Load a set by ``config.name``, or from the folder ``config.root``.

    Raises:
        LongtailError: it cannot be downloaded or read, lacks a column or a training split, or its labels have gaps.
    """
    if config.root is None and config.name is None:
        raise LongtailError("data.name is missing: which set of the Hub, or which folder with --data.root?")
    where = f"data.name '{config.name}'" if config.root is None else f"data.root '{config.root}'"
    remarks: list[str] = []
    tables = _read_tables(config, where, remarks)
    train = tables["train"]
    names = train.names or [str(index) for index in range(int(train.labels.max()) + 1)]
    parts = _split(tables, len(names), config, seed)
    if "test" not in parts:
        raise LongtailError(f"{where}: has no test split and no class of two images; expected one to test on")
    order = permuted_by_class(parts["train"].labels, len(names), seed)
    empty = next((names[index] for index, positions in enumerate(order) if len(positions) == 0), None)
    if empty is not None:
        raise LongtailError(f"{where}: the class '{empty}' has no training image")
    profile = resolve_profile(config.profile, balanced=False)
    kept = long_tailed(order, names, profile, config.imbalance, config.class_order, seed)
    parts["train"] = _Part(train, parts["train"].positions[kept])
    policy = choose_size(
        config,
        images=sum(len(part.positions) for part in parts.values()),
        short_sides=lambda: _short_sides(parts["train"], where),
    )
    unreadable = Unreadable(config, sum(len(part.positions) for part in parts.values()))
    sets = {name: _open(part, policy, where, unreadable) for name, part in parts.items()}
    unreadable.check(remarks)
    lost = torch.nonzero(torch.bincount(sets["train"].labels, minlength=len(names)) == 0).flatten().tolist()
    if lost:
        raise LongtailError(f"{where}: the class '{names[lost[0]]}' has no training image that can be read")
    return LongTailedData(
        train=sets["train"],
        val=sets.get("val"),
        test=sets["test"],
        class_names=tuple(names),
        mean=policy.mean,
        std=policy.std,
        image_size=policy.size,
        augment=policy.augment,
        remarks=tuple(remarks),
        unreadable=tuple(unreadable.found),
    )


def _read_tables(config: Data, where: str, remarks: list[str]) -> dict[str, DatasetRows]:
    """Return the tables that have labels, by their names in the set, numbered as the training classes are."""
    name = config.name or "" if config.root is None else str(Path(config.root).resolve())
    loaded = load_hf_dataset(name, where)
    splits = {split_of(split) or split: loaded[split] for split in loaded}
    images = (config.image_column,) if config.image_column else _IMAGE_COLUMNS
    labels = (config.label_column,) if config.label_column else _LABEL_COLUMNS
    if "train" not in splits:
        raise LongtailError(f"{where}: there is no split 'train', only {', '.join(splits)}")
    tables: dict[str, DatasetRows] = {}
    for split in sorted(splits, key=lambda name: name != "train"):
        class_names = tables["train"].names if "train" in tables else None
        rows = DatasetRows(splits[split], images, labels, f"{where}, split {split}", class_names)
        if split != "train" and len(rows.labels) and bool((rows.labels == -1).all()):
            remarks.append(f"split {split} has no labels, and is left out")
            continue
        train = tables.get("train", rows)
        classes = len(train.names or []) or int(train.labels.max()) + 1
        if len(rows.labels) and (int(rows.labels.min()) < 0 or int(rows.labels.max()) >= classes):
            raise LongtailError(
                f"{where}, split {split}: expected labels 0 to {classes - 1} in '{rows.label_column}', got "
                f"{int(rows.labels.min())} to {int(rows.labels.max())}"
            )
        tables[split] = rows
    return tables


def _split(tables: dict[str, DatasetRows], classes: int, config: Data, seed: int) -> dict[str, _Part]:
    """Return train, test and, where there is one, val; what the set lacks is held out of its training images."""
    train = tables["train"]
    val, test = tables.get("val"), tables.get("test")
    if test is None and val is not None:
        test, val = val, None
    existing = {"train": train, "val": val, "test": test}
    parts = {name: _Part(rows, torch.arange(len(rows.labels))) for name, rows in existing.items() if rows is not None}
    test_fraction = config.test_fraction if test is None else 0.0
    val_fraction = config.val_fraction if val is None else 0.0
    if test_fraction or val_fraction:
        assignment, _ = stratified_split(train.labels, classes, val_fraction, test_fraction, seed)
        for number, name in ((2, "test"), (1, "val"), (0, "train")):
            positions = torch.nonzero(assignment == number).flatten()
            if len(positions):
                parts[name] = _Part(train, positions)
    return parts


def _short_sides(train: _Part, where: str) -> list[int]:
    """Return the shorter sides in pixels of the first training images."""
    encoded = train.rows.encoded_images(train.positions[:SAMPLE].tolist())
    images = EncodedImages(encoded.__getitem__, len(encoded), where, 8)
    return [min(images.open(index).size) for index in range(len(encoded))]


def _open(part: _Part, policy: SizePolicy, where: str, unreadable: Unreadable) -> ImageSet:
    """Decode the images of a split where they fit into memory, otherwise when they are needed."""
    rows, positions, labels = part.rows, part.positions, part.labels

    def read_row(index: int) -> bytes:
        return rows.encoded_images([int(positions[index])])[0]

    fraction = 0.0 if unreadable.refuses else unreadable.config.max_unreadable_fraction
    encoded = EncodedImages(read_row, len(positions), where, policy.stored, 3, labels, fraction)
    if not policy.in_memory:
        return ImageSet(encoded, labels, positions)
    squares, reasons = decode_readable(encoded, torch.arange(len(positions)))
    unreadable.add({f"row {int(positions[index])}": reason for index, reason in reasons.items()})
    images = ArrayImages(squares.permute(0, 3, 1, 2))
    return ImageSet(images, without(labels, reasons), without(positions, reasons))


HUB = Source(load=load_hub)
