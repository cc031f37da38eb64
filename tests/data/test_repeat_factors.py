"""Repeat factor sampling (Gupta et al., CVPR 2019), held against loops that are written from its formula."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtail.config import Data
from longtail.data.dataset import ImageSet
from longtail.data.images import ArrayImages
from longtail.data.loader import TrainLoader
from longtail.data.samplers import (
    ClassAwareSampler,
    ImageClasses,
    class_repeat_factors,
    epoch_order,
    rarest_classes,
    repeat_factors,
)
from longtail.errors import LongtailError


def image_classes(classes_of: list[list[int]]) -> ImageClasses:
    images = [image for image, labels in enumerate(classes_of) for _ in labels]
    classes = [label for labels in classes_of for label in labels]
    return ImageClasses(
        torch.tensor(images, dtype=torch.int64), torch.tensor(classes, dtype=torch.int64), len(classes_of)
    )


def factors_of(classes_of: list[list[int]], threshold: float) -> list[float]:
    factors = []
    for labels in classes_of:
        repeats = [1.0]
        for label in labels:
            fraction = sum(label in other for other in classes_of) / len(classes_of)
            repeats.append(math.sqrt(threshold / fraction))
        factors.append(max(repeats))
    return factors


IMAGES = st.lists(st.lists(st.integers(0, 8), max_size=6), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(IMAGES, st.floats(0.001, 2))
def test_factors_are_those_of_the_formula(classes_of: list[list[int]], threshold: float) -> None:
    factors = repeat_factors(image_classes(classes_of), threshold)
    assert factors.tolist() == pytest.approx(factors_of(classes_of, threshold))


def test_factors_of_classes() -> None:
    classes_of = [[0], [0, 0, 2], [0], [0]]
    assert class_repeat_factors(image_classes(classes_of), 1.0).tolist() == [1, 1, 2]  # class 1 is nowhere


@settings(max_examples=30, deadline=None)
@given(IMAGES, st.integers(0, 1000))
def test_an_epoch_shows_every_image_the_next_lower_or_higher_number_of_times(
    classes_of: list[list[int]], seed: int
) -> None:
    order = epoch_order(image_classes(classes_of), "repeat_factor", seed, 3, repeat_threshold=0.8)
    assert len(order) == len(classes_of)
    factors = factors_of(classes_of, 0.8)
    shown = Counter(order.tolist())
    for image, factor in enumerate(factors):
        expected = len(factors) * factor / sum(factors)
        assert math.floor(expected - 1e-9) <= shown[image] <= math.ceil(expected + 1e-9)


def test_images_are_shown_in_proportion_to_their_factors() -> None:
    rng = np.random.default_rng(0)
    classes_of = [[0, *rng.choice([1, 2, 3], 1, p=[0.6, 0.3, 0.1]).tolist()] for _ in range(60)] + [[4]]
    classes, epochs = image_classes(classes_of), 4000
    orders = torch.stack(
        [epoch_order(classes, "repeat_factor", 0, epoch, repeat_threshold=0.5) for epoch in range(epochs)]
    )
    means = torch.bincount(orders.flatten(), minlength=61).double() / epochs
    factors = torch.tensor(factors_of(classes_of, 0.5), dtype=torch.float64)
    expected = 61 * factors / factors.sum()
    fraction = expected - expected.floor()
    # a number of times is one of two neighbours: its deviation is that of a coin; five of them over all epochs
    limits = 5 * (fraction * (1 - fraction) / epochs).sqrt() + 1e-9
    assert bool(((means - expected).abs() <= limits).all())
    # every place of the order is alike: the rare image is in the first half of an epoch as often as in the second
    rare = torch.nonzero(orders == 60)[:, 1]
    assert abs(float((rare < 30).double().mean()) - 30 / 61) < 5 * 0.5 / math.sqrt(len(rare))


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    classes = image_classes([[index % 7] for index in range(100)] + [[7]])
    first = epoch_order(classes, "repeat_factor", 0, 4, repeat_threshold=0.1)
    assert torch.equal(first, epoch_order(classes, "repeat_factor", 0, 4, repeat_threshold=0.1))
    assert not torch.equal(first, epoch_order(classes, "repeat_factor", 0, 5, repeat_threshold=0.1))
    assert not torch.equal(first, epoch_order(classes, "repeat_factor", 1, 4, repeat_threshold=0.1))


def test_with_a_threshold_that_no_class_is_below_every_image_is_shown_once() -> None:
    classes = image_classes([[index % 3] for index in range(1000)])
    order = epoch_order(classes, "repeat_factor", 0, 0)
    assert sorted(order.tolist()) == list(range(1000))


def test_millions_of_images_lose_none() -> None:
    labels = torch.zeros(1_000_000, dtype=torch.int64)
    labels[:300] = 1
    order = epoch_order(labels, "repeat_factor", 0, 0)
    assert len(order) == len(labels)
    shown = torch.bincount(order, minlength=len(labels))
    factor = math.sqrt(0.001 / 0.0003)
    expected = 1e6 * factor / (300 * factor + 999_700)
    assert int(shown[:300].min()) >= math.floor(expected)
    assert int(shown[:300].max()) <= math.ceil(expected)
    assert int(shown.max()) <= math.ceil(expected)


@settings(max_examples=60, deadline=None)
@given(IMAGES)
def test_other_schemes_take_the_rarest_class_of_an_image(classes_of: list[list[int]]) -> None:
    counts = Counter(label for labels in classes_of for label in set(labels))
    most = min(counts, key=lambda label: (-counts[label], label)) if counts else 0
    expected = [min(labels, key=lambda label: (counts[label], label)) if labels else most for labels in classes_of]
    assert rarest_classes(image_classes(classes_of)).tolist() == expected


def test_a_sampler_for_other_trainers() -> None:
    labels = [0] * 90 + [1] * 10
    sampler = ClassAwareSampler(labels, "repeat_factor", repeat_threshold=0.4)
    sampler.set_epoch(2)
    shown = list(sampler)
    assert shown == epoch_order(torch.tensor(labels), "repeat_factor", 0, 2, repeat_threshold=0.4).tolist()
    assert abs(sum(labels[index] for index in shown) - 100 * 20 / 110) <= 1
    assert sampler.state_dict()["repeat_threshold"] == 0.4
    other = ClassAwareSampler(labels, "repeat_factor", repeat_threshold=0.3)
    with pytest.raises(LongtailError, match=r"its repeat_threshold is 0\.4, this sampler's 0\.3"):
        other.load_state_dict(sampler.state_dict())
    with pytest.raises(LongtailError, match="repeat_threshold: expected a fraction above 0, got 0"):
        ClassAwareSampler(labels, "repeat_factor", repeat_threshold=0)


def test_the_loader_repeats_images_of_rare_classes() -> None:
    labels = torch.tensor([0] * 95 + [1] * 5)
    classes = ImageClasses(torch.arange(100), labels.flip(0), 100)
    images = ImageSet(ArrayImages(torch.zeros(100, 1, 2, 2, dtype=torch.uint8)), labels, torch.arange(100), classes)
    loader = TrainLoader(images, 10, [], 0, sampler="repeat_factor", repeat_threshold=0.5)
    shown = torch.bincount(torch.cat(loader.splits(0)), minlength=100)
    # the images' classes count, not their labels
    assert int(shown[:5].min()) >= 2
    assert int(shown[5:].max()) <= 1


def test_the_setting() -> None:
    assert Data(sampler="repeat_factor").repeat_threshold == 0.001
