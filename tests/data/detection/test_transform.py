"""A rectangle stays under its box, whatever is done to its image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from longtail.box_labels import IGNORED_TARGET, PADDING_TARGET
from longtail.data.detection import DetectionSample, DetectionTransform, letterbox
from longtail.data.letterbox import FILL
from tests.data.detection.drawn import COLORS, NAMES, Drawn, drawn_images

SIZE = 96


def sample_of(drawn: Drawn, ignored: bool = False) -> DetectionSample:
    pixels = np.full((drawn.height, drawn.width, 3), 128, dtype=np.uint8)
    for name, left, top, right, bottom in drawn.objects:
        pixels[top:bottom, left:right] = COLORS[name]
    return DetectionSample(
        Image.fromarray(pixels),
        torch.tensor([box for _, *box in drawn.objects], dtype=torch.float32).view(-1, 4),
        torch.tensor([NAMES.index(name) for name, *_ in drawn.objects], dtype=torch.int64),
        torch.full((len(drawn.objects),), ignored),
    )


def colored(view: torch.Tensor, name: str) -> torch.Tensor:
    """Return where a view has nearly the colour of a class, (S, S) bool."""
    color = torch.tensor(COLORS[name]).view(3, 1, 1)
    return (view.int() - color).abs().amax(dim=0) < 40


@pytest.mark.parametrize(
    ("scale", "mirror"), [((1.0, 1.0), 0.0), ((1.0, 1.0), 1.0), ((0.4, 0.9), 0.5), ((1.2, 3.0), 0.5), ((0.4, 3.0), 0.5)]
)
def test_a_rectangle_stays_under_its_box(scale: tuple[float, float], mirror: float) -> None:
    transform = DetectionTransform(SIZE, 5, scale, mirror)
    seen = 0
    for number, drawn in enumerate(drawn_images(40)):
        view, targets = transform(sample_of(drawn), number, (3, 1))
        assert view.shape == (3, SIZE, SIZE)
        assert view.dtype == torch.uint8
        for name in {name for name, *_ in drawn.objects}:
            rows = targets[(targets[:, 4] == NAMES.index(name))]
            regions = targets[targets[:, 4] == IGNORED_TARGET]
            where = torch.nonzero(colored(view, name))
            for x1, y1, x2, y2 in rows[:, :4].tolist():
                seen += 1
                # its pixels are there up to the border, which the scaling blurs, and end there
                inner = (math.ceil(x1 + 1.5), math.floor(x2 - 1.5), math.ceil(y1 + 1.5), math.floor(y2 - 1.5))
                assert bool(colored(view, name)[inner[2] : inner[3], inner[0] : inner[1]].all())
                assert where[:, 1].min() >= x1 - 1.5
                assert where[:, 1].max() <= x2 + 0.5
                assert where[:, 0].min() >= y1 - 1.5
                assert where[:, 0].max() <= y2 + 0.5
            if not len(rows) and not len(regions):
                assert len(where) < 30  # at most a sliver at the border of the crop
    assert seen > 30


@pytest.mark.parametrize("size", [(80, 40), (40, 80), (50, 50), (333, 111)])
def test_without_augmentation_it_is_the_letterbox(size: tuple[int, int]) -> None:
    width, height = size
    drawn = Drawn(width, height, [("red", 5, 6, 25, 20)])
    sample = sample_of(drawn)
    view, targets = DetectionTransform(SIZE, 2)(sample, 7, (0,))
    square, (across, down) = letterbox(sample.image, SIZE)
    assert torch.equal(view, torch.from_numpy(np.array(square)).permute(2, 0, 1))
    expected = torch.tensor([5 * across, 6 * down, 25 * across, 20 * down, 2])
    torch.testing.assert_close(targets[0], expected)
    assert targets[1].tolist() == [0, 0, 0, 0, PADDING_TARGET]
    assert max(across, down) == pytest.approx(SIZE / max(size), rel=0.01)
    if width != height:
        assert tuple(view[:, -1, -1].tolist()) == FILL


def test_a_view_is_a_function_of_its_keys() -> None:
    transform, sample = DetectionTransform(SIZE, 3, (0.5, 2.0), 0.5, 0.4), sample_of(drawn_images(1)[0])
    views = [transform(sample, image_id, (seed, 5)) for image_id, seed in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert torch.equal(views[0][0], views[1][0])
    assert torch.equal(views[0][1], views[1][1])
    assert not torch.equal(views[0][0], views[2][0])
    assert not torch.equal(views[0][0], views[3][0])


def test_jitter_leaves_boxes_alone() -> None:
    sample = sample_of(drawn_images(1)[0])
    plain = DetectionTransform(SIZE, 3, (0.5, 2.0), 0.5)(sample, 0, (0,))
    jittered = DetectionTransform(SIZE, 3, (0.5, 2.0), 0.5, 0.4)(sample, 0, (0,))
    assert torch.equal(plain[1], jittered[1])
    assert not torch.equal(plain[0], jittered[0])


def test_boxes_are_inside_the_view_and_objects_cut_off_are_ignored() -> None:
    drawn = Drawn(100, 100, [("red", 10, 10, 30, 30), ("blue", 0, 0, 100, 100)])
    sample, transform = sample_of(drawn), DetectionTransform(SIZE, 2, (4.0, 4.0), min_visible=0.5)
    seen = {"whole": 0, "cut": 0, "gone": 0}
    for image_id in range(200):
        _, targets = transform(sample, image_id, (0,))
        assert float(targets[:, :4].min()) >= 0
        assert float(targets[:, :4].max()) <= SIZE
        # of the large object a sixteenth is visible at a scale of 4
        assert targets[-1, 4] == IGNORED_TARGET or targets[0, 4] == IGNORED_TARGET
        rows = [row for row in targets.tolist() if row[4] != PADDING_TARGET][:-1]
        area = (rows[0][2] - rows[0][0]) * (rows[0][3] - rows[0][1]) / (20 * 4 * SIZE / 100) ** 2 if rows else 0.0
        kind = "gone" if not rows else "whole" if rows[0][4] == 2 else "cut"
        seen[kind] += 1
        assert (area == 0) if kind == "gone" else (area >= 0.499) if kind == "whole" else (area < 0.5)
    assert min(seen.values()) > 10


def test_ignored_objects_are_regions_and_not_classes() -> None:
    drawn = drawn_images(1)[0]
    _, targets = DetectionTransform(SIZE, 4)(sample_of(drawn, ignored=True), 0, (0,))
    assert targets[:, 4].tolist() == [IGNORED_TARGET] * len(drawn.objects) + [PADDING_TARGET] * (4 - len(drawn.objects))


def test_tiny_objects_stay_objects() -> None:
    sample = sample_of(Drawn(960, 960, [("red", 100, 100, 105, 105)]))
    _, targets = DetectionTransform(SIZE, 1)(sample, 0, (0,))
    torch.testing.assert_close(targets[0], torch.tensor([10.0, 10.0, 10.5, 10.5, 2.0]))
