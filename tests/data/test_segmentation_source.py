"""Folders of images and masks: what is read, what is refused, and views in which both move alike."""

from __future__ import annotations

import csv
import dataclasses
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from longtail.config import Config, Data, Shots
from longtail.data.dataset import ImageSet
from longtail.data.image_io import open_image
from longtail.data.loader import TrainLoader
from longtail.data.source_spec import source_of
from longtail.data.sources import load_data
from longtail.data.sources.mask_files import read_mask
from longtail.data.sources.segmentation import (
    CAMVID_CLASSES,
    SegmentationData,
    SegmentationImages,
    SegmentationSample,
)
from longtail.data.sources.segmentation_transform import SegmentationTransform
from longtail.errors import LongtailError
from longtail.training.run_io import count_unreadable
from longtail.training.trainer import fit
from tests.conftest import SHARED, save_scene


def load(root: Path, source: str = "masks") -> SegmentationData:
    data = load_data(Data(source=source, root=str(root)), 0)
    assert isinstance(data, SegmentationData)
    return data


def test_a_folder_is_read(scenes: Path) -> None:
    data = load(scenes)
    assert data.class_names == ("sky", "ground", "sign")
    assert (len(data.train), len(data.val or ()), len(data.test)) == (12, 4, 6)
    images = data.train.images
    assert isinstance(images, SegmentationImages)
    everything = np.concatenate([images.open_sample(index).labels.ravel() for index in range(12)])
    assert data.class_counts == [int((everything == index).sum()) for index in range(3)]
    # the rarest class of each image, and shares of a draw in which an image's classes are alike
    assert data.train.labels.tolist() == [
        2 if index % 3 == 0 else int(np.argmin(data.class_counts[:2])) for index in range(12)
    ]
    assert data.draw_counts == (8 * 500 + 4 * 333 + 1, 8 * 500 + 4 * 333 + 1, 4 * 333 + 1)
    assert data.size == (50, 66)
    assert source_of(str(scenes)) == {"source": "masks", "root": str(scenes)}


def test_memory_grows_with_the_classes_in_a_mask_alone(tmp_path: Path) -> None:
    values = np.array([[1, 60_000]], dtype=np.uint16)
    for number in range(200):
        for split in ("training", "test") if number == 0 else ("training",):
            image, mask = (tmp_path / part / split / f"{number}.png" for part in ("images", "annotations"))
            for path in (image, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 1)).save(image)
            Image.fromarray(values).save(mask)
    tracemalloc.start()
    try:
        with pytest.raises(LongtailError, match=r"class 'class 2' \(value 2\) has no pixel there"):
            load(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 40e6  # a count for each mask and class would be 96 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_masks_without_a_label_evaluate_nothing(scenes: Path, split: str) -> None:
    for path in (scenes / "annotations" / split).iterdir():
        Image.fromarray(np.zeros((50, 66), dtype=np.uint8)).save(path)
    if split == "test":
        with pytest.raises(LongtailError, match=r"^test: the masks have no labelled pixel; expected some to evaluate"):
            load(scenes)
    else:
        data = load(scenes)
        assert data.val is None
        assert "the validation masks have no labelled pixel, and are left out; the last epoch is kept" in data.remarks


def test_without_a_test_split_the_validation_images_are_tested_on(scenes: Path) -> None:
    for part in ("images", "annotations"):
        for path in (scenes / part / "test").iterdir():
            path.unlink()
    data = load(scenes)
    assert data.val is None
    assert len(data.test) == 4


def test_settings_of_other_data_are_refused_or_said_to_have_no_effect(scenes: Path) -> None:
    with pytest.raises(LongtailError, match=r"data\.profile exponential: is not supported for images with masks"):
        load_data(Data(source="masks", root=str(scenes), profile="exponential"), 0)
    data = load_data(Data(source="masks", root=str(scenes), val_fraction=0.1), 0)
    assert data.remarks == ("data.val_fraction is not used: masks have the splits of their folders",)


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("drawn_on", ["stored", "shown"])
def test_masks_of_photographs_that_their_exif_tag_turns(scenes: Path, orientation: int, drawn_on: str) -> None:
    values = np.ones((40, 60), dtype=np.uint8)
    values[:7, :21] = 2  # a corner, so that each of the eight orientations differs
    exif = Image.Exif()
    exif[0x0112] = orientation
    for split in ("training", "validation"):
        _, mask = save_scene(scenes, split, "turned", values)
        stored = scenes / "images" / split / "turned.png"
        image = scenes / "images" / split / "turned.jpg"
        Image.open(stored).save(image, quality=95, exif=exif)
        stored.unlink()
        if drawn_on == "shown":
            turned = Image.fromarray(values)
            turned.getexif()[0x0112] = orientation
            ImageOps.exif_transpose(turned).save(mask)
    data = load(scenes)
    for images in (data.train.images, data.val.images):  # type: ignore[union-attr]
        assert isinstance(images, SegmentationImages)
        index = next(number for number, name in enumerate(images.names) if name.endswith("turned.jpg"))
        shown, labels = images.open_sample(index)
        red, green = (np.asarray(shown, dtype=float)[..., channel] for channel in (0, 1))
        assert shown.size == ((60, 40) if orientation == 1 else (40, 60))
        assert np.mean((green > red) == (labels == 1)) > 0.98  # save_scene paints value 1 red and value 2 green


def test_without_names_classes_have_numbers(scenes: Path) -> None:
    (scenes / "classes.txt").unlink()
    assert load(scenes).class_names == ("class 1", "class 2", "class 3")


@pytest.mark.parametrize("value", [0, 1])
def test_without_names_there_are_at_least_two_numbers(scenes: Path, value: int) -> None:
    (scenes / "classes.txt").unlink()
    for path in (scenes / "annotations").rglob("*.png"):
        Image.fromarray(np.minimum(np.array(Image.open(path)), value)).save(path)
    message = rf"annotations: expected the numbers of at least two classes.*found {value}; 0 means unlabelled"
    with pytest.raises(LongtailError, match=message):
        load(scenes)


def test_ade20ks_own_file_of_names(scenes: Path) -> None:
    (scenes / "classes.txt").unlink()
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t.5\t1\t1\t1\twall", "2\t.3\t1\t1\t1\tbuilding, edifice"]
    (scenes / "objectInfo150.txt").write_text("\n".join([*rows, "3\t.1\t1\t1\t1\tsky"]) + "\n")
    data = load(scenes, "ade20k")
    assert data.class_names == ("wall", "building", "sky")
    assert (data.val, len(data.test)) == (None, 4)  # its validation images are what everybody tests on


def test_camvid() -> None:
    if not (SHARED / "camvid").is_dir():
        pytest.skip("needs CamVid in ../shared/data/camvid")
    data = load(SHARED / "camvid", "camvid")
    assert (len(data.train), len(data.val or ()), len(data.test)) == (367, 101, 233)
    assert data.class_names == CAMVID_CLASSES
    shares = np.array(data.class_counts) / sum(data.class_counts)
    for name in ("pole", "sign", "fence", "pedestrian", "bicyclist"):
        assert shares[CAMVID_CLASSES.index(name)] < 0.015
    assert data.size == (240, 320)


def no_mask(root: Path) -> None:
    (root / "annotations/training/03.png").unlink()


def no_image(root: Path) -> None:
    (root / "images/test/03.png").unlink()


def other_size(root: Path) -> None:
    Image.new("L", (65, 50), 1).save(root / "annotations/training/03.png")


def too_many(root: Path) -> None:
    Image.new("L", (66, 50), 7).save(root / "annotations/validation/01.png")


def in_colours(root: Path) -> None:
    Image.new("RGB", (66, 50)).save(root / "annotations/training/03.png")


def unseen(root: Path) -> None:
    (root / "classes.txt").write_text("sky\nground\nsign\nunicorn\n")


def broken(root: Path) -> None:
    (root / "annotations/training/03.png").write_bytes(b"none")


def one_class(root: Path) -> None:
    (root / "classes.txt").write_text("sky\n")


def twice(root: Path) -> None:
    (root / "classes.txt").write_text("sky\nsky\nsign\n")


def no_folder(root: Path) -> None:
    (root / "images").rename(root / "pictures")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_mask, r"images/training/03.png: has no mask .*annotations/training/03.png; add it, or remove the image"),
        (no_image, r"annotations/test/03.png: has no image .*images/test/03.jpg; add it, or remove the mask"),
        (other_size, r"annotations/training/03.png: has 65 × 50 pixels, its image .*03.png 66 × 50"),
        (too_many, r"annotations/validation/01.png: holds the value 7, expected 0 \(unlabelled\) to 3"),
        (in_colours, r"annotations/training/03.png: has 3 channels \(RGB\), expected one"),
        (unseen, r"class 'unicorn' \(value 4\) has no pixel there; add images of it"),
        (broken, r"annotations/training/03.png: is not an image"),
        (one_class, r"classes.txt: expected the names of at least two classes.*found 1"),
        (twice, r"classes.txt: .*'sky' is listed twice"),
        (no_folder, r"annotations/training/00.png: has no image"),
    ],
)
def test_what_is_wrong_is_named(scenes: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(scenes)
    with pytest.raises(LongtailError, match=message):
        load(scenes)


def spoil_four(root: Path) -> list[str]:
    """Make images and masks of each split unreadable; returns the paths that are named for it."""
    (root / "annotations/training/03.png").write_bytes(b"none")
    (root / "images/training/05.png").write_bytes(b"none")
    for name in ("annotations/validation/01.png", "images/test/02.png"):  # their headers can be read
        path = root / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [
        "annotations/training/03.png",
        "images/training/05.png",
        "annotations/validation/01.png",
        "images/test/02.png",
    ]


def test_unreadable_images_and_masks_are_left_out_and_named(scenes: Path) -> None:
    spoiled = spoil_four(scenes)
    settings = Data(source="masks", root=str(scenes))
    refused = r"4 of 22 images cannot be read, more than data.max_unreadable_fraction 0.01 accepts; the first: .*03.png"
    with pytest.raises(LongtailError, match=refused):
        load_data(settings, 0)
    with pytest.raises(LongtailError, match=r"annotations/training/03.png: is not an image"):
        load_data(dataclasses.replace(settings, unreadable="error", max_unreadable_fraction=0.5), 0)
    data = load_data(dataclasses.replace(settings, max_unreadable_fraction=0.2), 0)
    assert (len(data.train), len(data.val or ()), len(data.test)) == (10, 3, 5)
    assert [path for path, _ in data.unreadable] == [name.replace("annotations", "images") for name in spoiled]
    assert all(name in reason for name, (_, reason) in zip(spoiled, data.unreadable, strict=True))
    assert any("4 of 22 images cannot be read, and are left out (unreadable.csv" in remark for remark in data.remarks)
    images = data.train.images
    assert isinstance(images, SegmentationImages)
    everything = np.concatenate([images.open_sample(index).labels.ravel() for index in range(10)])
    assert data.class_counts == [int((everything == index).sum()) for index in range(3)]
    for path in (scenes / "images/test").iterdir():
        path.write_bytes(b"none")
    with pytest.raises(LongtailError, match=r"images: no image of test can be read; the first: .*00.png: is not an"):
        load_data(dataclasses.replace(settings, max_unreadable_fraction=0.9), 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_fails_later_is_replaced_by_another_of_its_class(scenes: Path, workers: int) -> None:
    settings = Data(source="masks", root=str(scenes), max_unreadable_fraction=0.1)
    whole = load_data(settings, 0).train
    others = [index for index in range(12) if index != 3 and whole.labels[index] == whole.labels[3]]
    labels = [whole.images.open_sample(index).labels for index in others]
    path = scenes / "images/training/03.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = load_data(settings, 0)
    assert (len(data.train), data.unreadable) == (12, ())  # of training images only the header is read
    assert any(np.array_equal(data.train.images.open_sample(3).labels, each) for each in labels)
    data = load_data(settings, 0)
    view = SegmentationTransform((32, 48), (0.5, 2.0), 0.2)
    assert sum(map(len, TrainLoader(data.train, 5, [view], seed=3, workers=workers).epoch(0))) == 12
    assert list(data.train.images.unreadable) == [3]
    assert "images/training/03.png: is damaged" in data.train.images.unreadable[3]
    strict = load_data(dataclasses.replace(settings, unreadable="error"), 0)
    with pytest.raises(LongtailError, match=r"images/training/03.png: is damaged"):
        list(TrainLoader(strict.train, 5, [view], seed=3, workers=workers).epoch(0))


def test_a_run_lists_its_unreadable_images(segmenting: Config, scenes: Path, tmp_path: Path) -> None:
    names = spoil_four(scenes)
    path = scenes / "images/training/00.png"  # is found out in the first epoch
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fit(segmenting.replace(epochs=1, data={"max_unreadable_fraction": 0.2}), tmp_path / "run", quiet=True)
    with (tmp_path / "run" / "unreadable.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    expected = [name.replace("annotations", "images") for name in [*names, "images/training/00.png"]]
    assert [row[0] for row in rows] == ["path", *expected]
    assert count_unreadable(tmp_path / "run") == 5


def test_a_missing_root(tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match=r"data.root is missing: which folder holds images/ and annotations/"):
        load_data(Data(source="camvid"), 0)
    with pytest.raises(LongtailError, match=r"images: holds no folder train or training with images"):
        load(tmp_path)


@pytest.mark.parametrize("mode", ["P", "I;16", "1"])
def test_palette_and_16_bit_masks_are_read(scenes: Path, mode: str) -> None:
    path = scenes / "annotations/training/00.png"
    values = read_mask(path).astype(np.uint16)
    values[values == 0] = 1
    if mode == "1":
        values = np.ones_like(values)
        image = Image.fromarray(values.astype(bool))
    elif mode == "P":
        image = Image.fromarray(values.astype(np.uint8), mode="P")
        image.putpalette([9, 8, 7, 200, 10, 10, 10, 200, 10, 10, 10, 200])
    else:
        image = Image.fromarray(values)
    image.save(path)
    with Image.open(path) as saved:
        assert saved.mode == mode
    images = load(scenes).train.images
    assert isinstance(images, SegmentationImages)
    assert np.array_equal(images.open_sample(0).labels, values.astype(np.int32) - 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grey_png_masks_of_few_bits_hold_the_values_that_are_written(bits: int, tmp_path: Path) -> None:
    """Pillow spreads 2 and 4 bits over 8: a value of 1 is 85 or 17."""
    values = np.arange(16, dtype=np.uint8).reshape(2, 8) & (2**bits - 1)
    written = np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(2, -1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(written, axis=1))
    header = struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0)
    path = tmp_path / "mask.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    assert np.array_equal(read_mask(path), values)
    assert np.array_equal(read_mask(path, ignore_value=3), np.where(values == 3, 0, values))


def test_a_mask_without_a_label_is_left_out_and_remarked_on(scenes: Path) -> None:
    for split, number in (("training", 1), ("test", 2)):
        Image.new("L", (66, 50), 0).save(scenes / f"annotations/{split}/{number:02}.png")
    data = load(scenes)
    assert (len(data.train), len(data.test)) == (11, 6)
    assert len(data.remarks) == 2
    assert "1 of 12 masks have no labelled pixel, and do not count" in data.remarks[0]
    assert "training/01.png" in data.remarks[0]


@pytest.mark.parametrize("scale", [(0.5, 2.0), (0.3, 0.3), (3.0, 3.0)])
def test_image_and_mask_move_alike(scale: tuple[float, float], tmp_path: Path) -> None:
    # the labels can be read from the colours, so wherever a view looks they must agree
    values = np.ones((40, 60), dtype=np.uint8)
    values[20:, 30:], values[:10, :15], values[30:, :20] = 2, 3, 0
    image, mask = save_scene(tmp_path, "training", "x", values)
    scene = SegmentationSample(open_image(image), read_mask(mask) - 1)
    view, seen = SegmentationTransform((32, 48), scale, 0.0), set()
    for draw in range(20):
        pixels, labels = view(scene, 5, (1, draw))
        assert pixels.shape == (3, 32, 48)
        assert labels.shape == (32, 48)
        from_colors = pixels.float().argmax(dim=0)
        inside = labels >= 0
        agreeing = (from_colors[inside] == labels[inside]).float().mean().item() if inside.any() else 1.0
        assert agreeing > 0.85  # but where two colours meet
        seen.add(tuple(labels.flatten().tolist()))
        again = view(scene, 5, (1, draw))
        assert torch.equal(pixels, again[0])
        assert torch.equal(labels, again[1])
    assert len(seen) > 10


def test_jitter_leaves_labels_alone(tmp_path: Path) -> None:
    image, mask = save_scene(tmp_path, "training", "x", np.ones((40, 60), dtype=np.uint8))
    scene = SegmentationSample(open_image(image), read_mask(mask) - 1)
    plain, changed = (SegmentationTransform((32, 32), (1.0, 1.0), jitter)(scene, 0, (0,)) for jitter in (0.0, 0.4))
    assert torch.equal(plain[1], changed[1])
    assert not torch.equal(plain[0], changed[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_views_and_the_labels_of_their_pixels(scenes: Path, workers: int) -> None:
    train: ImageSet = load(scenes).train
    transform = SegmentationTransform((32, 48), (0.5, 2.0), 0.2)
    batches = list(TrainLoader(train, 5, [transform], seed=3, workers=workers).epoch(0))
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert batches[0].views[0].shape == (4, 3, 32, 48)
    assert batches[0].labels.shape == (4, 32, 48)
    loader = TrainLoader(train, 5, [transform], seed=3)
    index = int(batches[0].ids[0])
    pixels, labels = transform(train.images.open_sample(index), index, loader.rng_keys(0, 0))
    assert torch.equal(batches[0].views[0][0].mul(255).round().to(torch.uint8), pixels)
    assert torch.equal(batches[0].labels[0], labels)


def test_groups_are_thirds_by_pixels(scenes: Path) -> None:
    data = load(scenes)
    assert (data.task, data.counted, data.group_names) == (
        "segmentation",
        "training pixels",
        ("head", "middle", "tail"),
    )
    assert sorted(data.groups(Shots())) == ["head", "middle", "tail"]
    assert data.groups(Shots())[2] == "tail"


@pytest.mark.parametrize(("images", "masks"), [("train", "training"), ("Training", "TRAIN")])
def test_the_splits_folders_have_any_of_their_names(scenes: Path, images: str, masks: str) -> None:
    (scenes / "images" / "training").rename(scenes / "images" / images)
    (scenes / "annotations" / "training").rename(scenes / "annotations" / masks)
    (scenes / "images" / "validation").rename(scenes / "images" / "Val")
    (scenes / "annotations" / "test").rename(scenes / "annotations" / "holdout")
    data = load_data(Data(source="masks", root=str(scenes)), seed=0)
    assert data.val is not None
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 4, 6]
    (scenes / "images" / "dev").symlink_to("gone")
    with pytest.raises(LongtailError, match=r"images/dev: is a broken or circular link"):
        load_data(Data(source="masks", root=str(scenes)), seed=0)


@pytest.mark.parametrize("value", [255, 7])
@pytest.mark.parametrize("named", [True, False])
def test_a_value_of_pixels_that_are_not_labelled_is_ignored(scenes: Path, value: int, named: bool) -> None:
    before = load_data(Data(source="masks", root=str(scenes)), seed=0)
    labels = [before.train.images.open_sample(index).labels for index in range(len(before.train))]
    for path in (scenes / "annotations").rglob("*.png"):
        values = np.array(Image.open(path))
        values[values == 0] = value  # the first two rows
        Image.fromarray(values).save(path)
    if not named:
        (scenes / "classes.txt").unlink()
    with pytest.raises(LongtailError, match=r"--data\.ignore_value"):
        load_data(Data(source="masks", root=str(scenes)), seed=0)
    data = load_data(Data(source="masks", root=str(scenes), ignore_value=value), seed=0)
    assert data.class_counts == before.class_counts
    assert len(data.class_names) == 3
    assert all(
        np.array_equal(data.train.images.open_sample(index).labels, expected) for index, expected in enumerate(labels)
    )


def test_masks_and_names_are_part_of_what_a_set_is(scenes: Path) -> None:
    before = load(scenes).fingerprints
    assert load(scenes).fingerprints == before
    for split, kind in (("training", "images"), ("validation", "val_images"), ("test", "test_images")):
        path = scenes / "annotations" / split / "00.png"
        flipped = np.array(Image.open(path))[::-1]  # each class has as many pixels as before
        Image.fromarray(flipped).save(path)
        after = load(scenes).fingerprints
        assert {name for name in before if before[name] != after[name]} == {kind}
        before = after
    for part in ("images", "annotations"):
        (scenes / part / "test" / "05.png").rename(scenes / part / "test" / "06.png")
    after = load(scenes).fingerprints
    assert {name for name in before if before[name] != after[name]} == {"test_images"}
