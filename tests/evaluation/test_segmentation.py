"""IoU against counts in NumPy; the bands of boundary IoU against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longtail.evaluation.segmentation import boundary_band, boundary_mask, count_pixels, pixel_metrics


def images(count: int = 5, classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        height, width = rng.integers(20, 40, 2)
        truth = rng.integers(-1, classes, (height // 5 + 1, width // 5 + 1)).repeat(5, 0).repeat(5, 1)[:height, :width]
        predicted = np.where(
            rng.random((height, width)) < 0.3, rng.integers(0, classes, (height, width)), truth.clip(0)
        )
        pairs.append((torch.from_numpy(predicted.astype(np.int64)), torch.from_numpy(truth.astype(np.int64))))
    return pairs


def test_against_numpy() -> None:
    pairs, pixel_counts = images(), [100, 50, 10, 5]
    counts = sum((count_pixels(p, t, 4, 0.05) for p, t in pairs), torch.zeros(6, 4, dtype=torch.int64))
    got = pixel_metrics(counts, pixel_counts, len(pairs))
    predicted = np.concatenate([p.numpy().ravel()[t.numpy().ravel() >= 0] for p, t in pairs])
    truth = np.concatenate([t.numpy().ravel()[t.numpy().ravel() >= 0] for _, t in pairs])
    iou = [100 * np.sum((predicted == c) & (truth == c)) / np.sum((predicted == c) | (truth == c)) for c in range(4)]
    accuracy = [100 * np.mean(predicted[truth == c] == c) for c in range(4)]
    assert got["per_class"] == pytest.approx(iou)
    assert got["mean_iou"] == pytest.approx(np.mean(iou))
    assert got["balanced_accuracy"] == pytest.approx(np.mean(accuracy))
    assert got["top1"] == pytest.approx(100 * np.mean(predicted == truth))
    assert got["head"] == pytest.approx(iou[0])
    assert got["tail"] == pytest.approx(iou[3])


def naive_band(labels: np.ndarray, width: int) -> np.ndarray:
    height, across = labels.shape
    band = np.zeros(labels.shape, dtype=bool)
    for y in range(height):
        for x in range(across):
            for dy in range(-width, width + 1):
                for dx in range(-width, width + 1):
                    inside = 0 <= y + dy < height and 0 <= x + dx < across
                    if not inside or labels[y + dy, x + dx] != labels[y, x]:
                        band[y, x] = True
    return band


@pytest.mark.parametrize("width", [1, 3])
def test_bands_along_boundaries(width: int) -> None:
    for predicted, truth in images(2):
        for labels in (predicted, truth):
            assert np.array_equal(boundary_mask(labels, width).numpy(), naive_band(labels.numpy(), width))


def test_boundary_iou_against_counting() -> None:
    predicted, truth = images(1)[0]
    width = max(1, round(0.05 * float(np.hypot(*truth.shape))))
    known = truth.numpy() >= 0
    # where the labelled part ends is a boundary of the prediction too
    bands = [naive_band(np.where(known, labels.numpy(), -1), width) & known for labels in (truth, predicted)]
    got = pixel_metrics(count_pixels(predicted, truth, 4, 0.05), [4, 3, 2, 1], 1)["per_class_boundary"]
    for index in range(4):
        a, b = bands[0] & (truth.numpy() == index), bands[1] & (predicted.numpy() == index)
        assert got[index] == pytest.approx(100 * (a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("unlabelled", [slice(17, 19), slice(0, 5), slice(30, 36)])
def test_a_right_prediction_has_a_boundary_iou_of_100(unlabelled: slice) -> None:
    truth = torch.zeros(36, 48, dtype=torch.int64)
    truth[:, 24:] = 1
    predicted = truth.clone()
    truth[unlabelled] = -1
    got = pixel_metrics(count_pixels(predicted, truth, 2), [2, 1], 1)
    assert (got["mean_iou"], got["per_class_boundary"]) == (100.0, [100.0, 100.0])


def test_unlabelled_pixels_are_ignored_and_an_absent_class_is_none() -> None:
    truth = torch.full((8, 8), -1)
    truth[:4] = 0
    predicted = torch.zeros(8, 8, dtype=torch.int64)
    predicted[4:] = 1  # where nothing is labelled
    got = pixel_metrics(count_pixels(predicted, truth, 3), [3, 2, 1], 1)
    assert got["per_class"] == [100.0, None, None]
    assert (got["mean_iou"], got["tail"]) == (100.0, None)


@pytest.mark.parametrize("width", [1, 5, 20, 46])
def test_bands_are_those_of_pooling(width: int) -> None:
    """Wider than the image too; the maximum over a square is that of max_pool2d."""
    for labels in (truth for _, truth in images(2)):
        values = F.pad(labels[None, None].float(), (width,) * 4, value=-2.0)
        largest, smallest = (sign * F.max_pool2d(sign * values, 2 * width + 1, stride=1)[0, 0] for sign in (1, -1))
        assert torch.equal(boundary_mask(labels, width), largest != smallest)


def test_several_predictions_share_the_band_of_the_labels() -> None:
    predicted, truth = images(1)[0]
    counts, band = count_pixels(predicted, truth, 4, 0.05), boundary_band(truth, 0.05)
    assert torch.equal(count_pixels(predicted, truth, 4, 0.05, band), counts)
    nothing = count_pixels(predicted, truth, 4, 0.05, torch.zeros_like(band))  # it is used as it is given
    assert nothing[3].tolist() == [0] * 4


def test_without_boundaries_the_rest_is_the_same() -> None:
    predicted, truth = images(1)[0]
    whole, some = (pixel_metrics(count_pixels(predicted, truth, 4, width), [4, 3, 2, 1], 1) for width in (0.05, None))
    assert some == {name: value for name, value in whole.items() if "boundary" not in name}
    assert whole.keys() - some.keys() == {"boundary_iou", "per_class_boundary"}
