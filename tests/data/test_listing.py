"""Every format of a set of files, in its exact layout, and what each can get wrong."""

from __future__ import annotations

import csv
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longtail.config import Data
from longtail.data.images import FileImages
from longtail.data.listing import Entries, Listing, encode_labels, names_by_folder, read_list
from longtail.data.source_spec import source_of
from longtail.data.sources import load_data, read_listing
from longtail.data.splits import write_split
from longtail.errors import LongtailError
from tests.conftest import save_image


def tree(root: Path, files: dict[str, int]) -> None:
    """Write an image at every path; the number is its seed."""
    for path, seed in files.items():
        save_image(root / path, seed=seed)


def write_lists(root: Path, lists: dict[str, dict[str, int]]) -> None:
    for name, entries in lists.items():
        (root / name).write_text("".join(f"{path} {label}\n" for path, label in entries.items()))


def imagenet_lt(root: Path) -> None:
    train = {f"train/n0{c}/n0{c}_{i}.JPEG": c for c in range(3) for i in range(6 - 2 * c)}
    val, test = ({f"val/ILSVRC2012_val_{i + shift}.JPEG": i % 3 for i in range(6)} for shift in (0, 10))
    write_lists(root, {"ImageNet_LT_train.txt": train, "ImageNet_LT_val.txt": val, "ImageNet_LT_test.txt": test})
    tree(root, {path: index for index, path in enumerate([*train, *val, *test])})


def places_lt(root: Path, images: str, lists: str) -> None:
    """Places-LT with its images and its lists each in one of the two styles."""
    names = ["airfield", "bakery/shop"]
    train: dict[str, int] = {}
    val: dict[str, int] = {}
    test: dict[str, int] = {}
    for label, name in enumerate(names):
        for i in range(5 - 2 * label):
            path = {"long": f"data_256/{name[0]}/{name}/{i:08}.jpg", "short": f"train/{name}/{i:08}.jpg"}
            train[path[lists]] = label
            save_image(root / path[images], seed=10 * label + i)
        for part, number in ((val, 1), (test, 2)):
            path = {"long": f"val_256/{label}{number}.jpg", "short": f"val/{label}{number}.jpg"}
            part[path[lists]] = label
            save_image(root / path[images], seed=100 + 10 * label + number)
    write_lists(root, {"Places_LT_train.txt": train, "Places_LT_val.txt": val, "Places_LT_test.txt": test})


def inat_lists(root: Path) -> None:
    train = {f"train_val2018/Aves/{c + 10}/{i}.jpg": c for c in range(3) for i in range(4 - c)}
    val = {f"train_val2018/Aves/{c + 10}/v{i}.jpg": c for c in range(3) for i in range(3)}
    write_lists(root, {"iNaturalist18_train.txt": train, "iNaturalist18_val.txt": val})
    tree(root, {path: index for index, path in enumerate([*train, *val])})


def inat_json(root: Path) -> None:
    for split, count in (("train2018", 4), ("val2018", 3)):
        files = [f"train_val2018/Aves/{c + 10}/{split}{i}.jpg" for c in range(3) for i in range(count)]
        content = {
            "images": [{"id": 100 + n, "file_name": file, "license": 1} for n, file in enumerate(files)],
            "annotations": [{"id": n, "image_id": 100 + n, "category_id": n // count} for n in range(len(files))],
            "categories": [{"id": c, "name": ["Pica pica", "Corvus", "Ardea"][c]} for c in (2, 0, 1)],
        }
        (root / f"{split}.json").write_text(json.dumps(content))
        tree(root, {file: n for n, file in enumerate(files)})


LAYOUTS: dict[str, tuple[Callable[[Path], None], str, list[int], tuple[str, ...]]] = {
    "imagenet-lt": (imagenet_lt, "imagenet-lt", [6, 4, 2], ("n00", "n01", "n02")),
    "places-lt, long": (lambda r: places_lt(r, "long", "long"), "places-lt", [5, 3], ("airfield", "shop")),
    "places-lt, short": (lambda r: places_lt(r, "short", "short"), "places-lt", [5, 3], ("airfield", "shop")),
    "places-lt, long lists": (lambda r: places_lt(r, "short", "long"), "places-lt", [5, 3], ("airfield", "shop")),
    "places-lt, short lists": (lambda r: places_lt(r, "long", "short"), "places-lt", [5, 3], ("airfield", "shop")),
    "inat2018, lists": (inat_lists, "inat2018", [4, 3, 2], ("10", "11", "12")),
    "inat2018, json": (inat_json, "inat2018", [4, 4, 4], ("Pica pica", "Corvus", "Ardea")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts(tmp_path: Path, layout: str) -> None:
    make, source, counts, names = LAYOUTS[layout]
    make(tmp_path)
    data = load_data(Data(source=source, root=str(tmp_path)), seed=0)
    assert data.class_counts == counts
    assert data.class_names == names
    assert (data.val is None) == (source == "inat2018")
    assert data.train.images.take(torch.tensor([0])).shape == (1, 3, 32, 32)
    # a remark says that these are not the sets as they were published
    assert f"not {source} as it was published" in data.remarks[0]
    assert f"train {sum(counts)}, published" in data.remarks[0]


def test_lists_of_ones_own(tmp_path: Path) -> None:
    tree(tmp_path, {f"a b/{i}.png": i for i in range(8)} | {f"c/{i}.png": i for i in range(4)})
    lines = [f"a b/{i}.png 0" for i in range(4)] + [f"a b/{i}.png\t0" for i in range(4, 8)]
    lines += [f"c/{i}.png 1\r" for i in range(4)] + [""]
    (tmp_path / "mine.txt").write_text("\n".join(lines))
    config = Data(**source_of(str(tmp_path / "mine.txt")))
    data = load_data(config, seed=0)
    assert data.class_names == ("a b", "c")
    assert data.class_counts == [6, 3]
    assert torch.bincount(data.test.labels).tolist() == [2, 1]
    # classes that share their folders go by their numbers
    (tmp_path / "mixed.txt").write_text("".join(f"a b/{i}.png {i % 2}\n" for i in range(8)))
    assert load_data(Data(**source_of(str(tmp_path / "mixed.txt"))), seed=0).class_names == ("0", "1")


def test_tables(tmp_path: Path) -> None:
    files = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(6)]
    tree(tmp_path, {file: n for n, file in enumerate(files)})
    splits = (["train"] * 4 + ["validation", "test"]) * 2
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "kinds", "split", "note")])
        csv.writer(file).writerows((f, f.split("/")[0], s, "x, y") for f, s in zip(files, splits, strict=True))
    config = Data(source="list", train=str(tmp_path / "t.csv"), label_column="kinds")
    data = load_data(config, seed=0)
    assert data.class_names == ("cat", "dog")
    assert data.class_counts == [4, 4]
    assert data.val is not None
    assert len(data.val) == len(data.test) == 2
    from pyarrow import Table, parquet

    table = Table.from_pydict({"image": files, "label": [int(f.startswith("dog")) for f in files]})
    parquet.write_table(table, tmp_path / "t.parquet")
    data = load_data(Data(**source_of(str(tmp_path / "t.parquet"))), seed=0)
    assert data.class_names == ("cat", "dog")
    assert data.class_counts == [5, 5]


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("", {}, "is empty, expected a header"),
        ("path,label\n", {}, "has no rows"),
        ("file,kinds\na.png,1\n", {}, r"which column holds the label\? .*there are: file, kinds"),
        (
            "file,kinds\na.png,1\n",
            {"label_column": "kind"},
            r"no column 'kind' \(data.label_column\); there are: file",
        ),
        (
            "path,label\na.png,0.5\n",
            {},
            "line 2: column 'label' holds '0.5', expected a whole number of at least 0 or a class name; correct it",
        ),
        ("path,label\na.png,0\nb.png,nan\n", {}, "line 3: column 'label' holds 'nan'"),
        ("path,label\na.png,\n", {}, "line 2: column 'label' holds nothing"),
        ("path,label\na.png,0,1\n", {}, "line 2: expected 2 columns, got 3"),
        ("path,label,label\na.png,0,1\n", {}, "two columns are called 'label'"),
        ("path,label\na.png,-1\n", {}, "line 2: column 'label' holds '-1'"),
        ("path,label\na.png," + "1" * 5000, {}, "line 2: column 'label' holds '1{80}', expected a whole number"),
        ("path,label,split\na.png,0,x\n", {}, "line 2: split 'x' is not known: expected train, val or test"),
        ("path,label,split\na.png,0,\n", {}, "line 2: column 'split' holds nothing, expected train, val or test"),
        ("path,label\n,0\n", {}, "line 2: column 'path' holds nothing, expected a path"),
        ("path,label\na.png,Cat\nb.png,cat \n", {}, "'Cat' and 'cat' differ only in case or blanks"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, columns: dict[str, str], message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(LongtailError, match=message):
        load_data(Data(source="list", train=str(tmp_path / "t.csv"), **columns), seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("a.png 0\nb.png one\n", "line 2: expected 'path label' with a label from 0, got 'b.png one'"),
        ("a.png -1\n", "line 1: expected 'path label'"),
        ("a.png\n", "line 1: expected 'path label'"),
        ("a.png " + "1" * 5000, "line 1: expected 'path label' with a label from 0, got 'a.png 1{74}'$"),
        ("x\0y/\u00e9/a.png 0\nb\0.png 1\n", r"2 of 2 files are missing below .* has no 'x\\x00y'"),
        ("x/a.png 0\ny/b.png 1\n", r"2 of 2 files are missing below .* \(x/a.png, y/b.png\): .* has no 'x'"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(LongtailError, match=message):
        load_data(Data(source="list", train=str(tmp_path / "list.txt")), seed=0)


def test_of_a_wrong_root_the_part_that_fails_is_named(tmp_path: Path) -> None:
    imagenet_lt(tmp_path)
    (tmp_path / "train").rename(tmp_path / "Train")
    with pytest.raises(LongtailError, match=r"12 of 12 files are missing .*has no 'train'; perhaps you meant Train\?"):
        load_data(Data(source="imagenet-lt", root=str(tmp_path)), seed=0)
    with pytest.raises(LongtailError, match=r"found no list ImageNet_LT_train\.txt"):
        load_data(Data(source="imagenet-lt", root=str(tmp_path / "val")), seed=0)


def test_test_images_must_not_be_trained_on(tmp_path: Path) -> None:
    imagenet_lt(tmp_path)
    text = (tmp_path / "ImageNet_LT_test.txt").read_text()
    (tmp_path / "ImageNet_LT_test.txt").write_text(text + "train/n00/n00_0.JPEG 0\n")
    (tmp_path / "ImageNet_LT_val.txt").write_text((tmp_path / "ImageNet_LT_val.txt").read_text() * 2)
    listing = read_listing(Data(source="imagenet-lt", root=str(tmp_path)))
    assert listing.errors == [
        "1 file is listed in train and again in test (train/n00/n00_0.JPEG): "
        "test and validation images must not be trained on"
    ]
    assert "val: 6 entries name a file that is listed already, and are left out" in listing.remarks
    assert len(listing.splits["val"]) == 6


def test_a_file_that_a_table_lists_twice_is_there_once(tmp_path: Path) -> None:
    tree(tmp_path, {f"{c}/{i}.png": 10 * c + i for c in range(2) for i in range(5)})
    rows = [f"{c}/{i}.png,{c}" for c in range(2) for i in range(5)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows, "./0/1.png,0", "1//2.png,1"]))
    data = load_data(Data(**source_of(str(tmp_path / "t.csv"))), seed=0)
    assert len(data.train) + len(data.test) == 10
    assert not set(data.train.ids.tolist()) & set(data.test.ids.tolist())
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows, "0/1.png,1"]))
    with pytest.raises(LongtailError, match=r"0/1\.png is listed under '0' and '1'; correct one"):
        load_data(Data(**source_of(str(tmp_path / "t.csv"))), seed=0)


@pytest.mark.parametrize("place", ["photos", "link"])
def test_an_absolute_path_below_the_root_is_that_of_the_same_file(tmp_path: Path, place: str) -> None:
    files = {f"{c}/{i}.png": 10 * c + i for c in range(2) for i in range(5)}
    tree(tmp_path / "photos", files)
    (tmp_path / "link").symlink_to("photos")

    def listing(*more: str) -> Listing:
        rows = [f"{file},{file[0]},train" for file in files]
        (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows, *more]))
        return read_listing(Data(source="list", train=str(tmp_path / "t.csv"), root=str(tmp_path / "link")))

    absolute = tmp_path / place / "0" / "1.png"
    twice = listing(f"{absolute},0,train")
    assert twice.splits["all"].names == list(files)
    assert "all: 1 entry names a file that is listed already, and is left out" in twice.remarks
    assert listing(f"{absolute},1,train").errors == ["all: 0/1.png is listed under '0' and '1'; correct one"]
    assert "1 file is listed in train and again in test (0/1.png)" in listing(f"{absolute},0,test").errors[0]


def test_other_splits_are_numbered_as_training_is(tmp_path: Path) -> None:
    def annotations(split: str, categories: dict[int, str]) -> str:
        files = {c: f"{split}/{c}-{i}.png" for c in categories for i in range(1)}
        tree(tmp_path, {file: hash(file) % 1000 for file in files.values()})
        content = {
            "images": [{"id": c, "file_name": file} for c, file in files.items()],
            "annotations": [{"id": c, "image_id": c, "category_id": c} for c in files],
            "categories": [{"id": c, "name": name} for c, name in categories.items()],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        return str(tmp_path / f"{split}.json")

    train = annotations("train", {1: "cat", 2: "dog", 3: "emu"})
    data = load_data(Data(source="list", train=train, test=annotations("test", {1: "cat", 3: "emu"})), seed=0)
    assert data.test.labels.tolist() == [0, 2]
    with pytest.raises(LongtailError, match="category 9 is not among the training classes"):
        load_data(Data(source="list", train=train, test=annotations("test", {9: "yak"})), seed=0)
    tree(tmp_path, {"a.png": 1, "b.png": 2, "c.png": 3})
    (tmp_path / "named.csv").write_text("path,label\na.png,cat\nb.png,dog\n")
    (tmp_path / "numbers.txt").write_text("c.png 1\n")
    mixed = {"train": str(tmp_path / "named.csv"), "test": str(tmp_path / "numbers.txt")}
    with pytest.raises(LongtailError, match="test: its labels are numbers, those of train are names"):
        load_data(Data(source="list", **mixed), seed=0)  # type: ignore[arg-type]


def test_a_split_that_was_written_down_is_read_again(tmp_path: Path) -> None:
    tree(tmp_path / "images", {f"{name}/{i}.png": int(name) + i for name in ("3", "17", "25") for i in range(6)})
    (tmp_path / "images" / "3").rename(tmp_path / "images" / "train")  # a class called train is no split
    split = write_split(Data(source="folder", root=str(tmp_path / "images")), tmp_path / "s.csv", 0.2, 0.2, 0)
    assert split["images"] == {"train": 12, "val": 3, "test": 3}
    data = load_data(Data(source="list", train=str(tmp_path / "s.csv"), root=split["root"]), seed=0)
    assert data.class_names == ("17", "25", "train")
    assert data.class_counts == [4, 4, 4]
    assert data.val is not None


def test_a_label_beyond_the_training_classes(tmp_path: Path) -> None:
    imagenet_lt(tmp_path)
    text = (tmp_path / "ImageNet_LT_test.txt").read_text()
    (tmp_path / "ImageNet_LT_test.txt").write_text(text.replace("13.JPEG 0", "13.JPEG 7"))
    with pytest.raises(LongtailError, match="test: label 7 is not among the 3 training classes, 0 to 2"):
        load_data(Data(source="imagenet-lt", root=str(tmp_path)), seed=0)


@pytest.mark.parametrize(
    "text",
    [
        *("[1]", "{", '{"images": [], "annotations": []}', '{"images": 3}', "[" * 200_000, "[" + "1" * 5000 + "]"),
        *(
            f'{{"images": [{{"id": 1, "file_name": {name}}}], "annotations": [{{"image_id": 1, "category_id": 1}}], '
            '"categories": [{"id": 1, "name": "cat"}]}'
            for name in ("null", "7")
        ),
    ],
)
def test_annotations_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(LongtailError, match=r"a\.json: (is not JSON|expected images)"):
        load_data(Data(source="list", train=str(tmp_path / "a.json")), seed=0)


def test_annotations_of_boxes_of_several_classes(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": c, "bbox": [0, 0, 4, 4]} for c in (1, 2)],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(LongtailError, match=r"several classes in one image; to train on these, expected --data.source"):
        load_data(Data(source="list", train=str(tmp_path / "a.json")), seed=0)


def test_links_in_circles_and_names_that_are_not_utf8(photos: Path) -> None:
    (photos / "cat" / "loop.png").symlink_to(photos / "cat" / "loop.png")
    with pytest.raises(LongtailError, match=r"loop\.png: is a broken or circular link"):
        load_data(Data(source="folder", root=str(photos)), seed=0)
    (photos / "cat" / "loop.png").unlink()
    (photos / "up").symlink_to(photos)  # a class folder that holds the classes
    with pytest.raises(LongtailError, match=r"up: is a link to a folder that contains it"):
        load_data(Data(source="folder", root=str(photos)), seed=0)
    (photos / "up").unlink()
    (photos / "cat").rename(photos / os.fsdecode(b"caf\xe9"))
    data = load_data(Data(source="folder", root=str(photos)), seed=0)
    assert data.class_names[0].encode("utf-8", "surrogateescape") == b"caf\xe9"


def test_an_image_that_breaks_is_replaced_and_too_many_are_not(tmp_path: Path) -> None:
    tree(tmp_path, {f"{c}/{i}.png": 10 * c + i for c in range(2) for i in range(5)})
    names = [f"{c}/{i}.png" for c in range(2) for i in range(5)]
    labels = torch.tensor([0] * 5 + [1] * 5)
    (tmp_path / "0/4.png").write_bytes(b"gone bad")
    images = FileImages(tmp_path, names, 16, labels=labels, max_unreadable_fraction=0.1)
    taken = images.take(torch.arange(10))
    assert torch.equal(taken[4], taken[0])  # the next of its class
    assert list(images.unreadable) == [4]
    assert "4.png: is not an image" in images.unreadable[4]
    (tmp_path / "1/2.png").write_bytes(b"")
    with pytest.raises(
        LongtailError, match=r"2 of 10 images cannot be read, more than data.max_unreadable_fraction 0.1; the first"
    ):
        images.take(torch.arange(10))
    with pytest.raises(LongtailError, match="is not an image"):
        FileImages(tmp_path, names, 16).take(torch.tensor([4]))


@pytest.mark.parametrize(("lines", "classes"), [(115_846, 1000), pytest.param(437_513, 8142, marks=pytest.mark.slow)])
def test_long_lists_take_little_memory(tmp_path: Path, lines: int, classes: int) -> None:
    """The time is measured in benchmarks/data.py; the peak counts Python's and torch's own objects alike."""
    path = tmp_path / "long.txt"
    path.write_text(
        "".join(f"train/n{i % classes:08}/n{i % classes:08}_{i}.JPEG {i % classes}\n" for i in range(lines))
    )
    tracemalloc.start()
    names, labels = read_list(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(names) == lines
    assert peak < 200 * 2**20
    assert encode_labels(labels)[0].shape == (lines,)


def test_names_come_from_folders_only_where_they_tell_classes_apart() -> None:
    assert names_by_folder(Entries(["a/x.png", "b/y.png"], torch.tensor([0, 1])), 2) == ["a", "b"]
    assert names_by_folder(Entries(["a/x.png", "b/y.png", "c/z.png"], torch.tensor([0, 1, 1])), 2) == ["0", "1"]
    assert names_by_folder(Entries(["x.png", "y.png"], torch.tensor([0, 1])), 2) == ["0", "1"]
    nested = Entries(["t/gate/outdoor/x.png", "t/market/outdoor/y.png", "t/pond/z.png"], torch.arange(3))
    assert names_by_folder(nested, 3) == ["gate/outdoor", "market/outdoor", "pond"]
