"""The data source: splits, held-out images, groups, samples, and what inspect and split say and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longtail.cli.parsing import recipe_with_data
from longtail.config import Data, Shots, load_recipe
from longtail.data.detection import (
    AnnotationProblems,
    DetectionData,
    DetectionImages,
    DetectionTransform,
    read_coco,
    read_split,
    write_coco,
)
from longtail.data.detection.data import lvis_groups
from longtail.data.detection.inspection import find_doubled, find_tiny
from longtail.data.image_io import to_rgb
from longtail.data.inspection import inspect
from longtail.data.loader import TrainLoader
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.registry import TASKS
from tests.conftest import SHARED, Command
from tests.data.detection.drawn import (
    NAMES,
    WRITERS,
    Drawn,
    coco_content,
    drawn_images,
    write_voc_layout,
    write_yolo_layout,
)

SPLITS = {"train": drawn_images(12), "val": drawn_images(5, seed=1), "test": drawn_images(6, seed=2)}


def load(root: Path, load_seed: int = 0, **settings: Any) -> DetectionData:
    data = load_data(Data(source="boxes", root=str(root), **settings), load_seed)
    assert isinstance(data, DetectionData)
    return data


@pytest.mark.parametrize("layout", WRITERS)
def test_a_set_is_loaded(layout: str, tmp_path: Path) -> None:
    data = load(WRITERS[layout](tmp_path, SPLITS))
    assert (len(data.train), len(data.val or ()), len(data.test)) == (12, 5, 6)
    assert data.task == "detection"
    assert data.class_names == NAMES
    assert data.class_counts == [3, 6, 12]
    assert data.image_counts == [3, 6, 12]
    assert data.groups(Shots()) == ["rare", "rare", "common"]
    assert data.max_objects == max(len(image.objects) for image in SPLITS["train"])
    assert data.remarks[0].startswith(f"{tmp_path}: {layout} (")
    assert len({*data.train.ids.tolist(), *data.test.ids.tolist()}) == 18
    # the rarest class of an image stands for it
    rarest = [min(NAMES.index(name) for name, *_ in image.objects) for image in SPLITS["train"]]
    assert data.train.labels.tolist() == rarest
    assert data.train.classes is not None
    images = data.train.images
    assert isinstance(images, DetectionImages)
    for index, image in enumerate(SPLITS["train"]):
        sample = images.open_sample(index)
        assert (sample.image.size, sample.image.mode) == ((image.width, image.height), "RGB")
        assert sample.boxes.round().int().tolist() == [list(box) for _, *box in image.objects]
        assert (sample.boxes.dtype, sample.labels.dtype, sample.ignored.dtype) == (
            torch.float32,
            torch.int64,
            torch.bool,
        )
    assert data.fingerprint == load(tmp_path).fingerprint


def test_a_folder_of_boxes_has_its_own_recipe(tmp_path: Path) -> None:
    root = write_yolo_layout(tmp_path, SPLITS)
    for arguments in (["--data", str(root)], [str(root)], ["boxes", "--data", str(root)]):
        recipe, rest = recipe_with_data(arguments, "digits-lt")
        assert not rest
        assert recipe.config.data.root == str(root)
        TASKS["detection"].check(recipe.config)
    assert recipe_with_data(["--data", "bccd"], "digits-lt")[0].config == load_recipe("bccd").config
    assert recipe_with_data(["--data", "cifar100-lt"], "digits-lt")[0].config.pretrained == "auto"


def test_the_boxes_are_part_of_what_a_set_is(tmp_path: Path) -> None:
    root = write_yolo_layout(tmp_path, SPLITS)
    before = load(root).fingerprint
    path = root / "labels" / "train" / "train000.txt"
    path.write_text(path.read_text().replace("2 0.", "1 0.", 1))
    assert load(root).fingerprint != before
    tested = load(root).fingerprints["test_images"]
    (path,) = (root / "labels" / "test").glob("*000.txt")
    path.write_text("0 0.5 0.5 0.25 0.25\n")
    assert load(root).fingerprints["test_images"] != tested


def test_what_is_evaluated_is_held_out_where_there_is_none(tmp_path: Path) -> None:
    root = WRITERS["COCO"](tmp_path, {"train": drawn_images(40)})
    data = load(root, test_fraction=0.25, val_fraction=0.25)
    sizes = [len(part) for part in (data.train, data.val, data.test) if part is not None]
    assert sum(sizes) == 40
    assert all(abs(size - wanted) <= 2 for size, wanted in zip(sizes, (20, 10, 10), strict=True))
    assert f"of 40 images, {sizes[2]} for testing and {sizes[1]} for validation are held out of the training" in (
        data.remarks
    )
    ids = torch.cat([part.ids for part in (data.train, data.val, data.test) if part is not None])
    assert sorted(ids.tolist()) == list(range(40))
    for part in (data.train, data.val, data.test):
        assert part is not None
        assert isinstance(part.images, DetectionImages)
        assert int(part.images.annotations.image_counts.min()) >= 1
    again, other = load(root, test_fraction=0.25), load(root, load_seed=1, test_fraction=0.25)
    assert torch.equal(load(root, test_fraction=0.25).test.ids, again.test.ids)
    assert not torch.equal(other.test.ids, again.test.ids)
    # masks of the images that are held out can be evaluated
    assert isinstance(again.test.images, DetectionImages)
    assert again.test.images.annotations.masks is not None


def test_classes_without_objects_are_left_out(tmp_path: Path) -> None:
    """As in the exports of Roboflow, whose first category is the name of the set."""
    root = WRITERS["COCO"](tmp_path, SPLITS)
    for split in SPLITS:
        path = root / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
        path.write_text(json.dumps(content))
    data = load(root)
    assert data.class_names == NAMES
    assert data.class_counts == [3, 6, 12]
    assert "1 of 4 classes have no objects, and are left out (shapes)" in data.remarks
    assert data.train.classes is not None
    assert int(data.train.classes.classes.max()) == 2


def test_a_class_to_evaluate_that_is_not_trained_is_an_error(tmp_path: Path) -> None:
    only_red = [Drawn(40, 40, [("red", 2, 2, 20, 20)])] * 3
    root = WRITERS["COCO"](tmp_path, {"train": only_red, "test": SPLITS["test"]})
    with pytest.raises(LongtailError, match="train: class 'blue' has no object there, but 2 to evaluate; add images"):
        load(root)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_without_objects_cannot_be_evaluated(tmp_path: Path, split: str) -> None:
    root = WRITERS["YOLO"](tmp_path, {**SPLITS, split: [Drawn(40, 40, [])] * 2})
    with pytest.raises(LongtailError, match=f"{split}: there is no object in any image; expected some to evaluate on"):
        load(root)


def test_images_without_objects_are_kept_and_remarked_on(tmp_path: Path) -> None:
    empty = [Drawn(40, 40, [])] * 2
    root = WRITERS["YOLO"](tmp_path, {"train": [*SPLITS["train"], *empty], "test": SPLITS["test"]})
    data = load(root)
    assert "2 of 14 training images have no objects, and show background alone" in data.remarks
    sample = data.train.images.open_sample(13)
    assert sample.boxes.shape == (0, 4)
    view, targets = DetectionTransform(32, data.max_objects)(sample, 0, (0,))
    assert view.shape == (3, 32, 32)
    assert targets[:, 4].tolist() == [-1] * data.max_objects


def test_unreadable_images(tmp_path: Path) -> None:
    root = WRITERS["YOLO"](tmp_path, {"train": SPLITS["train"], "test": drawn_images(10, seed=2)})
    for split, number in (("train", 0), ("test", 2)):
        path = root / "images" / split / f"{split}{number:03}.png"
        path.write_bytes(path.read_bytes()[:90])  # the header is whole
    with pytest.raises(LongtailError, match=r"1 of 22 images cannot be read, more than data\.max_unreadable_fraction"):
        load(root)
    data = load(root, max_unreadable_fraction=0.2)
    assert len(data.test) == 9
    assert [path for path, _ in data.unreadable] == ["images/test/test002.png"]
    assert 2 + 12 not in data.test.ids.tolist() or 2 not in data.test.ids.tolist()
    # a training image that fails is replaced by the next of its rarest class, with that one's objects
    sample = data.train.images.open_sample(0)
    assert sample.image.size == (SPLITS["train"][4].width, SPLITS["train"][4].height)
    assert len(sample.boxes) == len(SPLITS["train"][4].objects)
    inspection = inspect(Data(source="boxes", root=str(root), max_unreadable_fraction=0.2), 0, Shots())
    assert {entry["path"] for entry in inspection.unreadable} == {
        "images/test/test002.png",
        "train: images/train/train000.png",
    }
    assert inspection.errors == []


def test_unreadable_headers_of_images_whose_size_is_not_in_the_annotations(tmp_path: Path, command: Command) -> None:
    root = WRITERS["YOLO"](tmp_path / "set", SPLITS)
    (root / "images" / "train" / "train001.png").write_bytes(b"no image")
    with pytest.raises(LongtailError, match=r"train001\.png: is not an image that Pillow can read"):
        load(root, unreadable="error")
    data = load(root, max_unreadable_fraction=0.1)
    assert len(data.train) == 11
    assert data.image_counts == [3, 5, 11]
    assert [path for path, _ in data.unreadable] == ["images/train/train001.png"]
    code, out, _ = command("split", root, "--out", tmp_path / "split")
    assert code == 0
    assert out.count("1 image cannot be read, and is left out: ") == 1
    assert "its own splits (train, val, test) were joined and divided again" in out


def test_unreadable_images_are_counted_once(tmp_path: Path) -> None:
    root = WRITERS["YOLO"](tmp_path, SPLITS)
    (root / "images" / "train" / "train001.png").write_bytes(b"no image")
    remarks = load(root, max_unreadable_fraction=0.1).remarks
    (remark,) = (remark for remark in remarks if "train001.png" in remark)
    assert remark.startswith("1 of 23 images cannot be read")
    problems = AnnotationProblems()
    read_split(root, "train", problems)
    assert problems.remarks() == [
        f"1 image cannot be read, and is left out: {root}/images/train/train001.png: is not an image that Pillow can "
        "read; remove or replace it"
    ]


@pytest.mark.parametrize("layout", ["COCO", "Pascal VOC"])
@pytest.mark.parametrize("kind", ["size", "unreadable"])
def test_training_images_are_checked_before_training(layout: str, kind: str, tmp_path: Path) -> None:
    root = WRITERS[layout](tmp_path, SPLITS)
    path = next(root.rglob("train000.png"))
    if kind == "size":
        Image.new("RGB", (33, 20)).save(path)
        message = r"train000\.png: has 33 × 20 pixels, its annotations say 85 × 59"
    else:
        path.write_bytes(b"no image")
        message = r"train000\.png: is not an image that Pillow can read"
    with pytest.raises(LongtailError, match=f"1 of 23 images cannot be read.*{message}"):
        load(root)
    with pytest.raises(LongtailError, match=message):
        load(root, unreadable="error")
    data = load(root, max_unreadable_fraction=0.1)
    assert len(data.train) == 11
    assert data.train.ids.tolist() == list(range(1, 12))
    assert [name for name, _ in data.unreadable] == [path.relative_to(root).as_posix()]
    assert any(remark.startswith("1 of 23 images cannot be read") for remark in data.remarks)


def test_ignored_boxes_of_a_class_without_objects_are_no_background(tmp_path: Path) -> None:
    """As VisDrone's ignored regions, a class of their own."""
    root = WRITERS["COCO"](tmp_path, SPLITS)
    for split in SPLITS:
        path = root / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"].insert(0, {"id": 0, "name": "ignored regions"})
        image = content["images"][0]
        content["annotations"].append(
            {"image_id": image["id"], "category_id": 0, "bbox": [1, 2, 20, 30], "iscrowd": 1, "segmentation": [[0] * 6]}
        )
        path.write_text(json.dumps(content))
    data = load(root)
    assert data.class_names == NAMES
    assert data.class_counts == [3, 6, 12]
    assert data.train.classes is not None
    assert len(data.train.classes.classes) == 3 + 6 + 12
    sample = data.train.images.open_sample(0)
    assert sample.ignored.tolist() == [False] * len(SPLITS["train"][0].objects) + [True]
    assert sample.boxes[-1].tolist() == [1, 2, 21, 32]
    assert (sample.labels >= 0).all()
    targets = DetectionTransform(32, data.max_objects)(sample, 0, (0,))[1]
    assert targets[:, 4].tolist().count(-2) == 1
    for part in (data.val, data.test):
        assert part is not None
        assert isinstance(part.images, DetectionImages)
        assert not part.images.annotations.ignored.any()
    assert any("(train 1, val 1, test 1) are neither objects nor background in training" in r for r in data.remarks)


def test_split_writes_the_masks_of_those_that_have_one(tmp_path: Path, command: Command) -> None:
    root = WRITERS["COCO"](tmp_path / "set", SPLITS)
    paths = {split: root / "annotations" / f"instances_{split}.json" for split in SPLITS}
    content = json.loads(paths["train"].read_text())
    content["annotations"][2]["segmentation"] = []
    paths["train"].write_text(json.dumps(content))
    content = json.loads(paths["val"].read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    paths["val"].write_text(json.dumps(content))
    without, total = (
        1 + len(content["annotations"]),
        sum(len(image.objects) for part in SPLITS.values() for image in part),
    )
    code, text, _ = command("split", root, "--out", tmp_path / "split", "--val", "0.2", "--test", "0.2")
    assert code == 0
    assert (
        f"{without} of {total} objects have no mask, and are written without one; the first is of train/train" in text
    )
    entries = [
        entry
        for split in SPLITS
        for entry in json.loads((tmp_path / "split" / f"{split}.json").read_text())["annotations"]
    ]
    assert len(entries) == total
    assert sum(not entry["segmentation"] for entry in entries) == without
    for entry in entries:
        if entry["segmentation"]:
            (left, top, width, height), corners = entry["bbox"], entry["segmentation"][0]
            assert [min(corners[::2]), min(corners[1::2])] == [left, top]
            assert [max(corners[::2]), max(corners[1::2])] == [left + width, top + height]


@pytest.mark.parametrize("rotated", [True, False])
def test_boxes_may_be_of_the_image_before_or_after_exif_rotates_it(rotated: bool, tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 0, 0), (2, 3, 12, 9))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn by 90° clockwise
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.jpg", exif=exif, quality=100, subsampling=0)
    drawn = Drawn(20, 40, [("red", 11, 2, 17, 12)]) if rotated else Drawn(40, 20, [("red", 2, 3, 12, 9)])
    (tmp_path / "train.json").write_text(json.dumps(coco_content([drawn], ["a.jpg"])))
    images = DetectionImages(tmp_path / "images", read_coco(tmp_path / "train.json"), 32)
    sample = images.open_sample(0)
    x1, y1, x2, y2 = (int(side) for side in sample.boxes[0].tolist())
    inside = np.array(sample.image)[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1]
    assert inside[..., 0].min() > 200
    assert np.array(sample.image)[..., 0].sum() < 255 * ((x2 - x1 + 2) * (y2 - y1 + 2))
    assert to_rgb(sample.image).size == sample.image.size  # whoever is given it does not rotate it again


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_views_and_targets(workers: int, tmp_path: Path) -> None:
    data = load(WRITERS["COCO"](tmp_path, SPLITS), sampler="repeat_factor")
    transform = DetectionTransform(64, data.max_objects, (0.5, 2.0), 0.5, 0.2)
    loader = TrainLoader(data.train, 4, [transform], 0, workers=workers, sampler="repeat_factor", repeat_threshold=0.5)
    batches = list(loader.epoch(0))
    assert [len(batch) for batch in batches] == [4, 4, 4]
    for batch in batches:
        assert batch.views[0].shape == (4, 3, 64, 64)
        assert batch.views[0].dtype == torch.float32
        assert float(batch.views[0].max()) <= 1
        assert batch.labels.shape == (4, data.max_objects, 5)
        assert batch.labels.dtype == torch.float32
    again = next(iter(loader.epoch(0)))
    assert torch.equal(again.views[0], batches[0].views[0])
    assert torch.equal(again.labels, batches[0].labels)


def test_lvis_groups() -> None:
    assert lvis_groups([1, 10, 11, 100, 101]) == ["rare", "rare", "common", "common", "frequent"]


def test_doubled_and_tiny_objects_against_all_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = coco_content([Drawn(100, 100, [("red", 2, 3, 9, 10)])] * 4, list("abcd"))
    entries: list[dict[str, Any]] = []
    for number in range(400):
        base = entries[int(rng.integers(len(entries)))] if entries and rng.random() < 0.3 else None
        box = (
            [*(rng.random(2) * 60), *(rng.random(2) * 30 + 1)]
            if base is None
            else (np.array(base["bbox"]) + rng.choice([0, 0.02, 0.3], 4)).tolist()
        )
        source = base or {"image_id": int(rng.integers(10, 14)), "category_id": int(rng.choice([3, 7, 90]))}
        entries.append({**source, "id": number, "bbox": [float(value) for value in box], "segmentation": None})
    content["annotations"] = entries
    (tmp_path / "a.json").write_text(json.dumps(content))
    annotations = read_coco(tmp_path / "a.json")

    def iou(a: list[float], b: list[float]) -> float:
        common = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)

    boxes, labels, owner = annotations.boxes.tolist(), annotations.labels.tolist(), annotations.image_index.tolist()
    expected = [
        second
        for second in range(len(boxes))
        if any(
            owner[first] == owner[second]
            and labels[first] == labels[second]
            and iou(boxes[first], boxes[second]) >= 0.99
            for first in range(second)
        )
    ]
    assert find_doubled(annotations).tolist() == expected
    assert 10 < len(expected) < 200
    tiny = [row for row, box in enumerate(boxes) if min(box[2] - box[0], box[3] - box[1]) * 0.5 < 4]
    assert find_tiny(annotations, 50).tolist() == tiny


def test_inspect_reports_what_was_planted(tmp_path: Path, command: Command) -> None:
    root = WRITERS["COCO"](tmp_path / "set", SPLITS)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    entries = content["annotations"]
    entries.append({**entries[0], "id": 900})
    entries[1]["bbox"][2] = 0
    entries[2]["bbox"][0:1] = [-5]
    content["images"].append({"id": 99, "file_name": "../val/../train/empty.png", "width": 30, "height": 30})
    path.write_text(json.dumps(content))
    Image.new("RGB", (30, 30)).save(root / "train" / "empty.png")
    code, out, _ = command("inspect", root, "--json", tmp_path / "inspection.json")
    assert code == 0
    assert "box without area: " in out
    assert "box outside: " in out
    assert "annotated twice: " in out
    assert "repeat factor" in out
    values = json.loads((tmp_path / "inspection.json").read_text())
    assert values["group_sizes"] == {"frequent": 0, "common": 1, "rare": 2}
    assert [len(values[key]) for key in ("boxes_without_area", "boxes_outside", "doubled", "empty_images")] == [
        1,
        1,
        1,
        1,
    ]
    assert values["splits"] == {"train": 13, "val": 5, "test": 6}
    assert len(values["image_counts"]) == len(values["repeat_factors"]) == 3


def test_inspect_finds_images_in_two_splits(tmp_path: Path) -> None:
    root = WRITERS["YOLO"](tmp_path, SPLITS)
    source = root / "images" / "train" / "train003.png"
    (root / "images" / "test" / "test000.png").write_bytes(source.read_bytes())
    inspection = inspect(Data(source="boxes", root=str(root)), 0, Shots())
    assert inspection.leaks == [["train: images/train/train003.png", "test: images/test/test000.png"]]


def test_split_writes_files_that_can_be_trained_on(tmp_path: Path, command: Command) -> None:
    root = write_voc_layout(tmp_path / "set", {"train": drawn_images(40)}, lists=False)
    out = tmp_path / "split"
    code, text, _ = command("split", root, "--out", out, "--val", "0.2", "--test", "0.2", "--json", tmp_path / "s.json")
    assert code == 0
    summary = json.loads((tmp_path / "s.json").read_text())
    assert sum(summary["images"].values()) == 40
    assert summary["short"] == []
    assert text.rstrip().endswith(f"longtail train {summary['data']}")
    files: dict[str, Any] = {name: str(out / f"{name}.json") for name in ("train", "val", "test")}
    data = load(root, **files)
    assert {"train": len(data.train), "val": len(data.val or ()), "test": len(data.test)} == summary["images"]
    names = [name for split in files for name in read_coco(Path(files[split])).files]
    assert len(set(names)) == 40
    again = tmp_path / "again"
    command("split", root, "--out", again, "--val", "0.2", "--test", "0.2")
    assert (again / "train.json").read_bytes() == (out / "train.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.csv"], "--out a.csv: expected the name of a folder"),
        (["--groups", "patient"], "--groups patient: is not supported for boxes; expected a table"),
        (["--test", "1"], "expected fractions from 0"),
    ],
)
def test_split_refuses(
    arguments: list[str], message: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = WRITERS["YOLO"](tmp_path / "set", SPLITS)
    monkeypatch.chdir(tmp_path)
    code, _, errors = command("split", root, *arguments)
    assert code == 2
    assert message in errors
    assert not (tmp_path / "split").exists()


def test_write_coco_names_a_folder_that_is_missing(tmp_path: Path) -> None:
    root = WRITERS["COCO"](tmp_path, SPLITS)
    annotations = read_coco(root / "annotations" / "instances_val.json")
    with pytest.raises(LongtailError, match=r"cannot be written: No such file or directory"):
        write_coco(annotations, tmp_path / "no" / "a.json")


def test_bccd(command: Command) -> None:
    root = SHARED / "bccd"
    if not root.is_dir():
        pytest.skip("needs BCCD in ../shared/data/bccd")
    data = load_data(Data(source="bccd", root=str(root)), 0)
    assert isinstance(data, DetectionData)
    assert (len(data.train), len(data.val or ()), len(data.test)) == (205, 87, 72)
    assert data.class_names == ("Platelets", "RBC", "WBC")
    assert data.image_size == 640
    code, out, _ = command("inspect", "bccd", "--data.root", root)
    assert code == 0
    assert "boxes without area          2" in out
    assert "box without area: " in out


def test_bccd_needs_its_root() -> None:
    with pytest.raises(LongtailError, match=r"data\.root is missing: which folder holds Annotations, ImageSets"):
        load_data(Data(source="bccd"), 0)
