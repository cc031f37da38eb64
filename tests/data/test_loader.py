from __future__ import annotations

import pytest
import torch

from longtail.data import loader as loader_module
from longtail.data.dataset import ImageSet
from longtail.data.images import ArrayImages
from longtail.data.loader import Batch, TrainLoader, evaluation_batches
from longtail.data.transforms import PerImageTransform, build_transform


def numbered_images(count: int) -> ImageSet:
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()
    return ImageSet(ArrayImages(pixels), torch.arange(count) % 3, torch.arange(count) * 7)


def test_every_image_once_in_even_batches() -> None:
    loader = TrainLoader(numbered_images(101), 32, [build_transform("none", 8)], seed=0)
    batches = list(loader.epoch(0))
    assert [len(batch.labels) for batch in batches] == [26, 25, 25, 25]
    assert sorted(torch.cat([batch.ids for batch in batches]).tolist()) == [7 * n for n in range(101)]
    for batch in batches:
        assert torch.equal(batch.labels, batch.ids // 7 % 3)
        assert torch.equal((batch.views[0][:, 0, 0, 0] * 255).round().long(), batch.ids // 7)


def test_an_epoch_can_be_entered_anywhere() -> None:
    loader = TrainLoader(numbered_images(50), 8, [build_transform("digits", 8)] * 2, seed=3)
    whole, rest = list(loader.epoch(4)), list(loader.epoch(4, start=5))
    assert len(rest) == len(whole) - 5
    for a, b in zip(whole[5:], rest, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    assert not torch.equal(whole[0].ids, next(loader.epoch(5)).ids)
    assert not torch.equal(whole[0].views[0], whole[0].views[1])


@pytest.mark.parametrize("transform", ["digits", "cifar-plain"])
def test_small_batches_are_augmented_together(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    augment = build_transform(transform, 8)
    assert not isinstance(augment, PerImageTransform)

    def counted(images: torch.Tensor, ids: torch.Tensor, keys: tuple[int, ...]) -> torch.Tensor:
        calls.append(len(images))
        return augment(images, ids, keys)

    batches = {}
    for values in (1, 2**17):
        monkeypatch.setattr(loader_module, "GROUPED_VALUES", values)
        batches[values] = list(TrainLoader(numbered_images(50), 8, [counted], seed=3).epoch(1))
    assert calls == [8, 7, 7, 7, 7, 7, 7, 50]
    for alone, together in zip(*batches.values(), strict=True):
        assert torch.equal(alone.ids, together.ids)
        assert torch.equal(alone.labels, together.labels)
        assert torch.equal(alone.views[0], together.views[0])


def test_evaluation_sees_every_image_once() -> None:
    labels = [labels_of_batch for _, labels_of_batch in evaluation_batches(numbered_images(10), 8, batch_size=4)]
    assert [len(part) for part in labels] == [4, 4, 2]
    assert torch.equal(torch.cat(labels), numbered_images(10).labels)


def test_a_batch_that_is_on_the_device_stays_as_it_is() -> None:
    there = torch.device("meta")
    batch = Batch((torch.zeros(2, 3, 4, 4, device=there),), torch.zeros(2, device=there), torch.zeros(2, device=there))
    assert batch.to(there) is batch


def test_large_images_are_evaluated_in_smaller_batches() -> None:
    assert [loader_module.evaluation_batch_size(side) for side in (8, 32, 90, 128, 224, 4096)] == [
        512,
        512,
        512,
        256,
        83,
        1,
    ]
