"""Every layout gives the same annotations, what is wrong with a file is one line, and reading a large file is quick."""

from __future__ import annotations

import dataclasses
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtail.config import Data
from longtail.data.detection import (
    AnnotationProblems,
    Annotations,
    concatenate,
    read_coco,
    read_split,
    read_voc,
    read_yolo,
    to_coco,
    write_coco,
)
from longtail.data.detection.layouts import read_annotated_images
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from tests.conftest import SHARED
from tests.data.detection.drawn import NAMES, WRITERS, Drawn, coco_content, drawn_images, write_voc_layout

SPLITS = {"train": drawn_images(12), "val": drawn_images(5, seed=1), "test": drawn_images(6, seed=2)}


def check_against(annotations: Annotations, images: list[Drawn]) -> None:
    assert annotations.class_names == NAMES
    assert annotations.sizes.tolist() == [[image.height, image.width] for image in images]
    expected = [(index, *item) for index, image in enumerate(images) for item in image.objects]
    assert annotations.image_index.tolist() == [index for index, *_ in expected]
    assert [NAMES[label] for label in annotations.labels.tolist()] == [name for _, name, *_ in expected]
    boxes = torch.tensor([box for _, _, *box in expected], dtype=torch.float32)
    torch.testing.assert_close(annotations.boxes, boxes, atol=1e-4, rtol=0)
    assert not annotations.ignored.any()
    torch.testing.assert_close(
        annotations.areas, (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_same_annotations(layout: str, tmp_path: Path) -> None:
    root = WRITERS[layout](tmp_path / "set", SPLITS)
    found = read_annotated_images(Data(source="boxes", root=str(root)))
    assert list(found.splits) == ["train", "val", "test"]
    assert found.layout.startswith(f"{root}: {layout} (")
    assert "train 12, val 5, test 6 images" in found.layout
    for split, part in found.splits.items():
        check_against(part, SPLITS[split])
        assert all((found.root / name).is_file() for name in part.files)


@pytest.mark.parametrize("layout", WRITERS)
def test_one_split_of_a_folder(layout: str, tmp_path: Path) -> None:
    root = WRITERS[layout](tmp_path / "set", SPLITS)
    for split in ("train", "val"):
        annotations = read_split(root, split)
        check_against(annotations, SPLITS[split])
        assert annotations.masks is None
        assert all((root / file).is_file() for file in annotations.files)
    other = WRITERS[layout](tmp_path / "other", {"train": SPLITS["train"], "test": SPLITS["test"]})
    with pytest.raises(LongtailError, match=r"other: has no validation images \(.*\); name a \.json file"):
        read_split(other, "val")


def test_one_split_of_a_folder_without_splits_and_of_a_file(tmp_path: Path) -> None:
    root = write_voc_layout(tmp_path / "set", {"a": SPLITS["train"]}, lists=False)
    problems = AnnotationProblems()
    annotations = read_split(root, "train", problems)
    check_against(annotations, SPLITS["train"])
    with pytest.raises(LongtailError, match="has no validation images"):
        read_split(root, "val")
    write_coco(annotations, tmp_path / "all.json")
    check_against(read_split(tmp_path / "all.json", "val"), SPLITS["train"])
    (tmp_path / "none.json").write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')
    with pytest.raises(LongtailError, match=r"none\.json: images: expected at least one"):
        read_split(tmp_path / "none.json", "val")


def test_splits_in_other_places(tmp_path: Path) -> None:
    """Roboflow's folders: a json file beside the images of every split, or images and labels below it."""
    coco = WRITERS["COCO"](tmp_path / "coco", SPLITS)
    for split, name in {"train": "train", "val": "valid", "test": "test"}.items():
        (coco / split).rename(coco / name)
        (coco / "annotations" / f"instances_{split}.json").rename(coco / name / "_annotations.coco.json")
    yolo = WRITERS["YOLO"](tmp_path / "yolo", SPLITS)
    for split, name in {"train": "train", "val": "valid", "test": "test"}.items():
        (yolo / name).mkdir()
        for kind in ("images", "labels"):
            (yolo / kind / split).rename(yolo / name / kind)
    for kind in ("images", "labels"):
        (yolo / kind).rmdir()
    for root in (coco, yolo):
        for split, part in read_annotated_images(Data(source="boxes", root=str(root))).splits.items():
            check_against(part, SPLITS[split])


def test_files_by_name(tmp_path: Path) -> None:
    root = WRITERS["COCO"](tmp_path / "set", SPLITS)
    files: dict[str, Any] = {
        split: str(root / "annotations" / f"instances_{split}.json") for split in ("train", "test")
    }
    found = read_annotated_images(Data(source="boxes", root=str(root), **files))
    assert list(found.splits) == ["train", "test"]
    only = read_annotated_images(Data(source="boxes", root=str(root), train=files["train"]))
    assert list(only.splits) == ["all"]


def test_voc_counts_from_one_and_difficult_objects_are_ignored(tmp_path: Path) -> None:
    root = write_voc_layout(tmp_path, {"train": [Drawn(20, 10, [("red", 0, 0, 20, 10), ("red", 3, 2, 4, 3)])]}, False)
    path = root / "Annotations" / "train000.xml"
    text = path.read_text()
    assert "<xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>10</ymax>" in text  # the whole image, as VOC has it
    path.write_text(text.replace("<difficult>0", "<difficult>1", 1))
    annotations = read_voc(root)["all"]
    assert annotations.boxes.tolist() == [[0, 0, 20, 10]]  # of a single pixel is without area: a click
    assert annotations.ignored.tolist() == [True]
    assert annotations.crowds.tolist() == [False]
    assert annotations.object_counts.tolist() == [0]
    write_coco(annotations, tmp_path / "voc.json")
    assert read_coco(tmp_path / "voc.json").crowds.tolist() == [False]
    assert read_coco(tmp_path / "voc.json").ignored.tolist() == [True]


def test_yolo_polygons_give_their_box(tmp_path: Path) -> None:
    root = WRITERS["YOLO"](tmp_path, {"train": [Drawn(80, 40, [("red", 8, 4, 16, 12)])]})
    (root / "labels" / "train" / "train000.txt").write_text("2 0.1 0.1 0.2 0.2 0.15 0.3\n\n0 0.5 0.5 0.25 0.5\n")
    annotations = read_yolo(root)["train"]
    torch.testing.assert_close(annotations.boxes, torch.tensor([[8.0, 4, 16, 12], [30, 10, 50, 30]]))
    assert annotations.labels.tolist() == [2, 0]
    (root / "labels" / "train" / "train000.txt").unlink()
    assert len(read_yolo(root)["train"].boxes) == 0  # an image without a file has no objects


def test_yolo_folders_of_one_split_are_joined(tmp_path: Path) -> None:
    """As Ultralytics lays out Pascal VOC: images/train2007, images/train2012, …, or train2007/images, …"""
    root = WRITERS["YOLO"](tmp_path / "a", SPLITS)
    other = WRITERS["YOLO"](tmp_path / "b", SPLITS)
    for split, number in (("train", 7), ("val", 3)):
        for kind, suffix in (("images", "png"), ("labels", "txt")):
            (root / kind / split).rename(root / kind / f"{split}2007")
            (root / kind / f"{split}2012").mkdir()
            for index in range(number, len(SPLITS[split])):
                name = f"{split}{index:03}.{suffix}"
                (root / kind / f"{split}2007" / name).rename(root / kind / f"{split}2012" / name)
            for year in ("2007", "2012"):
                shutil.copytree(root / kind / f"{split}{year}", other / f"{split}{year}" / kind)
    shutil.rmtree(other / "images")
    for folder in (root, other):
        splits = read_yolo(folder)
        check_against(splits["train"], SPLITS["train"])
        check_against(splits["val"], SPLITS["val"])
        assert all((folder / file).is_file() for file in splits["train"].files)


def test_yolo_keypoints_are_not_taken_for_a_polygon(tmp_path: Path) -> None:
    root = WRITERS["YOLO"](tmp_path, {"train": [Drawn(80, 40, [("red", 8, 4, 16, 12)])]})
    labels, described = root / "labels" / "train" / "train000.txt", root / "data.yaml"
    described.write_text("kpt_shape: [2, 3]\nnames: [blue, green, red]\n")
    labels.write_text("2 .5 .5 .25 .5 .9 .9 2 0 -3 0\n0 .5 .5 .1 .1\n")
    annotations = read_yolo(root)["train"]
    torch.testing.assert_close(annotations.boxes, torch.tensor([[30.0, 10, 50, 30], [36, 18, 44, 22]]))
    labels.write_text("2 .5 .5 .25 .5 .9 .9 0 0\n")
    with pytest.raises(
        LongtailError, match=r"train000\.txt, line 1: expected a class, .* and 6 numbers of keypoints, .* got 9 values"
    ):
        read_yolo(root)
    for shape in ("3", "[2]", "[2, 4]", "[0, 3]", "[a, 3]"):
        described.write_text(f"kpt_shape: {shape}\nnames: [blue, green, red]\n")
        with pytest.raises(LongtailError, match=r"data\.yaml: kpt_shape: expected \[KEYPOINTS, 2\] or"):
            read_yolo(root)
    described.write_text("kpt_shape:\nnames: [blue, green, red]\n")
    read_yolo(root)


@pytest.mark.parametrize("names", ["[yes, no, null]", "{0: yes, 1: no, 2: null}", "{'2': null, '1': no, 0: yes}"])
def test_yolo_names_that_yaml_takes_for_other_values(names: str, tmp_path: Path) -> None:
    root = WRITERS["YOLO"](tmp_path, SPLITS)
    (root / "data.yaml").write_text(f"nc: 3\nnames: {names}\n")
    assert read_yolo(root)["train"].class_names == ("yes", "no", "null")


def test_voc_names_with_spaces_and_flags(tmp_path: Path) -> None:
    root = write_voc_layout(tmp_path, {"train": SPLITS["train"][:4]})
    for folder, suffix in (("JPEGImages", "png"), ("Annotations", "xml")):
        for before, after in (("train000", "my photo 1"), ("train001", "my photo"), ("train002", "my")):
            (root / folder / f"{before}.{suffix}").rename(root / folder / f"{after}.{suffix}")
    listed = root / "ImageSets" / "Main" / "train.txt"
    listed.write_text("my photo 1\nmy photo -1\nmy  0\ntrain003\n")
    assert read_voc(root)["train"].image_ids == ("my photo 1", "my photo", "my", "train003")
    listed.write_text("my photo\ntrain003 x\nyour photo -1\n")
    with pytest.raises(LongtailError, match=r"JPEGImages/your photo\.jpg: there is no such image"):
        read_voc(root)


def test_lvis_says_what_was_looked_for(tmp_path: Path) -> None:
    content = coco_content(SPLITS["train"][:2], ["a", "b"])
    for image in content["images"]:
        del image["file_name"]
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image['id']:012}.jpg"
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [3], [90, 7]
    (tmp_path / "lvis_v1_train.json").write_text(json.dumps(content))
    annotations = read_coco(tmp_path / "lvis_v1_train.json")
    assert annotations.files == ("train2017/000000000010.jpg", "train2017/000000000011.jpg")
    assert annotations.negatives == (frozenset({0}),) * 2
    assert annotations.incomplete == (frozenset({1, 2}),) * 2
    assert annotations.class_ids == (3, 7, 90)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = coco_content(SPLITS["train"], [f"{number}.png" for number in range(12)])
    for entry in content["annotations"]:
        entry["bbox"] = (np.array(entry["bbox"]) + rng.random(4) - [0, 0, 1, 1]).tolist()
        entry["iscrowd"], entry["ignore"] = rng.integers(2, size=2).tolist()
    for image in content["images"]:
        image["neg_category_ids"] = [7]
    (tmp_path / "a.json").write_text(json.dumps(content))
    first = read_coco(tmp_path / "a.json")
    write_coco(first, tmp_path / "b.json")
    second = read_coco(tmp_path / "b.json")
    assert first.masks is not None
    assert 0 < int(first.crowds.sum()) < int(first.ignored.sum()) < len(first.boxes)
    for name in ("sizes", "image_index", "boxes", "labels", "ignored", "crowds", "areas"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    as_lvis, again = (read_coco(tmp_path / f"{name}.json", as_written=True) for name in "ab")
    assert as_lvis.ignored.tolist() == [bool(entry["ignore"]) for entry in content["annotations"]]
    # what is a crowd in COCO alone is ignored in LVIS too when it is written
    assert torch.equal(again.ignored, first.ignored)
    assert not again.crowds.any()
    for name in ("files", "image_ids", "class_names", "class_ids", "masks", "negatives"):
        assert getattr(first, name) == getattr(second, name)
    assert second.incomplete == (frozenset(),) * 12 or second.incomplete is None


def test_pycocotools_reads_it(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    root = WRITERS["Pascal VOC"](tmp_path, SPLITS)
    annotations = read_voc(root)["train"]
    write_coco(annotations, tmp_path / "a.json")
    reader = coco.COCO(str(tmp_path / "a.json"))
    assert len(reader.getAnnIds()) == len(annotations.boxes)
    counts = [len(reader.getAnnIds(catIds=[number])) for number in reader.getCatIds()]
    assert counts == annotations.object_counts.tolist()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_masks_are_what_pycocotools_takes(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    content = coco_content([Drawn(20, 12, [("red", 2, 3, 9, 10), ("blue", 10, 1, 14, 6)])], ["a.png"])
    content["annotations"][1]["segmentation"] = {"size": [12, 20], "counts": [121, 4, 8, 4, 103]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    annotations = read_coco(tmp_path / "a.json")
    assert annotations.masks is not None
    reader = coco.COCO()
    reader.dataset = to_coco(annotations)
    reader.createIndex()
    assert [int(reader.annToMask(entry).sum()) for entry in reader.dataset["annotations"]] == [49, 8]


def test_masks_that_not_all_objects_have(tmp_path: Path) -> None:
    """As CVAT writes them, for objects that were drawn as boxes."""
    content = coco_content(SPLITS["train"], [f"{number}.png" for number in range(12)])
    entries = content["annotations"]
    entries[1]["segmentation"], entries[4]["segmentation"] = [], [[1, 2, 3, 4]]
    entries[6]["segmentation"] = entries[6]["segmentation"][0]  # without the outer brackets
    del entries[5]["segmentation"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    problems = AnnotationProblems()
    assert read_coco(path, problems).masks is None
    assert problems.remarks() == [
        "3 objects have no mask, and those of their file are left out; the first: "
        f"{path}: annotation 2 of {content['images'][0]['file_name']}"
    ]
    annotations = read_coco(path, problems := AnnotationProblems(), partial_masks=True)
    assert annotations.masks is not None
    assert [index for index, mask in enumerate(annotations.masks) if not mask] == [1, 4, 5]
    assert annotations.masks[6] == [entries[6]["segmentation"]]
    assert problems.remarks() == []
    write_coco(annotations, tmp_path / "b.json")
    assert read_coco(tmp_path / "b.json", partial_masks=True).masks == annotations.masks
    assert read_coco(path, problems, masks=False).masks is None
    assert problems.remarks() == []
    without = dataclasses.replace(annotations, masks=None)
    assert concatenate([annotations, without]).masks is None
    joined = concatenate([without, annotations], partial_masks=True)
    assert joined.masks == ([],) * len(entries) + annotations.masks
    for entry in entries:  # none at all is nothing to remark on, but masks that are none are
        entry["segmentation"] = []
    path.write_text(json.dumps(content))
    assert read_coco(path, problems).masks is None
    assert problems.remarks() == []
    entries[0]["segmentation"] = [1, 2, 3, 4]
    path.write_text(json.dumps(content))
    assert read_coco(path, problems).masks is None
    assert len(problems.without_mask) == len(entries)


def test_fields_that_are_null_or_text_are_read_as_what_they_mean(tmp_path: Path) -> None:
    content = coco_content(SPLITS["train"], [f"{number}.png" for number in range(12)])
    entries = content["annotations"]
    entries[0]["area"], entries[1]["area"] = None, 17
    del entries[2]["area"]
    for entry, flag in zip(entries, ["0", "1", False, True, None, 1.0, "false"], strict=False):
        entry["iscrowd"] = flag
    entries[8]["id"] = entries[9]["id"] = None
    content["images"][0]["neg_category_ids"], content["images"][1]["neg_category_ids"] = None, [7]
    for image in content["images"]:
        image["not_exhaustive_category_ids"] = None
    content["images"][2] |= {"file_name": None, "coco_url": "http://x/y/z.png"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    annotations = read_coco(path)
    width, height = entries[0]["bbox"][2:]
    assert annotations.areas[:2].tolist() == [width * height, 17]
    assert annotations.areas[2] == entries[2]["bbox"][2] * entries[2]["bbox"][3]
    assert annotations.ignored[:8].tolist() == [False, True, False, True, False, True, False, False]
    assert annotations.negatives is not None
    assert annotations.negatives[:3] == (frozenset(), frozenset({1}), frozenset())
    assert annotations.incomplete is None
    assert annotations.files[2] == "y/z.png"


@pytest.mark.parametrize(
    "mask",
    [
        "x",
        7,
        [1, 2, 3, 4, 5, 6, 7],
        [[1, 2], [3, 4], [5, 6]],
        [[1, 2, 3, 4, 5, None]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 5, 10**400], [0.5, 2, 3, 4, 5, 6]],
        [1, 2, 3, 4, 5, [6]],
        {"counts": "x"},
        {"size": [1, 2], "counts": [1.5]},
    ],
)
def test_what_is_no_mask_is_one_line(mask: Any, tmp_path: Path) -> None:
    content = coco_content(SPLITS["train"], [f"{number}.png" for number in range(12)])
    content["annotations"][1]["segmentation"] = mask
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(
        LongtailError, match=r"a\.json: annotation 2: expected a segmentation of polygons, each x and y"
    ):
        read_coco(tmp_path / "a.json")
    read_coco(tmp_path / "a.json", masks=False)


def test_joined_annotations() -> None:
    empty = Annotations(
        files=("x.png",),
        sizes=torch.tensor([[4, 4]]),
        image_ids=(1,),
        class_names=NAMES,
        image_index=torch.zeros(0, dtype=torch.int64),
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        ignored=torch.zeros(0, dtype=torch.bool),
        areas=torch.zeros(0),
    )
    both = concatenate([empty, empty])
    assert both.image_ids == (1, 2)
    assert len(both) == 2
    assert both.num_objects.tolist() == [0, 0]


def change(content: dict[str, Any], *keys: Any, to: Any) -> None:
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = to


BAD_COCO: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "class": (
        lambda c: change(c, "annotations", 2, "category_id", to=8),
        "annotation 3: its category_id 8 is not listed in categories; ",
    ),
    "image": (
        lambda c: [entry.update(image_id=99) for entry in c["annotations"][2:4]],
        "annotation 3: its image_id 99 is not listed in images (2 annotations have such); ",
    ),
    "outside": (
        lambda c: change(c, "annotations", 0, "bbox", to=[500, 2, 5, 5]),
        "annotation 1 of 0.png: its box (x1, y1, x2, y2 = 500, 2, 505, 7) is outside of its image, ",
    ),
    "no bbox": (lambda c: c["annotations"][4].pop("bbox"), "annotation 5: expected a bbox of 4 numbers"),
    "short bbox": (
        lambda c: change(c, "annotations", 4, "bbox", to=[1, 2]),
        "annotation 5: expected a bbox of 4 numbers",
    ),
    "words": (
        lambda c: change(c, "annotations", 4, "bbox", to=["a", 1, 2, 3]),
        "annotation 5: expected a bbox of 4 numbers",
    ),
    "NaN": (
        lambda c: change(c, "annotations", 4, "bbox", to=[float("nan"), 1, 2, 3]),
        "has a box with coordinates that are no finite numbers",
    ),
    "twice": (lambda c: change(c, "images", 1, "file_name", to="0.png"), "the image 0.png occurs twice; "),
    "image id": (lambda c: change(c, "images", 1, "id", to=10), "the image id 10 occurs twice; "),
    "id": (lambda c: change(c, "annotations", 1, "id", to=1), "the annotation id 1 occurs twice; "),
    "category": (lambda c: change(c, "categories", 1, "name", to="blue"), "the category blue occurs twice; "),
    "size": (lambda c: c["images"][3].pop("width"), "images[3]: expected height and width"),
    "file": (lambda c: c["images"][3].pop("file_name"), "images[3]: expected a file_name or coco_url"),
    "no size": (
        lambda c: change(c, "images", 3, "height", to=None),
        "images[3]: expected whole numbers above 0 as its height and width",
    ),
    "fraction": (
        lambda c: change(c, "images", 3, "height", to=40.5),
        "images[3]: expected whole numbers above 0 as its height and width",
    ),
    "huge": (lambda c: change(c, "images", 3, "height", to=10**400), "images[3]: expected height and width"),
    "no file": (lambda c: change(c, "images", 3, "file_name", to=None), "images[3]: expected a file_name or coco_url"),
    "no name": (lambda c: change(c, "categories", 1, "name", to=None), "categories[1]: expected a name"),
    "image id list": (lambda c: change(c, "images", 1, "id", to=[1]), "images[1]: expected an id, a number or text"),
    "id list": (
        lambda c: change(c, "annotations", 1, "id", to=[1]),
        "annotations[1]: expected a number or text as its id",
    ),
    "image list": (
        lambda c: change(c, "annotations", 1, "image_id", to=[10]),
        "annotation 2: its image_id [10] is not listed in images; ",
    ),
    "class list": (
        lambda c: change(c, "annotations", 1, "category_id", to={"id": 3}),
        "annotation 2: its category_id {'id': 3} is not listed in categories; ",
    ),
    "negatives": (
        lambda c: change(c, "images", 1, "neg_category_ids", to=3),
        "images[1]: expected a list of category ids as its neg_category_ids",
    ),
    "negatives list": (
        lambda c: change(c, "images", 1, "neg_category_ids", to=[3, [3]]),
        "images[1]: neg_category_ids: the category id [3] is not listed in categories",
    ),
    "area": (
        lambda c: change(c, "annotations", 1, "area", to=-2),
        "annotation 2: expected an area of at least 0; correct or remove it",
    ),
    "area list": (
        lambda c: change(c, "annotations", 1, "area", to=[2]),
        "annotation 2: expected a number as its area",
    ),
    "text bbox": (
        lambda c: change(c, "annotations", 4, "bbox", to="1234"),
        "annotation 5: expected a bbox of 4 numbers",
    ),
    "crowd": (
        lambda c: change(c, "annotations", 1, "iscrowd", to="maybe"),
        "annotation 2: expected 0 or 1 as its iscrowd",
    ),
    "crowd list": (
        lambda c: change(c, "annotations", 1, "iscrowd", to=[0]),
        "annotation 2: expected 0 or 1 as its iscrowd",
    ),
    "list": (lambda c: c.pop("images"), "expected an object with the lists images, annotations, categories"),
}


@pytest.mark.parametrize("kind", BAD_COCO)
def test_what_is_wrong_with_a_json_file_is_one_line(kind: str, tmp_path: Path) -> None:
    spoil, message = BAD_COCO[kind]
    content = coco_content(SPLITS["train"], [f"{number}.png" for number in range(12)])
    spoil(content)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(LongtailError) as error:
        read_coco(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"images": [' + "1" * 5000 + "]}"])
def test_json_that_cannot_be_parsed_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(LongtailError, match=r"a\.json: is not valid JSON in COCO's or LVIS's format \(.*\)$"):
        read_coco(tmp_path / "a.json")


def test_a_broken_json_file_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"images": [\n{"id": 1},\n')
    with pytest.raises(LongtailError, match=r"a\.json, line 3: is not valid JSON \(.*\); is the file complete\?"):
        read_coco(tmp_path / "a.json")


def test_boxes_partly_outside_are_clipped_and_those_without_area_left_out(tmp_path: Path) -> None:
    content = coco_content([Drawn(50, 40, [("red", 2, 3, 9, 10)] * 5)], ["a.png"])
    boxes = [[-10, 5, 20, 10], [40, 30, 10.4, 10.4], [5, 5, 0, 7], [5, 5, 7, -1], [1, 1, 2, 2]]
    for entry, box in zip(content["annotations"], boxes, strict=True):
        entry["bbox"] = box
        del entry["area"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    problems = AnnotationProblems()
    annotations = read_coco(tmp_path / "a.json", problems)
    assert annotations.boxes.tolist() == [[0, 5, 10, 15], [40, 30, 50, 40], [1, 1, 3, 3]]
    assert annotations.areas.tolist() == [100, 100, 4]
    assert [len(problems.outside), len(problems.without_area)] == [1, 2]  # less than a pixel is rounding
    assert problems.remarks() == [
        f"2 boxes have no area, and are left out; the first: {tmp_path / 'a.json'}: annotation 3 of a.png",
        f"1 box has parts outside of the image, and is clipped: {tmp_path / 'a.json'}: annotation 1 of a.png",
    ]


def spoil_line(file: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / file).write_text(text)


def remove(file: str) -> Callable[[Path], object]:
    return lambda root: (root / file).unlink()


YOLO_LABELS, VOC_XML = "labels/train/train001.txt", "Annotations/train001.xml"


@pytest.mark.parametrize(
    ("layout", "spoil", "message"),
    [
        (
            "YOLO",
            spoil_line(YOLO_LABELS, "0 .5 .5 .1 .1\n3 .5 .5 .1 .1"),
            f"{YOLO_LABELS}, line 2: class 3 is not listed",
        ),
        ("YOLO", spoil_line(YOLO_LABELS, "0.5 .5 .5 .1 .1"), f"{YOLO_LABELS}, line 1: class 0.5 is not listed"),
        ("YOLO", spoil_line(YOLO_LABELS, "nan .5 .5 .1 .1"), f"{YOLO_LABELS}, line 1: class nan is not listed"),
        ("YOLO", spoil_line(YOLO_LABELS, "\n0 .5 .5 .1"), f"{YOLO_LABELS}, line 2: expected a class and x, y, width"),
        ("YOLO", spoil_line(YOLO_LABELS, "0 .5 .5 .1 x"), f"{YOLO_LABELS}, line 1: expected a class and x, y, width"),
        ("YOLO", spoil_line(YOLO_LABELS, "0 30 20 5 5"), f"{YOLO_LABELS}, line 1: expected fractions of the image's"),
        ("YOLO", spoil_line(YOLO_LABELS, "0 .5 nan .1 .1"), f"{YOLO_LABELS}, line 1: expected fractions"),
        ("YOLO", spoil_line(YOLO_LABELS, "0 1.3 .5 .1 .1"), f"{YOLO_LABELS}, line 1: its box "),
        ("YOLO", remove("images/train/train001.png"), f"{YOLO_LABELS}: has no image in "),
        ("YOLO", remove("data.yaml"), "expected the names of the classes in data.yaml (names: […]) or classes.txt"),
        ("YOLO", spoil_line("data.yaml", "names: [a, a]"), "data.yaml: the class a occurs twice"),
        ("YOLO", spoil_line("data.yaml", "names: {0: a, 2: b}"), "data.yaml: expected names: a list of the classes"),
        ("YOLO", spoil_line("data.yaml", "names: [a\nb: ]"), "data.yaml, line 2: is not valid YAML"),
        ("Pascal VOC", remove(VOC_XML), f"{VOC_XML}: there is no such file; expected the objects of JPEGImages/"),
        ("Pascal VOC", remove("JPEGImages/train001.png"), "JPEGImages/train001.jpg: there is no such image"),
        ("Pascal VOC", spoil_line(VOC_XML, "<annotation>\n<object>\n"), f"{VOC_XML}, line 3: is not valid XML"),
        (
            "Pascal VOC",
            spoil_line(VOC_XML, "<annotation><object><name>red</name></object></annotation>"),
            f"{VOC_XML}: object 1: expected a name, and a bndbox with the numbers xmin, ymin, xmax, ymax",
        ),
        ("Pascal VOC", spoil_line("classes.txt", "blue\ngreen\nrad\n"), "its class is not listed in "),
        (
            "Pascal VOC",
            spoil_line("ImageSets/Main/train.txt", "train001\ntrain001\n"),
            "train.txt: the image train001 occurs twice",
        ),
        (
            "Pascal VOC",
            spoil_line("ImageSets/Main/val.txt", "train001\n"),
            "is in train and in val (1 such images); test and validation images must not be trained on",
        ),
        ("COCO", remove("train/train004.png"), "train/train004.png: there is no such image; add it"),
        ("COCO", remove("train/train000.png"), "train/train000.png: there is no such image; add it"),
        (
            "COCO",
            lambda root: (root / "train").rename(root / "elsewhere"),
            "instances_train.json: there is no image train000.png in ",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(
    layout: str, spoil: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    root = WRITERS[layout](tmp_path / "set", SPLITS)
    spoil(root)
    with pytest.raises(LongtailError) as error:
        load_data(Data(source="boxes", root=str(root)), 0)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data.root is missing: which folder holds the images with boxes of boxes?"),
        ({"root": "."}, "is no layout of images with boxes; expected .json files of COCO or LVIS"),
        ({"root": ".", "train": "x.csv"}, "data.train x.csv: expected a .json file"),
        ({"root": ".", "val": "x.json"}, "data.train is missing"),
        ({"root": ".", "train": "x.json"}, "x.json: cannot be read: No such file"),
        ({"root": ".", "profile": "step"}, "data.profile step: is not supported for images with boxes"),
    ],
)
def test_other_bad_input(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LongtailError, match=message.replace("?", r"\?").replace(".", r"\.")):
        load_data(Data(source="boxes", **settings), 0)


def test_files_whose_split_is_not_clear(tmp_path: Path) -> None:
    root = WRITERS["COCO"](tmp_path, SPLITS)
    (root / "annotations" / "captions_train.json").write_text("{}")  # no boxes: not looked at
    read_annotated_images(Data(source="boxes", root=str(root)))
    (root / "annotations" / "train.json").write_text("{}")
    with pytest.raises(LongtailError, match=r"instances_train\.json and train\.json may both hold the images of train"):
        read_annotated_images(Data(source="boxes", root=str(root)))


def test_paths_of_one_file_are_recognised(tmp_path: Path) -> None:
    root = WRITERS["COCO"](tmp_path, SPLITS)
    path = root / "annotations" / "instances_test.json"
    content = json.loads(path.read_text())
    for file, message in (
        ("test/test000.png", "test: the image test/test000.png occurs twice"),
        ("train/train003.png", "train/train003.png: is in train and in test"),
    ):
        content["images"][1]["file_name"] = str(root / file)
        path.write_text(json.dumps(content))
        with pytest.raises(LongtailError, match=message):
            read_annotated_images(Data(source="boxes", root=str(root)))


def test_names_in_another_unicode_form_are_those_of_the_disk(tmp_path: Path) -> None:
    root = WRITERS["COCO"](tmp_path, SPLITS)
    path = root / "annotations" / "instances_test.json"
    content = json.loads(path.read_text())
    for entry, name in zip(content["images"], ("caf\u00e9.png", "th\u00e9.png"), strict=False):
        (root / "test" / entry["file_name"]).rename(root / "test" / unicodedata.normalize("NFD", name))
        entry["file_name"] = name
    path.write_text(json.dumps(content))
    found = read_annotated_images(Data(source="boxes", root=str(root)))
    assert found.splits["test"].files[:2] == ("test/cafe\u0301.png", "test/the\u0301.png")


def test_other_classes_in_another_file(tmp_path: Path) -> None:
    root = WRITERS["COCO"](tmp_path, SPLITS)
    path = root / "annotations" / "instances_test.json"
    content = json.loads(path.read_text())
    swapped = {3: 7, 7: 3, 90: 90}
    for entry in (*content["annotations"], *content["categories"]):
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = swapped[entry[key]]
    path.write_text(json.dumps(content))
    check_against(read_annotated_images(Data(source="boxes", root=str(root))).splits["test"], SPLITS["test"])
    content["categories"][0]["name"] = "rad"
    path.write_text(json.dumps(content))
    with pytest.raises(LongtailError, match=r"the category 'rad' is not listed in .*; perhaps you meant red"):
        read_annotated_images(Data(source="boxes", root=str(root)))


def test_objects_in_any_order_are_gathered_by_image(tmp_path: Path) -> None:
    images, objects = 300, 4000
    rng = np.random.default_rng(0)
    owner, label = rng.integers(0, images, objects).tolist(), rng.integers(0, 50, objects).tolist()
    corners = (rng.random((objects, 4)) * [300, 200, 300, 200] + [0, 0, 1, 1]).round(2).tolist()
    content = {
        "images": [{"id": f"i{n}", "file_name": f"{n}.jpg", "width": 640, "height": 480} for n in range(images)],
        "annotations": [
            {"image_id": f"i{image}", "category_id": category, "bbox": box}
            for image, category, box in zip(owner, label, corners, strict=True)
        ],
        "categories": [{"id": number, "name": f"c{number}"} for number in range(50)],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    annotations = read_coco(tmp_path / "a.json")
    for image in range(images):
        rows = annotations.objects_of(image)
        mine = [number for number in range(objects) if owner[number] == image]
        assert annotations.labels[rows].tolist() == [label[number] for number in mine]
        expected = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (corners[number] for number in mine)])
        torch.testing.assert_close(annotations.boxes[rows], expected.view(-1, 4))


def test_bccd() -> None:
    root = SHARED / "bccd"
    if not root.is_dir():
        pytest.skip("needs BCCD in ../shared/data/bccd")
    found = read_annotated_images(Data(source="bccd", root=str(root)))
    assert {split: len(part) for split, part in found.splits.items()} == {"train": 205, "val": 87, "test": 72}
    counts = concatenate(list(found.splits.values())).object_counts.tolist()
    assert found.splits["train"].class_names == ("Platelets", "RBC", "WBC")
    assert counts == [361, 4155 - 2, 372]
    assert [text.rpartition("/")[2] for text in sorted(found.problems.without_area)] == [
        "BloodImage_00338.xml: object 13 (RBC)",
        "BloodImage_00343.xml: object 4 (RBC)",
    ]
    assert found.problems.outside == []
