"""A set with planted faults, each reported, and sets without any."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shlex
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longtail.config import Data, Shots
from longtail.data.dataset import from_arrays
from longtail.data.image_io import StorageError
from longtail.data.inspection import histogram, inspect
from longtail.data.sources import load_data, read_listing
from longtail.data.sources.from_listing import split_listing
from longtail.data.splits import write_split
from longtail.errors import LongtailError
from tests.conftest import Command, save_image


def bomb(path: Path, side: int = 50_000) -> None:
    """A PNG of a few kilobytes that would decode to gigabytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.fixture
def faulty(photos: Path, tmp_path: Path) -> Path:
    root = tmp_path / "faulty"
    for split in ("train", "test"):
        root.mkdir(exist_ok=True)
        (root / split).mkdir()
        for entry in photos.iterdir():
            for file in entry.iterdir():
                target = root / split / entry.name / f"{split}-{file.name}"
                save_image(target, (20, 24), seed=hash((split, entry.name, file.name)) % 2**31)
    whole = (root / "train" / "cat" / "train-0.png").read_bytes()
    (root / "train" / "cat" / "twin.png").write_bytes(whole)
    (root / "test" / "dog" / "leak.png").write_bytes((root / "train" / "dog" / "train-1.png").read_bytes())
    (root / "train" / "emu" / "half.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "emu" / "empty.jpg").write_bytes(b"")
    (root / "train" / "emu" / "text.jpg").write_text("hello")
    (root / "train" / "emu" / "notes.txt").write_text("hello")
    bomb(root / "train" / "emu" / "bomb.png")
    save_image(root / "test" / "fox" / "a.png", seed=77)
    save_image(root / "train" / "Cat" / "a.png", seed=78)
    return root


def test_every_planted_fault_is_reported(faulty: Path) -> None:
    inspection = inspect(Data(source="folder", root=str(faulty)), 0, Shots())
    reasons = {entry["path"].rpartition("/")[2]: entry["reason"] for entry in inspection.unreadable}
    assert set(reasons) == {"half.png", "empty.jpg", "text.jpg", "bomb.png"}
    assert "larger than Pillow decodes safely" in reasons["bomb.png"]
    assert reasons["empty.jpg"] == "is empty"
    assert [sorted(group) for group in inspection.duplicates] == [
        ["train: train/cat/train-0.png", "train: train/cat/twin.png"]
    ]
    assert [sorted(group) for group in inspection.leaks] == [
        ["test: test/dog/leak.png", "train: train/dog/train-1.png"]
    ]
    errors = "\n".join(inspection.errors)
    for text in ("notes.txt: is not an image by its name", "class 'fox' is not among", "'Cat' and 'cat' differ only"):
        assert text in errors
    assert inspection.sides["width"] == [16, 20, 20]
    assert inspection.class_counts[inspection.class_names.index("cat")] == 13
    assert inspection.imbalance_factor == 13.0
    assert (inspection.counted, inspection.group_names) == ("training images", ("many", "medium", "few"))


def test_masks_are_counted_in_pixels(scenes: Path) -> None:
    inspection = inspect(Data(source="masks", root=str(scenes)), 0, Shots())
    assert inspection.counted == "training pixels"
    assert inspection.to_dict()["group_sizes"] == {"head": 1, "middle": 1, "tail": 1}
    assert inspection.splits == {"train": 12, "val": 4, "test": 6}


def test_the_command_reports_everything(faulty: Path, command: Command, tmp_path: Path) -> None:
    table, plot = tmp_path / "inspection.json", tmp_path / "deep" / "tail.png"
    code, out, err = command("inspect", faulty, "--json", table, "--plot", plot)
    assert code == 1, err
    for text in ("imbalance factor", "13.0", "unreadable: train: train/emu/bomb.png", "in two splits", "same content"):
        assert text in out
    assert plot.stat().st_size > 5000
    assert json.loads(table.read_text())["group_sizes"] == {"many": 0, "medium": 0, "few": 4}
    # and training on it says the first and how many more there are
    code, _, err = command("train", "--data", faulty, "--out", tmp_path / "run")
    assert code == 2
    assert "more problems: longtail inspect lists them" in err
    assert not (tmp_path / "run").exists()


def test_a_table_of_the_good_images_is_written_and_can_be_trained_on(
    photos: Path, command: Command, tmp_path: Path
) -> None:
    awkward = photos / "cat" / "a\nb\t\x1b[31m.png"
    save_image(awkward, seed=70)
    (photos / "cat" / "0.png").write_bytes(b"none")
    (photos / "dog" / "bad\nname.png").write_bytes(b"none")
    table, values = tmp_path / "good.csv", tmp_path / "i.json"
    code, out, _ = command("inspect", photos, "--fix", table, "--json", values)
    assert code == 1
    assert "error: 2 of 23 images cannot be read, more than data.max_unreadable_fraction 0.01" in out
    assert r"unreadable: dog/bad\nname.png: is not an image that Pillow can read" in out
    assert "\x1b" not in out
    inspection = json.loads(values.read_text())
    assert {entry["path"] for entry in inspection["unreadable"]} == {"cat/0.png", "dog/bad\nname.png"}
    assert inspection["fixed"] == 21
    settings = {"source": "list", "train": str(table), "root": str(photos)}
    good = inspect(Data(**settings), 0, Shots())  # type: ignore[arg-type]
    assert not good.errors
    assert not good.unreadable
    assert (good.splits, good.split_sizes) == ({"all": 21}, {"train": 17, "test": 4})
    assert good.class_counts == [10, 5, 2]
    code, out, _ = command("inspect", photos, "--data.max_unreadable_fraction", "0.2")
    assert code == 0
    assert "unreadable: " in out


def test_a_table_of_the_good_images_needs_a_class_for_each(command: Command, tmp_path: Path) -> None:
    code, _, err = command("inspect", "digits-lt", "--fix", tmp_path / "good.csv")
    assert code == 2
    assert "is a table of image files with one class each, and digits-lt has none" in err
    assert not list(tmp_path.iterdir())


def test_what_training_would_refuse_is_an_error_beforehand(photos: Path, tmp_path: Path) -> None:
    def errors(root: Path, **settings: object) -> list[str]:
        return inspect(Data(source="folder", root=str(root), **settings), 0, Shots()).errors  # type: ignore[arg-type]

    assert not errors(photos)
    save_image(tmp_path / "one" / "cat" / "0.png")
    save_image(tmp_path / "one" / "cat" / "1.png", seed=1)
    assert errors(tmp_path / "one") == [f"{tmp_path / 'one'}: expected at least two classes, found 'cat' alone"]
    save_image(photos / "fox" / "0.png", seed=99)
    (error,) = errors(photos)
    assert "class 'fox' has 1 image below" in error
    assert f"longtail split {photos} --val 0 --out split.csv, then longtail train split.csv --data.root {photos}" in (
        error
    )
    # which is true
    split = write_split(Data(source="folder", root=str(photos)), tmp_path / "s.csv", 0.0, 0.2, 0)
    data = load_data(Data(source="list", train=str(tmp_path / "s.csv"), root=split["root"]), seed=0)
    assert data.class_counts[data.class_names.index("fox")] == 1
    assert errors(photos, min_images=3)


def test_a_class_whose_training_images_cannot_be_read_is_an_error(
    photos: Path, tmp_path: Path, command: Command
) -> None:
    rare = [save_image(photos / "fox" / f"{number}.png", seed=900 + number) for number in range(2)]
    settings = Data(source="folder", root=str(photos), max_unreadable_fraction=0.5, cache="none")
    trained = read_listing(settings)
    (name,) = [name for name in split_listing(trained, settings, 0, [])["train"].names if name.startswith("fox")]
    damaged = photos / name
    damaged.write_bytes(damaged.read_bytes()[:40])
    (error,) = inspect(settings, 0, Shots()).errors
    expected = f"class 'fox' has 0 training images that can be read below {photos}: at least 1 is expected"
    with pytest.raises(LongtailError) as refused:
        load_data(settings, 0)
    for message in (error, str(refused.value)):
        assert expected in message
        assert f"1 cannot be read: {damaged}: " in message
    # and the table of the others has a class of one image, which the command says
    code, out, _ = command("inspect", photos, "--data.max_unreadable_fraction", "0.5", "--fix", tmp_path / "good.csv")
    assert code == 1
    assert "lists the 22 images that can be read; training would refuse it too: class 'fox' has 1 image" in out
    for file in rare:
        file.unlink()
    rare[0].parent.rmdir()
    code, out, _ = command("inspect", photos, "--fix", tmp_path / "good.csv")
    assert code == 0
    assert f"longtail train {tmp_path / 'good.csv'} --data.root {photos}" in out


def test_a_file_that_is_no_image_by_its_name_hides_no_other_error(photos: Path) -> None:
    (photos / "cat" / "readme.txt").write_text("by whom")
    (photos / "cat" / "bad.png").write_bytes(b"none")
    settings = Data(source="folder", root=str(photos))
    name, unreadable = inspect(settings, 0, Shots()).errors
    assert "readme.txt: is not an image by its name" in name
    assert "1 of 22 images cannot be read, more than data.max_unreadable_fraction 0.01 accepts" in unreadable
    save_image(photos / "fox" / "0.png", seed=99)
    inspection = inspect(settings, 0, Shots())
    errors = ("readme.txt: is not an image by its name", "class 'fox' has 1 image", "1 of 23 images cannot be read")
    for error, part in zip(inspection.errors, errors, strict=True):
        assert part in error
    with pytest.raises(LongtailError, match=r"readme\.txt: is not an image by its name"):
        load_data(settings, 0)


def test_the_split_that_is_advised_reads_the_table_in_the_same_way(
    photos: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_image(photos / "fox" / "0.png", seed=99)
    rows = [f"{file.relative_to(photos)};{file.parent.name}" for file in sorted(photos.rglob("*.png"))]
    (tmp_path / "birds.csv").write_text("\n".join(["Datei;Art", *rows]) + "\n")
    table = Data(
        source="list", train="birds.csv", root="photos", image_column="Datei", label_column="Art", cache="none"
    )
    folder = Data(source="folder", root="photos", class_depth=1, skip_empty=True, cache="none")
    (photos / "empty").mkdir()
    save_image(photos / "fox" / "young" / "1.png", seed=98).unlink()
    for settings in (table, folder):
        (error,) = inspect(settings, 0, Shots()).errors
        split, _, train = error.partition("longtail split ")[2].partition(", then longtail train ")
        code, _, err = command("split", *shlex.split(split), "--overwrite")
        assert code == 0, err
        trained = load_data(dataclasses.replace(table, train=train.split()[0], image_column=None, label_column=None), 0)
        assert trained.class_names == ("cat", "dog", "emu", "fox")


def test_an_image_in_two_classes_is_a_kind_of_its_own(photos: Path, tmp_path: Path, command: Command) -> None:
    whole = (photos / "cat" / "0.png").read_bytes()
    for copy in ("cat/copy.png", "dog/wrong.png"):
        (photos / copy).write_bytes(whole)
    (photos / "emu" / "twin.png").write_bytes((photos / "emu" / "0.png").read_bytes())
    inspection = inspect(Data(source="folder", root=str(photos)), 0, Shots())
    assert inspection.conflicts == [["cat/0.png (cat)", "cat/copy.png (cat)", "dog/wrong.png (dog)"]]
    assert not any("cat/0.png" in group for group in inspection.duplicates)
    table, values = tmp_path / "good.csv", tmp_path / "i.json"
    code, out, _ = command("inspect", photos, "--fix", table, "--json", values)
    assert code == 0
    assert "same content in two classes: cat/0.png (cat) = cat/copy.png (cat) = dog/wrong.png (dog)" in out
    assert "lists the 22 images that can be read, without 2 copies of others; longtail train" in out
    assert "1 image is in it under two classes ('same content in two classes' above): remove the wrong rows" in out
    assert (json.loads(values.read_text())["fixed_copies"], len(table.read_text().splitlines())) == (2, 23)
    fixed = inspect(Data(source="list", train=str(table), root=str(photos)), 0, Shots())
    assert len(fixed.conflicts) == 1
    assert not fixed.duplicates


def test_of_an_image_in_two_splits_the_table_keeps_the_test_image(faulty: Path, tmp_path: Path) -> None:
    table = tmp_path / "good.csv"
    inspect(Data(source="folder", root=str(faulty)), 0, Shots(), fix=table)
    names = {line.partition(",")[0] for line in table.read_text().splitlines()}
    assert "test/dog/leak.png" in names
    assert not names & {"train/dog/train-1.png", "train/cat/twin.png"}
    assert "train/cat/train-0.png" in names


def test_images_of_an_array_in_two_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    images[3] = images[0]  # of the other class
    images[4] = images[2]  # of the same
    labels = np.array([0, 0, 0, 1, 0, 1, 1, 1])
    data = from_arrays((images, labels), (images[5:7], labels[5:7]), class_names=["cat", "dog"])
    monkeypatch.setattr("longtail.data.inspection.load_data", lambda *_: data)
    inspection = inspect(Data(source="digits-lt"), 0, Shots())
    assert inspection.conflicts == [["train: image 0 (cat)", "train: image 3 (dog)"]]
    assert inspection.duplicates == [["train: image 2 (cat)", "train: image 4 (cat)"]]
    assert len(inspection.leaks) == 2


@pytest.mark.parametrize("classes", [30, 31])
def test_the_classes_are_listed_with_their_counts(tmp_path: Path, command: Command, classes: int) -> None:
    for number in range(classes):
        for copy in range(3 if number == 7 else 2):
            save_image(tmp_path / f"class {number:02d}" / f"{copy}.png", seed=10 * number + copy)
    _, out, _ = command("inspect", tmp_path)
    shown = re.findall(r"class (\d+) (\d+)", out)
    listed = [number for number in range(classes) if classes == 30 or not 10 <= number < 21]
    assert shown == [("07", "2"), *((f"{number:02d}", "1") for number in listed if number != 7)]
    assert ("… 11 more; --json FILE lists all …" in out) == (classes == 31)


def test_the_same_image_in_train_and_test_of_the_split_to_come_is_reported(photos: Path, command: Command) -> None:
    settings = Data(source="folder", root=str(photos))
    splits = split_listing(read_listing(settings), settings, 0, [])
    train = [name for name in splits["train"].names if name.startswith("cat")]
    test = next(name for name in splits["test"].names if name.startswith("cat"))
    (photos / test).write_bytes((photos / train[0]).read_bytes())
    (photos / train[1]).write_bytes((photos / train[2]).read_bytes())
    inspection = inspect(settings, 0, Shots())
    assert [sorted(group) for group in inspection.leaks] == [[f"test: {test}", f"train: {train[0]}"]]
    assert [sorted(group) for group in inspection.duplicates] == [sorted(train[1:3])]
    code, out, _ = command("inspect", photos)
    assert code == 0
    assert "all 21: train 17, test 4" in out
    assert "same content in two splits: " in out
    assert "may be in train and test with another: keep one of each" in out


def test_an_unsplit_folder_is_counted_as_training_counts_it(photos: Path, command: Command) -> None:
    settings = Data(source="folder", root=str(photos), cache="none")
    inspection = inspect(settings, 0, Shots(many_above=9, few_below=3))
    data = load_data(settings, 0)
    assert inspection.class_counts == data.class_counts == [10, 5, 2]
    assert inspection.groups == data.groups(Shots(many_above=9, few_below=3)) == ["many", "medium", "few"]
    assert inspection.imbalance_factor == 5.0
    assert inspection.counted == "training images"
    (photos / "empty").mkdir()  # so that no split is made
    refused = inspect(settings, 0, Shots())
    assert (refused.counted, refused.class_counts) == ("images", [12, 6, 3])
    assert "emu 3" in command("inspect", photos)[1]


def test_a_tail_other_than_the_one_asked_for_is_remarked_on(photos: Path) -> None:
    settings = Data(source="folder", root=str(photos), profile="exponential", imbalance=2, cache="none")
    remark = "data.imbalance 2: is 5 in fact: class 'emu' has 2 training images, and the profile asks for 5"
    assert remark in load_data(settings, 0).remarks
    inspection = inspect(settings, 0, Shots())
    assert remark in inspection.remarks
    assert inspection.class_counts == [10, 5, 2]


def test_a_file_that_is_missing_is_reported_once(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("path,label\n" + "".join(f"cat/{n}.png,cat\ndog/{n}.png,dog\n" for n in range(7)))
    settings = Data(source="list", train=str(table), root=str(photos))
    inspection = inspect(settings, 0, Shots(), fix=tmp_path / "good.csv")
    assert len(inspection.errors) == 1
    assert "1 of 14 files are missing" in inspection.errors[0]
    assert (inspection.missing, inspection.unreadable, inspection.fixed) == (["dog/6.png"], [], 13)


def test_where_no_class_has_two_images_no_command_is_advised(tmp_path: Path, command: Command) -> None:
    for name in ("cat", "dog"):
        save_image(tmp_path / "photos" / name / "0.png")
    code, out, _ = command("inspect", tmp_path / "photos")
    assert code == 1
    assert "there are no test images, and no class has a second image" in out
    assert "longtail split" not in out
    table = tmp_path / "split.csv"
    code, out, _ = command("split", tmp_path / "photos", "--val", "0", "--out", table)
    assert code == 0
    assert "no test images: no class has a second image" in out
    code, out, _ = command("inspect", table, "--data.root", tmp_path / "photos")
    assert code == 1
    assert "there are no test images, and no class has a second image" in out
    assert "column 'split' has train alone: there are no test images of its own" in out


def test_a_named_set_is_looked_at_with_its_recipes_tail(command: Command) -> None:
    code, out, _ = command("inspect", "digits-lt")
    assert code == 0
    assert "train 357, test 500" in out
    assert "no problems found" in out


def test_the_histogram_falls_from_head_to_tail() -> None:
    lines = histogram([1000, 100, 10, 1] * 50, width=40)
    assert lines[0].strip().startswith("1,000 │")
    widths = [len(line.partition("│")[2]) for line in lines[:6]]
    assert widths == sorted(widths)
    assert widths[-1] == 40
    assert "200 classes" in lines[-1]
    assert "1 class;" in histogram([3])[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect"], "SOURCE: expected a named set"),
        (["inspect", "nowhere"], "there is no such folder or set"),
        (["inspect", "digits"], "perhaps you meant digits-lt"),
        (["inspect", "digits-lt", "--data.imblance", "3"], "perhaps you meant --data.imbalance"),
        (["split", "digits-lt", "--out", "x.csv"], "has its own splits"),
        (["split", "nowhere", "--out", "x.csv"], "there is no such folder"),
        (["train", "--data"], "--data: expected a named set"),
        (["train", "--data", "x.txt"], "x.txt: cannot be read"),
        (["train", "--data", "hub:nobody/nothing", "--pretrained", "none"], "could not be loaded from the Hub"),
    ],
)
def test_bad_input(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not out
    assert not list(tmp_path.iterdir())


def test_values_that_training_refuses_are_reported(photos: Path) -> None:
    Image.fromarray(np.array([[-1000.0, 2000.0]], dtype=np.float32)).save(photos / "cat" / "heights.tiff")
    inspection = inspect(Data(source="folder", root=str(photos)), 0, Shots())
    (found,) = inspection.unreadable
    assert found["path"] == "cat/heights.tiff"
    assert found["reason"].startswith("has values from -1000 to 2000, expected 0 to 1")


def test_a_disk_that_fails_is_no_fault_of_an_image(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(StorageError, match=r"^cat/0\.png: cannot be read: Stale file handle$"):
        inspect(Data(source="folder", root=str(photos)), 0, Shots())
