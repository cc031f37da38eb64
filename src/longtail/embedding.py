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
from longtail.nn.backbones import Encoder, normalization
from longtail.nn.segmentation import is_dense
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
        seed: of the split and the tail, as in training, and of a network without pretrained weights.
        pretrained: of a timm model: timm (its weights, downloaded at first use), a file of them, or none.
        batch_size: images at a time.
        device: auto, cpu or cuda.
        say: told of each split.

    Returns:
        Images by split, ``width`` and ``classes``.

    Raises:
        LongtailError: the set or the model cannot be had or used, or the file cannot be written.
    """
    if out.suffix.lower() != ".npz":
        raise LongtailError(f"{out}: expected a name that ends in .npz")
    if out.is_dir():
        raise LongtailError(f"{out}: is a folder, expected a file")
    if batch_size < 1:
        raise LongtailError(f"batch_size: expected at least 1, got {batch_size}")
    data = load_data(config, seed)
    if isinstance(data, DenseData):
        raise LongtailError(f"{config.source}: has a label for every pixel; embeddings are of whole images")
    with torch.random.fork_rng(devices=[]):  # networks are made on the CPU; a caller's own random numbers stay
        torch.default_generator.manual_seed(seed)
        encoder, size = _encoder(model, pretrained, data)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        encoder.to(name, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    except (RuntimeError, AssertionError) as error:  # of a torch without CUDA the second
        raise LongtailError(f"device '{device}': cannot be used: {str(error).splitlines()[0]}") from None
    try:  # before the work
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtailError(f"{out.parent}: cannot be made: {error.strerror}") from None
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
    if is_dense(model):
        raise LongtailError(f"network '{model}': is for segmentation, which gives an image no one embedding")
    import timm

    settings = None
    if timm.is_model(model.split(".")[0]):
        try:
            settings = timm.get_pretrained_cfg(model)
        except RuntimeError as error:
            raise LongtailError(f"network '{model}': {error}") from None
    mean, std = (list(data.mean), list(data.std)) if settings is None else normalization(model, len(data.mean))
    encoder = Encoder(model, mean, std, pretrained=pretrained)
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
