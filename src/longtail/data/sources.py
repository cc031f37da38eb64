"""Where images come from: named sets and folders, all giving the same object.

One function adds a set: write it, and put it into :data:`SOURCES`.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longtail.config import Data
from longtail.data.images import SUFFIXES, ArrayImages, FileImages, Images, decode_files, sides, to_square
from longtail.data.imbalance import exponential_counts, permuted_by_class, subsample
from longtail.errors import LongtailError, nearest

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS_MEAN, DIGITS_STD = (0.305,), (0.376,)


@dataclass(frozen=True)
class ImageSet:
    """One split."""

    images: Images
    labels: Tensor
    """(N,) int64."""
    ids: Tensor
    """(N,) int64, one an image, the same in every run."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class LongTailedData:
    """A long-tailed training set with what is needed to judge a model on it."""

    train: ImageSet
    val: ImageSet | None
    """Picks the epoch where there is one."""
    test: ImageSet
    """Read once, at the end."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Of the images in [0, 1], a channel; its length is the number of channels."""
    std: tuple[float, ...]
    image_size: int
    """Side in pixels of what a network sees."""
    augment: str
    """The augmentation that suits these images."""

    @property
    def fingerprint(self) -> str:
        """A name of the training set: which images, under which labels and class names."""
        digest = hashlib.blake2b("\0".join(self.class_names).encode("utf-8", "surrogateescape"), digest_size=8)
        for tensor in (self.train.ids, self.train.labels):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @property
    def class_counts(self) -> list[int]:
        """Training images a class."""
        counts: list[int] = torch.bincount(self.train.labels, minlength=len(self.class_names)).tolist()
        return counts


def load_data(config: Data, seed: int) -> LongTailedData:
    """Load a set.

    Args:
        config: which set, from where, and its tail.
        seed: of the split and the tail, where ``config.seed`` gives none.

    Raises:
        LongtailError: the set is unknown, cannot be had, or has something wrong in it.
    """
    if config.source not in SOURCES:
        raise LongtailError(f"data.source '{config.source}' is not known{nearest(config.source, SOURCES)}")
    if config.root is not None and not Path(config.root).is_dir():
        raise LongtailError(f"data.root '{config.root}': there is no such folder")
    return SOURCES[config.source](config, seed if config.seed is None else config.seed)


def _digits_lt(config: Data, seed: int) -> LongTailedData:
    """scikit-learn's 8 × 8 digits: real, and in the package, so nothing is downloaded."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    # a shuffled class order makes another digit the head, and with it another problem, a seed
    names = torch.arange(10)
    if config.shuffle_classes:
        names = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        labels = torch.argsort(names)[labels]
    order = permuted_by_class(labels, 10, seed)
    held_out = config.test_per_class
    least = min(len(positions) for positions in order)
    if held_out >= least:
        raise LongtailError(f"data.test_per_class {held_out}: expected less than {least}, the images of a digit")
    counts = exponential_counts(least - held_out, 10, config.imbalance)
    _check_counts(counts, config)
    train = subsample([positions[held_out:] for positions in order], counts)
    test = torch.cat([positions[:held_out] for positions in order])
    return LongTailedData(
        train=ImageSet(ArrayImages(pixels[train]), labels[train], train),
        val=None,
        test=ImageSet(ArrayImages(pixels[test]), labels[test], test),
        class_names=tuple(str(name) for name in names.tolist()),
        mean=DIGITS_MEAN,
        std=DIGITS_STD,
        image_size=8,
        augment="digits",
    )


def _cifar(classes: int) -> Callable[[Data, int], LongTailedData]:
    """CIFAR made long-tailed: the head is class 0, the test set stays balanced."""

    def load(config: Data, seed: int) -> LongTailedData:
        root = None if config.root is None else Path(config.root)
        if root is not None and any(root.rglob("*.parquet")):
            sets, names = _cifar_from_parquet(root, classes)
        else:
            sets, names = _cifar_from_torchvision(root, classes)
        (train_pixels, train_labels), (test_pixels, test_labels) = sets
        order = permuted_by_class(train_labels, classes, seed)
        counts = exponential_counts(min(len(positions) for positions in order), classes, config.imbalance)
        _check_counts(counts, config)
        kept = subsample(order, counts)
        return LongTailedData(
            train=ImageSet(ArrayImages(train_pixels(kept)), train_labels[kept], kept),
            val=None,
            test=ImageSet(
                ArrayImages(test_pixels(torch.arange(len(test_labels)))), test_labels, torch.arange(len(test_labels))
            ),
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
    try:
        import datasets
    except ImportError:
        raise LongtailError(
            f"data.root '{root}' holds parquet files, which need the extra hf: pip install 'longtail[hf]'"
        ) from None
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(str(root.resolve()))
    except Exception as error:  # the library raises its own, pyarrow's and plain ones
        raise LongtailError(f"data.root '{root}': cannot be read as parquet: {' '.join(str(error).split())}") from None
    sets: list[_Split] = []
    names: list[str] = []
    for split in ("train", "test"):
        if split not in loaded:
            raise LongtailError(f"data.root '{root}': there is no split '{split}', only {', '.join(loaded)}")
        rows = loaded[split]
        image = _column(rows.column_names, ("img", "image"), root)
        label = _column(rows.column_names, ("fine_label", "label", "labels"), root)
        labels = torch.tensor(rows.with_format("arrow")[:][label].to_pylist(), dtype=torch.int64)
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
            raise LongtailError(f"data.root '{root}', split {split}: expected labels 0 to {classes - 1} in '{label}'")
        feature = rows.features[label]
        names = list(getattr(feature, "names", None) or [str(index) for index in range(classes)])
        encoded = rows.cast_column(image, datasets.Image(decode=False)).with_format("arrow")
        sets.append((_parquet_pixels(encoded, image), labels))
    return sets, names


def _parquet_pixels(rows: Any, column: str) -> Callable[[Tensor], Tensor]:
    def pixels(positions: Tensor) -> Tensor:
        encoded = rows[positions.tolist()][column].to_pylist()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            decoded = pool.map(lambda cell: to_square(Image.open(io.BytesIO(cell["bytes"])), 32), encoded)
            return torch.stack(list(decoded))

    return pixels


def _column(there: Sequence[str], wanted: Sequence[str], root: Path) -> str:
    for name in wanted:
        if name in there:
            return name
    raise LongtailError(f"data.root '{root}': expected a column {' or '.join(wanted)}, there are {', '.join(there)}")


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


def _check_counts(counts: Sequence[int], config: Data) -> None:
    if min(counts) < 1:
        raise LongtailError(
            f"data.imbalance {config.imbalance:g} leaves the smallest class without an image; "
            f"with {counts[0]} in the largest it can be at most {counts[0]}"
        )


def _folder(config: Data, seed: int) -> LongTailedData:
    """One sub-folder a class; with train/ (and val/, test/) above them, or without, and a test split is held out."""
    if config.root is None:
        raise LongtailError("data.root is missing: which folder holds the images? (--data.root FOLDER)")
    root = Path(config.root)
    if (root / "train").is_dir():
        train = _class_files(root / "train")
        names = list(train)
        test_root = next(
            (root / name for name in ("test", "val", "valid", "validation") if (root / name).is_dir()), None
        )
        val_root = next((root / name for name in ("val", "valid", "validation") if (root / name).is_dir()), None)
        test = _split_files(test_root, names) if test_root else None
        # a folder with nothing but val/ beside train/ is judged on it, so it cannot pick the epoch too
        val = _split_files(val_root, names) if val_root and val_root != test_root else None
    else:
        train, test, val = _class_files(root), None, None
        names = list(train)
    if len(names) < 2:
        raise LongtailError(f"{root}: expected a sub-folder for each of at least two classes, found '{names[0]}' alone")
    held_out: dict[str, list[Path]] = test if test is not None else {}
    for position, (name, files) in enumerate(train.items()):
        least = config.min_images if test is not None else max(config.min_images, 2)
        if len(files) < least:
            reason = "" if test is not None else ", one to train on and one to test on"
            raise LongtailError(
                f"class '{name}' has {len(files)} image{'s' * (len(files) != 1)} in {files[0].parent}: "
                f"at least {least} are expected{reason}; add images or remove the folder"
            )
        if test is None:
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed * 1_000_003 + position))
            count = min(max(1, round(len(files) * config.test_fraction)), len(files) - 1)
            held_out[name] = [files[index] for index in sorted(order[:count].tolist())]
            train[name] = [files[index] for index in sorted(order[count:].tolist())]
    size = config.image_size or _natural_size([file for files in train.values() for file in files])
    # photographs are kept a little larger than they are used, as in evaluation at 256 and 224
    stored = size if size <= 64 else round(size * 256 / 224)

    def image_set(files_of: dict[str, list[Path]] | None) -> ImageSet | None:
        return None if files_of is None else _file_set(files_of, names, root, stored, config.memory_gib)

    train_set, test_set = image_set(train), image_set(held_out)
    assert train_set is not None
    assert test_set is not None
    return LongTailedData(
        train=train_set,
        val=image_set(val),
        test=test_set,
        class_names=tuple(names),
        mean=CIFAR_MEAN if size <= 64 else IMAGENET_MEAN,
        std=CIFAR_STD if size <= 64 else IMAGENET_STD,
        image_size=size,
        augment="cifar" if size <= 64 else "photo",
    )


def _class_files(root: Path) -> dict[str, list[Path]]:
    """Return the images of every class, classes and files in order of name."""
    classes = sorted(path for path in _entries(root) if path.is_dir())
    loose = [path for path in _entries(root) if path.is_file() and path.suffix.lower() in SUFFIXES]
    if not classes:
        found = f"{len(loose)} images without one" if loose else "no images"
        raise LongtailError(f"{root}: expected a sub-folder with images for each class, found {found}")
    files_of = {}
    for folder in classes:
        files = sorted(path for path in _entries(folder) if path.is_file())
        if not files:
            raise LongtailError(f"{folder}: the class '{folder.name}' has no images; add some or remove the folder")
        for file in files:
            if file.suffix.lower() not in SUFFIXES:
                raise LongtailError(f"{file}: is not an image by its name; remove it from the class '{folder.name}'")
        files_of[folder.name] = files
    return files_of


def _split_files(root: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    files_of = _class_files(root)
    unseen = sorted(set(files_of) - set(names))
    if unseen:
        raise LongtailError(
            f"{root / unseen[0]}: the class '{unseen[0]}' is not among the training classes{nearest(unseen[0], names)}"
        )
    return files_of


def _entries(folder: Path) -> Iterable[Path]:
    """Yield what is in a folder but hidden files and what desktops leave behind."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "Thumbs.db"]
    except OSError as error:
        raise LongtailError(f"{folder}: cannot be read: {error.strerror}") from None


def _natural_size(files: Sequence[Path]) -> int:
    """Return 32 or 64 for small images and 224 for photographs, by the median short side of up to 64 files."""
    sample = files[:: max(1, len(files) // 64)]
    short = sorted(min(sides(file)) for file in sample)
    median = short[len(short) // 2]
    return 32 if median < 48 else 64 if median < 128 else 224


def _file_set(files_of: dict[str, list[Path]], names: Sequence[str], root: Path, size: int, limit: float) -> ImageSet:
    files = [file for name in names for file in files_of.get(name, [])]
    labels = [index for index, name in enumerate(names) for _ in files_of.get(name, [])]
    ids = torch.tensor([_path_id(file.relative_to(root)) for file in files], dtype=torch.int64)
    images: Images = FileImages(files, size)
    if len(files) * size * size * 3 <= limit * 2**30:
        images = ArrayImages(decode_files(files, size))
    else:
        for file in files:  # found now, by name, rather than in the middle of an epoch
            sides(file)
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64), ids)


def _path_id(path: Path) -> int:
    """Name an image by its path below the root: an order of files, which a new file would shift, is no name."""
    digest = hashlib.blake2b(path.as_posix().encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


SOURCES: dict[str, Callable[[Data, int], LongTailedData]] = {
    "digits-lt": _digits_lt,
    "cifar10-lt": _cifar(10),
    "cifar100-lt": _cifar(100),
    "folder": _folder,
}
"""Every set by its name."""
