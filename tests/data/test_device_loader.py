"""Batches made on the device are those of the loader, here on a CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from longtail.data import device_loader
from longtail.data.batch import Batch
from longtail.data.dataset import ImageSet
from longtail.data.device_loader import DeviceLoader, SharedViews, reason_against_device
from longtail.data.images import ArrayImages
from longtail.data.loader import TrainLoader
from longtail.data.transforms import build_transform
from longtail.methods.base import view_after_view

CPU = torch.device("cpu")


def _loader(images: int, batch_size: int, views: int = 2, transform: str = "cifar", **options: Any) -> TrainLoader:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (images, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 5, (images,), generator=generator)
    data = ImageSet(ArrayImages(pixels), labels, torch.arange(images) * 7)
    return TrainLoader(data, batch_size, [build_transform(transform, 16)] * views, seed=11, epochs=3, **options)


def _same(made: Batch, expected: Batch) -> None:
    assert torch.equal(made.labels, expected.labels)
    assert torch.equal(made.ids, expected.ids)
    assert made.global_batch == expected.global_batch
    assert len(made.views) == len(expected.views)
    for ours, theirs in zip(made.views, expected.views, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def _through(device: DeviceLoader, epoch: int, start: int = 0) -> list[tuple[Batch, float]]:
    found = []
    for _row, size in device.epoch(epoch, start):
        batch = device.batch(size)
        copies = tuple(view.clone(memory_format=torch.channels_last) for view in batch.views)
        kept = Batch(copies, batch.labels.clone(), batch.ids.clone(), global_batch=batch.global_batch)
        found.append((kept, float(device.rate())))
        device.advance()
    return found


@pytest.mark.parametrize("transform", ["cifar", "photo", "none"])
@pytest.mark.parametrize("block_bytes", [2**30, 40_000])
def test_batches_are_those_of_the_loader(transform: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_loader, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(device_loader, "PIXELS_AT_ONCE", 20 * 16 * 16)
    loader = _loader(53, 10, transform=transform)  # batches of 9 and 8
    device = DeviceLoader(loader, CPU, math.inf, lambda step: step / 64)
    for epoch in range(3):
        made = _through(device, epoch)
        expected = list(loader.epoch(epoch))
        assert len(made) == len(expected) == 6
        for number, ((batch, rate), other) in enumerate(zip(made, expected, strict=True)):
            _same(batch, other)
            assert rate == (6 * epoch + number) / 64
    assert (device.rows < 6) == (block_bytes < 2**30)


def test_an_epoch_starts_at_any_step() -> None:
    loader = _loader(53, 10)
    device = DeviceLoader(loader, CPU, math.inf, lambda step: float(step))
    made = _through(device, 1, start=4)
    for (batch, rate), other, step in zip(made, loader.epoch(1, 4), (10, 11), strict=True):
        _same(batch, other)
        assert rate == step
    # what was prepared for the next epoch is what it shows, and what was not is made
    for epoch in (2, 1):
        for (batch, _), other in zip(_through(device, epoch), loader.epoch(epoch), strict=True):
            _same(batch, other)


class _Cache:
    num_fixed_views = 1

    def __init__(self, views: int) -> None:
        self.views = views

    def rng_keys(self, epoch: int, number: int) -> tuple[int, ...]:
        return (1, (epoch + number) % self.views)

    def lookup(self, indices: torch.Tensor, epoch: int | torch.Tensor) -> tuple[torch.Tensor, None]:
        return (indices + 1000 * (torch.as_tensor(epoch) % self.views))[:, None], None


@pytest.mark.parametrize("cache", [None, _Cache(3)], ids=["", "cached"])
@pytest.mark.parametrize("shared", [None, SharedViews(math.inf)], ids=["", "shared"])
def test_repeated_images_are_those_of_the_loader(cache: Any, shared: SharedViews | None) -> None:
    loader = _loader(53, 10, sampler="class", cache=cache)
    device = DeviceLoader(loader, CPU, math.inf, lambda _step: 0.1, shared=shared, view_names=["a", "b"])
    for epoch, start in ((0, 0), (1, 3)):
        expected = list(loader.epoch(epoch, start))
        for (batch, _), other in zip(_through(device, epoch, start), expected, strict=True):
            _same(batch, other)
    views = torch.cat([batch.views[0] for batch in loader.epoch(0)])
    assert len(views.unique(dim=0)) > len(torch.cat(loader.splits(0)).unique())


def test_views_of_another_cache_are_not_shared() -> None:
    shared = SharedViews(math.inf)
    for views in (2, 5):
        loader = _loader(53, 10, sampler="class", cache=_Cache(views))
        device = DeviceLoader(loader, CPU, math.inf, lambda _step: 0.1, shared=shared, view_names=["a", "b"])
        for (batch, _), other in zip(_through(device, 0), loader.epoch(0), strict=True):
            _same(batch, other)
    assert shared.hits > 0  # of the views that are not cached


def test_what_the_teacher_computes_comes_with_the_views() -> None:
    loader = _loader(31, 8, views=3)

    def teacher(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        sums = [view.flatten(1).sum(dim=1) for view in batch.views]
        return sums[2][:, None] * torch.tensor([1.0, 2.0]), torch.cat(sums[:2])[:, None].expand(-1, 4)

    device = DeviceLoader(loader, CPU, math.inf, lambda _step: 0.1, teacher, kept_views=2)
    for (_row, size), expected in zip(device.epoch(0), loader.epoch(0), strict=True):
        batch = device.batch(size)
        assert len(batch.views) == 2
        features, scores = teacher(expected)
        torch.testing.assert_close(batch.key_features, features, rtol=1e-6, atol=1e-3)
        assert batch.teacher_scores is not None
        torch.testing.assert_close(view_after_view(batch.teacher_scores), scores, rtol=1e-6, atol=1e-3)
        device.advance()


def test_what_stands_in_the_way_is_named() -> None:
    loader = _loader(31, 8)
    assert reason_against_device(loader, 31 * 3 * 16 * 16) == ""
    assert "more than accelerator.memory allows" in reason_against_device(loader, 31 * 3 * 16 * 16 - 1)
    shared = TrainLoader(loader.images, 8, loader.views, seed=0, world=2)
    assert "several processes" in reason_against_device(shared, math.inf)


def test_the_measured_step_of_a_resumed_epoch_is_not_shared() -> None:
    """Its views would be those of the first step of a training beside it."""
    shared = SharedViews(math.inf)
    for epoch, start in ((1, 4), (0, 0)):
        loader = _loader(10, 10)  # one step in an epoch
        device = DeviceLoader(loader, CPU, math.inf, lambda _step: 0.1, shared=shared, view_names=["a", "b"])
        start = min(start, len(loader.splits(epoch)) - 1)
        for (batch, _), other in zip(_through(device, epoch, start), loader.epoch(epoch, start), strict=True):
            _same(batch, other)
