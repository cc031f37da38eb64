"""Rare classes are on both sides of a split; held against iterative stratification written from its paper."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtail.data.detection import Annotations, split_images


def annotations_of(classes_of: list[set[int]], classes: int) -> Annotations:
    """Return annotations of images with an object of each of their classes."""
    pairs = [(image, label) for image, labels in enumerate(classes_of) for label in sorted(labels)]
    owner, labels = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for side in (0, 1))
    return Annotations(
        files=tuple(f"{number}.png" for number in range(len(classes_of))),
        sizes=torch.full((len(classes_of), 2), 10),
        image_ids=tuple(range(len(classes_of))),
        class_names=tuple(f"c{number}" for number in range(classes)),
        image_index=owner,
        boxes=torch.tensor([[0.0, 0, 5, 5]]).expand(len(pairs), 4),
        labels=labels,
        ignored=torch.zeros(len(pairs), dtype=torch.bool),
        areas=torch.full((len(pairs),), 25.0),
    )


def long_tailed_images(count: int, classes: int, seed: int) -> list[set[int]]:
    """Return the classes of images, one to five of a long tail; some images have none."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, classes + 1) ** 1.2
    images = [
        set(rng.choice(classes, rng.integers(0, 6), replace=True, p=weights / weights.sum()).tolist())
        for _ in range(count)
    ]
    for label in range(classes):  # every class is there
        images[label].add(label)
    return images


def iterative_stratification(images: list[set[int]], classes: int, fractions: list[float], seed: int) -> list[int]:
    """Return the part of each image, by algorithm 1 of Sechidis, Tsoumakas and Vlahavas (ECML 2011)."""
    rng = np.random.default_rng(seed)
    desired = [fraction * len(images) for fraction in fractions]
    by_class = [
        [fraction * sum(label in image for image in images) for label in range(classes)] for fraction in fractions
    ]
    parts, left = [-1] * len(images), {index for index, image in enumerate(images) if image}
    while left:
        remaining = [sum(label in images[index] for index in left) for label in range(classes)]
        rarest = min((label for label in range(classes) if remaining[label]), key=lambda label: remaining[label])
        for index in sorted(index for index in left if rarest in images[index]):
            order = [(by_class[part][rarest], desired[part], rng.random(), part) for part in range(len(fractions))]
            part = max(order)[-1]
            parts[index] = part
            left.discard(index)
            desired[part] -= 1
            for label in images[index]:
                by_class[part][label] -= 1
    return parts


def deviation(images: list[set[int]], parts: list[int], classes: int, fractions: list[float]) -> float:
    """Return the mean over parts, and classes of 10 images or more, of |the part's share of a class − its fraction|."""
    gaps = []
    for label in range(classes):
        mine = [part for image, part in zip(images, parts, strict=True) if label in image]
        if len(mine) < 10:
            continue
        gaps += [abs(mine.count(part) / len(mine) - fraction) for part, fraction in enumerate(fractions)]
    return float(np.mean(gaps))


def test_frequent_classes_are_as_even_as_by_iterative_stratification() -> None:
    classes, fractions = 30, [0.7, 0.1, 0.2]
    gaps = []
    for seed in range(4):
        images = long_tailed_images(400, classes, seed)
        split = split_images(annotations_of(images, classes), 0.1, 0.2, seed)
        reference = iterative_stratification(images, classes, fractions, seed)
        shuffled = np.random.default_rng(seed).permutation(split.parts).tolist()
        gaps.append(
            [deviation(images, parts, classes, fractions) for parts in (split.parts.tolist(), reference, shuffled)]
        )
        sizes = torch.bincount(split.parts, minlength=3) / len(images)
        assert (sizes - torch.tensor(fractions)).abs().max() < 0.05
    mine, by_reference, by_chance = np.mean(gaps, axis=0)
    assert mine < 1.2 * by_reference
    assert mine < 0.5 * by_chance


def test_rare_classes_are_on_both_sides_where_iterative_stratification_leaves_them_on_one() -> None:
    classes = 60
    images = long_tailed_images(200, classes, 0)
    split = split_images(annotations_of(images, classes), 0.0, 0.2, 0)
    reference = iterative_stratification(images, classes, [0.8, 0.2], 0)

    def on_one_side(parts: list[int]) -> list[int]:
        sides = [
            {part for image, part in zip(images, parts, strict=True) if label in image} for label in range(classes)
        ]
        counts = [sum(label in image for image in images) for label in range(classes)]
        return [label for label in range(classes) if counts[label] > 1 and len(sides[label]) == 1]

    assert on_one_side(split.parts.tolist()) == []
    assert len(on_one_side(reference)) > 5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20))
def test_every_class_of_two_images_is_in_train_and_test(seed: int) -> None:
    classes = 20
    images = long_tailed_images(60, classes, seed)
    split = split_images(annotations_of(images, classes), 0.0, 0.3, seed)
    for label in range(classes):
        parts = {int(part) for image, part in zip(images, split.parts, strict=True) if label in image}
        count = sum(label in image for image in images)
        assert parts == ({0, 2} if count > 1 else {0}) or label in split.missing
        assert (label in split.missing) == (parts != {0, 2})
    # what is missing has a single image, or cannot be had: with classes of two images in pairs that form an odd ring
    assert all(sum(label in image for image in images) <= 2 for label in split.missing)


def test_what_cannot_be_had_is_said() -> None:
    """Three images with three classes, each in two of them: some class is in one part only, however they are split."""
    split = split_images(annotations_of([{0, 1}, {1, 2}, {0, 2}], 3), 0.0, 0.4, 0)
    assert len(split.missing) == 1


def test_images_without_objects_are_divided_too() -> None:
    images: list[set[int]] = [{0}] * 10 + [set()] * 100
    split = split_images(annotations_of(images, 1), 0.1, 0.2, 0)
    assert torch.bincount(split.parts[10:]).tolist() == [70, 10, 20]
    assert torch.equal(split.parts, split_images(annotations_of(images, 1), 0.1, 0.2, 0).parts)
    assert not torch.equal(split.parts, split_images(annotations_of(images, 1), 0.1, 0.2, 1).parts)
