"""What every source returns: images, labels, class names and ids by split. Legend: N images, C classes, S side."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from longtail.config import Data, Shots
from longtail.data.images import ArrayImages, Images
from longtail.data.samplers import ImageClasses
from longtail.errors import LongtailError

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INAT_MEAN, INAT_STD = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)


@dataclass(frozen=True)
class ImageSet:
    """One split."""

    images: Images
    labels: Tensor
    """(N,) int64 in [0, C)."""
    ids: Tensor
    """(N,) int64, unique per image and the same in every run."""
    classes: ImageClasses | None = None
    """The classes of each image, where it may have several or none, for samplers; :attr:`labels` if None."""

    def __len__(self) -> int:
        return len(self.labels)

    def keys(self) -> Tensor:
        """Return (N,) int64 hashes of each image's id and content, by which what is computed of it is found again."""
        keys = [
            hashlib.blake2b(self.images.version(index), key=image_id.to_bytes(8, "little", signed=True), digest_size=8)
            for index, image_id in enumerate(self.ids.tolist())
        ]
        return torch.tensor([int.from_bytes(key.digest(), "little", signed=True) for key in keys], dtype=torch.int64)


@dataclass(frozen=True)
class DataDetails:
    """What an inspection says of a set beyond its images and class counts."""

    rows: Sequence[tuple[str, str]] = ()
    """What is printed, each with its name."""
    class_columns: Sequence[str] = ()
    """Titles of :attr:`class_rows`."""
    class_rows: Sequence[Sequence[str]] = ()
    """(C,) what is printed of each class, its name first."""
    problems: Sequence[tuple[str, str]] = ()
    """Kind and description of each."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """All of it as plain values, by name."""


@dataclass(frozen=True)
class LongTailedData:
    """A long-tailed training set, with what is needed to train and to evaluate a model on it."""

    task: ClassVar[str] = "classification"
    """Name of the task in :data:`longtail.registry.TASKS` that learns from it."""
    counted: ClassVar[str] = "training images"
    """What :attr:`class_counts` counts."""
    group_names: ClassVar[tuple[str, ...]] = ("many", "medium", "few")
    """Names of the groups of classes that metrics are averaged over, from head to tail."""

    train: ImageSet
    val: ImageSet | None
    """Chooses the best epoch and calibrates, where there is one."""
    test: ImageSet
    """Evaluated once, after training."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Of each channel of the images in [0, 1]; its length is the number of channels."""
    std: tuple[float, ...]
    image_size: int
    """Side in pixels of the images that a network is given, S."""
    augment: str
    """Default augmentation of these images, a name in :data:`longtail.registry.TRANSFORMS`."""
    remarks: tuple[str, ...] = ()
    """What a user should know about the set before training on it."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """Path and reason of every image that could not be read and was left out."""

    def __post_init__(self) -> None:
        if self.val is not None and not len(self.val):
            remark = (
                "there is no validation image: too few in a class, or none that can be read; the last epoch is kept"
            )
            object.__setattr__(self, "val", None)
            object.__setattr__(self, "remarks", (*self.remarks, remark))
        if not len(self.test):
            raise LongtailError("there is no test image, or none that can be read; expected some to evaluate on")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the training set: ids, labels, class names and the signatures of some 64 images."""
        digest = hashlib.blake2b("\0".join(self.class_names).encode("utf-8", "surrogateescape"), digest_size=8)
        for tensor in (self.train.ids, self.train.labels):
            digest.update(tensor.numpy().tobytes())
        for index in range(0, len(self.train), max(1, len(self.train) // 64)):
            digest.update(self.train.images.signature(index))
        return digest.hexdigest()

    @functools.cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of the training set, and of the ids and labels of the validation (None without) and test images.

        By these a run that is resumed, or its metrics, are recognised as those of other images.
        """
        val = None if self.val is None else self.hash_of(self.val)
        return {"images": self.fingerprint, "val_images": val, "test_images": self.hash_of(self.test)}

    def hash_of(self, images: ImageSet) -> str:
        """Return the hash of the ids and labels of a split that is not trained on."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in (images.ids, images.labels):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def all_unreadable(self) -> dict[str, str]:
        """Return the reason for every image that could not be read so far, by path, or by split and row of a table.

        Beside :attr:`unreadable` these are images that were found when they were to be decoded, and were replaced.
        """
        found = dict(self.unreadable)
        for split, images in (("train", self.train), ("val", self.val), ("test", self.test)):
            for index, reason in ({} if images is None else images.images.unreadable).items():
                assert images is not None
                names = getattr(images.images, "names", None)
                found[f"{split}, row {int(images.ids[index])}" if names is None else names[index]] = reason
        return found

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class, (C,)."""
        counts: list[int] = torch.bincount(self.train.labels, minlength=len(self.class_names)).tolist()
        return counts

    def groups(self, shots: Shots) -> list[str]:
        """Return the group of each class, C of :attr:`group_names`.

        Args:
            shots: thresholds between many, medium and few training images.
        """
        return shots.groups(self.class_counts)

    def details(self, config: Data) -> DataDetails:  # noqa: ARG002
        """Return what an inspection says of it beyond its images and class counts.

        Args:
            config: what it was loaded by.
        """
        return DataDetails()


Arrays = tuple[np.ndarray[Any, Any] | Tensor, np.ndarray[Any, Any] | Tensor]
"""Images (N, S, S), (N, S, S, channels) or (N, channels, S, S) of uint8, and labels (N,) in [0, C)."""


def from_arrays(
    train: Arrays, test: Arrays, val: Arrays | None = None, class_names: Sequence[str] | None = None
) -> LongTailedData:
    """Return images that are in memory as a data set, ready for :func:`longtail.training.trainer.fit`.

    Args:
        train: training images and labels.
        test: test images and labels, evaluated once.
        val: validation images and labels.
        class_names: C names; the labels' numbers if not given.

    Raises:
        LongtailError: shapes, types or labels are not as in :data:`Arrays`; the message names the split.
    """
    splits = {"train": train, "test": test} | ({} if val is None else {"val": val})
    pixels: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    classes = 0
    for name, (images, labels) in splits.items():
        pixels[name], targets[name] = _check_pixels(images, name), _check_labels(labels, len(images), name)
        classes = max(classes, int(targets[name].max()) + 1)
    names = tuple(str(index) for index in range(classes)) if class_names is None else tuple(map(str, class_names))
    if len(names) < classes:
        raise LongtailError(f"class_names: expected at least {classes}, one for each label, got {len(names)}")
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in pixels.items()}
    if len(set(shapes.values())) > 1:
        raise LongtailError(f"images: expected one shape in every split, got {shapes}")
    missing = sorted(set(range(len(names))) - set(targets["train"].tolist()))
    if missing:
        raise LongtailError(f"train labels: class '{names[missing[0]]}' has no training image")
    channels, size = pixels["train"].shape[1:3]
    sets = {
        name: ImageSet(ArrayImages(pixels[name]), targets[name], torch.arange(len(targets[name]))) for name in splits
    }
    values = pixels["train"].float().div(255).transpose(0, 1).flatten(1)
    return LongTailedData(
        train=sets["train"],
        val=sets.get("val"),
        test=sets["test"],
        class_names=names,
        mean=tuple(values.mean(dim=1).tolist()),
        std=tuple(values.std(dim=1).clamp(min=1e-3).tolist()),
        image_size=int(size),
        augment="cifar" if channels == 3 and size >= 16 else "digits",
    )


def _check_pixels(images: np.ndarray[Any, Any] | Tensor, split: str) -> Tensor:
    """Return images as (N, channels, S, S) uint8."""
    tensor = given = _as_tensor(images, f"{split} images")
    expected = "(N, S, S), (N, S, S, channels) or (N, channels, S, S) of uint8, with 1 or 3 channels"
    if tensor.ndim == 3:
        tensor = tensor[:, None]
    elif tensor.ndim == 4 and tensor.shape[3] in {1, 3} and tensor.shape[1] not in {1, 3}:
        tensor = tensor.permute(0, 3, 1, 2)
    square = tensor.ndim == 4 and tensor.shape[2] == tensor.shape[3]
    if tensor.dtype != torch.uint8 or not square or tensor.shape[1] not in {1, 3} or len(tensor) == 0:
        raise LongtailError(f"{split} images: expected {expected}, got {tuple(given.shape)} of {given.dtype}")
    return tensor.contiguous()


def _check_labels(labels: np.ndarray[Any, Any] | Tensor, images: int, split: str) -> Tensor:
    """Return labels as (images,) int64."""
    tensor = _as_tensor(labels, f"{split} labels", "; numpy.unique(names, return_inverse=True)[1] numbers names")
    integers = not tensor.is_floating_point() and tensor.dtype != torch.bool
    if tensor.shape != (images,) or not integers or (images and int(tensor.min()) < 0):
        raise LongtailError(
            f"{split} labels: expected {images} integers of at least 0, got {tuple(tensor.shape)} of {tensor.dtype}"
        )
    return tensor.long()


def _as_tensor(values: np.ndarray[Any, Any] | Tensor, name: str, advice: str = "") -> Tensor:
    """Return a tensor on the CPU, a copy of an array that torch cannot share: a reversed or a read-only one."""
    if isinstance(values, Tensor):
        return values.cpu()
    try:
        array = np.ascontiguousarray(values)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError):
        kind = getattr(values, "dtype", type(values).__name__)
        raise LongtailError(f"{name}: expected an array of numbers, got {kind}{advice}") from None
