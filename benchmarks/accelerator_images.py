"""The images of ``accelerator.py`` in one file: CIFAR-10 or CIFAR-100, made long-tailed, as lossless WebP."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longtail.config import Data
from longtail.data.dataset import CIFAR_MEAN, CIFAR_STD, ImageSet, LongTailedData
from longtail.data.images import ArrayImages
from longtail.data.imbalance import hold_out_balanced, long_tailed, resolve_profile
from longtail.data.sources import Source, load_data
from longtail.errors import LongtailError
from longtail.registry import SOURCES

CLASSES = {"cifar100": 100, "cifar10": 10}


def prepare(name: str, folder: str, imbalances: Sequence[float], pack: Path) -> str:
    """Write the training images that the smallest imbalance factor keeps, and all test images; return what is there.

    Args:
        name: cifar100 or cifar10.
        folder: of the set.
        imbalances: factors that can be trained with the pack.
        pack: the file.
    """
    factors = sorted(imbalances, reverse=True)
    sets = [load_data(Data(source=f"{name}-lt", root=folder, imbalance=factor, seed=0), 0) for factor in factors]
    largest = sets[-1]
    # the sets are nested: the images of larger factors first, so that a prefix of every class is the set
    position = {int(index): row for row, index in enumerate(largest.train.ids)}
    kept: dict[int, None] = {}
    for each in sets:
        kept |= dict.fromkeys(each.train.ids.tolist())
    rows = torch.tensor([position[index] for index in kept])
    pixels = torch.cat([largest.train.images.take(rows), largest.test.images.take(torch.arange(len(largest.test)))])
    with ThreadPoolExecutor(2) as pool:
        encoded = list(pool.map(encode, pixels.permute(0, 2, 3, 1).numpy()))
    labels = torch.cat([largest.train.labels[rows], largest.test.labels])
    write_pack(pack, name, encoded, labels.numpy(), list(kept), largest.class_names, factors)
    size = pack.stat().st_size / 2**20
    return f"{pack}: {len(kept):,} training and {len(largest.test):,} test images, {size:.1f} MiB"


def write_pack(
    pack: Path,
    name: str,
    encoded: Sequence[bytes],
    labels: np.ndarray[Any, Any],
    ids: Sequence[int],
    class_names: Sequence[str],
    imbalances: Sequence[float],
) -> None:
    """Write encoded images, training before test ones, with the labels of all and the ids of the training images."""
    np.savez(
        pack,
        name=np.array(name),
        blob=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        ends=np.cumsum([len(blob) for blob in encoded]),
        labels=labels.astype(np.uint8),
        ids=np.array(ids),
        class_names=np.array(class_names),
        imbalances=np.array(imbalances),
    )


def encode(pixels: np.ndarray[Any, Any]) -> bytes:
    """Return an image as lossless WebP."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True, quality=90, method=4)
    return stream.getvalue()


def _decode(blob: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))


def packed(pack: Path) -> tuple[str, list[float]]:
    """Return the name of the set in a pack, and its imbalance factors."""
    if not pack.is_file():
        raise LongtailError(f"{pack}: there is no such file; make it with --prepare FOLDER")
    with np.load(pack) as stored:
        if "imbalances" not in stored:
            raise LongtailError(f"{pack}: is not a file of images of this version; make it with --prepare FOLDER")
        return str(stored["name"]), [float(factor) for factor in stored["imbalances"]]


@functools.cache
def unpack(pack: str) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Return the pixels of the training and then the test images, their labels, the training images' ids, and names."""
    with np.load(pack) as stored:
        blob, ends = stored["blob"].tobytes(), stored["ends"].tolist()
        labels, ids = (torch.from_numpy(stored[kind].astype(np.int64)) for kind in ("labels", "ids"))
        names = stored["class_names"].tolist()
    parts = [blob[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pixels = torch.from_numpy(np.stack(list(pool.map(_decode, parts)))).permute(0, 3, 1, 2).contiguous()
    return pixels, labels, ids, names


@functools.cache
def load_packed(config: Data, seed: int, name: str) -> LongTailedData:
    """Return a CIFAR set of the pack: as the package loads it with ``data.seed`` 0."""
    there, factors = packed(Path(str(config.root)))
    if there != name or config.imbalance not in factors:
        raise LongtailError(
            f"{config.root}: contains {there} at imbalance {', '.join(f'{factor:g}' for factor in factors)}, not "
            f"{name} at {config.imbalance:g}; make another with --prepare"
        )
    pixels, labels, ids, names = unpack(str(config.root))
    count = len(ids)
    order = [torch.nonzero(labels[:count] == index).flatten() for index in range(CLASSES[name])]
    val, order = hold_out_balanced(order, config.val_fraction)
    rows = long_tailed(order, names, resolve_profile(config.profile, balanced=True), config.imbalance, "index", seed)
    rows = rows[torch.argsort(ids[rows])]
    test = torch.arange(count, len(pixels))
    return LongTailedData(
        train=ImageSet(ArrayImages(pixels[rows]), labels[rows], ids[rows]),
        val=None if val is None else ImageSet(ArrayImages(pixels[val]), labels[val], ids[val]),
        test=ImageSet(ArrayImages(pixels[test]), labels[test], test - count),
        class_names=tuple(names),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        image_size=32,
        augment="cifar",
    )


def register_packed() -> None:
    """Make the sets of a pack sources of data."""
    for name in CLASSES:
        if f"{name}-packed" not in SOURCES:
            source = Source(load=functools.partial(load_packed, name=name), balanced=True)
            SOURCES.register(f"{name}-packed")(source)


def first_images(data: LongTailedData, count: int) -> LongTailedData:
    """Return a set with ``count`` of its training images, at least one of every class."""
    rows = torch.arange(len(data.train))
    _, first = np.unique(data.train.labels.numpy(), return_index=True)
    rows = torch.cat([torch.from_numpy(first), rows[~torch.isin(rows, torch.from_numpy(first))]])[:count]
    train = ImageSet(ArrayImages(data.train.images.take(rows)), data.train.labels[rows], data.train.ids[rows])
    return dataclasses.replace(data, train=train)
