"""Folders as people have them: their names for splits, classes at any depth, empty folders, links, Unicode forms."""

from __future__ import annotations

import json
import os
import time
import unicodedata
from pathlib import Path

import pytest
import torch

from longtail.config import Config, Data
from longtail.data.listing import Listing, check, read_folder, split_of
from longtail.data.paths import find_path, nfc, printable
from longtail.data.source_spec import source_of
from longtail.data.sources import load_data, read_listing
from longtail.errors import LongtailError, did_you_mean
from tests.conftest import save_image

CAFE = "caf\u00e9"
CAFE_OF_MACOS = unicodedata.normalize("NFD", CAFE)


def tree(root: Path, *paths: str) -> None:
    for seed, path in enumerate(paths):
        save_image(root / path, seed=seed)


def listed(root: Path, class_depth: int | None = None, skip_empty: bool = False) -> Listing:
    listing = read_folder(root, class_depth=class_depth, skip_empty=skip_empty)
    check(listing)
    return listing


@pytest.mark.parametrize("train", ["train", "training", "Train", "TRAINING"])
@pytest.mark.parametrize(
    ("val", "test"),
    [("val", "test"), ("valid", "testing"), ("validation", "Test"), ("dev", "holdout"), ("Val", "Holdout")],
)
def test_split_folders_have_the_names_that_people_give_them(tmp_path: Path, train: str, val: str, test: str) -> None:
    tree(tmp_path, *(f"{split}/{name}/{split}.png" for split in (train, val, test) for name in ("cat", "dog")))
    listing = listed(tmp_path)
    assert not listing.errors
    assert listing.class_names == ["cat", "dog"]
    assert {split: entries.names for split, entries in listing.splits.items()} == {
        "train": [f"{train}/cat/{train}.png", f"{train}/dog/{train}.png"],
        "val": [f"{val}/cat/{val}.png", f"{val}/dog/{val}.png"],
        "test": [f"{test}/cat/{test}.png", f"{test}/dog/{test}.png"],
    }


def test_two_folders_of_one_split_and_splits_without_training_images_are_errors(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{split}/{name}/{split}.png" for split in ("train", "val", "valid") for name in ("cat", "dog")))
    assert listed(tmp_path).errors == [
        f"{tmp_path}: has two folders of val images, 'val' and 'valid'; make them one, or rename one"
    ]
    (tmp_path / "train").rename(tmp_path / "valid" / "train")
    assert "has folders of splits (val, valid) but none of training images" in listed(tmp_path).errors[0]


def test_validation_images_are_tested_on_where_there_is_no_test_split(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{split}/{name}/{split}.png" for split in ("train", "valid") for name in ("cat", "dog")))
    listing = listed(tmp_path)
    assert set(listing.splits) == {"train", "test"}
    assert listing.remarks == [
        f"{tmp_path / 'valid'}: there is no test split, so these are the test images, and do not choose the epoch; "
        "--data.val_fraction 0.1 holds out training images for that"
    ]


def test_classes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    tree(tmp_path, "train/a.png", "dev/b.png", "cat/c.png")
    assert listed(tmp_path).class_names == ["cat", "dev", "train"]
    assert split_of("cat") is None


def test_a_folder_with_images_is_a_class_at_any_depth(tmp_path: Path) -> None:
    tree(tmp_path, "animals/cat/0.png", "animals/dog/big/1.png", "a/airfield/2.png", "tree/3.png", "tree/oak/4.png")
    listing = listed(tmp_path)
    assert not listing.errors
    assert listing.class_names == ["a/airfield", "animals/cat", "animals/dog/big", "tree", "tree/oak"]
    assert [listing.class_names[label] for label in listing.training.labels] == [
        *("a/airfield", "animals/cat", "animals/dog/big", "tree", "tree/oak")
    ]
    assert listing.training.names[1] == "animals/cat/0.png"
    assert "1 class has others below it (tree)" in listing.remarks[0]
    joined = listed(tmp_path, class_depth=1)
    assert joined.class_names == ["a", "animals", "tree"]
    assert torch.bincount(joined.training.labels).tolist() == [1, 2, 2]
    assert not joined.remarks
    assert listed(tmp_path, class_depth=2).class_names == [
        "a/airfield",
        "animals/cat",
        "animals/dog",
        *("tree", "tree/oak"),
    ]
    assert read_listing(Data(source="folder", root=str(tmp_path), class_depth=1)).class_names == joined.class_names


def test_an_empty_class_folder_is_named_once(tmp_path: Path) -> None:
    tree(tmp_path, "cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png")
    (tmp_path / "emu").mkdir()
    (tmp_path / "fox" / "small").mkdir(parents=True)
    (tmp_path / "gnu").mkdir()
    (tmp_path / "gnu" / "notes.txt").write_text("none")
    errors = listed(tmp_path).errors
    assert len(errors) == 3
    for error, name in zip(errors, ("emu", "fox/small", "gnu"), strict=True):
        assert f"the class '{name}' has no images" in error
        assert "--data.skip_empty" in error
    assert "only notes.txt" in errors[2]
    listing = listed(tmp_path, skip_empty=True)
    assert not listing.errors
    assert listing.class_names == ["cat", "dog"]
    assert listing.remarks == ["3 class folders have no images, and are left out (emu, fox/small, gnu)"]
    assert load_data(Data(source="folder", root=str(tmp_path), skip_empty=True), seed=0).class_counts == [1, 1]


def test_an_empty_training_class_with_test_images(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{split}/{name}/{split}.png" for split in ("train", "test") for name in ("cat", "dog")))
    tree(tmp_path, "test/emu/9.png")
    (tmp_path / "train" / "emu").mkdir()
    assert len(listed(tmp_path).errors) == 1
    listing = listed(tmp_path, skip_empty=True)
    assert not listing.errors
    assert len(listing.splits["test"]) == 2
    assert "1 images of a class without training images are left out" in listing.remarks[0]


def test_classes_of_a_split_that_the_training_set_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Similar names are looked for a few times only, as each search goes through all training classes."""
    searched: list[str] = []

    def watched(name: str, names: list[str]) -> str:
        searched.append(name)
        return did_you_mean(name, names)

    monkeypatch.setattr("longtail.data.listing.folders.did_you_mean", watched)
    tree(tmp_path, "train/cat/0.png", "train/dog/1.png", "val/cat/2.png")
    tree(tmp_path, *(f"val/cat{number:02d}/3.png" for number in range(12)), "test/Katze/4.png", "test/dogg/5.png")
    *known_too, none_known = listed(tmp_path).errors
    assert len(known_too) == 12
    assert known_too[0] == (
        f"{tmp_path / 'val' / 'cat00'}: the class 'cat00' is not among the training classes; perhaps you meant cat?"
    )
    assert known_too[11] == f"{tmp_path / 'val' / 'cat11'}: the class 'cat11' is not among the training classes"
    assert none_known == (
        f"{tmp_path / 'test'}: none of its 2 classes is among the training classes; the first is 'Katze'; there are: "
        "cat, dog"
    )
    assert len(searched) == 11


def test_thousands_of_classes_are_listed_quickly(tmp_path: Path) -> None:
    names = [f"class_{number:05d}_Genus species" for number in range(4000)] + ["class_00007_Genus species/young"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    start = time.process_time()
    listing = read_folder(tmp_path)
    assert time.process_time() - start < 2  # the comparison of every pair of names alone takes longer
    assert listing.class_names == names[:8] + names[-1:] + names[8:-1]
    assert "1 class has others below it (class_00007_Genus species)" in listing.remarks[0]


def test_what_is_not_used_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "train/cat/0.png", "train/dog/1.png", "train/loose.png", "extra/cat/3.png")
    remarks = listed(tmp_path).remarks
    assert f"{tmp_path / 'train'}: 1 image beside the class folders belongs to no class" in remarks[0]
    assert remarks[1] == f"{tmp_path}: 1 folder beside the splits is not used (extra), with 1 image"


def test_a_class_that_is_called_as_a_split_does_not_hide_the_others(tmp_path: Path) -> None:
    tree(tmp_path, "train/deer/0.png", "train/emu/1.png", "train/emu/2.png", "wolf/3.png", "bear/black/4.png")
    tree(tmp_path, "bear/black/5.png")
    expected = (
        f"{tmp_path}: train/ is a split, and 2 folders beside it (bear, wolf) contain 4 images that would not be "
        f"used: move them into train/ or out of {tmp_path}, or rename train/"
    )
    assert not listed(tmp_path).errors  # as many images are used
    tree(tmp_path, "wolf/6.png")
    assert listed(tmp_path).errors == [expected]
    with pytest.raises(LongtailError) as error:
        load_data(Data(source="folder", root=str(tmp_path)), seed=0)
    assert str(error.value) == expected
    (tmp_path / "train").rename(tmp_path / "forest")
    assert listed(tmp_path).class_names == ["bear/black", "forest/deer", "forest/emu", "wolf"]


def test_what_people_keep_beside_splits_is_no_error(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{split}/{name}/{split}.png" for split in ("train", "test") for name in ("cat", "dog")))
    tree(tmp_path, *(f"unlabelled/{n}.png" for n in range(9)), *(f"images_raw/cat/{n}.png" for n in range(3)))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "boxes.json").write_text("{}")
    # the runs that were trained in it
    tree(tmp_path, *(f"runs/photos-la-seed0/errors/{n}.png" for n in range(9)), "runs/photos-la-seed0/recognizer/a.png")
    (tmp_path / "runs" / "photos-la-seed0" / "config.yaml").write_text(Config().to_yaml())
    listing = listed(tmp_path)
    assert not listing.errors
    assert listing.remarks == [
        f"{tmp_path}: 2 folders beside the splits are not used (images_raw, unlabelled), with 12 images"
    ]


def test_a_folder_beside_the_splits_need_not_be_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "train/cat/0.png", "train/dog/1.png", "lost+found/2.png")
    scandir = os.scandir

    def refuses(path: Path) -> object:
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    listing = listed(tmp_path)
    assert (listing.errors, listing.remarks) == ([], [])


def test_the_error_on_a_single_class_counts_what_is_beside_it(tmp_path: Path) -> None:
    tree(tmp_path, "train/deer/0.png", "train/deer/1.png", "wolf/2.png")
    with pytest.raises(LongtailError) as error:
        load_data(Data(source="folder", root=str(tmp_path)), seed=0)
    assert str(error.value) == (
        f"{tmp_path}: expected at least two classes, found 'deer' alone; 1 folder beside the splits is not used "
        "(wolf), with 1 image"
    )


def test_classes_with_the_names_of_collections_are_remarked_on(tmp_path: Path) -> None:
    tree(tmp_path, "cat/0.png", "otter/1.png", "Unsorted/2.png")
    assert listed(tmp_path).remarks == ["is 'Unsorted' a class? Leave it out of the set if not"]
    tree(tmp_path, "cat/New folder (2)/3.png", "tmp/4.png", "misc 3/5.png")
    assert listed(tmp_path, class_depth=2).remarks[-1] == (
        "are 'Unsorted', 'cat/New folder (2)', 'misc 3'… classes? Leave them out of the set if not"
    )


@pytest.mark.parametrize("place", ["test", "train/emu", "train/cat/x.png", "other"])
def test_a_link_that_leads_nowhere_is_an_error_at_every_level(tmp_path: Path, place: str) -> None:
    tree(tmp_path, *(f"{split}/{name}/{split}.png" for split in ("train", "val") for name in ("cat", "dog")))
    assert not listed(tmp_path).errors
    (tmp_path / place).symlink_to(tmp_path / "gone")
    assert listed(tmp_path).errors == [f"{tmp_path / place}: is a broken or circular link; repair or remove it"]


def test_a_broken_link_among_class_folders_and_a_file_in_place_of_a_split(tmp_path: Path) -> None:
    tree(tmp_path / "flat", "cat/0.png", "dog/1.png")
    (tmp_path / "flat" / "emu").symlink_to("gone")
    assert "emu: is a broken or circular link" in listed(tmp_path / "flat").errors[0]
    tree(tmp_path / "split", "train/cat/0.png", "train/dog/1.png")
    (tmp_path / "split" / "Test").write_text("")
    assert listed(tmp_path / "split").errors == [
        f"{tmp_path / 'split' / 'Test'}: is a file, expected a folder of the test images; rename it"
    ]


def test_names_in_two_unicode_forms_are_one_class(tmp_path: Path) -> None:
    tree(tmp_path, *(f"train/{name}/{i}.png" for name in (CAFE, "bar") for i in range(3)))
    save_image(tmp_path / "test" / CAFE_OF_MACOS / "0.png", seed=70)
    save_image(tmp_path / "train" / CAFE_OF_MACOS / "9.png", seed=71)
    listing = listed(tmp_path)
    assert not listing.errors
    assert listing.class_names == ["bar", CAFE]
    assert listing.splits["test"].labels.tolist() == [1]
    assert torch.bincount(listing.training.labels).tolist() == [3, 4]
    assert all((tmp_path / name).is_file() for entries in listing.splits.values() for name in entries.names)


def test_a_path_is_found_in_another_unicode_form(tmp_path: Path) -> None:
    tree(tmp_path / CAFE_OF_MACOS, "cat/0.png", "dog/1.png")
    assert find_path(tmp_path / CAFE / "cat") == tmp_path / CAFE_OF_MACOS / "cat"
    assert find_path(tmp_path / CAFE / "gone") == tmp_path / CAFE / "gone"
    assert source_of(str(tmp_path / CAFE)) == {"source": "folder", "root": str(tmp_path / CAFE_OF_MACOS)}
    assert nfc(CAFE_OF_MACOS) == CAFE
    assert read_listing(Data(source="folder", root=str(tmp_path / CAFE))).class_names == ["cat", "dog"]


def test_names_are_shown_on_one_line() -> None:
    assert printable("a\nb\tc\x1b[31m") == r"a\nb\tc\x1b[31m"
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\xe9"
    assert printable("naïve 日本.png") == "naïve 日本.png"


def test_an_error_shows_an_awkward_name_escaped(tmp_path: Path) -> None:
    tree(tmp_path, "cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png")
    (tmp_path / "cat" / "a\n\x1b[31mb.txt").write_text("")
    with pytest.raises(LongtailError, match=r"cat/a\\n\\x1b\[31mb\.txt: is not an image by its name") as error:
        load_data(Data(source="folder", root=str(tmp_path)), seed=0)
    assert str(error.value).isprintable()


def test_what_longtail_wrote_is_no_class(tmp_path: Path) -> None:
    tree(tmp_path, "cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png")
    plain = listed(tmp_path).training.names

    def run(path: str, *names: str) -> None:
        tree(tmp_path / path, *(f"errors/{name}.png" for name in names), "recognizer/none.png")
        (tmp_path / path / "config.yaml").write_text(Config().to_yaml())

    run("runs/photos-la-seed0", "0", "1")
    run("dog/again")
    tree(tmp_path, "runs/compare/la-seed0/errors/0.png", "runs/compare/comparison.png")
    (tmp_path / "runs" / "compare" / "comparison.json").write_text(json.dumps({"format": 1, "recipe": {}}))
    run("runs/teachers/digits-lt-conv8-0123")
    (tmp_path / "runs" / "teachers" / ".digits-lt-conv8-0123.lock").touch()
    (tmp_path / "runs" / "teachers" / "cache").mkdir()
    (tmp_path / "runs" / "teachers" / "cache" / "a-features.npy").touch()
    (tmp_path / "runs" / "stopped").mkdir()
    (tmp_path / "runs" / "stopped" / "config.yaml").write_text(Config().to_yaml())
    listing = listed(tmp_path)
    assert not listing.errors
    assert listing.class_names == ["cat", "dog"]
    assert listing.training.names == plain
    (remark,) = listing.remarks
    assert "5 folders of runs are no classes, and are left out (dog/again, runs/compare, runs/photos" in remark
    # other files of such names are the user's
    tree(tmp_path, "teachers/4.png", "emu/5.png")
    (tmp_path / "emu" / "config.yaml").write_text("model: resnet\n")
    listing = listed(tmp_path)
    assert listing.class_names == ["cat", "dog", "emu", "teachers"]
    assert "emu/config.yaml: is not an image by its name" in listing.errors[0]


def test_every_suffix_that_pillow_reads_is_an_image(tmp_path: Path) -> None:
    for index, suffix in enumerate(("jfif", "jpe", "JPG", "webp", "qoi", "tga")):
        save_image(tmp_path / ("cat" if index % 2 else "dog") / f"{index}.png", seed=index).rename(
            tmp_path / ("cat" if index % 2 else "dog") / f"{index}.{suffix}"
        )
    listing = listed(tmp_path)
    assert not listing.errors
    assert len(listing.training) == 6


def test_test_images_of_a_competition_are_not_tested_on(tmp_path: Path) -> None:
    tree(tmp_path, "train/cat/0.png", "train/dog/1.png", "test/2.png", "test/3.png")
    with pytest.raises(LongtailError) as error:
        listed(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'test'}: expected a sub-folder with images for each class, found 2 images without one; images "
        "without labels cannot be tested on: move them out, and use longtail predict RUN FOLDER"
    )


@pytest.mark.parametrize("place", ["", "train/", "train/cat/"])
def test_a_table_in_parquet_beside_images_makes_no_set_of_the_hub(tmp_path: Path, place: str) -> None:
    tree(tmp_path, "train/cat/0.png", "train/cat/1.png", "train/dog/2.png", "train/dog/3.png")
    (tmp_path / place / "gps.parquet").write_bytes(b"none")
    assert source_of(str(tmp_path)) == {"source": "folder", "root": str(tmp_path)}
    listing = listed(tmp_path)
    said = listing.errors if place == "train/cat/" else listing.remarks
    assert len(said) == 1
    assert "gps.parquet" in said[0]
    # images of a split, without classes, are what a set of the Hub may have beside its table
    for name in ("cat", "dog"):
        for file in (tmp_path / "train" / name).glob("*.png"):
            file.rename(tmp_path / "train" / file.name)
    assert source_of(str(tmp_path)) == {"source": "hub", "root": str(tmp_path)}


def test_what_macos_adds_to_an_archive_is_no_class(tmp_path: Path) -> None:
    tree(tmp_path, "cat/0.png", "dog/1.png")
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "cat" / "._0.png").write_bytes(b"none")
    listing = listed(tmp_path)
    assert not listing.errors
    assert not listing.remarks
    assert listing.class_names == ["cat", "dog"]
