"""What every source gives: images, labels, class names and ids, split by split. Legend: N images, S side in pixels."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtail.data.images import ArrayImages, Images
from longtail.errors import LongtailError

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INAT_MEAN, INAT_STD = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)


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
    remarks: tuple[str, ...] = ()
    """What a user should know of the set before training on it."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """A name of the training set: which images, with a look at some of them, under which labels and class names."""
        digest = hashlib.blake2b("\0".join(self.class_names).encode("utf-8", "surrogateescape"), digest_size=8)
        for tensor in (self.train.ids, self.train.labels):
            digest.update(tensor.numpy().tobytes())
        for index in range(0, len(self.train), max(1, len(self.train) // 64)):
            digest.update(self.train.images.glance(index))
        return digest.hexdigest()

    @property
    def class_counts(self) -> list[int]:
        """Training images a class."""
        counts: list[int] = torch.bincount(self.train.labels, minlength=len(self.class_names)).tolist()
        return counts


Arrays = tuple[np.ndarray[Any, Any] | Tensor, np.ndarray[Any, Any] | Tensor]
"""Images (N, H, W), (N, H, W, channels) or (N, channels, H, W) of uint8, and labels (N,) in [0, C)."""


def from_arrays(
    train: Arrays, test: Arrays, val: Arrays | None = None, class_names: Sequence[str] | None = None
) -> LongTailedData:
    """Return images that are in memory already, ready for :func:`longtail.engine.fit.fit`.

    Args:
        train: images and labels to train on.
        test: images and labels to be judged on, once.
        val: images and labels that pick the epoch.
        class_names: C names; the labels' numbers if not given.

    Raises:
        LongtailError: shapes, types or labels are not as in :data:`Arrays`; the split is named.
    """
    splits = {"train": train, "test": test} | ({} if val is None else {"val": val})
    pixels: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    classes = 0
    for name, (images, labels) in splits.items():
        pixels[name], targets[name] = _pixels(images, name), _labels(labels, len(images), name)
        classes = max(classes, int(targets[name].max()) + 1)
    names = tuple(str(index) for index in range(classes)) if class_names is None else tuple(map(str, class_names))
    if len(names) < classes:
        raise LongtailError(f"class_names: expected at least {classes}, one a label, got {len(names)}")
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


def _pixels(images: np.ndarray[Any, Any] | Tensor, split: str) -> Tensor:
    tensor = torch.as_tensor(images)
    expected = "(N, S, S), (N, S, S, channels) or (N, channels, S, S) of uint8, with 1 or 3 channels"
    if tensor.ndim == 3:
        tensor = tensor[:, None]
    elif tensor.ndim == 4 and tensor.shape[3] in {1, 3} and tensor.shape[1] not in {1, 3}:
        tensor = tensor.permute(0, 3, 1, 2)
    square = tensor.ndim == 4 and tensor.shape[2] == tensor.shape[3]
    if tensor.dtype != torch.uint8 or not square or tensor.shape[1] not in {1, 3} or len(tensor) == 0:
        got = f"{tuple(torch.as_tensor(images).shape)} of {torch.as_tensor(images).dtype}"
        raise LongtailError(f"{split} images: expected {expected}, got {got}")
    return tensor.contiguous()


def _labels(labels: np.ndarray[Any, Any] | Tensor, images: int, split: str) -> Tensor:
    tensor = torch.as_tensor(labels)
    whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
    if tensor.shape != (images,) or not whole or (images and int(tensor.min()) < 0):
        raise LongtailError(
            f"{split} labels: expected {images} integers of at least 0, got {tuple(tensor.shape)} of {tensor.dtype}"
        )
    return tensor.long()
