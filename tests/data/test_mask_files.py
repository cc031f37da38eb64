"""Masks whose values, names or orientation are not what they seem."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from longtail.config import Data, Shots
from longtail.data.inspection import inspect
from longtail.data.source_spec import source_of
from longtail.data.sources import load_data
from longtail.data.sources.segmentation import SegmentationData, SegmentationImages
from longtail.errors import LongtailError
from tests.conftest import save_scene

ORIENTATION = 0x0112
CORNER = np.ones((40, 60), dtype=np.uint8)
CORNER[:7, :21] = 2  # so that each of the eight orientations differs


def load(root: Path, source: str = "masks", **settings: object) -> SegmentationData:
    data = load_data(Data(source=source, root=str(root), **settings), 0)  # type: ignore[arg-type]
    assert isinstance(data, SegmentationData)
    return data


def add_photograph(
    root: Path, name: str, orientation: int, drawn_on: str, values: np.ndarray = CORNER, split: str = "training"
) -> None:
    """Write a photograph that its Exif tag turns, and its mask, drawn on it as it is stored or as it is shown."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image, mask = save_scene(root, split, name, values)
    with Image.open(image) as stored:
        stored.save(image.with_suffix(".jpg"), quality=95, exif=exif)
    image.unlink()
    if drawn_on == "shown":
        turned = Image.fromarray(values)
        turned.getexif()[ORIENTATION] = orientation
        ImageOps.exif_transpose(turned).save(mask)
    elif drawn_on == "tagged":
        Image.fromarray(values).save(mask, exif=exif)


def agreement(images: object, name: str) -> float:
    """Return the fraction of pixels whose label is the one that their colour tells."""
    assert isinstance(images, SegmentationImages)
    shown, labels = images.open_sample(next(n for n, file in enumerate(images.names) if Path(file).stem == name))
    red, green = (np.asarray(shown, dtype=float)[..., channel] for channel in (0, 1))
    return float(np.mean((green > red) == (labels == 1)))  # save_scene paints value 1 red and value 2 green


@pytest.mark.parametrize("drawn_on", ["stored", "shown"])
def test_masks_whose_size_does_not_tell_are_drawn_as_those_whose_size_does(scenes: Path, drawn_on: str) -> None:
    add_photograph(scenes, "told", 6, drawn_on, split="validation")
    for orientation in (2, 3, 4):
        add_photograph(scenes, f"like{orientation}", orientation, drawn_on)
    add_photograph(scenes, "square", 8, drawn_on, CORNER[:, :40])
    data = load(scenes)
    for name in ("like2", "like3", "like4", "square"):
        assert agreement(data.train.images, name) > 0.98
    assert agreement(data.val.images, "told") > 0.98  # type: ignore[union-attr]
    assert data.remarks == ()


@pytest.mark.parametrize("told", [(), ("stored", "shown")])
def test_what_no_size_tells_is_remarked_on(scenes: Path, told: tuple[str, ...]) -> None:
    for drawn_on in told:
        add_photograph(scenes, drawn_on, 6, drawn_on)
    add_photograph(scenes, "turned", 3, "shown")
    data = load(scenes)
    (remark,) = data.remarks
    assert remark.startswith("1 image is turned by the Exif tag, and the size of the mask does not tell whether")
    assert agreement(data.train.images, "turned") > 0.98


@pytest.mark.parametrize("orientation", [3, 6])
def test_the_exif_tag_of_a_mask_turns_it(scenes: Path, orientation: int) -> None:
    add_photograph(scenes, "turned", orientation, "tagged")
    data = load(scenes)
    assert agreement(data.train.images, "turned") > 0.98
    assert data.remarks == ()


def test_the_size_of_most_images_is_the_one_that_is_shown(scenes: Path) -> None:
    for number in range(7):
        add_photograph(scenes, f"turned{number}", 6, "stored", split="test")
    assert load(scenes).size == (60, 40)


def test_an_inspection_reads_every_file(scenes: Path) -> None:
    for part in ("images", "annotations"):
        shutil.copy(scenes / part / "training/00.png", scenes / part / "test/00.png")
        shutil.copy(scenes / part / "training/01.png", scenes / part / "training/11.png")
    path = scenes / "images/training/05.png"  # its header can be read
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = inspect(Data(source="masks", root=str(scenes)), 0, Shots())
    assert found.leaks == [["train: images/training/00.png", "test: images/test/00.png"]]
    assert found.duplicates == [["train: images/training/01.png", "train: images/training/11.png"]]
    assert [entry["path"] for entry in found.unreadable] == ["train: images/training/05.png"]
    assert found.errors[0].startswith("1 of 22 images cannot be read, more than data.max_unreadable_fraction")
    assert found.sides == {"width": [66, 66, 66], "height": [50, 50, 50]}


def voc(root: Path) -> Path:
    (root / "images").rename(root / "JPEGImages")
    (root / "annotations").rename(root / "SegmentationClass")
    return root


def beside(folder: str) -> Callable[[Path], Path]:
    def rename(root: Path) -> Path:
        (root / "annotations").rename(root / folder)
        return root

    return rename


def within_splits(root: Path) -> Path:
    new = root.with_name("within")
    for part, folder in (("images", "images"), ("annotations", "masks")):
        for split in ("training", "test"):
            shutil.copytree(root / part / split, new / split.removesuffix("ing") / folder)
    return new


@pytest.mark.parametrize("layout", [voc, beside("masks"), beside("labels"), beside("Mask"), within_splits])
def test_images_and_masks_in_other_folders_are_not_two_classes(scenes: Path, layout: Callable[[Path], Path]) -> None:
    root = layout(scenes)
    with pytest.raises(LongtailError, match=r"has images \(.*\) and masks \(.*\) of the same names; .*annotations"):
        source_of(str(root))


def test_other_folders_of_these_names_stay_what_they_are(tmp_path: Path) -> None:
    for name in ("images/a.png", "images/b.png", "masks/c.png", "masks/a.png"):  # a class of masks for carnival
        path = tmp_path / "classes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    assert source_of(str(tmp_path / "classes"))["source"] == "folder"
    for name in ("images/a.png", "labels/a.txt"):
        path = tmp_path / "yolo" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert source_of(str(tmp_path / "yolo"))["source"] == "boxes"
    for name in ("JPEGImages/a.jpg", "SegmentationClass/a.png", "Annotations/a.xml"):
        path = tmp_path / "voc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert source_of(str(tmp_path / "voc"))["source"] == "boxes"


def count_from_zero(root: Path) -> None:
    for path in (root / "annotations").rglob("*.png"):
        values = np.array(Image.open(path))
        Image.fromarray(np.where(values == 0, 255, values - 1).astype(np.uint8)).save(path)


def test_classes_that_are_numbered_from_0(scenes: Path) -> None:
    count_from_zero(scenes)
    with pytest.raises(
        LongtailError, match=r"'sign' \(value 3\) has no pixel .*0 means unlabelled: are the classes num"
    ):
        load(scenes, ignore_value=255)
    (scenes / "classes.txt").unlink()
    (remark,) = load(scenes, ignore_value=255).remarks
    zeros = np.mean([np.array(Image.open(path)) == 0 for path in (scenes / "annotations/training").iterdir()])
    assert remark == f"{zeros:.2%} of the training pixels have the value 0, which means unlabelled, and are left out"


def test_a_class_that_is_missing_alone(scenes: Path) -> None:
    for path in (scenes / "annotations").rglob("*.png"):
        Image.fromarray(np.maximum(np.array(Image.open(path)), 1)).save(path)  # nothing is unlabelled
    (scenes / "classes.txt").write_text("sky\nground\nsign\nunicorn\n")
    with pytest.raises(LongtailError, match=r"'unicorn' \(value 4\) has no pixel there; .* that are not labelled$"):
        load(scenes)


@pytest.mark.parametrize(("text", "line"), [("\nsky\nground\nsign\n", 1), ("sky\n \nground\nsign\n", 2)])
def test_a_blank_line_among_the_names_is_refused(scenes: Path, text: str, line: int) -> None:
    (scenes / "classes.txt").write_text(text)
    with pytest.raises(LongtailError, match=rf"classes\.txt: line {line} is blank, expected the name of the class"):
        load(scenes)
    (scenes / "classes.txt").write_text("sky\nground\nsign\n\n \n")
    assert load(scenes).class_names == ("sky", "ground", "sign")


def test_a_mask_of_fractions(scenes: Path) -> None:
    path = scenes / "annotations/training/00.png"
    Image.fromarray(np.array(Image.open(path)).astype(np.float32)).save(path.with_suffix(".tif"))
    path.unlink()
    with pytest.raises(LongtailError, match=r"00\.tif: has floating-point values, expected integers"):
        load(scenes)


def test_names_are_compared_in_one_unicode_form(scenes: Path) -> None:
    for part, form in (("images", "NFC"), ("annotations", "NFD")):
        path = scenes / part / "training/00.png"
        path.rename(path.with_name(unicodedata.normalize(form, "é.png")))  # type: ignore[arg-type]
    assert len(load(scenes).train) == 12


def test_ade20k_does_not_look_at_test_images_which_have_no_masks(scenes: Path) -> None:
    (scenes / "classes.txt").replace(scenes / "objectInfo150.txt")
    (scenes / "objectInfo150.txt").write_text("Idx\tName\n1\tsky\n2\tground\n3\tsign\n")
    shutil.rmtree(scenes / "annotations/test")
    assert len(load(scenes, "ade20k").test) == 4
    for part in ("images", "annotations"):
        shutil.rmtree(scenes / part / "validation")
    with pytest.raises(LongtailError, match=r"images: holds no images of val; expected some to evaluate on"):
        load(scenes, "ade20k")
