"""Tables as spreadsheets and programs write them, labels as databases number them, paths in two Unicode forms."""

from __future__ import annotations

import json
import tracemalloc
import unicodedata
from pathlib import Path

import pytest

from longtail.data.listing import Listing, check, read_splits
from longtail.errors import LongtailError
from tests.conftest import save_image

CAFE = "caf\u00e9"
ROWS = [("a.png", "cat"), ("b.png", "cat"), ("c.png", "dog"), ("d.png", "dog")]


def listed(root: Path, content: str | bytes, name: str = "t.csv", **columns: str) -> Listing:
    """Write a table and read it."""
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    listing = read_splits({"train": root / name}, root, **columns)
    check(listing)
    return listing


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, (name, _) in enumerate(ROWS):
        save_image(tmp_path / name, seed=seed)
    return tmp_path


def table(separator: str = ",", end: str = "\n", rows: list[tuple[str, str]] = ROWS, quote: str = "") -> str:
    lines = [("path", "label"), *rows]
    return end.join(separator.join(f"{quote}{cell}{quote}" for cell in line) for line in lines) + end


@pytest.mark.parametrize(
    ("content", "remark"),
    [
        (table().encode("utf-8-sig"), None),
        (table(end="\r\n").encode(), None),
        (table(quote='"').encode(), None),
        (table(";").encode(), "a semicolon separates its columns"),
        (table("\t", end="\r\n").encode("utf-16"), "a tab separates its columns"),
        (table("|").encode(), "'|' separates its columns"),
        (("sep=;\r\n" + table(";", end="\r\n")).encode(), None),
    ],
    ids=["byte-order mark", "CRLF", "quotes", "semicolon", "UTF-16 with tabs", "bar", "sep="],
)
def test_every_way_to_write_a_table(root: Path, content: bytes, remark: str | None) -> None:
    listing = listed(root, content)
    assert not listing.errors
    assert listing.class_names == ["cat", "dog"]
    assert listing.training.names == [name for name, _ in ROWS]
    assert listing.remarks == ([] if remark is None else [f"{root / 't.csv'}: {remark}"])


def test_a_comma_within_a_path_is_no_separator(root: Path) -> None:
    save_image(root / "x, y.png")
    assert listed(root, table(";", rows=[("x, y.png", "cat"), ("a.png", "dog")])).training.names == [
        "x, y.png",
        "a.png",
    ]


@pytest.mark.parametrize("labels", [("0.0", "1.0"), ("0", "1.0"), ("0,0", "1,0"), ("0.", "1")])
def test_whole_numbers_are_whole_numbers(root: Path, labels: tuple[str, str]) -> None:
    listing = listed(root, table(";", rows=[("a.png", labels[0]), ("b.png", labels[1])]))
    assert listing.training.labels.tolist() == [0, 1]
    assert listing.class_names == ["0", "1"]


def test_latin_1_is_found_out_by_the_files_that_exist(root: Path) -> None:
    save_image(root / f"{CAFE}.png")
    rows = [(f"{CAFE}.png", CAFE), ("a.png", "bar")]
    listing = listed(root, table(rows=rows).encode("latin-1"))
    assert not listing.errors
    assert listing.class_names == ["bar", CAFE]
    assert listing.training.names[0] == f"{CAFE}.png"
    assert listing.remarks == [f"{root / 't.csv'}: is not UTF-8; it is read as Latin-1 (a guess)"]
    # a file whose name has these bytes is opened by them
    (root / f"{CAFE}.png").rename(root / b"caf\xe9.png".decode("utf-8", "surrogateescape"))
    listing = listed(root, table(rows=rows).encode("latin-1"))
    assert not listing.errors
    assert not listing.remarks


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("10432", "a1b2", "77e1", "0009"), ["0009", "10432", "77e1", "a1b2"]),
        (("007", "7", "12", "3"), ["007", "12", "3", "7"]),
        (("0", "1", "2", "none"), ["0", "1", "2", "none"]),
        (("0.5", "1", "2", "high"), ["0.5", "1", "2", "high"]),
        (("10", "77e1", "3", "4"), ["10", "3", "4", "77e1"]),
        (("²", "0", "1", "2"), ["0", "1", "2", "²"]),
    ],
)
def test_the_type_of_labels_is_decided_for_the_column(root: Path, labels: tuple[str, ...], names: list[str]) -> None:
    rows = [(name, label) for (name, _), label in zip(ROWS, labels, strict=True)]
    listing = listed(root, table(rows=rows))
    assert listing.class_names == names
    assert [names[label] for label in listing.training.labels] == list(labels)
    assert not listing.errors


def test_the_type_is_decided_for_all_splits(root: Path) -> None:
    (root / "train.csv").write_text(table(rows=[("a.png", "10432"), ("b.png", "a1b2")]))
    (root / "test.csv").write_text(table(rows=[("c.png", "10432"), ("d.png", "10432")]))
    listing = read_splits({"train": root / "train.csv", "test": root / "test.csv"}, root)
    assert listing.class_names == ["10432", "a1b2"]
    assert listing.splits["test"].labels.tolist() == [0, 0]
    (root / "test.csv").write_text(table(rows=[("c.png", "10433"), ("d.png", "10432")]))
    with pytest.raises(LongtailError, match="test: class '10433' is not among the training classes; perhaps you meant"):
        read_splits({"train": root / "train.csv", "test": root / "test.csv"}, root)


@pytest.mark.parametrize("name", ["t.csv", "t.txt"])
def test_ids_from_a_database_name_the_classes(root: Path, name: str) -> None:
    ids = [12, 50_000_000, 5_219_404, 12]
    text = table(rows=[(file, str(i)) for (file, _), i in zip(ROWS, ids, strict=True)])
    if name == "t.txt":
        text = "".join(f"{file} {i}\n" for (file, _), i in zip(ROWS, ids, strict=True))
    tracemalloc.start()
    listing = listed(root, text, name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert not listing.errors
    assert listing.class_names == ["12", "5219404", "50000000"]
    assert listing.training.labels.tolist() == [0, 2, 1, 0]
    assert "are 3 different numbers from 12 to 50000000: they name the classes" in listing.remarks[0]


def test_categories_without_an_image_are_no_classes(root: Path) -> None:
    content = {
        "images": [{"id": n, "file_name": name} for n, (name, _) in enumerate(ROWS)],
        "annotations": [{"image_id": n, "category_id": [40_000_000, 7][n % 2]} for n in range(4)],
        "categories": [{"id": n, "name": f"c{n}"} for n in (1, 7, 9, 40_000_000)],
    }
    listing = listed(root, json.dumps(content), "t.json")
    assert not listing.errors
    assert listing.class_names == ["c7", "c40000000"]
    assert listing.training.labels.tolist() == [1, 0, 1, 0]
    assert "2 of 4 categories have no image, and are no classes (c1, c9)" in listing.remarks[0]


@pytest.mark.parametrize(
    "header",
    [
        *("path,label,Split", "Path,Label,SPLIT", "File Name,Class,subset", "IMG_PATH,labels,set"),
        *("path,Species,split", "path,scientificName,split", "path,scientific name,split"),
    ],
)
def test_columns_and_splits_in_any_case(root: Path, header: str) -> None:
    text = f"{header}\na.png,cat,Train\nb.png,dog,TRAIN\nc.png,cat,Test\nd.png,dog,holdout\n"
    listing = listed(root, text)
    assert not listing.errors
    assert {split: entries.names for split, entries in listing.splits.items()} == {
        "train": ["a.png", "b.png"],
        "test": ["c.png", "d.png"],
    }
    assert not listing.remarks


def test_columns_that_are_not_used_but_look_as_if_they_were_are_named(root: Path) -> None:
    text = (
        "path,label,class_id,copy,Fold,phase,where,patient_id,width\n"
        "a.png,cat,3,a.png,0,day,train,p1,4\nb.png,dog,4,b.png,1,night,test,p2,4\nc.png,dog,4,c.png,1,night,train,p2,4\n"
    )
    listing = listed(root, text)
    assert set(listing.splits) == {"all"}
    unused = {remark.split("'")[1]: remark.partition("is not used: ")[2] for remark in listing.remarks}
    assert set(unused) == {"class_id", "copy", "Fold", "phase", "where", "patient_id"}
    assert "labels are read from 'label'" in unused["class_id"]
    assert "paths are read from 'path'" in unused["copy"]
    assert "looks like a split; --data.split_column names it" in unused["where"]
    assert "images of one group may be in several splits" in unused["patient_id"]
    assert set(listed(root, text, split_column="WHERE").splits) == {"train", "test"}


def test_an_empty_label_is_named_by_its_row_in_parquet_too(root: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths = [name for name, _ in ROWS]
    parquet.write_table(pyarrow.table({"path": paths, "label": [0.0, 1.0, None, 1.0]}), root / "t.parquet")
    with pytest.raises(LongtailError, match=r"row 3: column 'label' holds nothing, expected a label; add it"):
        read_splits({"train": root / "t.parquet"}, root)
    parquet.write_table(pyarrow.table({"path": paths, "label": [0.0, 1.0, 0.0, 1.0]}), root / "t.parquet")
    assert read_splits({"train": root / "t.parquet"}, root).training.labels.tolist() == [0, 1, 0, 1]


def test_a_path_in_another_unicode_form_opens_the_file_that_is_there(root: Path) -> None:
    stored = unicodedata.normalize("NFD", CAFE)
    save_image(root / stored / f"{stored}.png", seed=8)
    save_image(root / f"{stored}.png", seed=9)
    rows = [(f"{CAFE}/{CAFE}.png", CAFE), (f"{CAFE}.png", stored), ("a.png", "bar")]
    listing = listed(root, table(rows=rows))
    assert not listing.errors
    assert listing.class_names == ["bar", CAFE]
    assert listing.training.names == [f"{stored}/{stored}.png", f"{stored}.png", "a.png"]


def test_missing_files_are_one_message_without_the_rest_of_the_folder(root: Path) -> None:
    text = "path,label,split\n" + "".join(f"gone/{n}.png,{n % 2},{('train', 'test')[n // 4]}\n" for n in range(8))
    errors = listed(root, text).errors
    assert errors == [
        f"train, test: 8 of 8 files are missing below {root} (gone/0.png, gone/1.png, gone/2.png…): "
        f"{root} has no 'gone'; the folder that the names begin in is --data.root FOLDER"
    ]
    (root / "broken.png").symlink_to("nowhere.png")
    errors = listed(root, table(rows=[*ROWS, ("broken.png", "cat")])).errors
    assert errors[0].endswith(f"{root / 'broken.png'} is a broken or circular link")


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (['a.png,cat,"big one', "b.png,cat,", 'c.png,dog,"small"', "d.png,dog,"], 2),
        (["a.png,cat,", 'b.png,"ca"t,', "c.png,dog,", "d.png,dog,"], 3),
        (["a.png,cat,", "b.png,cat,", 'c.png,"dog,', "d.png,dog,"], 4),
    ],
)
def test_a_stray_quotation_mark_swallows_no_rows(root: Path, rows: list[str], line: int) -> None:
    with pytest.raises(LongtailError, match=rf"t\.csv, line {line}: cannot be read as a table: .*is doubled"):
        listed(root, "\n".join(["path,label,comment", *rows]))


def test_a_thousand_is_not_one(root: Path) -> None:
    content = 'path,label\na.png,"1,0"\nb.png,1\nc.png,"{}"\nd.png,2.000\n'
    assert sorted(listed(root, content.format("3,00")).class_names) == ["1", "2", "3"]
    with pytest.raises(LongtailError, match="line 4: column 'label' holds '1,000', expected a whole number"):
        listed(root, content.format("1,000"))


@pytest.mark.parametrize("prefix", ["pets\\", ".\\pets\\", "pets/"])
def test_relative_paths_of_windows_name_the_files_that_exist(root: Path, prefix: str) -> None:
    for seed, (name, label) in enumerate(ROWS):
        save_image(root / "pets" / label / name, seed=seed)
    numbers = {"cat": "0", "dog": "1"}
    rows = [(f"{prefix}{label}\\{name}", numbers[label]) for name, label in ROWS]
    listing = listed(root, table(rows=rows))
    assert not listing.errors
    assert listing.training.names == [f"pets/{label}/{name}" for name, label in ROWS]
    assert listing.class_names == ["cat", "dog"]  # after the folders of their images
    remark = f"{root / 't.csv'}: 4 paths have \\ between folders, read as / ({rows[0][0]})"
    assert listing.remarks == [remark]
    # a file that is missing is looked for in the same way
    missing = listed(root, table(rows=[*rows, (f"{prefix}dog\\e.png", "1")]))
    assert missing.errors == [
        f"all: 1 of 5 files are missing below {root} (pets/dog/e.png): {root / 'pets' / 'dog'} has no 'e.png'; perhaps "
        "you meant d.png or c.png?"
    ]


def test_a_backslash_may_be_part_of_a_name(root: Path) -> None:
    save_image(root / "x\\y.png", seed=9)
    save_image(root / "x" / "y.png", seed=8)
    listing = listed(root, table(rows=[*ROWS, ("x\\y.png", "cat")]))
    assert not listing.errors
    assert not listing.remarks
    assert listing.training.names[-1] == "x\\y.png"


@pytest.mark.parametrize("start", ["C:\\Users\\J\u00f6rg\\", "D:/", "\\\\server\\share\\"])
def test_absolute_paths_of_windows_are_explained(root: Path, start: str) -> None:
    separator = start[-1]
    rows = [(separator.join([f"{start}photos", label, name]), label) for name, label in ROWS]
    (error,) = listed(root, table(rows=rows)).errors
    assert error.endswith(
        f": they are absolute paths of Windows: remove '{start}photos{separator}' from them, and name the folder that "
        "it stands for with --data.root FOLDER"
    )
    for seed, (name, label) in enumerate(ROWS):
        save_image(root / "photos" / label / name, seed=seed)
    (error,) = listed(root, table(rows=rows)).errors
    assert error.endswith(f": they are absolute paths of Windows: remove '{start}' from them")
    # which is true
    assert not listed(root, table(rows=[(path.removeprefix(start), label) for path, label in rows])).errors


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("path,label\na.png,cat\nb.png,\n", 3),
        ("path,label\n\na.png,cat\n\nb.png,\n", 5),
        ("sep=,\npath,label\na.png,cat\nb.png,\n", 4),
        ('path,label,comment\na.png,cat,"one\ntwo"\n\nb.png,,"one\ntwo"\n', 5),
        ("path,label,split\na.png,cat,train\n\nb.png,dog,middle\n", 4),
        ("path,label\na.png,1\n\nb.png,0.5\n", 4),
        ('path,label\na.png,"1\n"\n\nb.png,1,2\n', 5),
    ],
)
def test_a_row_is_named_by_its_line_in_the_file(root: Path, content: str, line: int) -> None:
    with pytest.raises(LongtailError, match=rf"t\.csv, line {line}: "):
        listed(root, content)


def test_test_images_without_labels_are_not_tested_on(root: Path) -> None:
    hint = "; images without labels cannot be tested on: move them out, and use longtail predict RUN FOLDER"
    train = "".join(f"{name},{label},train\n" for name, label in ROWS)
    with pytest.raises(LongtailError, match=rf"line 6: column 'label' holds nothing.*{hint}$"):
        listed(root, f"path,label,split\n{train}e.png,,test\nf.png,,test\n")
    (root / "test.csv").write_text("path,label\na.png,\n")
    (root / "train.csv").write_text(table())
    with pytest.raises(LongtailError, match=rf"test\.csv, line 2: .*{hint}$"):
        read_splits({"train": root / "train.csv", "test": root / "test.csv"}, root)
    # one that has been forgotten is another matter
    with pytest.raises(LongtailError, match=r"add it, or remove the row$"):
        listed(root, f"path,label,split\n{train}e.png,,test\nf.png,cat,test\n")


def test_close_names_say_more_than_that_the_root_may_be_another(root: Path) -> None:
    errors = listed(root, "path,label\nbirdz/0.png,cat\n").errors
    assert errors[0].endswith("; the folder that the names begin in is --data.root FOLDER")
    save_image(root / "birds" / "0.png")
    errors = listed(root, "path,label\nbirdz/0.png,cat\n").errors
    assert errors[0].endswith("has no 'birdz'; perhaps you meant birds?")


def test_a_column_of_splits_with_train_alone_is_remarked_on(root: Path) -> None:
    train = "".join(f"{name},{label},train\n" for name, label in ROWS)
    listing = listed(root, f"path,label,split\n{train}")
    assert set(listing.splits) == {"all"}
    assert "column 'split' has train alone: there are no test images of its own" in listing.remarks[0]
