"""Outputs of a frozen teacher for fixed views of every image, computed once and cached on disk.

Legend: N images, V views, D of them distilled in a step, F feature width, C classes. An epoch e shows the views eD to
eD + D − 1, modulo V, of every image, drawn from keys that the cache and the student's loader share, so that the student
can be given the very views that the teacher saw; its key is another one of them, where there are enough. An image that
an epoch shows again is given the views of the next epoch, and so on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.loader import TrainLoader
from longtail.data.row_store import content_hash
from longtail.errors import LongtailError
from longtail.files import atomic_write, make_folder
from longtail.nn import ClassifierEnsemble, Encoder, EncoderEnsemble, FrozenEncoder, TeacherEncoder, freeze
from longtail.randomness import Stream, mix
from longtail.registry import TRANSFORMS, network_parts, plugins_of

logger = logging.getLogger(__name__)

_CACHED = mix(Stream.CACHED_VIEWS)
_MAKING = ".making"
_ABANDONED_SECONDS = 24 * 3600  # without a write; by the time, as the process may be one of another machine


@dataclass(frozen=True)
class TeacherCache:
    """Memory-mapped features (V, N, F), scores (V, N, C), or both."""

    features: np.memmap | None
    """Where the method compares with them."""
    scores: np.memmap | None
    """Where there is a classifier to distil from."""
    seed: int
    share_key: bool
    distilled: int = 1
    """D."""
    name: str = ""
    """By which other processes open it: what it depends on may look another way to them, such as copies of files."""

    @property
    def views(self) -> int:
        """V."""
        held = self.scores if self.features is None else self.features
        assert held is not None
        return len(held)

    @property
    def num_fixed_views(self) -> int:
        """How many of its views the student must be given as the teacher saw them."""
        return int(self.share_key) if self.scores is None else self.distilled

    def rng_keys(self, epoch: int, number: int) -> tuple[int, ...]:
        """Return what names the draw of one of these views in an epoch."""
        return rng_keys(self.seed, int(self._shown(epoch, number)))

    def _shown(self, epoch: int | np.ndarray[Any, Any], number: int) -> Any:
        return (epoch * self.distilled + number) % self.views

    def lookup(self, indices: Tensor, epoch: int | Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (B, F) features of the key views and (B, D, C) scores of the distilled views, None if not kept.

        Args:
            indices: (B,) int64 positions of the images.
            epoch: whose views are meant; (B,) int64 where these differ between the images.
        """
        positions, epochs = indices.numpy(), np.asarray(epoch)
        features, scores = None, None
        if self.features is not None:
            key = self._shown(epochs, 0 if self.share_key else max(self.distilled, (self.views + 1) // 2))
            features = torch.from_numpy(self.features[key, positions])
        if self.scores is not None:
            shown = np.stack([self._shown(epochs, number) for number in range(self.distilled)], axis=-1)
            scores = torch.from_numpy(self.scores[shown, positions[:, None]])
        return features, scores


def rng_keys(seed: int, view: int) -> tuple[int, ...]:
    """Return what names the draw of one of the fixed views."""
    return (seed, _CACHED, view)


class _OneView:
    """Tells a loader to draw one of the fixed views."""

    num_fixed_views = 1

    def __init__(self, seed: int, view: int) -> None:
        self.seed, self.view = seed, view

    def rng_keys(self, _epoch: int, _number: int) -> tuple[int, ...]:
        return rng_keys(self.seed, self.view)

    def lookup(self, _indices: Tensor, _epoch: int | Tensor) -> tuple[None, None]:
        return None, None  # they are what is computed


def teacher_cache(
    config: Config,
    data: LongTailedData,
    teacher: TeacherEncoder,
    classifier: nn.Module | None,
    make_loader: Callable[[object], TrainLoader],
    folder: Path,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    keeps_features: bool = True,
    share_key: bool = False,
    distilled: int = 1,
    name: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> TeacherCache:
    """Return the cache of a teacher over a training set, made now or found again.

    Whatever ends the making early leaves no file, except where the process is killed: the next making of any cache in
    the folder removes what is left of that after a day.

    Args:
        config: the student's settings; ``teacher.cache`` is V.
        data: the training set.
        teacher: frozen; one encoder or several.
        classifier: the teacher's, where it is distilled from.
        make_loader: gives a loader of the classification view, whose draws the argument names.
        folder: where caches are kept.
        device: where the teacher is.
        autocast: gives the context of ``config.precision``, in which the teacher of a run without a cache works too.
        keeps_features: whether the method compares with the teacher's features.
        share_key: whether the key view is the classification view.
        distilled: D.
        name: of the cache that another process has made; if None, it is made or found here.
        check: called at every batch; what it raises ends the making.
    """
    views, wanted, made_here = config.teacher.cache, classifier is not None, name is None
    name = name or _name(config, data, teacher, classifier)
    shapes: dict[str, tuple[int, int, int]] = {}
    if keeps_features:
        shapes["features"] = (views, len(data.train), teacher.num_features)
    if wanted:
        shapes["scores"] = (views, len(data.train), len(data.class_names))
    paths = {kind: folder / f"{name}-{kind}.npy" for kind in shapes}
    if made_here and not _all_exist(paths):

        def fill(arrays: dict[str, np.memmap]) -> None:
            with autocast():
                _fill(arrays, config, data, freeze(teacher).to(device), classifier, make_loader, device, check)

        with _locked(folder, name, check):
            if not _all_exist(paths):  # another process may have made it meanwhile
                _make(folder, paths, shapes, fill)
    opened = {kind: np.load(path, mmap_mode="r") for kind, path in paths.items()} if _all_exist(paths) else {}
    if not opened:
        raise LongtailError(f"{folder}: the teacher's cache is not there; do all processes see the same folder?")
    return TeacherCache(opened.get("features"), opened.get("scores"), config.seed, share_key, distilled, name)


def _name(config: Config, data: LongTailedData, teacher: TeacherEncoder, classifier: nn.Module | None) -> str:
    """Return the name of a cache: a hash of all that its values depend on."""
    weights = hashlib.blake2b(digest_size=8)
    for tensor in [*teacher.state_dict().values(), *(classifier.state_dict().values() if classifier else ())]:
        weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    images = [data.fingerprint, content_hash(data.train.keys())]  # the former looks at some 64 images only
    content: list[Any] = [*images, config.seed, config.teacher.cache, classifier is not None, config.precision]
    content += [config.data.augment, data.image_size]
    members = [teacher] if isinstance(teacher, Encoder) else teacher.members
    encoders = [member for member in members if isinstance(member, Encoder)]
    content += [
        [encoder.architecture, *map(float, encoder.mean), *map(float, encoder.std), encoder.resize]
        for encoder in encoders
    ]
    parts = network_parts(*(encoder.architecture for encoder in encoders)) | {(TRANSFORMS.kind, config.data.augment)}
    if plugins := sorted(plugins_of(parts)):  # what they do is not in the names of their parts
        content.append(plugins)
    if config.tune == "head":  # the views are drawn from so many features of the frozen encoder
        content.append(config.feature_views)
    if isinstance(classifier, ClassifierEnsemble):  # whose scores depend on it
        content.append(classifier.temperature)
    return hashlib.blake2b(json.dumps(content).encode() + weights.digest(), digest_size=8).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path, name: str, check: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time make a cache; ``check`` is called while it waits for another."""
    make_folder(folder)
    lock = FileLock(folder.with_name(f".{folder.name}-{name}.lock"))
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            check()
    try:
        yield
    finally:
        lock.release()


def _make(
    folder: Path,
    paths: dict[str, Path],
    shapes: dict[str, tuple[int, int, int]],
    fill: Callable[[dict[str, np.memmap]], None],
) -> None:
    """Write the files of a cache, of arrays that ``fill`` is given."""
    views, images, _ = next(iter(shapes.values()))
    gib = sum(4 * int(np.prod(shape)) for shape in shapes.values()) / 2**30
    logger.info("teacher: %d views of %s images once, kept in %s (%.2f GiB)", views, f"{images:,}", folder, gib)
    _remove_abandoned(folder)
    unique = uuid.uuid4().hex  # the number of a process may be that of one of another machine too
    partial = {kind: path.with_suffix(f".{unique}{_MAKING}") for kind, path in paths.items()}
    try:
        try:
            arrays = {
                kind: np.lib.format.open_memmap(partial[kind], mode="w+", dtype=np.float32, shape=shape)
                for kind, shape in shapes.items()
            }
            for path in partial.values() if hasattr(os, "posix_fallocate") else ():  # not on macOS
                with path.open("r+b") as file:  # now, rather than in the middle, when the disk turns out to be full
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise LongtailError(f"{folder}: {gib:.2f} GiB cannot be written: {error.strerror}") from None
        fill(arrays)
        for kind, array in arrays.items():
            array.flush()
            _move(partial[kind], paths[kind])
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed have left, several GiB each."""
    for path in folder.glob(f"*{_MAKING}"):
        with contextlib.suppress(OSError):  # another process may remove it too
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _move(made: Path, path: Path) -> None:
    def move(target: Path) -> None:
        made.replace(target)

    atomic_write(path, move)  # which brings it to the disk first


def _all_exist(paths: dict[str, Path]) -> bool:
    return all(path.is_file() for path in paths.values())


@torch.no_grad()
def _fill(
    arrays: dict[str, np.memmap],
    config: Config,
    data: LongTailedData,
    teacher: FrozenEncoder | EncoderEnsemble,
    classifier: nn.Module | None,
    make_loader: Callable[[object], TrainLoader],
    device: torch.device,
    check: Callable[[], None],
) -> None:
    splits = torch.arange(len(data.train)).split(512)
    for view in range(config.teacher.cache):
        loader = make_loader(_OneView(config.seed, view))
        for positions, batch in zip(splits, loader.batches(splits, 0, only=[0]), strict=True):
            check()
            features = teacher(batch.views[0].to(device))
            if "features" in arrays:
                arrays["features"][view, positions] = features.float().cpu().numpy()
            if "scores" in arrays:
                assert classifier is not None
                arrays["scores"][view, positions] = classifier(features).float().cpu().numpy()
