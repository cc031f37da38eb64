"""Pixels as samples: shared out evenly, at the right place, and void never among them."""

from __future__ import annotations

import math
from collections import Counter

import torch
import torch.nn.functional as F

from longtail.nn.segmentation import downsample_labels, upsample_scores
from longtail.tasks.segmentation.pixels import draw_points, features_at, regions


def picture(height: int = 24, width: int = 36) -> torch.Tensor:
    """One image of sky with a sign of 6 pixels and a void border, and one that is all void but for 3 pixels."""
    labels = torch.zeros(2, height, width, dtype=torch.int64)
    labels[0, :2], labels[0, 12:], labels[0, 5, 10:16] = -1, 2, 1
    labels[1] = -1
    labels[1, 4, 4:7] = 3
    return labels


def test_classes_get_equal_shares() -> None:
    torch.manual_seed(0)
    labels = picture()
    rows, columns, drawn = draw_points(labels, 20)
    counts = Counter(drawn[0].tolist())
    assert counts == {0: 7, 1: 6, 2: 7}  # the sign has no more than 6
    assert sorted(drawn[1].tolist(), reverse=True)[:3] == [3, 3, 3]
    assert (drawn[1] == -1).sum() == 17
    for image in range(2):
        there = drawn[image] >= 0
        assert torch.equal(labels[image, rows[image], columns[image]][there], drawn[image][there])
        places = set(zip(rows[image][there].tolist(), columns[image][there].tolist(), strict=True))
        assert len(places) == int(there.sum())  # none twice


def test_an_unfinished_turn_prefers_no_class() -> None:
    torch.manual_seed(0)
    labels = torch.arange(4).repeat_interleave(16).view(1, 8, 8)
    counts = Counter[int]()
    for _ in range(400):
        counts.update(draw_points(labels, 6)[2][0].tolist())  # one each, and a second of two of them
    assert all(abs(count - 600) < 60 for count in counts.values())


def test_a_large_image_is_looked_at_in_steps() -> None:
    torch.manual_seed(0)
    labels = torch.randint(-1, 5, (2, 300, 410))
    rows, columns, drawn = draw_points(labels, 64)
    for image in range(2):
        assert torch.equal(labels[image, rows[image], columns[image]], drawn[image])
    assert set(drawn.flatten().tolist()) == {0, 1, 2, 3, 4}


def test_features_of_pixels_are_those_of_the_enlarged_map() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 5, 6, 9)
    whole = upsample_scores(maps, 23, 35)
    rows, columns = torch.randint(23, (2, 40)), torch.randint(35, (2, 40))
    got = features_at(maps, rows, columns).view(2, 40, 5)
    for image in range(2):
        assert torch.allclose(got[image], whole[image][:, rows[image], columns[image]].t(), atol=1e-5)
    assert torch.allclose(whole, F.interpolate(maps, scale_factor=4, mode="bilinear")[..., :23, :35])


def test_regions_are_means_of_classes_in_images() -> None:
    torch.manual_seed(0)
    labels, maps = picture(), torch.randn(2, 5, 6, 9)
    means, classes = regions(maps, labels, 5)
    squares = downsample_labels(labels)
    assert squares.shape == (2, 6, 9)
    for image in range(2):
        for index in range(5):
            row, chosen = image * 5 + index, squares[image] == index
            if chosen.any():
                assert classes[row] == index
                assert torch.allclose(means[row], maps[image][:, chosen].mean(dim=1), atol=1e-6)
            else:
                assert classes[row] == -1
    assert math.isfinite(means.sum().item())


def test_maps_in_half_precision_give_the_same_features() -> None:
    """As autocast leaves them: counts beyond 256 and positions are not rounded."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 8, 60, 80, generator=generator).bfloat16()
    labels = torch.zeros(2, 240, 320, dtype=torch.int64)
    labels[:, :, 300:] = 1
    means, classes = regions(maps, labels, 2)
    expected, _ = regions(maps.float(), labels, 2)
    assert classes.tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(means.float(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected[0], maps[0, :, :, :75].float().mean(dim=(1, 2)), rtol=1e-4, atol=1e-4)
    rows, columns = (torch.randint(size, (2, 40), generator=generator) for size in (240, 320))
    got = features_at(maps, rows, columns).float()
    torch.testing.assert_close(got, features_at(maps.float(), rows, columns), rtol=1e-5, atol=1e-5)
