"""Average precision beside pycocotools, federated annotations, and intervals from the table of matches."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from longtail.data.detection import Annotations, Detections, concatenate
from longtail.errors import LongtailError
from longtail.evaluation.detection import detection_metrics
from longtail.evaluation.detection_matches import coco_masks, detection_table, encode_mask, match_table
from tests.evaluation.detections import draw_detections

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

SIDE = 256


def pycocotools(
    detections: list[Detections], annotations: Annotations, iou_type: str = "bbox", further: list[Any] | None = None
) -> Any:
    """Return pycocotools' evaluation: precision (T, R, C, A, M), recall (T, C, A, M) and the twelve figures."""

    def box(corners: list[float]) -> list[float]:
        return [corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]]

    found = [
        {"image_id": image + 1, "category_id": label + 1, "bbox": box(corners), "score": score}
        | ({"segmentation": each.masks[index]} if iou_type == "segm" and each.masks is not None else {})
        for image, each in enumerate(detections)
        for index, (corners, label, score) in enumerate(
            zip(each.boxes.double().tolist(), each.labels.tolist(), each.scores.tolist(), strict=True)
        )
    ]
    for entry in found:
        entry.pop("bbox") if iou_type == "segm" else None
    objects = [
        {
            "id": index + 1,
            "image_id": int(annotations.image_index[index]) + 1,
            "category_id": int(annotations.labels[index]) + 1,
            "bbox": box(annotations.boxes[index].double().tolist()),
            "area": float(annotations.areas[index]),
            "iscrowd": int(annotations.ignored[index]),
        }
        | ({} if annotations.masks is None else {"segmentation": annotations.masks[index]})
        for index in range(len(annotations.labels))
    ]
    for number, entry in enumerate(further or []):
        objects.append({"id": len(objects) + 1 + number, **entry})
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i + 1, "height": h, "width": w} for i, (h, w) in enumerate(annotations.sizes.tolist())],
        "categories": [{"id": label + 1} for label in range(len(annotations.class_names))],
        "annotations": objects,
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def close(value: float | None, expected: float) -> None:
    """Compare percent with a fraction; −1 is pycocotools' word for nothing to be found."""
    if expected < 0:
        assert value is None
    else:
        assert value == pytest.approx(100 * expected, abs=1e-6)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_those_of_pycocotools(seed: int, iou_type: Any) -> None:
    """With crowds, equal scores, images without objects or detections, and a class that has no object."""
    detections, annotations = draw_detections(seed, masks=iou_type == "segm")
    metrics = detection_metrics(detections, annotations, iou_type=iou_type, resamples=0)
    evaluation = pycocotools(detections, annotations, iou_type)
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    for name, expected in zip((*names, "ar"), (*evaluation.stats[:6], evaluation.stats[8]), strict=True):
        close(metrics[name], expected)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    for label in range(len(annotations.class_names)):
        close(metrics["per_class"][label], precision[:, :, label].mean())
        close(metrics["per_class_ap50"][label], precision[0, :, label].mean())
    assert metrics["per_class"][-1] is None
    assert metrics["operating_points"][-1] is None
    assert 0 < metrics["ap"] < metrics["ap50"]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_table_of_matches_gives_the_same_average_precision(iou_type: Any) -> None:
    detections, annotations = draw_detections(2, masks=iou_type == "segm")
    evaluation = pycocotools(detections, annotations, iou_type)
    table, once = detection_table(detections, annotations, iou_type), np.ones((1, len(annotations)), dtype=np.int64)
    for place, area in enumerate([(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)]):
        ours = match_table(table, annotations, area).average_precision(once)[0]
        expected = evaluation.eval["precision"][:, :, :, place, -1].mean(axis=1)
        np.testing.assert_allclose(np.where(np.isnan(ours), -1, ours), expected, atol=1e-9)


def test_a_resampled_set_is_a_set_with_images_twice() -> None:
    detections, annotations = draw_detections(3, ties=False)
    images = np.random.default_rng(0).integers(len(annotations), size=len(annotations))
    drawn = np.sort(images).tolist()
    weights = np.bincount(images, minlength=len(annotations))[None]
    ours = match_table(detection_table(detections, annotations), annotations).average_precision(weights)[0]
    again = pycocotools([detections[image] for image in drawn], annotations.select(drawn))
    expected = again.eval["precision"][:, :, :, 0, -1].mean(axis=1)
    np.testing.assert_allclose(np.where(np.isnan(ours), -1, ours), expected, atol=1e-9)


def test_intervals_are_the_middle_of_resampled_sets() -> None:
    detections, annotations = draw_detections(4)
    counts = [200, 50, 5, 0]
    metrics = detection_metrics(detections, annotations, image_counts=counts, resamples=300)
    for name in ("ap", "ap50", "ap75", "frequent", "common", "rare"):
        low, high = metrics["intervals"][name]
        assert low < metrics[name] < high
    assert metrics["frequent"] == metrics["per_class"][0]
    assert metrics["rare"] == metrics["per_class"][2]  # the other rare class has no object
    assert metrics["per_class_interval"][3] is None
    low, high = metrics["per_class_interval"][0]
    assert low < metrics["per_class"][0] < high
    assert metrics == detection_metrics(detections, annotations, image_counts=counts, resamples=300)
    assert "intervals" not in detection_metrics(detections, annotations, resamples=0)


def test_a_class_in_few_images_has_no_interval() -> None:
    detections, annotations = draw_detections(5)
    few = annotations.select(range(4))
    metrics = detection_metrics(detections[:4], few, resamples=50)
    assert metrics["per_class_interval"] == [None] * 4
    assert all(images <= 4 for images in metrics["class_images"])


def test_federated_annotations() -> None:
    """Unknown classes of an image are left out; where a class is incomplete, nothing is a false detection."""
    detections, annotations = draw_detections(6, crowd=False)
    rng = np.random.default_rng(0)
    classes, images = len(annotations.class_names), len(annotations)
    present = [set(annotations.labels[annotations.objects_of(image)].tolist()) for image in range(images)]
    negatives = tuple(frozenset({int(rng.integers(classes))} - here) for here in present)
    incomplete = tuple(frozenset(label for label in here if rng.random() < 0.4) for here in present)
    federated = dataclasses.replace(annotations, negatives=negatives, incomplete=incomplete)
    metrics = detection_metrics(detections, federated, resamples=0)
    known = []
    for image, each in enumerate(detections):
        keep = torch.tensor(
            [label in present[image] | negatives[image] for label in each.labels.tolist()], dtype=torch.bool
        )
        known.append(Detections(each.boxes[keep], each.labels[keep], each.scores[keep]))
    # to pycocotools a crowd that is everywhere says the same: what matches no object is ignored
    crowds = [
        {"image_id": i + 1, "category_id": c + 1, "bbox": [-1e4, -1e4, 3e4, 3e4], "area": 9e8, "iscrowd": 1}
        for i, labels in enumerate(incomplete)
        for c in labels
    ]
    expected = pycocotools(known, annotations, further=crowds)
    for name, value in zip(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"), expected.stats, strict=False):
        close(metrics[name], value)
    assert metrics["ap"] != detection_metrics(detections, annotations, resamples=0)["ap"]
    table, once = detection_table(detections, federated), np.ones((1, images), dtype=np.int64)
    ours = match_table(table, federated).average_precision(once)
    assert 100 * np.nanmean(ours) == pytest.approx(metrics["ap"], abs=1e-6)


def test_incomplete_classes_of_annotations_that_are_not_federated_say_nothing() -> None:
    """Average precision, its intervals and the operating points are all COCO's."""
    detections, annotations = draw_detections(6)
    every = (frozenset(range(4)),) * len(annotations)
    incomplete = dataclasses.replace(annotations, incomplete=every)
    assert detection_metrics(detections, incomplete, resamples=50) == detection_metrics(
        detections, annotations, resamples=50
    )


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_ignored_objects_are_crowds_only_where_they_are_marked(iou_type: Any) -> None:
    """Of one that is none a single detection is ignored, and only by the usual IoU."""
    boxes = torch.tensor([[0.0, 0, 60, 60], [70, 70, 90, 90]])
    found = torch.tensor([[5.0, 5, 15, 15], [0, 0, 60, 60], [1, 0, 60, 60], [70, 70, 90, 90]])
    annotations = Annotations(
        files=("a.png",),
        sizes=torch.tensor([[100, 100]]),
        image_ids=(1,),
        class_names=("x",),
        image_index=torch.zeros(2, dtype=torch.int64),
        boxes=boxes,
        labels=torch.zeros(2, dtype=torch.int64),
        ignored=torch.tensor([True, False]),
        areas=torch.tensor([3600.0, 400]),
        masks=tuple(encode_mask(rectangle(box), (100, 100)) for box in boxes.tolist()),
    )
    masks = tuple(encode_mask(rectangle(box), (100, 100)) for box in found.tolist())
    detections = [Detections(found, torch.zeros(4, dtype=torch.int64), torch.tensor([0.9, 0.8, 0.7, 0.6]), masks)]
    for crowd, expected in ((True, 100.0), (False, 100 / 3)):
        marked = dataclasses.replace(annotations, crowd=torch.tensor([crowd, False]))
        metrics = detection_metrics(detections, marked, iou_type=iou_type, resamples=0)
        assert metrics["ap"] == pytest.approx(expected)
        assert metrics["objects"] == [1]
        matches = match_table(detection_table(detections, marked, iou_type), marked)
        ours = matches.average_precision(np.ones((1, 1), dtype=np.int64))
        assert 100 * ours.mean() == pytest.approx(expected)
    for parts in (annotations.select([0]), concatenate([annotations, marked])):
        assert parts.crowds.tolist()[:2] == [True, False]
    assert marked.select([0]).crowds.tolist() == [False, False]


def rectangle(box: list[float]) -> list[list[float]]:
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def test_limits() -> None:
    """100 of an image and class for COCO, 300 of an image for LVIS, or what is asked for; those of highest score."""
    _, annotations = draw_detections(7)
    first = annotations.select([0])
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(1000, 1)
    many = [Detections(boxes, torch.arange(1000) % 4, torch.linspace(1, 0, 1000))]
    assert len(detection_table(many, first).labels) == 400
    assert len(detection_table(many, first, max_detections=7).labels) == 28
    everything = (frozenset(range(4)),)
    federated = dataclasses.replace(first, negatives=everything, incomplete=(frozenset[int](),))
    table = detection_table(many, federated)
    assert len(table.labels) == 300
    assert table.scores.min() == pytest.approx(float(many[0].scores[299]))


def test_nothing_at_all() -> None:
    detections, annotations = draw_detections(8)
    nothing = [Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))] * len(annotations)
    metrics = detection_metrics(nothing, annotations, resamples=20)
    assert metrics["ap"] == metrics["ar"] == 0
    assert metrics["operating_points"][0] is None
    empty = annotations.select([])
    metrics = detection_metrics([], empty, resamples=0)
    assert metrics["ap"] is None
    assert metrics["per_class"] == [None] * 4
    unlabelled = annotations.select([len(annotations) - 1])
    assert len(unlabelled.labels) == 0
    assert detection_metrics(detections[:1], unlabelled, resamples=10)["ap"] is None


def test_operating_points() -> None:
    """Three objects; right, right, false, right: F1 is best over all four."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    annotations = Annotations(
        files=("a.png",),
        sizes=torch.tensor([[64, 64]]),
        image_ids=(1,),
        class_names=("x",),
        image_index=torch.zeros(3, dtype=torch.int64),
        boxes=boxes,
        labels=torch.zeros(3, dtype=torch.int64),
        ignored=torch.zeros(3, dtype=torch.bool),
        areas=torch.full((3,), 100.0),
    )
    found = torch.stack([boxes[0], boxes[1], torch.tensor([40.0, 40, 50, 50]), boxes[2]])
    scores = torch.tensor([0.875, 0.75, 0.5, 0.25])
    detections = [Detections(found, torch.zeros(4, dtype=torch.int64), scores)]
    metrics = detection_metrics(detections, annotations, resamples=0)
    assert metrics["operating_points"] == [{"score": 0.25, "precision": 75.0, "recall": 100.0}]
    assert metrics["ap50"] == pytest.approx(100 * (67 + 34 * 0.75) / 101)


def test_masks_of_every_kind_are_encoded() -> None:
    runs = {"size": [3, 2], "counts": [1, 2, 3]}
    encoded = encode_mask(runs, (3, 2))
    assert isinstance(encoded["counts"], str | bytes)
    assert encode_mask(encoded, (3, 2)) == encoded
    halves = [[0.0, 0, 0, 10, 5, 10, 5, 0], [5.0, 0, 5, 10, 10, 10, 10, 0]]
    whole = encode_mask(halves, (12, 20))
    assert whole["size"] == [12, 20]
    assert coco_masks().decode(whole)[:10, :10].all()
    assert coco_masks().area([whole]) == [100]


def test_refused() -> None:
    detections, annotations = draw_detections(9)
    with pytest.raises(LongtailError, match="expected those of 24 images, got 23"):
        detection_metrics(detections[1:], annotations)
    with pytest.raises(LongtailError, match="expected one for each of 4 classes, got 2"):
        detection_metrics(detections, annotations, image_counts=[1, 2])
    wrong = [*detections[:-1], detections[0]._replace(labels=detections[0].labels + 4)]
    with pytest.raises(LongtailError, match="expected labels from 0 to 3"):
        detection_metrics(wrong, annotations)
    unsure = [*detections[:-1], detections[0]._replace(scores=detections[0].scores * torch.nan)]
    with pytest.raises(LongtailError, match="image 23 has a score that is not a number"):
        detection_metrics(unsure, annotations)
    with pytest.raises(LongtailError, match="have no masks"):
        detection_metrics(detections, annotations, iou_type="segm")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    detections, annotations = draw_detections(9)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(LongtailError, match=r"needs the extra det: pip install 'longtail\[det\]'"):
        detection_metrics(detections, annotations)


def test_with_a_library_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    class Evaluation:
        """As that of 1.6.8."""

        def __init__(self, cocoGt: Any = None, cocoDt: Any = None, iouType: str = "segm") -> None:  # noqa: N803
            raise AssertionError

    detections, annotations = draw_detections(9)
    old = types.SimpleNamespace(COCOeval_faster=Evaluation, __version__="1.6.8")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", old)
    with pytest.raises(LongtailError, match=r"^average precision: faster-coco-eval 1\.6\.8 .* expected 1\.7 or later"):
        detection_metrics(detections, annotations)
