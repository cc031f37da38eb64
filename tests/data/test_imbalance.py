from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longtail.data.imbalance import (
    gini,
    hold_out_balanced,
    imbalance_factor,
    long_tailed,
    permuted_by_class,
    profile_counts,
    rank_classes,
    remarks_on_tail,
    resolve_profile,
    stratified_split,
    subsample,
)
from longtail.errors import LongtailError


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


@pytest.mark.parametrize("profile", ["exponential", "step", "pareto"])
@pytest.mark.parametrize("factor", [1, 10, 100])
def test_profiles_fall_from_head_to_tail_by_the_factor(profile: str, factor: float) -> None:
    counts = profile_counts(profile, 1000, 20, factor)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 1000
    assert counts[-1] == 1000 / factor
    if profile == "step" and factor > 1:
        assert counts.count(1000) == 10


def test_a_power_law_is_between_a_step_and_an_exponential_in_its_middle() -> None:
    middle = {profile: profile_counts(profile, 1000, 21, 100)[10] for profile in ("exponential", "pareto")}
    assert middle["exponential"] == 100
    # (1 + ½(100^(1/6) − 1))^−6 · 1000
    assert middle["pareto"] == int(1000 * (1 + 0.5 * (100 ** (1 / 6) - 1)) ** -6)


@pytest.mark.parametrize("profile", ["exponential", "step", "pareto"])
@pytest.mark.parametrize("ranks", ["index", "name", "random"])
def test_long_tailed_sets_are_nested(profile: str, ranks: str) -> None:
    labels = torch.arange(6).repeat_interleave(200)[torch.randperm(1200, generator=torch.Generator().manual_seed(1))]
    names = ["f", "b", "d", "a", "e", "c"]
    order = permuted_by_class(labels, 6, seed=2)
    kept = [set(long_tailed(order, names, profile, factor, ranks, 2).tolist()) for factor in (100, 10, 1)]
    assert kept[0] < kept[1] < kept[2]
    counts = torch.bincount(labels[torch.tensor(sorted(kept[0]))], minlength=6).tolist()
    ranked = rank_classes(ranks, names, 2)
    assert [counts[index] for index in ranked] == profile_counts(profile, 200, 6, 100)
    if ranks == "name":
        assert [names[index] for index in ranked] == sorted(names)


def test_a_class_with_fewer_images_than_the_profile_wants_keeps_all() -> None:
    labels = torch.tensor([0] * 100 + [1] * 3 + [2] * 50)
    kept = long_tailed(permuted_by_class(labels, 3, 0), ["a", "b", "c"], "exponential", 4, "index", 0)
    assert torch.bincount(labels[kept]).tolist() == [100, 3, 25]
    natural = long_tailed(permuted_by_class(labels, 3, 0), ["a", "b", "c"], "natural", 4, "index", 0)
    assert torch.equal(natural, torch.arange(153))


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=8),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([0.1, 0.2, 0.5]),
    st.integers(0, 100),
)
def test_splits_leave_every_class_of_three_an_image_in_each(
    counts: list[int], val: float, test: float, seed: int
) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assignment, short = stratified_split(labels, len(counts), val, test, seed)
    again, _ = stratified_split(labels, len(counts), val, test, seed)
    assert torch.equal(assignment, again)
    for index, count in enumerate(counts):
        shares = torch.bincount(assignment[labels == index], minlength=3).tolist()
        assert sum(shares) == count
        assert shares[0] >= 1
        if count >= 3:
            assert shares[2] >= 1
            assert (shares[1] >= 1) == (val > 0)
            assert index not in short
            for share, wanted in ((shares[1], val), (shares[2], test)):
                assert share <= max(1, round(count * wanted))
        else:
            assert (index in short) == (count == 1 or val > 0)


def test_a_held_out_split_is_balanced_and_leaves_the_rest() -> None:
    order = [torch.arange(10), torch.arange(10, 15)]
    held_out, rest = hold_out_balanced(order, 0.4)
    assert held_out is not None
    assert held_out.tolist() == [0, 1, 10, 11]
    assert [len(positions) for positions in rest] == [8, 3]
    assert hold_out_balanced(order, 0.0)[0] is None


def test_the_tail_is_made_of_balanced_sets_unless_a_profile_is_asked_for() -> None:
    assert resolve_profile("auto", balanced=True) == "exponential"
    assert resolve_profile("auto", balanced=False) == "natural"
    assert resolve_profile("natural", balanced=True) == "natural"
    assert resolve_profile("step", balanced=False) == "step"


def test_gini_and_factor() -> None:
    assert gini([5, 5, 5]) == 0
    assert gini([0, 0, 0, 12]) == pytest.approx(0.75)
    assert gini([1, 3]) == pytest.approx(0.25)
    assert imbalance_factor([10, 2, 5]) == 5
    assert imbalance_factor([10, 0]) == math.inf


@pytest.mark.parametrize("wrong", [3, 255, -1])
def test_a_label_out_of_range_is_named(wrong: int) -> None:
    labels = torch.tensor([0, 1, 2, wrong, 0, 0])
    with pytest.raises(LongtailError, match=rf"^labels: expected values in \[0, 3\), got {wrong} for image 3$"):
        permuted_by_class(labels, 3, 0)
    with pytest.raises(LongtailError, match=rf"got {wrong} for image 3$"):
        stratified_split(labels, 3, 0.1, 0.2, 0)


@pytest.mark.parametrize("profile", ["exponential", "step", "pareto"])
@pytest.mark.parametrize("largest", [49, 98, 103, 107, 4980])
def test_the_last_class_has_its_image_at_the_largest_factor(profile: str, largest: int) -> None:
    for divisor in (1, 2, 5, 10, 20):
        if largest % divisor == 0:
            counts = profile_counts(profile, largest, 10, largest / divisor)
            assert (counts[0], counts[-1]) == (largest, divisor)


def remarks(counts: list[int], profile: str, factor: float, order: str = "index") -> tuple[list[int], list[str]]:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    names = [f"class {index}" for index in range(len(counts))]
    positions = permuted_by_class(labels, len(counts), 0)
    kept = labels[long_tailed(positions, names, profile, factor, order, 0)]
    said = remarks_on_tail(positions, kept, names, profile, factor, order, 0)
    return torch.bincount(kept).tolist(), said


def test_a_tail_of_its_own_that_is_longer_than_the_one_asked_for_is_remarked_on() -> None:
    counts, (remark,) = remarks([70, 42, 21, 9, 1], "exponential", 10)
    assert counts == [70, 39, 21, 9, 1]
    assert remark == (
        "data.imbalance 10: is 70 in fact: class 'class 4' has 1 training image, and the profile asks for 7"
    )
    counts, (remark,) = remarks([50, 100, 60, 40, 30], "exponential", 10)
    assert counts[0] == max(counts) == 50
    assert "the head is 'class 0' with 50 images, and no class keeps more, although 'class 1' has 100" in remark


@pytest.mark.parametrize(("profile", "factor"), [("exponential", 7), ("step", 3), ("pareto", 100), ("natural", 10)])
def test_a_tail_that_is_as_asked_for_is_not_remarked_on(profile: str, factor: float) -> None:
    assert remarks([333] * 10, profile, factor)[1] == []
    assert remarks([100, 95, 90, 85, 80], profile, min(factor, 1.3))[1] == []
