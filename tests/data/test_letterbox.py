"""Tests of the letterbox and of boxes back from it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from longtail.data.dataset import IMAGENET_MEAN
from longtail.data.letterbox import FILL, boxes_in_image, letterbox, size_in_square


def test_the_rest_has_the_mean_color() -> None:
    assert tuple(round(255 * value) for value in IMAGENET_MEAN) == FILL
    square, _ = letterbox(Image.new("RGB", (8, 4), "white"), 8)
    assert square.getpixel((7, 3)) == (255, 255, 255)
    assert square.getpixel((0, 4)) == FILL
    assert letterbox(Image.new("RGB", (8, 4)), 8, (1, 2, 3))[0].getpixel((0, 7)) == (1, 2, 3)


@pytest.mark.parametrize(("image_size", "shown"), [((100, 50), (64, 32)), ((3, 1000), (1, 64)), ((64, 64), (64, 64))])
def test_boxes_go_back_to_where_they_were(image_size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert size_in_square(image_size, 64) == shown
    width, height = image_size
    across, down = (shown[0] / width, shown[1] / height)
    box = np.array([[0.25 * width, 0.5 * height, 0.75 * width, height]])
    in_square = box * [across, down, across, down]
    in_padding = np.array([[0, shown[1] + 1.0, 10, shown[1] + 5.0]])
    beyond = np.array([[-5.0, -5, 70, 70]])
    boxes, kept = boxes_in_image(np.concatenate([in_square, in_padding, beyond]), image_size, 64)
    assert kept.tolist() == [True, False, True]
    np.testing.assert_allclose(boxes[0], box[0], rtol=1e-6)
    assert boxes[2].tolist() == [0, 0, width, height]


def test_no_boxes() -> None:
    boxes, kept = boxes_in_image(np.zeros((0, 4), dtype=np.float32), (10, 20), 64)
    assert boxes.shape == (0, 4)
    assert kept.shape == (0,)
