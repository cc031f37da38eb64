"""Mixed images: pairs, shares and labels against loops, and the same mixtures wherever a batch is made."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta

from longtail.config import Mixing
from longtail.data.batch import Batch
from longtail.data.dataset import ImageSet
from longtail.data.device_loader import DeviceLoader
from longtail.data.images import ArrayImages
from longtail.data.loader import TrainLoader
from longtail.data.mixing import Mixer, Mixture, beta_quantiles, boxes, lookup_quantile, remix_label_weights
from longtail.data.transforms import build_transform

COUNTS = [40, 10, 5, 3, 1]
KINDS = ["mixup", "cutmix", "remix"]


def new_mixer(kind: str = "mixup", views: int = 1, **settings: Any) -> Mixer:
    return Mixer(Mixing(kind=kind, **settings), COUNTS, seed=7, epochs=10, views=views, temperature=4.0)  # type: ignore[arg-type]


def new_loader(mixer: Mixer | None, batch_size: int = 20, **options: Any) -> TrainLoader:
    generator = torch.Generator().manual_seed(3)
    labels = torch.repeat_interleave(torch.arange(5), torch.tensor(COUNTS))
    pixels = torch.randint(0, 256, (len(labels), 3, 16, 16), generator=generator, dtype=torch.uint8)
    data = ImageSet(ArrayImages(pixels), labels, torch.arange(len(labels)) * 7)
    views = [build_transform("cifar", 16)] * 3
    return TrainLoader(data, batch_size, views, seed=11, epochs=3, mixer=mixer, **options)


def test_partners_are_a_circle_of_the_images_of_each_batch() -> None:
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:60].view(4, 15)
    sizes = torch.tensor([15, 14, 2, 9])
    partners = new_mixer().partners(ids, 3, sizes)
    for row, size in zip(partners.tolist(), sizes.tolist(), strict=True):
        assert row[size:] == list(range(size, 15))
        place, seen = 0, []
        for _ in range(size):
            place = row[place]
            seen.append(place)
        assert sorted(seen) == list(range(size))
        assert place == 0
    assert not torch.equal(partners, new_mixer().partners(ids, 4, sizes))


def test_a_partner_does_not_depend_on_the_order_of_the_batch() -> None:
    ids = torch.arange(50) * 13
    shuffled = ids[torch.randperm(50, generator=torch.Generator().manual_seed(1))]

    def pairs(batch: torch.Tensor) -> set[tuple[int, int]]:
        partners = new_mixer().partners(batch[None], 0)[0]
        return set(zip(batch.tolist(), batch[partners].tolist(), strict=True))

    assert pairs(ids) == pairs(shuffled)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_have_the_beta_distribution(alpha: float) -> None:
    probability = np.linspace(0.001, 0.999, 777)
    found = lookup_quantile(beta_quantiles(alpha), torch.from_numpy(probability))
    np.testing.assert_allclose(found.numpy(), beta(alpha, alpha).ppf(probability), atol=2e-4)
    labels = torch.zeros(40_000, dtype=torch.int64)
    drawn = new_mixer(alpha=alpha).draw(torch.arange(40_000), labels, labels, 2, (8, 8)).image_weights.double()
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_labels_against_a_loop(kind: str) -> None:
    loader, mixer = new_loader(new_mixer(kind, views=2)), new_mixer(kind, views=2)
    plain = new_loader(None)
    for batch, unmixed in zip(loader.epoch(1), plain.epoch(1), strict=True):
        partners = mixer.partners(batch.ids[None], 1)[0]
        drawn = mixer.draw(batch.ids, unmixed.labels, unmixed.labels[partners], 1, (16, 16))
        targets = batch.targets(5)
        assert torch.equal(batch.labels, unmixed.labels)
        assert torch.equal(batch.views[2], unmixed.views[2])  # which is not mixed
        for image in range(len(batch)):
            partner, share = int(partners[image]), float(drawn.image_weights[image])
            own_label, other_label = int(unmixed.labels[image]), int(unmixed.labels[partner])
            for number in range(2):
                own, other = (unmixed.views[number][place].double() for place in (image, partner))
                if kind == "cutmix":
                    assert drawn.inside is not None
                    expected, taken = own.clone(), 0
                    for row in range(16):
                        for column in range(16):
                            if drawn.inside[image, 0, row, column]:
                                expected[:, row, column] = other[:, row, column]
                                taken += 1
                    assert share == pytest.approx(1 - taken / 256)
                else:
                    expected = share * own + (1 - share) * other
                torch.testing.assert_close(batch.views[number][image].double(), expected, rtol=0, atol=1e-6)
            weight = share
            if kind == "remix":
                if COUNTS[own_label] / COUNTS[other_label] >= 3 and share < 0.5:
                    weight = 0.0
                elif COUNTS[own_label] / COUNTS[other_label] <= 1 / 3 and 1 - share < 0.5:
                    weight = 1.0
            row_of_targets = torch.zeros(5, dtype=torch.float64)
            row_of_targets[own_label] += weight
            row_of_targets[other_label] += 1 - weight
            torch.testing.assert_close(targets[image].double(), row_of_targets, rtol=0, atol=1e-6)


def test_boxes_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(5)
    area, row, column = torch.rand(3, 200, generator=generator)
    area[:2] = torch.tensor([0.0, 1.0])
    inside = boxes(area, row, column, (12, 18))
    assert inside.shape == (200, 1, 12, 18)
    for image in range(200):
        height, width = (math.floor(side * math.sqrt(area[image])) for side in (12, 18))
        top = math.floor(12 * row[image]) - height // 2
        left = math.floor(18 * column[image]) - width // 2
        expected = torch.zeros(12, 18, dtype=torch.bool)
        expected[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = True
        assert torch.equal(inside[image, 0], expected)


def test_remix_gives_the_label_to_the_rarer_class() -> None:
    share = torch.tensor([0.49, 0.5, 0.51, 0.49, 0.6, 0.3])
    own = torch.tensor([30, 30, 10, 10, 29, 10])
    other = torch.tensor([10, 10, 30, 30, 10, 10])
    weights = remix_label_weights(share, own, other, 3.0, 0.5)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.5, 1.0, 0.49, 0.6, 0.3]))


def test_the_mean_of_two_posteriors() -> None:
    generator = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64).mul(9)
    weights = torch.tensor([0.3, 1.0, 0.0], dtype=torch.float64)
    scores = Mixture(weights, weights, None).scores(own, other, 4.0)
    expected = weights[:, None] * (own / 4).softmax(dim=1) + (1 - weights[:, None]) * (other / 4).softmax(dim=1)
    torch.testing.assert_close((scores / 4).softmax(dim=1), expected)


def test_some_images_are_mixed_and_none_late_in_the_training() -> None:
    mixer = new_mixer(probability=0.3, until=0.6)
    labels = torch.zeros(10_000, dtype=torch.int64)

    def unmixed(epoch: int) -> float:
        weights = mixer.draw(torch.arange(10_000), labels, labels, epoch, (8, 8)).image_weights
        return (weights == 1).double().mean().item()

    assert unmixed(5) == pytest.approx(0.7, abs=0.02)
    assert unmixed(6) == 1
    # 0.55 · 100 is above 55 in floating point
    mixer = Mixer(Mixing(kind="mixup", until=0.55), COUNTS, seed=7, epochs=100)
    assert (unmixed(54), unmixed(55)) == (0, 1)


def _equal(ours: Batch, theirs: Batch, rows: slice = slice(None)) -> None:
    for view, other in zip(ours.views, theirs.views, strict=True):
        torch.testing.assert_close(view, other[rows], rtol=0, atol=1e-6)
    for name in ("labels", "ids", "mixed_labels", "label_weights", "teacher_scores", "key_features"):
        tensor, other = getattr(ours, name), getattr(theirs, name)
        assert (tensor is None) == (other is None), name
        if tensor is not None:
            expected = other[rows]
            torch.testing.assert_close(tensor.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


class _Cache:
    """Scores and features that tell the image and the epoch."""

    num_fixed_views = 2

    def rng_keys(self, epoch: int, number: int) -> tuple[int, ...]:
        return (1, epoch, number)

    def lookup(self, indices: torch.Tensor, epoch: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = (indices.float() + epoch)[:, None]
        scores = torch.cat([features.sin(), features.cos(), 3 * (2 * features).sin()], dim=1) * 5
        return features, torch.stack([scores, -scores], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [None, _Cache()], ids=["", "cached"])
@pytest.mark.parametrize("sampler", ["instance", "class"])
def test_several_processes_make_the_batches_of_one(kind: str, cache: Any, sampler: str) -> None:
    alone = list(new_loader(new_mixer(kind, views=2), cache=cache, sampler=sampler).epoch(2))
    for world in (2, 3, 25):
        for rank in range(world):
            options = {"cache": cache, "rank": rank, "world": world, "sampler": sampler}
            here = new_loader(new_mixer(kind, views=2), **options).epoch(2)
            for ours, whole in zip(here, alone, strict=True):
                parts = torch.arange(len(whole)).tensor_split(world)
                if len(parts[rank]):
                    _equal(ours, whole, slice(int(parts[rank][0]), int(parts[rank][-1]) + 1))
                else:  # an image that gets no label
                    assert ours.labels.tolist() == [-1]
                    assert ours.targets(5).abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [None, _Cache()], ids=["", "cached"])
@pytest.mark.parametrize("sampler", ["instance", "class"])
def test_batches_of_the_device_are_mixed_as_those_of_the_loader(kind: str, cache: Any, sampler: str) -> None:
    loader = new_loader(new_mixer(kind, views=2), cache=cache, sampler=sampler)
    device = DeviceLoader(loader, torch.device("cpu"), math.inf, lambda _step: 0.1)
    for epoch in (0, 1):
        for (_row, size), expected in zip(device.epoch(epoch), loader.epoch(epoch), strict=True):
            _equal(device.batch(size), expected)
            device.advance()


def test_a_teacher_sees_mixed_images() -> None:
    loader = new_loader(new_mixer(views=1))

    def teacher(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        sums = [view.flatten(1).sum(dim=1) for view in batch.views]
        return sums[2][:, None], sums[0][:, None].expand(-1, 4)

    device = DeviceLoader(loader, torch.device("cpu"), math.inf, lambda _step: 0.1, teacher, kept_views=2)
    for (_row, size), expected in zip(device.epoch(0), loader.epoch(0), strict=True):
        batch = device.batch(size)
        assert batch.teacher_scores is not None
        assert batch.key_features is not None
        torch.testing.assert_close(batch.teacher_scores.flatten(1)[:, 0], expected.views[0].flatten(1).sum(dim=1))
        torch.testing.assert_close(batch.key_features[:, 0], expected.views[2].flatten(1).sum(dim=1))
        device.advance()


def test_an_epoch_is_mixed_the_same_from_any_step() -> None:
    whole = list(new_loader(new_mixer()).epoch(1))
    for ours, expected in zip(new_loader(new_mixer()).epoch(1, start=1), whole[1:], strict=True):
        _equal(ours, expected)


def test_occurrences_of_an_image_are_mixed_in_different_ways() -> None:
    weights: dict[int, list[float]] = {}
    for batch in new_loader(new_mixer(), sampler="class").epoch(1):
        assert batch.label_weights is not None
        for image, weight in zip(batch.ids.tolist(), batch.label_weights.tolist(), strict=True):
            weights.setdefault(image, []).append(weight)
    assert max(map(len, weights.values())) > 3
    assert all(len(set(drawn)) == len(drawn) for drawn in weights.values())


def test_batches_beside_the_epochs_are_not_mixed() -> None:
    loader, plain = new_loader(new_mixer()), new_loader(None)
    splits = [torch.arange(9)]
    _equal(next(loader.batches(splits, -1)), next(plain.batches(splits, -1)))


def test_parts_of_a_batch_keep_their_mixture() -> None:
    batch = next(new_loader(new_mixer()).epoch(0))
    halves = batch.split(2)
    assert torch.equal(torch.cat([half.targets(5) for half in halves]), batch.targets(5))
    torch.testing.assert_close(batch.targets(5).sum(dim=1), torch.ones(len(batch)))
