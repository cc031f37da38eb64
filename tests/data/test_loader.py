from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from longtail.data import loader as loader_module
from longtail.data.batch import Batch
from longtail.data.dataset import ImageSet
from longtail.data.evaluation_batches import evaluation_batch_size, evaluation_batches
from longtail.data.images import ArrayImages
from longtail.data.loader import TrainLoader
from longtail.data.transforms import PerImageTransform, build_transform
from longtail.data.transforms.batched import to_float
from longtail.randomness import generator


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


class _Plus(PerImageTransform):
    """Writes what it draws into the view."""

    def __call__(self, sample: Any, image_id: int, keys: tuple[int, ...]) -> tuple[torch.Tensor, None]:
        draws = torch.randint(0, 256, (1, 4, 4), generator=generator(*keys, image_id), dtype=torch.uint8)
        assert sample is not None
        return draws, None


def _views(name: str) -> list[Any]:
    return [_Plus()] * 2 if name == "per image" else [build_transform(name, 8)] * 2


@pytest.mark.parametrize("transform", ["digits", "cifar-plain", "per image"])
@pytest.mark.parametrize("sampler", ["class", "sqrt", "repeat_factor"])
def test_an_image_that_is_shown_again_is_another_view(transform: str, sampler: str) -> None:
    images, options = numbered_images(40), {"sampler": sampler, "repeat_threshold": 0.6, "workers": 0}
    images = dataclasses.replace(images, labels=(torch.arange(40) > 30).long() + (torch.arange(40) > 37).long())
    loader = TrainLoader(images, 8, _views(transform), seed=3, **options)  # type: ignore[arg-type]
    epoch = list(loader.epoch(2))
    once = TrainLoader(images, 8, _views(transform), seed=3, workers=0)
    alone = {int(b.ids[row]): [v[row] for v in b.views] for b in once.epoch(2) for row in range(len(b))}
    shown: dict[int, list[list[torch.Tensor]]] = {}
    for batch in epoch:
        for row, image in enumerate(batch.ids.tolist()):
            shown.setdefault(image, []).append([view[row] for view in batch.views])
    assert max(map(len, shown.values())) > 1
    for image, occurrences in shown.items():
        # the first is what a sampler without repetitions shows
        assert all(torch.equal(*pair) for pair in zip(occurrences[0], alone[image], strict=True))
        different = [
            [torch.equal(one, other) for one, other in zip(*pair, strict=True)]
            for pair in itertools.combinations(occurrences, 2)
        ]
        if image > 0 and transform != "cifar-plain":  # the first image is black; a crop of one colour may come twice
            assert not any(itertools.chain.from_iterable(different))
    # from any step, and in several processes
    for whole, rest in zip(epoch[3:], loader.epoch(2, start=3), strict=True):
        assert all(torch.equal(*pair) for pair in zip(whole.views, rest.views, strict=True))
    ranks = [TrainLoader(images, 8, _views(transform), seed=3, rank=r, world=2, **options).epoch(2) for r in (0, 1)]  # type: ignore[arg-type]
    for whole, *parts in zip(epoch, *ranks, strict=True):
        assert torch.equal(whole.ids, torch.cat([part.ids for part in parts]))
        for number, view in enumerate(whole.views):
            assert torch.equal(view, torch.cat([part.views[number] for part in parts]))


class _Cache:
    """Of three views; the features tell the image and the view."""

    num_fixed_views = 1

    def rng_keys(self, epoch: int, number: int) -> tuple[int, ...]:
        return (1, (epoch + number) % 3)

    def lookup(self, indices: torch.Tensor, epoch: int | torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.stack([indices, torch.as_tensor(epoch).expand(len(indices)) % 3], dim=1), None


@pytest.mark.parametrize("transform", ["digits", "per image"])
def test_a_cached_teacher_is_told_of_the_view_that_is_shown(transform: str) -> None:
    images, views = numbered_images(40), _views(transform)
    loader = TrainLoader(images, 8, views, seed=3, sampler="sqrt", workers=0, cache=_Cache())
    images.labels[:] = (torch.arange(40) > 37).long()
    number_of_views = set()
    for batch in loader.epoch(1):
        assert batch.key_features is not None
        for row, (index, view) in enumerate(batch.key_features.tolist()):
            assert int(batch.ids[row]) == 7 * index
            if transform == "per image":
                expected = to_float(views[0](0, 7 * index, (1, view))[0][None])[0]
            else:
                position = torch.tensor([index])
                expected = views[0](images.images.take(position), images.ids[position], (1, view))[0]
            torch.testing.assert_close(batch.views[0][row], expected, rtol=0, atol=0)
            number_of_views.add((index, view))
    assert len(number_of_views) > len(torch.cat(loader.splits(1)).unique())


def test_evaluation_sees_every_image_once() -> None:
    labels = [labels_of_batch for _, labels_of_batch in evaluation_batches(numbered_images(10), 8, batch_size=4)]
    assert [len(part) for part in labels] == [4, 4, 2]
    assert torch.equal(torch.cat(labels), numbered_images(10).labels)


def test_a_process_may_have_no_image_to_evaluate() -> None:
    shares = [list(evaluation_batches(numbered_images(2), 8, rank=rank, world=4)) for rank in range(4)]
    assert [[len(labels) for _, labels in share] for share in shares] == [[1], [1], [], []]


def test_a_batch_that_is_on_the_device_stays_as_it_is() -> None:
    there = torch.device("meta")
    batch = Batch((torch.zeros(2, 3, 4, 4, device=there),), torch.zeros(2, device=there), torch.zeros(2, device=there))
    assert batch.to(there) is batch


def test_large_images_are_evaluated_in_smaller_batches() -> None:
    sizes = [evaluation_batch_size(side) for side in (8, 32, 90, 128, 224, 4096)]
    assert sizes == [512, 512, 512, 256, 83, 1]
