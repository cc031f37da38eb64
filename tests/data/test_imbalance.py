from __future__ import annotations

import pytest
import torch

from longtail.data.imbalance import permuted_by_class, profile_counts, subsample


@pytest.mark.parametrize(
    ("largest", "classes", "factor", "total"),
    [
        (500, 100, 100, 10_847),
        (500, 100, 50, 12_608),
        (500, 100, 10, 19_573),
        (5000, 10, 100, 12_406),
        (5000, 10, 50, 13_996),
        (5000, 10, 10, 20_431),
    ],
)
def test_totals_are_the_published_ones(largest: int, classes: int, factor: float, total: int) -> None:
    counts = profile_counts("exponential", largest, classes, factor)
    assert sum(counts) == total
    assert counts[0] == largest
    assert counts == sorted(counts, reverse=True)


def test_shot_groups_of_cifar_100() -> None:
    counts = profile_counts("exponential", 500, 100, 100)
    assert counts[-1] == 5
    assert sum(c > 100 for c in counts) == 35
    assert sum(20 <= c <= 100 for c in counts) == 35
    assert sum(c < 20 for c in counts) == 30


def test_a_longer_tail_keeps_a_part_of_a_shorter_ones_images() -> None:
    labels = torch.arange(10).repeat_interleave(60)[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    order = permuted_by_class(labels, 10, seed=4)
    long, short = (set(subsample(order, profile_counts("exponential", 60, 10, f)).tolist()) for f in (30, 5))
    assert long < short
    other = set(subsample(permuted_by_class(labels, 10, seed=5), profile_counts("exponential", 60, 10, 30)).tolist())
    assert other != long
