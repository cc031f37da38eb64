"""Sets of the Hugging Face Hub by name, and local folders of Parquet files or images in its layouts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longtail.config import Data
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.images import ArrayImages, EncodedImages
from longtail.data.imbalance import long_tailed, permuted_by_class, remarks_on_tail, resolve_profile
from longtail.data.listing import SPLITS, validation_is_test
from longtail.data.listing.tables import IMAGE_COLUMNS, LABEL_COLUMNS
from longtail.data.size_policy import SAMPLE, SizePolicy, choose_size
from longtail.data.sources import Source
from longtail.data.sources.hf_rows import (
    DatasetRows,
    find_split_column,
    load_hf_dataset,
    number_labels,
    split_by_column,
)
from longtail.data.sources.hold_out import check_smallest_class, held_out_fractions, hold_out
from longtail.data.sources.unreadable import Unreadable, decode_readable, without
from longtail.errors import LongtailError

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", *IMAGE_COLUMNS)
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", *LABEL_COLUMNS)


@dataclass(frozen=True)
class _Part:
    """Rows of a table that make a split."""

    rows: DatasetRows
    positions: Tensor
    """(N,) int64."""
    labels: Tensor
    """(N,) int64 class indices."""

    def at(self, indices: Tensor) -> _Part:
        """Return the part at some of its N places."""
        return _Part(self.rows, self.positions[indices], self.labels[indices])


def load_hub(config: Data, seed: int) -> LongTailedData:
    """Load a set by ``config.name``, or from the folder ``config.root``.

    Raises:
        LongtailError: it cannot be downloaded or read, or lacks a column, a label or a training split.
    """
    if config.root is None and config.name is None:
        raise LongtailError("data.name is missing: which set of the Hub, or which folder with --data.root?")
    where = f"data.name '{config.name}'" if config.root is None else f"data.root '{config.root}'"
    remarks: list[str] = []
    parts, names = _read_parts(config, where, remarks)
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
        remarks.append(validation_is_test(where))
    test, val = held_out_fractions(parts, config, remarks)
    if test or val:
        train = parts["train"]
        held_out = hold_out(train.labels, names, test, val, seed, remarks)
        parts |= {split: train.at(positions) for split, positions in held_out.items()}
    if not len(parts["test"].labels):
        raise LongtailError(f"{where}: has no test split and no class of two images; expected one to test on")
    order = permuted_by_class(parts["train"].labels, len(names), seed)
    profile = resolve_profile(config.profile, balanced=False)
    kept = long_tailed(order, names, profile, config.imbalance, config.class_order, seed)
    parts["train"] = parts["train"].at(kept)
    remarks += remarks_on_tail(order, parts["train"].labels, names, profile, config.imbalance, config.class_order, seed)
    check_smallest_class(parts["train"].labels, names, f"in {where}", config.min_images)
    policy = choose_size(
        config,
        images=sum(len(part.positions) for part in parts.values()),
        short_sides=lambda: _short_sides(parts["train"], where),
    )
    unreadable = Unreadable(config, sum(len(part.positions) for part in parts.values()))
    sets = {name: _open(name, part, policy, where, unreadable) for name, part in parts.items()}
    unreadable.check(remarks)
    lost = torch.nonzero(torch.bincount(sets["train"].labels, minlength=len(names)) == 0).flatten().tolist()
    if lost:
        raise LongtailError(
            f"{where}: the class '{names[lost[0]]}' has no training image that can be read; {len(unreadable.found)} "
            f"images cannot be read, the first: {unreadable.found[0][1]}"
        )
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


def _read_parts(config: Data, where: str, remarks: list[str]) -> tuple[dict[str, _Part], list[str]]:
    """Return the splits that have labels, and the names of the classes."""
    name = config.name or "" if config.root is None else str(Path(config.root).resolve())
    loaded = load_hf_dataset(name, where)
    if "train" not in loaded:
        raise LongtailError(f"{where}: there is no split 'train', only {', '.join(loaded)}")
    unknown = [split for split in loaded if split not in SPLITS]
    if unknown:
        remarks.append(f"{where}: not used, since they are not train, val or test: {', '.join(unknown)}")
    loaded = {split: loaded[split] for split in SPLITS if split in loaded}
    split_column = find_split_column(loaded["train"], config.split_column, where)
    if len(loaded) > 1:
        if config.split_column is not None:
            raise LongtailError(
                f"data.split_column '{config.split_column}': {where} is divided into {', '.join(loaded)} already; "
                "leave it out"
            )
        if split_column is not None:
            remarks.append(f"{where}: column '{split_column}' is not used: the set is divided already")
    elif split_column is not None:
        loaded = split_by_column(loaded["train"], split_column, where)
        if "train" not in loaded:
            raise LongtailError(f"{where}: column '{split_column}' has no row of train, only of {', '.join(loaded)}")
    rows: dict[str, DatasetRows] = {}
    for split, table in loaded.items():
        split_rows = DatasetRows(
            table, _IMAGE_COLUMNS, _LABEL_COLUMNS, f"{where}, split {split}", config.image_column, config.label_column
        )
        if split != "train" and split_rows.unlabelled:
            remarks.append(f"split {split} has no labels, and is left out")
            continue
        rows[split] = split_rows
    remarks += rows["train"].remarks(split_column)
    labels, names = number_labels(rows, remarks)
    parts = {split: _Part(rows[split], torch.arange(len(labels[split])), labels[split]) for split in rows}
    return parts, names


def _short_sides(train: _Part, where: str) -> list[int]:
    """Return the shorter sides in pixels of the first training images."""
    positions = train.positions[:SAMPLE]
    images = EncodedImages(functools.partial(_encoded_image, train), len(positions), where, 8, numbers=positions)
    sides: list[int] = []
    failure: LongtailError | None = None
    for index in range(len(positions)):
        try:
            sides.append(min(images.open(index).size))
        except LongtailError as error:  # what is done about it is decided when all are opened
            failure = failure or error
    if not sides and failure is not None:
        raise failure
    return sides


def _encoded_image(part: _Part, index: int) -> bytes:
    return part.rows.encoded_images([int(part.positions[index])])[0]


def _open(split: str, part: _Part, policy: SizePolicy, where: str, unreadable: Unreadable) -> ImageSet:
    """Decode the images of a split where they fit into memory, otherwise when they are needed."""
    positions, labels = part.positions, part.labels
    fraction = 0.0 if unreadable.refuses else unreadable.config.max_unreadable_fraction
    read = functools.partial(_encoded_image, part)  # no closure: workers that are spawned get it pickled
    encoded = EncodedImages(read, len(positions), where, policy.stored, 3, labels, fraction, positions)
    if not policy.in_memory:
        return ImageSet(encoded, labels, positions)
    squares, reasons = decode_readable(encoded, torch.arange(len(positions)))
    unreadable.add({f"{split}, row {int(positions[index])}": reason for index, reason in reasons.items()})
    images = ArrayImages(squares.permute(0, 3, 1, 2))
    return ImageSet(images, without(labels, reasons), without(positions, reasons))


HUB = Source(load=load_hub, makes_tail=True)
