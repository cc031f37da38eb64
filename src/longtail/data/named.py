"""Sets that are loaded rather than listed: scikit-learn's digits, CIFAR, and what the library datasets can read."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longtail.config import Data
from longtail.data.dataset import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD, ImageSet, LongTailedData
from longtail.data.images import ArrayImages, EncodedImages, Images, to_square
from longtail.data.imbalance import long_tailed, permuted_by_class, stratified
from longtail.errors import LongtailError

BALANCED = frozenset({"digits-lt", "cifar10-lt", "cifar100-lt"})
"""Sets that are balanced by nature, whose tail is made; the others keep their own unless a profile is asked for."""

DIGITS_MEAN, DIGITS_STD = (0.305,), (0.376,)


def digits(config: Data, seed: int) -> LongTailedData:
    """scikit-learn's 8 × 8 digits: real, and in the package, so nothing is downloaded."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pixels = torch.from_numpy(np.round(loaded.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(loaded.target.astype(np.int64))
    names = tuple(map(str, range(10)))
    order = permuted_by_class(labels, 10, seed)
    held_out = config.test_per_class
    least = min(len(positions) for positions in order)
    if held_out >= least:
        raise LongtailError(f"data.test_per_class {held_out}: expected less than {least}, the images of a digit")
    val, rest = _held_out([positions[held_out:] for positions in order], config.val_fraction)
    train = long_tailed(rest, names, _profile(config), config.imbalance, config.class_order, seed)
    test = torch.cat([positions[:held_out] for positions in order])
    return LongTailedData(
        train=ImageSet(ArrayImages(pixels[train]), labels[train], train),
        val=None if val is None else ImageSet(ArrayImages(pixels[val]), labels[val], val),
        test=ImageSet(ArrayImages(pixels[test]), labels[test], test),
        class_names=names,
        mean=DIGITS_MEAN,
        std=DIGITS_STD,
        image_size=8,
        augment="digits",
    )


def _held_out(order: list[Tensor], share: float) -> tuple[Tensor | None, list[Tensor]]:
    """Return validation images, as many of each class, and the rest, of which the tail is made."""
    if share == 0:
        return None, order
    count = max(1, round(share * min(len(positions) for positions in order)))
    return torch.cat([positions[:count] for positions in order]), [positions[count:] for positions in order]


def _profile(config: Data) -> str:
    """Return the profile of a set that is balanced by nature."""
    return "exponential" if config.profile == "auto" else config.profile


def cifar(classes: int) -> Callable[[Data, int], LongTailedData]:
    """CIFAR made long-tailed: the head is class 0, the test set stays balanced."""

    def load(config: Data, seed: int) -> LongTailedData:
        root = None if config.root is None else Path(config.root)
        if root is not None and any(root.rglob("*.parquet")):
            sets, names = _cifar_from_parquet(root, classes)
        else:
            sets, names = _cifar_from_torchvision(root, classes)
        (train_pixels, train_labels), (test_pixels, test_labels) = sets
        val, order = _held_out(permuted_by_class(train_labels, classes, seed), config.val_fraction)
        kept = long_tailed(order, names, _profile(config), config.imbalance, config.class_order, seed)
        everything = torch.arange(len(test_labels))
        return LongTailedData(
            train=ImageSet(ArrayImages(train_pixels(kept)), train_labels[kept], kept),
            val=None if val is None else ImageSet(ArrayImages(train_pixels(val)), train_labels[val], val),
            test=ImageSet(ArrayImages(test_pixels(everything)), test_labels, everything),
            class_names=tuple(names),
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
            image_size=32,
            augment="cifar",
        )

    return load


_Split = tuple[Callable[[Tensor], Tensor], Tensor]
"""A function from positions to (N, 3, S, S) uint8 pixels, and all labels."""


def _cifar_from_parquet(root: Path, classes: int) -> tuple[list[_Split], list[str]]:
    """Read the Hub's layout from a local folder; only the images that are kept are decoded."""
    splits = _load_dataset(str(root.resolve()), f"data.root '{root}'")
    sets: list[_Split] = []
    names: list[str] = []
    for split in ("train", "test"):
        if split not in splits:
            raise LongtailError(f"data.root '{root}': there is no split '{split}', only {', '.join(splits)}")
        rows = _Rows(splits[split], ("img", "image"), ("fine_label", "label", "labels"), f"data.root '{root}'")
        labels = rows.labels
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            raise LongtailError(
                f"data.root '{root}', split {split}: expected labels 0 to {classes - 1} in '{rows.label_column}'"
            )
        names = rows.names or [str(index) for index in range(classes)]
        sets.append((rows.pixels, labels))
    return sets, names


class _Rows:
    """A split of the library datasets: encoded images and labels, columns by their usual names."""

    def __init__(
        self, split: Any, images: Sequence[str], labels: Sequence[str], where: str, known: list[str] | None = None
    ) -> None:
        import datasets

        self.where = where
        image = _column(split.column_names, images, where)
        self.label_column = _column(split.column_names, labels, where)
        values = split.with_format("arrow")[:][self.label_column].to_pylist()
        bad = next((value for value in values if not isinstance(value, int | str)), 0)
        if bad != 0:
            raise LongtailError(f"{where}: column '{self.label_column}' holds {bad!r}, expected integers or names")
        feature = split.features[self.label_column]
        self.names: list[str] | None = list(getattr(feature, "names", None) or []) or None
        if values and isinstance(values[0], str):
            self.names = sorted(set(values)) if known is None else known
            index = {name: position for position, name in enumerate(self.names)}
            unseen = next((value for value in values if value not in index), None)
            if unseen is not None:
                raise LongtailError(f"{where}: the class '{unseen}' is not among the training classes")
            values = [index[value] for value in values]
        self.labels = torch.tensor(values, dtype=torch.int64)
        self._encoded = split.cast_column(image, datasets.Image(decode=False)).with_format("arrow")
        self._image = image

    def cells(self, positions: Sequence[int]) -> list[bytes]:
        """Return the encoded images of some rows."""
        found = self._encoded[list(positions)][self._image].to_pylist()
        return [cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes() for cell in found]

    def pixels(self, positions: Tensor) -> Tensor:
        """Return some rows as (N, 3, 32, 32) uint8."""
        encoded = self.cells(positions.tolist())
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return torch.stack(list(pool.map(lambda cell: to_square(Image.open(io.BytesIO(cell)), 32), encoded)))


def _load_dataset(name: str, where: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError:
        raise LongtailError(
            f"{where}: Parquet files and the Hub's sets need the extra hf: pip install 'longtail[hf]'"
        ) from None
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the library raises its own, pyarrow's, the network's and plain ones
        reason = " ".join(str(error).split())[:300]
        if not Path(name).exists():
            raise LongtailError(
                f"{where}: could not be had from the Hub ({reason}); check the name and the network, or give a local "
                "copy with --data.root FOLDER"
            ) from None
        raise LongtailError(f"{where}: cannot be read as a set of images: {reason}") from None
    return dict(loaded)


def _column(there: Sequence[str], wanted: Sequence[str], where: str) -> str:
    for name in wanted:
        if name in there:
            return name
    raise LongtailError(f"{where}: expected a column {' or '.join(wanted)}, there are {', '.join(there)}")


def hub(config: Data, seed: int) -> LongTailedData:
    """A set of the Hugging Face Hub by name, or a local folder of Parquet files or images in its layouts."""
    if config.root is None and config.name is None:
        raise LongtailError("data.name is missing: which set of the Hub, or which folder with --data.root?")
    where = f"data.name '{config.name}'" if config.root is None else f"data.root '{config.root}'"
    loaded = _load_dataset(config.name or "" if config.root is None else str(Path(config.root).resolve()), where)
    images = (config.image_column,) if config.image_column else ("image", "img", "jpg", "png")
    labels = (config.label_column,) if config.label_column else ("label", "labels", "fine_label", "class")
    if "train" not in loaded:
        raise LongtailError(f"{where}: there is no split 'train', only {', '.join(loaded)}")
    rows: dict[str, _Rows] = {}
    remarks = []
    for split in sorted(loaded, key=lambda name: name != "train"):
        known = rows["train"].names if "train" in rows else None
        found = _Rows(loaded[split], images, labels, f"{where}, split {split}", known)
        if split != "train" and len(found.labels) and bool((found.labels == -1).all()):
            remarks.append(f"split {split} has no labels, and is left out")
            continue
        classes = len(rows["train"].names or []) if rows else len(found.names or [])
        classes = classes or int(rows.get("train", found).labels.max()) + 1
        if len(found.labels) and (int(found.labels.min()) < 0 or int(found.labels.max()) >= classes):
            raise LongtailError(
                f"{where}, split {split}: expected labels 0 to {classes - 1} in '{found.label_column}', got "
                f"{int(found.labels.min())} to {int(found.labels.max())}"
            )
        rows[split] = found
    parts = {"train": rows.get("train")} | {"val": rows.get("validation") or rows.get("val"), "test": rows.get("test")}
    if parts["test"] is None and parts["val"] is not None:
        parts["test"], parts["val"] = parts["val"], None
    train = rows["train"]
    names = train.names or [str(index) for index in range(int(train.labels.max()) + 1)]
    positions = {name: torch.arange(len(part.labels)) for name, part in parts.items() if part is not None}
    untested = config.test_fraction if parts["test"] is None else 0.0
    unvalidated = config.val_fraction if parts["val"] is None else 0.0
    if untested or unvalidated:
        assignment, _ = stratified(train.labels, len(names), unvalidated, untested, seed)
        for value, name in ((2, "test"), (1, "val"), (0, "train")):
            chosen = torch.nonzero(assignment == value).flatten()
            if len(chosen):
                parts[name], positions[name] = train, chosen
    profile = "natural" if config.profile == "auto" else config.profile
    order = permuted_by_class(train.labels[positions["train"]], len(names), seed)
    empty = next((names[index] for index, found in enumerate(order) if len(found) == 0), None)
    if empty is not None:
        raise LongtailError(f"{where}: the class '{empty}' has no training image")
    kept = long_tailed(order, names, profile, config.imbalance, config.class_order, seed)
    positions["train"] = positions["train"][kept]
    cells = train.cells(positions["train"][:64].tolist())
    sample = EncodedImages(cells.__getitem__, len(cells), where, 8)
    short = sorted(min(sample.open(index).size) for index in range(len(cells)))
    median = short[len(short) // 2]
    size = config.image_size or (32 if median < 48 else 64 if median < 128 else 224)
    stored = size if size <= 64 else round(size * 256 / 224)
    whole = config.augment.startswith("imagenet") and size > 64  # these views start from the whole image
    in_memory = not whole and sum(map(len, positions.values())) * stored**2 * 3 <= config.memory_gib * 2**30

    def opened(name: str) -> ImageSet | None:
        part = parts[name]
        if part is None:
            return None
        chosen = positions[name]
        share = config.broken_share if name == "train" and not in_memory else 0.0
        held: Images = EncodedImages(
            lambda index: part.cells([int(chosen[index])])[0], len(chosen), where, stored, 3, part.labels[chosen], share
        )
        if in_memory:
            held = ArrayImages(held.take(torch.arange(len(chosen))))
        return ImageSet(held, part.labels[chosen], chosen)

    train_set, test_set = opened("train"), opened("test")
    assert train_set is not None
    assert test_set is not None
    return LongTailedData(
        train=train_set,
        val=opened("val"),
        test=test_set,
        class_names=tuple(names),
        mean=CIFAR_MEAN if size <= 64 else IMAGENET_MEAN,
        std=CIFAR_STD if size <= 64 else IMAGENET_STD,
        image_size=size,
        augment="cifar" if size <= 64 else "photo" if in_memory else "imagenet",
        remarks=tuple(remarks),
    )


def cache_folder() -> Path:
    """Return where downloads are kept: ``$LONGTAIL_CACHE``, or ``longtail`` in the user's cache."""
    given = os.environ.get("LONGTAIL_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "longtail"


def _cifar_from_torchvision(root: Path | None, classes: int) -> tuple[list[_Split], list[str]]:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if classes == 10 else CIFAR100
    folder = root if root is not None else cache_folder()
    sets: list[_Split] = []
    names: list[str] = []
    for train in (True, False):
        try:
            loaded = kind(str(folder), train=train, download=root is None)
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
        array = torch.from_numpy(loaded.data).permute(0, 3, 1, 2)
        sets.append((array.__getitem__, torch.tensor(loaded.targets, dtype=torch.int64)))
        names = list(loaded.classes)
    return sets, names
