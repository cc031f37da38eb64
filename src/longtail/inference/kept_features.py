"""Features of a frozen encoder in place of the images: computed once, kept on disk, used by every run that follows.

Legend: N images, B of them in a batch, V views, F feature width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from longtail.config import Config
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.evaluation_batches import plain_batches
from longtail.data.images import Images
from longtail.data.loader import TrainLoader
from longtail.data.row_store import RowStore, cache_folder, content_hash
from longtail.data.sources.unreadable import without
from longtail.distributed import barrier, rank
from longtail.errors import LongtailError
from longtail.nn import Encoder, FrozenEncoder, TeacherEncoder
from longtail.nn.encoder import channels_last
from longtail.randomness import Stream, mix, uniform
from longtail.registry import TASKS, TRANSFORMS, network_parts, plugins_of

logger = logging.getLogger(__name__)

_VIEWS = mix(Stream.FEATURE_VIEWS)  # the same for every seed, so that all seeds share the features
_BATCH = 64


class FeatureImages:
    """Features of V views of every image; the first view is the image without augmentation.

    Args:
        images: what they are features of.
        features: V tensors (N, F).
    """

    lazy = False

    def __init__(self, images: Images, features: Sequence[Tensor]) -> None:
        self.images, self.features = images, tuple(features)
        self.unreadable = images.unreadable

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> Tensor:
        """Return (B, V, F) features, of which :func:`draw_view` takes one view each."""
        return torch.stack([view[indices] for view in self.features], dim=1)

    def plain(self, indices: Tensor, size: int) -> Tensor:  # noqa: ARG002
        """Return (B, F) features of the images without augmentation."""
        return self.features[0][indices]

    def name(self, index: int) -> str | None:
        """Return where an image is found."""
        return self.images.name(index)

    def open(self, index: int) -> Image.Image:
        """Return an image."""
        return self.images.open(index)

    def open_with_fallback(self, index: int) -> Image.Image:
        """Return an image."""
        return self.images.open_with_fallback(index)

    def open_sample(self, index: int) -> Any:
        """Return an image."""
        return self.images.open_sample(index)

    def record_unreadable(self, reasons: dict[int, str]) -> None:
        """Do nothing: the images are not read again."""
        assert not reasons

    def signature(self, index: int) -> bytes:
        """Return the signature of an image."""
        return self.images.signature(index)

    def version(self, index: int) -> bytes:
        """Return the version of an image."""
        return self.images.version(index)


def draw_view(features: Tensor, ids: Tensor, keys: tuple[int, ...]) -> Tensor:
    """Return (B, F) features of one of V views of every image, a function of (keys of the draw, image id).

    Args:
        features: (B, V, F).
        ids: (B,) int64.
        keys: of the draw.
    """
    views = features.shape[1]
    if views == 1:
        return features[:, 0]
    drawn = (uniform(ids, 1, *keys)[:, 0] * views).long()
    return features[torch.arange(len(ids)), drawn]


def check_same_encoder(teacher: TeacherEncoder, encoder: Encoder) -> None:
    """Raise LongtailError if a teacher's encoder is another one than that whose features replace the images."""
    members = [teacher] if isinstance(teacher, Encoder) else teacher.members
    if any(isinstance(member, Encoder) and encoder_hash(member) != encoder_hash(encoder) for member in members):
        raise LongtailError(
            "tune head: trains on kept features of the encoder, so the teacher must have the same encoder; use another "
            "--tune, or --teacher.source train without --teacher.network"
        )


def encoder_hash(encoder: Encoder) -> str:
    """Return a hash of an encoder's network, of its weights, and of how it scales images."""
    state = encoder.state_dict()
    geometry = [encoder.mean, encoder.std, encoder.resize]
    return content_hash(encoder.architecture, geometry, sorted(state), *(state[name] for name in sorted(state)))


def feature_data(
    data: LongTailedData,
    encoder: Encoder,
    config: Config,
    *,
    device: torch.device,
    progress: bool = False,
    check: Callable[[], None] = lambda: None,
) -> LongTailedData:
    """Return a data set with the features of a frozen encoder in place of the images.

    Features that are on disk are not computed again: those of an image are found by its id, its content and the
    encoder with its weights, so other splits, seeds and long tails of the same images share them. An image that cannot
    be read is replaced by another of its class; no features are kept of it, so that every run finds and reports it.

    Args:
        data: the images.
        encoder: images to features; put into eval mode.
        config: settings of the run: ``data.cache``, ``data.augment``, and ``feature_views``, V of the training images.
        device: where to compute them.
        progress: show a progress bar.
        check: called after every batch; what it raises ends the computation, and what is done is kept.
    """
    frozen, network = FrozenEncoder(encoder).to(device), encoder_hash(encoder)
    every = 0.5 if sys.stderr.isatty() else 30.0  # a log file need not hold each step of a bar
    views, augment, folder = config.feature_views, config.data.augment, cache_folder(config.data.cache)
    computed = False

    def compute(images: ImageSet, positions: Tensor, view: int) -> Iterator[Tensor]:
        nonlocal computed
        splits = positions.split(_BATCH)
        inputs = plain_batches(images, splits, data.image_size)
        if view > 0:
            transforms = TASKS[data.task].build_transforms(config, data, ["classification"])
            loader = TrainLoader(images, _BATCH, transforms, _VIEWS, workers=config.data.workers)
            inputs = (batch.views[0] for batch in loader.batches(splits, -1 - view))
        for batch in tqdm(
            inputs, "features", len(splits), unit="batch", mininterval=every, maxinterval=every, disable=not progress
        ):
            computed = True
            yield _encode(frozen, batch, device)
            check()

    def compute_readable(images: ImageSet, positions: Tensor, view: int) -> Iterator[Tensor]:
        for part, features in zip(positions.split(_BATCH), compute(images, positions, view), strict=True):
            if not images.images.unreadable.keys().isdisjoint(part.tolist()):
                raise _FoundUnreadable
            yield features

    def fill(store: RowStore, images: ImageSet, keys: Tensor, view: int) -> tuple[Tensor, Tensor]:
        """Return the positions of the images that can be read, and where their features are."""
        while True:
            good = without(torch.arange(len(images)), images.images.unreadable)

            def make(missing: Tensor, good: Tensor = good) -> Iterator[Tensor]:
                return compute_readable(images, good[missing], view)

            with contextlib.suppress(_FoundUnreadable):  # what is done is on disk
                return good, store.fill(keys[good], make)

    def rows(images: ImageSet, keys: Tensor | None, view: int) -> Tensor:
        everything = torch.arange(len(images))
        if folder is None or keys is None:
            return torch.cat(list(compute(images, everything, view)))
        store = _store(folder, network, encoder, data.image_size, augment, view)
        if rank() == 0:
            fill(store, images, keys, view)
        barrier()
        good, found = fill(store, images, keys, view)
        kept = torch.from_numpy(store.open()[found.numpy()])
        if len(good) == len(images):
            return kept
        bad = without(everything, good.tolist())
        features = kept.new_empty(len(images), kept.shape[1])
        features[good], features[bad] = kept, torch.cat(list(compute(images, bad, view)))
        return features

    replaced: dict[str, Any] = {}
    for name, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        if images is not None:
            keys = None if folder is None else images.keys()
            features = [rows(images, keys, view) for view in range(views if name == "train" else 1)]
            replaced[name] = dataclasses.replace(images, images=FeatureImages(images.images, features))
    _log_unreadable([split.images for split in replaced.values()])
    if folder is not None and computed:  # the many runs of a comparison find the features that the first one computed
        count = sum(len(split) for split in replaced.values()) + (views - 1) * len(data.train)
        mib = count * encoder.num_features * 4 / 2**20
        logger.info("features of %s images are kept in %s (%.0f MiB)", f"{count:,}", folder / "features", mib)
    return dataclasses.replace(data, **replaced)


def num_missing_features(data: LongTailedData, encoder: Encoder, config: Config) -> int:
    """Return for how many views of images :func:`feature_data` would compute features."""
    folder, network = cache_folder(config.data.cache), encoder_hash(encoder)
    missing = 0
    for images, views in ((data.train, config.feature_views), (data.val, 1), (data.test, 1)):
        if images is None:
            continue
        if folder is None:
            missing += len(images) * views
            continue
        keys = images.keys()
        for view in range(views):
            store = _store(folder, network, encoder, data.image_size, config.data.augment, view)
            missing += int((store.find(keys) < 0).sum())
    return missing


class _FoundUnreadable(Exception):  # noqa: N818
    """Ends the computation of features that are kept: what was computed is of another image."""


def _log_unreadable(splits: Sequence[Images]) -> None:
    reasons = [reason for images in splits for reason in images.unreadable.values()]
    if reasons:
        logger.info(
            "%d of %d images cannot be read, and the features of others of their class are used; the first: %s",
            len(reasons),
            sum(map(len, splits)),
            reasons[0],
        )


def _store(folder: Path, network: str, encoder: Encoder, size: int, augment: str, view: int) -> RowStore:
    """Return the file of one view's features; the first view is the image without augmentation."""
    parts = network_parts(encoder.architecture) | ({(TRANSFORMS.kind, augment)} if view > 0 else set())
    plugins = sorted(plugins_of(parts))  # what they do is not in the names of their parts
    name = content_hash(network, size, [augment, view] if view > 0 else "plain", *([plugins] if plugins else []))
    return RowStore(folder / "features", name, (encoder.num_features,), "float32")


@torch.no_grad()
def _encode(encoder: FrozenEncoder, batch: Tensor, device: torch.device) -> Tensor:
    inputs = (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)
    features: Tensor = encoder(channels_last(inputs)).float().cpu()
    return features
