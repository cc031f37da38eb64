from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from longtail.data.detection import Annotations
from longtail.detector_calibration.calibrate import class_counts, map_classes, map_further_classes
from longtail.detector_calibration.classes import match_classes
from longtail.detector_calibration.heads import ClassHead
from longtail.errors import LongtailError

COCO = ("person", "toothbrush"), (1, 90)
"""Names and ids of two categories."""


def head(outputs: int, background: Any = None, label_names: tuple[str, ...] | None = None) -> ClassHead:
    return ClassHead((), outputs, background, label_names)


def to_annotations(labels: list[int]) -> Annotations:
    """Return those of one image with objects of these categories."""
    boxes = torch.tensor([[0.0, 0, 8, 8]]).repeat(len(labels), 1)
    names, ids = COCO
    return Annotations(
        files=("a.jpg",),
        sizes=torch.tensor([[50, 60]]),
        image_ids=(7,),
        class_names=names,
        image_index=torch.zeros(len(labels), dtype=torch.int64),
        boxes=boxes,
        labels=torch.tensor(labels),
        ignored=torch.zeros(len(labels), dtype=torch.bool),
        areas=torch.full((len(labels),), 64.0),
        class_ids=ids,
    )


def test_torchvisions_labels_are_category_ids() -> None:
    """91 outputs: the background, 80 categories and gaps, which have no counts."""
    annotations = to_annotations([0, 1, 1])
    for outputs, background in ((91, "first"), (91, None)):
        detector = head(outputs, background)
        match = match_classes(detector, *COCO)
        assert match.order == "id"
        counts = class_counts(detector, annotations, "objects")
        assert counts[1 - detector.first_label] == 1
        assert counts[90 - detector.first_label] == 2
        assert int(counts.sum()) == 3
    assert "no category and are not raised" in match.describe()


def test_classes_without_gaps() -> None:
    match = match_classes(head(3, "first"), *COCO)
    assert match.order == "index"
    assert match.categories.tolist() == [0, 1]
    assert match.counts(torch.tensor([5, 9])).tolist() == [5, 9]
    # also where categories come in another order
    assert match_classes(head(3, "first"), ["b", "a"], [90, 1]).categories.tolist() == [1, 0]
    # LVIS: ids 1 to 1203
    lvis = match_classes(head(1204, "first"), [str(i) for i in range(1, 1204)], range(1, 1204))
    assert lvis.order == "id"
    assert lvis.categories.tolist() == list(range(1203))


def test_names_are_matched_in_any_case() -> None:
    names = ("N/A", "Person", "N/A", "aerosol_can")
    match = match_classes(head(5, "last", names), ["aerosol_can", "person"], [1, 2])
    assert match.order == "name"
    assert match.categories.tolist() == [-1, 1, -1, 0]


@pytest.mark.parametrize(
    ("detector", "ids", "order", "message"),
    [
        (
            head(5, "first"),
            [1, 90],
            "auto",
            "2 categories .the last is 'toothbrush', id 90., the detector has 4 classes",
        ),
        (head(5, "first"), [1, 90], "id", "'toothbrush' has the category id 90, but the detector's labels are 1 to 4"),
        (head(2, None, ("person", "toothbrsh")), [1, 2], "auto", "no class 'toothbrush'.*perhaps you meant toothbrsh"),
        (head(2), [1, 2], "name", "no class names"),
        (head(2), [1, 2], "size", "class_order 'size': expected auto, name, id, index"),
    ],
)
def test_a_mismatch_names_the_class(detector: ClassHead, ids: list[int], order: Any, message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        match_classes(detector, ["person", "toothbrush"], ids, order)


@pytest.mark.parametrize(
    ("detector", "order"),
    [(head(2, None, ("cell", "platelet")), "name"), (head(3, "first"), "id"), (head(2), "index")],
)
def test_a_category_without_objects_needs_no_output(detector: ClassHead, order: str) -> None:
    """Roboflow writes the group of all classes as the category 0."""
    names, ids = ("cells", "cell", "platelet"), (0, 1, 2)
    match = match_classes(detector, names, ids, used=[False, True, True])
    assert match.order == order
    assert match.categories.tolist() == [1, 2]
    with pytest.raises(LongtailError, match=r"classes: "):
        match_classes(detector, names, ids, order, used=[True, True, True])


def test_classes_of_validation_annotations_are_matched_as_in_training() -> None:
    """Of Roboflow's five categories the first has no objects; in validation one of the others has none either."""
    names, ids, detector = ("all", "a", "b", "c", "d"), (0, 1, 2, 3, 4), head(4)
    train = dataclasses.replace(to_annotations([1, 2, 3, 4]), class_names=names, class_ids=ids)
    further = dataclasses.replace(to_annotations([1, 3, 4]), class_names=names, class_ids=ids)
    trained = map_classes(detector, train)
    assert trained.categories.tolist() == [1, 2, 3, 4]
    assert map_further_classes(detector, trained, train, further).categories.tolist() == [1, 2, 3, 4]
    of_group = dataclasses.replace(to_annotations([0, 1]), class_names=names, class_ids=ids)
    with pytest.raises(LongtailError, match="the detector has no class 'all' of the annotations"):
        map_further_classes(detector, trained, train, of_group)


def test_names_that_differ_in_case_alone_are_two_classes() -> None:
    assert match_classes(head(2, None, ("Cat", "cat")), ("cat", "Cat"), (1, 2)).categories.tolist() == [1, 0]
