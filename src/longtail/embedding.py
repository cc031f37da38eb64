"""Embeddings of any image source by any network, kept in one file. Legend: N images, D features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from longtail.config import Data
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.loaders import evaluation_batches
from longtail.data.scenes import DenseData
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.files import write_whole
from longtail.nn.backbones import Encoder, normalization, timm_name
from longtail.segmenter import Segmenter, load_kept

Array = np.ndarray[Any, Any]


def embed(
    config: Data,
    model: str,
    out: Path,
    *,
    seed: int = 0,
    pretrained: str = "timm",
    batch_size: int = 64,
    device: str = "auto",
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Write the embeddings of a set's images to an ``.npz`` file.

    It holds ``train``, ``test`` and, where there are validation images, ``val``, each (N, D) float32; ``train_labels``,
    …, (N,) int64; and ``class_names``.

    Args:
        config: which images, and their tail.
        model: a timm model, or the folder of a run, whose encoder is used.
        out: the file.
        seed: of the split and the tail, as in training.
        pretrained: of a timm model: timm (its weights, downloaded at first use), a file of them, or none.
        batch_size: images at a time.
        device: auto, cpu or cuda.
        say: told of each split.

    Returns:
        Images by split, ``width`` and ``classes``.

    Raises:
        LongtailError: the set or the model cannot be had, or the file cannot be written.
    """
    if out.suffix.lower() != ".npz":
        raise LongtailError(f"{out}: expected a name that ends in .npz")
    data = load_data(config, seed)
    if isinstance(data, DenseData):
        raise LongtailError(f"{config.source}: has a label for every pixel; embeddings are of whole images")
    encoder, size = _encoder(model, pretrained, data)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    encoder.to(name, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    arrays: dict[str, Array] = {"class_names": np.array(data.class_names)}
    made: dict[str, Any] = {"classes": len(data.class_names)}
    splits = {"train": data.train, "val": data.val, "test": data.test}
    for split, images in splits.items():
        if images is None:
            continue
        say(f"{split}: {len(images):,} images")
        arrays[split] = _features(encoder, images, data.image_size, size, batch_size, name)
        arrays[f"{split}_labels"] = images.labels.numpy()
        made[split] = len(images)
    made["width"] = arrays["train"].shape[1]

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # by a name, savez would add an ending to it
            np.savez(file, **arrays)  # type: ignore[arg-type]

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtailError(f"{out.parent}: cannot be made: {error.strerror}") from None
    write_whole(out, write)
    return made


def _encoder(model: str, pretrained: str, data: LongTailedData) -> tuple[Encoder, int | None]:
    """Return an encoder, and the side that it wants images to have, if it is not theirs."""
    if Path(model).is_dir():
        recognizer = load_kept(model)
        if isinstance(recognizer, Segmenter):
            raise LongtailError(f"{model}: is a segmenter, which gives an image no one embedding")
        if recognizer.card.channels != len(data.mean):
            raise LongtailError(
                f"{model}: expects images of {recognizer.card.channels} channels, these have {len(data.mean)}"
            )
        return recognizer.encoder, recognizer.card.image_size
    import timm

    channels = len(data.mean)
    known = timm.is_model(model.split(".")[0])
    mean, std = normalization(timm_name(model), channels) if known else (list(data.mean), list(data.std))
    encoder = Encoder(model, mean, std, pretrained=pretrained)
    settings = timm.get_pretrained_cfg(model) if known else None
    return encoder, None if settings is None else settings.input_size[-1]


@torch.no_grad()
def _features(
    encoder: Encoder, images: ImageSet, image_size: int, size: int | None, batch_size: int, device: str
) -> Array:
    parts = []
    for views, _ in evaluation_batches(images, image_size, batch_size):
        seen = (views.pin_memory() if device == "cuda" else views).to(device, non_blocking=True)
        if size is not None and seen.shape[-1] != size:
            seen = F.interpolate(seen, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        parts.append(encoder(seen.contiguous(memory_format=torch.channels_last)).float().cpu())
    found: Array = torch.cat(parts).numpy()
    return found


def load_embeddings(path: Path | str) -> dict[str, Array]:
    """Read what :func:`embed` wrote.

    Raises:
        LongtailError: the file cannot be read, or its arrays are not as they must be; which is named.
    """
    try:
        with np.load(path, allow_pickle=False) as file:  # a pickle may run code
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise LongtailError(f"{path}: cannot be read as embeddings: {' '.join(str(error).split())}") from None
    except Exception as error:  # zipfile's own
        raise LongtailError(f"{path}: is no .npz file ({type(error).__name__})") from None
    for split in ("train", "val", "test"):
        if split not in arrays:
            if split == "val":
                continue
            raise LongtailError(f"{path}: has no array '{split}'")
        values, labels = arrays[split], arrays.get(f"{split}_labels")
        if values.ndim != 2 or values.shape[1] != arrays["train"].shape[1] or not np.isfinite(values).all():
            raise LongtailError(
                f"{path}: {split}: expected (N, {arrays['train'].shape[-1]}) finite numbers, got {values.shape}"
                + ("" if values.ndim != 2 or np.isfinite(values).all() else ", some of them not finite")
            )
        if labels is None or labels.shape != values.shape[:1]:
            raise LongtailError(f"{path}: {split}_labels: expected one label for each of {len(values)} rows")
    return arrays
