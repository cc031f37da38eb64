"""Folders that other tools write: which layout they have, and what of them is left out or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longtail.config import Data
from longtail.data.detection import AnnotationProblems, DetectionData, read_coco, read_voc, read_yolo, write_coco
from longtail.data.detection.layouts import read_annotated_images
from longtail.data.detection.split import write_split
from longtail.data.source_spec import source_of
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from tests.conftest import Command, save_image
from tests.data.detection.drawn import WRITERS, drawn_images, save_drawn, write_coco_layout, write_voc_layout

SPLITS = {"train": drawn_images(12), "val": drawn_images(5, seed=1), "test": drawn_images(6, seed=2)}


@pytest.mark.parametrize("place", ["", "images"])
@pytest.mark.parametrize("names", [("train", "val"), ("train2017", "val2017")])
def test_json_files_beside_folders_of_splits(place: str, names: tuple[str, str], tmp_path: Path) -> None:
    """Each is a file of boxes, not a folder of the classes train and val."""
    root = write_coco_layout(tmp_path / "set", {split: SPLITS[split] for split in ("train", "val")})
    for split, name in zip(("train", "val"), names, strict=True):
        (root / place).mkdir(exist_ok=True)
        (root / split).rename(root / place / name)
        (root / "annotations" / f"instances_{split}.json").rename(root / f"{name}.json")
    (root / "annotations").rmdir()
    (root / "runs").mkdir()
    assert source_of(str(root)) == {"source": "boxes", "root": str(root)}
    found = read_annotated_images(Data(source="boxes", root=str(root)))
    assert {split: len(part) for split, part in found.splits.items()} == {"train": 12, "val": 5}
    # a folder of another name may be a class, and a table of classes has no boxes
    save_image(root / place / "cats" / "1.png")
    assert source_of(str(root))["source"] == "folder"
    shutil.rmtree(root / place / "cats")
    for text in ("", json.dumps({"images": [], "annotations": [{"category_id": 1}], "categories": []})):
        for name in names:
            (root / f"{name}.json").write_text(text)
        assert source_of(str(root))["source"] == "folder"


def test_files_beside_the_photographs_of_voc_are_not_taken_for_these(tmp_path: Path) -> None:
    root = write_voc_layout(tmp_path, {"train": SPLITS["train"]})
    for name in ("train000.xml", "train001.txt", "Thumbs.db"):
        (root / "JPEGImages" / name).write_text("x")
    assert read_voc(root)["train"].files[:2] == ("JPEGImages/train000.png", "JPEGImages/train001.png")
    save_image(root / "JPEGImages" / "train003.jpg")
    with pytest.raises(LongtailError, match=r"train003\.png: train003\.xml may be of this image or of train003\.jpg"):
        read_voc(root)


def test_a_split_leaves_no_file_of_an_earlier_one(tmp_path: Path, command: Command) -> None:
    root = write_voc_layout(tmp_path / "set", {"train": drawn_images(40)}, lists=False)
    out = tmp_path / "split"
    assert command("split", root, "--out", out, "--val", "0.2", "--test", "0.2")[0] == 0
    assert command("split", root, "--out", out, "--val", "0", "--test", "0.2", "--overwrite")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["test.json", "train.json"]
    assert sum(len(read_coco(path)) for path in out.iterdir()) == 40


def test_an_interrupted_split_leaves_no_training_set_beside_the_others_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_voc_layout(tmp_path / "set", {"train": drawn_images(40)}, lists=False)
    config, out, steps = Data(source="boxes", root=str(root)), tmp_path / "split", 0

    def images() -> dict[str, set[str]]:
        return {path.stem: set(read_coco(path).files) for path in out.glob("*.json")}

    def interrupted(do: Callable[..., Any], after: int) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > after:
                raise KeyboardInterrupt
            return do(*args, **options)

        return step

    for after in range(9):  # of three files: written, removed, renamed
        write_split(config, out, 0.2, 0.2, seed=0)
        before, steps = images(), 0
        with monkeypatch.context() as patched:
            patched.setattr("longtail.data.detection.split.write_coco", interrupted(write_coco, after))
            patched.setattr(Path, "rename", interrupted(Path.rename, after))
            patched.setattr(Path, "unlink", interrupted(Path.unlink, after))
            with pytest.raises(KeyboardInterrupt):
                write_split(config, out, 0.2, 0.2, seed=1)
        left = images()
        assert "train" not in left or left == before
    write_split(config, out, 0.2, 0.2, seed=1)
    assert images() != before
    assert sum(map(len, images().values())) == len(set().union(*images().values())) == 40
    assert sorted(path.name for path in out.iterdir()) == ["test.json", "train.json", "val.json"]


def roboflow(root: Path, split: str, names: dict[int, str], class_id: int) -> Path:
    """Write Roboflow's folder of a split, all objects of one class."""
    images: list[dict[str, Any]] = [
        {"id": index, "file_name": f"{index}.png", "height": image.height, "width": image.width}
        for index, image in enumerate(SPLITS[split])
    ]
    objects: list[dict[str, Any]] = [
        {"image_id": image["id"], "category_id": class_id, "bbox": [1, 2, 20, 20]} for image in images
    ]
    for image, drawn in zip(images, SPLITS[split], strict=True):
        save_drawn(root / split / image["file_name"], drawn)
    content = {
        "images": images,
        "annotations": objects,
        "categories": [{"id": number, "name": name} for number, name in names.items()],
    }
    path = root / split / "_annotations.coco.json"
    path.write_text(json.dumps(content))
    return path


def test_an_unused_category_of_the_same_name_is_left_out(tmp_path: Path) -> None:
    """Roboflow lists the project as category 0; where it has the name of its only class, that occurs twice."""
    for split in SPLITS:
        path = roboflow(tmp_path, split, {0: "cell", 1: "cell"}, 1)
    data = load_data(Data(source="boxes", root=str(tmp_path)), 0)
    assert data.class_names == ("cell",)
    assert data.class_counts == [12]
    assert any(
        remark.startswith("3 categories without objects have the name of another, and are left out; the first: ")
        and remark.endswith("train/_annotations.coco.json: cell, id 0")
        for remark in data.remarks
    )
    problems = AnnotationProblems()
    assert read_coco(path, problems).category_ids == (1,)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    assert read_coco(path).category_ids == (1,)  # the last, where none has objects
    content = json.loads(roboflow(tmp_path, "train", {0: "cell", 1: "cell"}, 1).read_text())
    content["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(LongtailError, match="the category cell occurs twice"):
        read_coco(path)


@pytest.mark.parametrize("nested", [False, True])
def test_yolo_test_images_without_labels_are_left_out(nested: bool, tmp_path: Path) -> None:
    root = WRITERS["YOLO"](tmp_path, SPLITS)
    if nested:
        for split in SPLITS:
            (root / split).mkdir()
            for kind in ("images", "labels"):
                (root / kind / split).rename(root / split / kind)
        for kind in ("images", "labels"):
            (root / kind).rmdir()

    def folder(kind: str, split: str) -> Path:
        return root / split / kind if nested else root / kind / split

    shutil.rmtree(folder("labels", "test"))
    data = load_data(Data(source="boxes", root=str(root)), 0)
    assert isinstance(data, DetectionData)
    left_out = f"{folder('images', 'test')} (expected {folder('labels', 'test')})"
    assert f"1 folder of images has no folder of labels, and is left out: {left_out}" in data.remarks
    assert len(data.train) + len(data.val or ()) + len(data.test) == 12 + 5
    folder("labels", "train").rename(root / "elsewhere")
    with pytest.raises(LongtailError) as error:
        read_yolo(root)
    assert str(error.value).startswith(f"{folder('labels', 'train')}: there is no such folder; expected the labels of ")
    folder("labels", "train").mkdir()  # images without objects
    assert read_yolo(root)["train"].num_objects.sum() == 0


@pytest.mark.parametrize("layout", WRITERS)
def test_a_folder_without_test_images_is_tested_on_its_validation_images(layout: str, tmp_path: Path) -> None:
    root = WRITERS[layout](tmp_path, {"train": drawn_images(20), "val": SPLITS["val"]})
    for fraction, held_out in ((0.0, 0), (0.2, 4)):
        data = load_data(Data(source="boxes", root=str(root), val_fraction=fraction), 0)
        assert isinstance(data, DetectionData)
        assert (len(data.test), len(data.val or ())) == (5, held_out)
        assert len(data.train) == 20 - held_out
        assert len({*data.train.ids.tolist(), *data.test.ids.tolist()}) == 25 - held_out
        assert any(remark.startswith(f"validation images of {root}: there is no test split") for remark in data.remarks)


def test_a_file_that_is_named_as_validation_images_stays_these(tmp_path: Path) -> None:
    root = write_coco_layout(tmp_path, {"train": drawn_images(20), "val": SPLITS["val"]})
    files: dict[str, Any] = {split: str(root / "annotations" / f"instances_{split}.json") for split in ("train", "val")}
    data = load_data(Data(source="boxes", root=str(root), **files), 0)
    assert (len(data.train), len(data.val or ()), len(data.test)) == (16, 5, 4)


def test_a_split_does_not_replace_what_it_is_made_from(tmp_path: Path, command: Command) -> None:
    root = write_coco_layout(tmp_path / "set", {"train": drawn_images(20)})
    source = root / "annotations" / "val.json"  # a name that is removed where there are no validation images
    (root / "annotations" / "instances_train.json").rename(source)
    (tmp_path / "link").symlink_to(root / "annotations")
    before = source.read_bytes()
    named = ("split", "boxes", "--data.root", root / "train", "--data.train", source)
    for out in (root / "annotations", tmp_path / "link"):
        code, _, err = command(*named, "--out", out, "--val", "0", "--test", "0.2", "--overwrite")
        assert (code, err.strip().count("\n")) == (2, 0)
        assert f"{out / 'val.json'} is read by this command; choose another --out" in err
        assert [path.name for path in out.iterdir()] == ["val.json"]
        assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["lvis_v1_image_info_test_dev", "lvis_v1_image_info_test_challenge"])
def test_lvis_files_of_images_alone_are_left_out(name: str, tmp_path: Path) -> None:
    root = write_coco_layout(tmp_path, {split: SPLITS[split] for split in ("train", "val")})
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}.json").rename(root / "annotations" / f"lvis_v1_{split}.json")
    (root / "annotations" / f"{name}.json").write_text(json.dumps({"images": [], "categories": []}))
    found = read_annotated_images(Data(source="boxes", root=str(root)))
    assert {split: len(part) for split, part in found.splits.items()} == {"train": 12, "val": 5}
