"""Result files whose entries name images and classes, and whose masks are polygons or runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtail.data.detection import Annotations, Detections, read_coco
from longtail.errors import LongtailError
from longtail.evaluation.detection import detection_metrics
from longtail.evaluation.detection_matches import coco_masks, encode_mask
from longtail.evaluation.detection_results import read_results, to_results
from longtail.tasks.detection.evaluate_results import evaluate_results


def annotations_of(*files: str) -> Annotations:
    """Return annotations of images with the ids 100, 101, …, without objects, of the classes 5 (cat) and 9 (dog)."""
    return Annotations(
        files=files,
        sizes=torch.tensor([[40, 60]] * len(files)),
        image_ids=tuple(range(100, 100 + len(files))),
        class_names=("cat", "dog"),
        image_index=torch.zeros(0, dtype=torch.int64),
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        ignored=torch.zeros(0, dtype=torch.bool),
        areas=torch.zeros(0),
        class_ids=(5, 9),
    )


def entry(**changes: Any) -> dict[str, Any]:
    return {"image_id": 100, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.5} | changes


def read(tmp_path: Path, annotations: Annotations, *entries: dict[str, Any]) -> list[Detections]:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(entries))
    return read_results(path, annotations)


def test_paths_and_names_count_more_than_ids(tmp_path: Path) -> None:
    """Ids that a program has given by itself may be ids of others in the annotations."""
    found = read(
        tmp_path,
        annotations_of("val/a.png", "val/b.png", "a.png"),
        entry(image_id=101, category_id=9, file_name="set/val/a.png", category_name="cat", score=0.1),
        entry(image_id=1, category_id=5, file_name="b.png", category_name="dog", score=0.2),
        entry(image_id=2, category_id=9, file_name=".\\other\\a.png", category_name="cat", score=0.3),
    )
    assert [each.scores.tolist() for each in found] == [pytest.approx([score]) for score in (0.1, 0.2, 0.3)]
    assert [each.labels.tolist() for each in found] == [[0], [1], [0]]


def test_names_are_written_beside_the_ids(tmp_path: Path) -> None:
    annotations = annotations_of("a.png", "b.png")
    boxes = torch.tensor([[1.0, 2, 4, 6]])
    found = [Detections(boxes, torch.tensor([label]), torch.tensor([0.5])) for label in (1, 0)]
    results = to_results(found, (7, 8), (1, 2), ["x/b.png", "x/a.png"], annotations.class_names)
    assert results[0] == {
        "image_id": 7,
        "category_id": 2,
        "bbox": [1, 2, 3, 4],
        "score": 0.5,
        "category_name": "dog",
        "file_name": "x/b.png",
    }
    again = read(tmp_path, annotations, *results)
    assert [each.labels.tolist() for each in again] == [[0], [1]]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(file_name="x/c.png")], "entry 0: file_name x/c.png is not among the images of the annotations; "),
        ([entry(file_name="c/a.png")], "entry 0: file_name c/a.png may be val/a.png or test/a.png of the annotations"),
        ([entry(file_name=3)], "entry 0: expected a text as its file_name"),
        ([entry(image_id=[1])], "entry 0: expected a number or text as its image_id"),
        ([entry(category_name="cta")], "entry 0: the category 'cta' is not among .*; perhaps you meant cat"),
        (
            [entry(file_name="val/a.png"), entry(file_name="test/a.png")],
            "entry 1: image_id 100 is the image test/a.png here, and val/a.png in another entry",
        ),
        (
            [entry(file_name="test/a.png"), entry()],
            "entry 1: image_id 100 is the image val/a.png here, and test/a.png in another entry",
        ),
        (
            [entry(image_id=1, file_name="one/b.png"), entry(image_id=2, file_name="two/b.png")],
            "entry 1: the image b.png has the image_id 2 here, and 1 in another entry",
        ),
        ([entry(file_name="one/b.png"), entry(file_name="two/b.png")], "one/b.png and two/b.png are both the image b"),
        (
            [entry(category_name="cat"), entry(category_name="dog")],
            "entry 1: category_id 5 is the category dog here, and cat in another entry",
        ),
        (
            [entry(category_name="dog"), entry(category_id=9)],
            "entry 1: the category dog has the category_id 9 here, and 5 in another entry",
        ),
    ],
)
def test_contradictions_are_one_line(tmp_path: Path, entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(LongtailError, match=message) as error:
        read(tmp_path, annotations_of("val/a.png", "test/a.png", "b.png"), *entries)
    assert "\n" not in str(error.value)


def test_boxes_of_masks_of_every_kind(tmp_path: Path) -> None:
    """Without a bbox it is that of the mask: polygons, runs, or runs compressed."""
    annotations = dataclasses.replace(annotations_of("a.png"), sizes=torch.tensor([[40, 60]]))
    inside = np.zeros((40, 60), dtype=np.uint8)
    inside[10:30, 5:25] = 1
    changes = np.flatnonzero(np.diff(inside.T.ravel(), prepend=0, append=0))
    runs = {"size": [40, 60], "counts": np.diff(changes, prepend=0, append=2400).tolist()}
    compressed = encode_mask(runs, (40, 60))
    compressed = {**compressed, "counts": bytes(compressed["counts"]).decode()}
    polygons = [[5, 10, 25, 10, 25, 30, 5, 30]]
    for mask in (polygons, runs, compressed):
        one = entry(segmentation=mask)
        del one["bbox"]
        (found,) = read(tmp_path, annotations, one)
        assert found.boxes.tolist() == [[5, 10, 25, 30]]
        assert found.masks is not None
        assert (coco_masks().decode(found.masks[0]) == inside).all()
    # of two entries one has a mask alone, the other a box: boxes are what both have
    (both,) = read(tmp_path, annotations, one, entry())
    assert both.masks is None
    assert len(both.boxes) == 2


@pytest.mark.parametrize("mask", [[["a", 1]], [[1, 2]], {"size": [40, 60]}, {"size": [40, 60], "counts": ["x"]}, 5])
def test_broken_masks_are_one_line(tmp_path: Path, mask: Any) -> None:
    one = entry(segmentation=mask)
    del one["bbox"]
    with pytest.raises(LongtailError, match="entry 0: expected a segmentation of polygons"):
        read(tmp_path, annotations_of("a.png"), one)


def test_runs_that_are_not_those_of_the_image_are_one_line(tmp_path: Path) -> None:
    annotations = dataclasses.replace(annotations_of("a.png"), sizes=torch.tensor([[40, 60]]))
    inside = np.zeros((40, 60), dtype=np.uint8, order="F")
    inside[10:30, 5:25] = 1
    good = coco_masks().encode(inside)["counts"].decode()
    half = coco_masks().encode(np.asfortranarray(inside[::2, ::2]))["counts"].decode()
    for mask, message in (
        ({"size": [60, 40], "counts": good}, r"its size is \[60, 40\], expected that of the image, \[40, 60\]"),
        ({"size": "40x60", "counts": good}, "its size is 40x60"),
        ({"size": [40, 60], "counts": half}, "its counts are of 600 pixels, expected those of 2,400 pixels"),
        ({"size": [40, 60], "counts": good[:-1]}, "its counts are "),
        ({"size": [40, 60], "counts": "\u00e4\u00f6"}, "its counts are damaged"),
        ({"size": [40, 60], "counts": [100]}, "its counts are of 100 pixels"),
    ):
        with pytest.raises(LongtailError, match=f"entry 0: segmentation: {message}"):
            read(tmp_path, annotations, entry(segmentation=mask))
    (found,) = read(tmp_path, annotations, entry(segmentation={"size": [40, 60], "counts": good}))
    assert found.masks is not None
    assert (coco_masks().decode(found.masks[0]) == inside).all()


@pytest.mark.parametrize("content", ["[" * 100_000, '[{"image_id": 1, "category_id": 1, "score": 1' + "0" * 400 + "}]"])
def test_numbers_and_lists_beyond_any_bound_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(LongtailError, match=r"results\.json: "):
        read_results(tmp_path / "results.json", annotations_of("a.png"))


def test_equal_scores_are_in_the_order_of_the_images_ids(tmp_path: Path) -> None:
    """As in COCO's tools, whatever the order of the images in the annotations."""
    values = []
    for ids in ([7, 9], [9, 7]):
        annotations = {
            "images": [{"id": number, "file_name": f"{number}.png", "width": 40, "height": 40} for number in ids],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0}
            ],
        }
        found = [{"image_id": number, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.5} for number in (7, 9)]
        (tmp_path / "annotations.json").write_text(json.dumps(annotations))
        (tmp_path / "results.json").write_text(json.dumps(found))
        metrics = evaluate_results(tmp_path / "results.json", tmp_path / "annotations.json", None)
        values.append(metrics["ap"])
    assert values == [pytest.approx(100.0), pytest.approx(100.0)]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"size": [60, 40], "counts": [2400]}, r"its size is \[60, 40\], expected that of the image, \[40, 60\]"),
        ({"size": [40, 60], "counts": [10, 20]}, "its counts are of 30 pixels, expected those of 2,400 pixels"),
        ({"size": [40, 60], "counts": [-5, 2405]}, "its counts are damaged"),
        ({"size": [40, 60], "counts": "zzzz"}, "its counts are damaged"),
        ({"size": [40, 60], "counts": "\u00e9"}, "its counts are damaged"),
    ],
)
def test_damaged_masks_of_annotations_are_one_line(tmp_path: Path, mask: dict[str, Any], message: str) -> None:
    """They were a traceback, or a mask AP of 0; where boxes alone are compared, they do not matter."""
    content = {
        "images": [{"id": 100, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": [{"id": 7, "image_id": 100, "category_id": 5, "bbox": [1, 2, 3, 4], "segmentation": mask}],
        "categories": [{"id": 5, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    results = tmp_path / "results.json"
    results.write_text(json.dumps([entry(segmentation={"size": [40, 60], "counts": [90, 20, 2290]})]))
    with pytest.raises(LongtailError, match=rf"a\.json: annotation 7 of a\.png: segmentation: {message}"):
        evaluate_results(results, tmp_path / "a.json", None)
    found = read_results(results, annotations_of("a.png"))
    with pytest.raises(LongtailError, match=rf"annotations: object 0 of a\.png: segmentation: {message}"):
        detection_metrics(found, read_coco(tmp_path / "a.json"), iou_type="segm")
    results.write_text(json.dumps([entry()]))
    assert evaluate_results(results, tmp_path / "a.json", None)["ap"] == pytest.approx(100)
