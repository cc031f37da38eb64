"""The making of a teacher's cache that ends early."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.data.dataset import LongTailedData
from longtail.data.images import ArrayImages
from longtail.data.loader import TrainLoader
from longtail.data.sources import load_data
from longtail.data.transforms import build_transform
from longtail.errors import StoppedError
from longtail.nn import Encoder
from longtail.training.teacher_cache import TeacherCache, teacher_cache
from longtail.training.trainer import fit
from tests.training.runs import equal, weights


def test_a_cache_that_is_not_finished_leaves_nothing(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(teacher={"cache": 2})
    data, encoder, folder = load_data(config.data, 0), Encoder("conv8-tiny", [0.3], [0.4]).eval(), tmp_path / "cache"

    def loader(draws: Any) -> TrainLoader:
        return TrainLoader(data.train, 64, [build_transform("digits", 8)], config.seed, cache=draws)

    def make(check: Callable[[], None] = lambda: None) -> None:
        teacher_cache(config, data, encoder, None, loader, folder, torch.device("cpu"), check=check)

    def stopped() -> None:
        assert len(list(folder.glob("*.making"))) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(stopped)
    assert not list(folder.iterdir())
    # a killed process leaves a file, and the process of another machine may still write one
    left, written = folder / "a-features.0.making", folder / "b-features.1.making"
    for path, age in ((left, 25 * 3600), (written, 23 * 3600)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    make()
    assert [path.name for path in folder.glob("*.making")] == [written.name]
    assert len(list(folder.glob("*.npy"))) == 1


def test_a_cache_that_two_need_is_made_once(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(teacher={"cache": 2})
    data, encoder = load_data(config.data, 0), Encoder("conv8-tiny", [0.3], [0.4]).eval()
    made: list[Any] = []

    def loader(draws: Any) -> TrainLoader:
        made.append(draws)
        time.sleep(0.2)  # the other one comes meanwhile
        return TrainLoader(data.train, 64, [build_transform("digits", 8)], config.seed, cache=draws)

    def make(_: int) -> TeacherCache:
        return teacher_cache(config, data, encoder, None, loader, tmp_path / "cache", torch.device("cpu"))

    with ThreadPoolExecutor(2) as pool:
        caches = list(pool.map(make, range(2)))
    assert len(made) == 2  # one for each view
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npy"]
    first, second = (cache.features for cache in caches)
    assert first is not None
    assert second is not None
    assert np.array_equal(first, second)


def test_the_caches_of_networks_with_the_same_weights_are_told_apart(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(teacher={"cache": 1})
    data = load_data(config.data, 0)
    networks = ["test_resnet", "test_resnet(global_pool='max')", "test_resnet( global_pool = 'max' )"]
    encoders = [Encoder(network, [0.3], [0.4]).eval() for network in networks]

    def loader(draws: Any) -> TrainLoader:
        return TrainLoader(data.train, 64, [build_transform("digits", 8)], config.seed, cache=draws)

    for encoder, files in zip(encoders, (1, 2, 2), strict=True):
        encoder.load_state_dict(encoders[0].state_dict())
        teacher_cache(config, data, encoder, None, loader, tmp_path, torch.device("cpu"))
        assert len(list(tmp_path.glob("*.npy"))) == files


def test_a_signal_stops_the_filling_of_the_cache_and_the_run_is_resumed(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = tiny.replace(teacher={"cache": 2}, epochs=1), tmp_path / "teachers" / "cache"
    real = TrainLoader.batches

    def batches(*arguments: Any, **options: Any) -> Iterator[Batch]:
        if list(folder.glob("*.making")):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(TrainLoader, "batches", batches)
        with pytest.raises(StoppedError, match="stopped by SIGTERM while the teacher's cache was filled"):
            fit(config, tmp_path / "cut", quiet=True)
    assert not list(folder.iterdir())
    fit(config, tmp_path / "cut", quiet=True, resume=True)
    fit(config, tmp_path / "whole", quiet=True, teachers=tmp_path / "teachers")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_cache_is_of_the_very_images_and_plugins(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.replace(teacher={"cache": 1}, data={"augment": "digits"})
    data, encoder = load_data(config.data, 0), Encoder("conv8-tiny", [0.3], [0.4]).eval()

    def cached(data: LongTailedData, name: str | None = None) -> TeacherCache:
        def loader(draws: Any) -> TrainLoader:
            return TrainLoader(data.train, 64, [build_transform("digits", 8)], config.seed, cache=draws)

        return teacher_cache(config, data, encoder, None, loader, tmp_path, torch.device("cpu"), name=name)

    pixels = data.train.images.take(torch.arange(len(data.train)))
    pixels[1] = 255 - pixels[1]
    changed = dataclasses.replace(data, train=dataclasses.replace(data.train, images=ArrayImages(pixels)))
    assert changed.fingerprint == data.fingerprint  # which looks at some of them
    first, second = cached(data), cached(changed)
    assert first.name != second.name
    assert first.features is not None
    assert second.features is not None
    assert (first.features != second.features).any(axis=(0, 2)).nonzero()[0].tolist() == [1]
    # a process to which the images look another way opens what the first one has made
    assert cached(changed, first.name).name == first.name
    names = {first.name}
    parts = [("augmentation", "digits"), ("augmentation", "digits"), ("network", "conv8"), ("method", "la")]
    for digest, part in enumerate(parts):
        found = {part: [("p.py", str(digest))]}
        monkeypatch.setattr(
            "longtail.training.teacher_cache.plugins_of",
            lambda used, found=found: [plugin for part in used for plugin in found.get(part, [])],
        )
        names.add(cached(data).name)
    assert len(names) == 4  # the method changes nothing
