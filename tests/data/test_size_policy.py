from __future__ import annotations

from collections.abc import Sequence

import pytest

from longtail.config import Data
from longtail.data.dataset import CIFAR_MEAN, IMAGENET_MEAN, INAT_MEAN, INAT_STD
from longtail.data.size_policy import choose_size, natural_size


@pytest.mark.parametrize(("sides", "size"), [([10, 47, 300], 32), ([48], 64), ([60, 127, 500], 64), ([128, 500], 224)])
def test_a_size_follows_from_the_median(sides: Sequence[int], size: int) -> None:
    assert natural_size(sides) == size


def test_photographs_are_kept_larger_than_they_are_used() -> None:
    small = choose_size(Data(source="folder"), 100, lambda: [30])
    photos = choose_size(Data(source="folder"), 100, lambda: [300])
    assert (small.size, small.stored, small.in_memory, small.augment, small.mean) == (32, 32, True, "cifar", CIFAR_MEAN)
    assert (photos.size, photos.stored, photos.in_memory, photos.augment) == (224, 256, True, "photo")
    assert photos.mean == IMAGENET_MEAN


def test_what_does_not_fit_is_decoded_when_it_is_needed() -> None:
    images = 10**6
    policy = choose_size(Data(source="folder"), images, lambda: [300])
    assert (policy.in_memory, policy.augment) == (False, "imagenet")
    assert choose_size(Data(source="folder", memory_gib=200.0), images, lambda: [300]).in_memory


def test_augmentations_of_one_image_at_a_time_start_from_photographs_at_full_size() -> None:
    for augment, size, in_memory in (("imagenet", 224, False), ("photo", 224, True), ("imagenet", 64, True)):
        config = Data(source="folder", augment=augment, image_size=size)
        assert choose_size(config, 100, lambda: []).in_memory == in_memory


def test_a_size_that_is_given_is_taken_without_looking_at_the_images() -> None:
    def fail() -> list[int]:
        raise AssertionError

    policy = choose_size(Data(source="folder", image_size=100), 1, fail, INAT_MEAN, INAT_STD)
    assert (policy.size, policy.stored, policy.mean, policy.std) == (100, 114, INAT_MEAN, INAT_STD)
