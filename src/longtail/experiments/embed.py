"""Embeddings of any image source by any network, kept in one file. Legend: N images, D features."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtail.config import Data
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.sources import load_data
from longtail.data.sources.unreadable import log_unreadable, without
from longtail.devices import select_device
from longtail.errors import LongtailError
from longtail.files import atomic_write, make_folder
from longtail.inference.features import encode_split
from longtail.nn import Encoder
from longtail.nn.backbones import check_network
from longtail.nn.network_name import timm_settings
from longtail.nn.pretrained import find_pretrained, normalization
from longtail.registry import TASKS
from longtail.tasks.loading import load_model

logger = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]


def embed(
    config: Data,
    model: str,
    out: Path | str,
    *,
    seed: int = 0,
    pretrained: str = "auto",
    batch_size: int = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Write the embeddings of a data set's images to an ``.npz`` file.

    It holds ``train``, ``test`` and, if there are validation images, ``val``, each (N, D) float32; ``train_labels``, …,
    (N,) int64; and ``class_names``.

    Args:
        config: the images, and their tail.
        model: a timm model, or the folder of a run, whose encoder is used.
        out: the file.
        seed: of the split and the tail, as in training, and of a network without pretrained weights.
        pretrained: weights of a timm model: auto (from the Hub's local cache, an installed package or the Hub), timm
            (its own, downloaded at first use), a file, or none.
        batch_size: images per pass.
        device: auto, cpu or cuda.

    Returns:
        Number of images by split, ``width``, ``classes`` and, if some images cannot be read and are left out, their
        paths under ``unreadable``.

    Raises:
        LongtailError: the data or the model cannot be loaded or used, or the file cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() != ".npz":
        raise LongtailError(f"{out}: expected a name that ends in .npz")
    if out.is_dir():
        raise LongtailError(f"{out}: is a folder, expected a file")
    if batch_size < 1:
        raise LongtailError(f"batch_size: expected at least 1, got {batch_size}")
    data = load_data(config, seed)
    kind = TASKS[data.task].label_kind
    if kind != "image":
        raise LongtailError(f"{config.source}: has labels of {kind}; embeddings are of whole images")
    with torch.random.fork_rng(devices=[]):  # networks are built on the CPU; the caller's random state stays
        torch.default_generator.manual_seed(seed)
        encoder, resize = _encoder(model, pretrained, data)
    where = select_device(device)
    encoder.to(where).to(memory_format=torch.channels_last).eval()
    make_folder(out.parent)  # before the work
    arrays: dict[str, Array] = {"class_names": np.array(data.class_names)}
    summary: dict[str, Any] = {"classes": len(data.class_names)}
    for split, images in {"train": data.train, "val": data.val, "test": data.test}.items():
        if images is None:
            continue
        logger.info("%s: %s images", split, f"{len(images):,}")
        embeddings = _embeddings(encoder, images, data.image_size, resize, batch_size, where)
        readable = without(torch.arange(len(images)), images.images.unreadable)  # the others have that of another image
        arrays[split], arrays[f"{split}_labels"] = embeddings[readable].numpy(), images.labels[readable].numpy()
        summary[split] = len(readable)
    log_unreadable(data)
    if unreadable := data.all_unreadable():
        summary["unreadable"] = list(unreadable)
    summary["width"] = arrays["train"].shape[1]

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # given a name, savez would append an ending to it
            np.savez(file, **arrays)  # type: ignore[arg-type]

    atomic_write(out, write)
    return summary


def _encoder(model: str, pretrained: str, data: LongTailedData) -> tuple[Encoder, int | None]:
    """Return an encoder, and the side in pixels that it wants images to have, if another than theirs."""
    if Path(model).is_dir():
        if pretrained != "auto":
            raise LongtailError(f"--pretrained {pretrained}: {model} is a run, which has its own weights; leave it out")
        trained = load_model(model)
        kind = TASKS[trained.config.task].label_kind
        if kind != "image":
            raise LongtailError(f"{model}: labels {kind} and has no single embedding per image")
        if trained.config.channels != len(data.mean):
            raise LongtailError(
                f"{model}: expects images of {trained.config.channels} channels, these have {len(data.mean)}"
            )
        return trained.encoder, trained.config.image_size
    check_network(model)
    pretrained = find_pretrained(model) if pretrained == "auto" else pretrained
    settings = timm_settings(model)
    mean, std = (list(data.mean), list(data.std)) if settings is None else normalization(model, len(data.mean))
    encoder = Encoder(model, mean, std, pretrained=pretrained)
    return encoder, None if settings is None else settings.input_size[-1]


def _embeddings(
    encoder: Encoder, images: ImageSet, image_size: int, resize: int | None, batch_size: int, device: torch.device
) -> torch.Tensor:
    batches = encode_split(encoder, images, image_size, device=device, batch_size=batch_size, resize=resize)
    return torch.cat([features.cpu() for features, _ in batches])


def load_embeddings(path: Path | str) -> dict[str, Array]:
    """Read what :func:`embed` wrote.

    Raises:
        LongtailError: the file cannot be read, or its arrays are not as they must be; which is named.
    """
    try:
        # a pickle may run code; of a broken file NumPy leaves open what it opened itself
        with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        told = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise LongtailError(f"{path}: cannot be read as embeddings: {told}") from None
    except Exception as error:  # zipfile's own
        raise LongtailError(f"{path}: is no .npz file ({type(error).__name__})") from None
    names = arrays.get("class_names")
    if names is None or names.ndim != 1 or names.dtype.kind != "U":
        raise LongtailError(f"{path}: class_names: expected one name for each class")
    width: int | None = None
    for split in ("train", "val", "test"):
        if split not in arrays:
            if split == "val":
                continue
            raise LongtailError(f"{path}: has no array '{split}'")
        values, labels = arrays[split], arrays.get(f"{split}_labels")
        if values.ndim != 2 or values.dtype.kind not in "fiu" or values.shape[1] != (width or values.shape[1]):
            told = f"{values.shape} of {values.dtype}"
            raise LongtailError(f"{path}: {split}: expected (N, {width or 'D'}) numbers, got {told}")
        width = values.shape[1]
        if not np.isfinite(values).all():
            raise LongtailError(f"{path}: {split}: expected finite numbers, got some that are not")
        if labels is None or labels.shape != values.shape[:1] or labels.dtype.kind not in "iu":
            raise LongtailError(f"{path}: {split}_labels: expected one integer for each of {len(values)} rows")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
            raise LongtailError(f"{path}: {split}_labels: expected 0 to {len(names) - 1}, the places in class_names")
    return arrays
