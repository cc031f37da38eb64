"""What the library datasets reads, offline, and arrays that are in memory already."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longtail.config import Config, Data, Shots
from longtail.data.dataset import LongTailedData, from_arrays
from longtail.data.images import EncodedImages
from longtail.data.inspection import inspect
from longtail.data.source_spec import source_of
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.experiments.embed import embed, load_embeddings
from longtail.training.trainer import fit


def png(seed: int, side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A folder in the Hub's layout: images as structs of bytes, labels as names."""
    from pyarrow import Table, parquet

    for split, counts in (("train", {"cat": 9, "dog": 5, "emu": 2}), ("validation", {"cat": 2, "dog": 2, "emu": 2})):
        labels = [name for name, count in counts.items() for _ in range(count)]
        images = [{"bytes": png(hash((split, index)) % 2**31), "path": None} for index in range(len(labels))]
        parquet.write_table(Table.from_pydict({"image": images, "label": labels}), tmp_path / f"{split}-0.parquet")
    return tmp_path


@pytest.mark.parametrize("memory", [4.0, 1e-9])
def test_parquet(parquet: Path, memory: float) -> None:
    config = Data(**source_of(str(parquet)), memory_gib=memory)
    assert config.source == "hub"
    data = load_data(config, seed=0)
    assert data.class_names == ("cat", "dog", "emu")
    assert data.class_counts == [9, 5, 2]
    assert data.val is None
    assert len(data.test) == 6
    assert any("there is no test split, so these are the test images" in remark for remark in data.remarks)
    assert isinstance(data.train.images, EncodedImages) == (memory < 1)
    assert data.train.images.take(torch.tensor([0, 15])).shape == (2, 3, 32, 32)
    thin = load_data(Data(source="hub", root=str(parquet), profile="exponential", imbalance=3), seed=0)
    assert thin.class_counts == [9, 5, 2]
    with pytest.raises(LongtailError, match=r"has no column 'species' \(data\.label_column\); there are: label$"):
        load_data(Data(source="hub", root=str(parquet), label_column="species"), seed=0)


def test_workers_that_are_spawned_read_the_same_rows(parquet: Path) -> None:
    images = load_data(Data(**source_of(str(parquet)), memory_gib=1e-9), seed=0).train.images
    sent = pickle.loads(pickle.dumps(images))
    assert torch.equal(sent.take(torch.tensor([0, 15])), images.take(torch.tensor([0, 15])))


def test_held_out_images_of_the_hub(parquet: Path) -> None:
    """What a folder's owner is told of small classes, a table's owner is told too."""
    (parquet / "validation-0.parquet").unlink()
    held_out = Data(source="hub", root=str(parquet), val_fraction=0.2)
    data = load_data(held_out, seed=0)
    assert "1 class has too few images for every split (emu)" in data.remarks
    assert data.val is not None
    assert set(data.val.labels.tolist()) == {0, 1}
    few = "class 'emu' has 1 training image in data.root '.*': at least 5 are expected (data.min_images)"
    with pytest.raises(LongtailError, match=few.replace("(", r"\(").replace(")", r"\)")):
        load_data(Data(source="hub", root=str(parquet), min_images=5), seed=0)


def test_validation_images_of_the_hub_are_not_held_out_again(parquet: Path) -> None:
    (parquet / "validation-0.parquet").rename(parquet / "test-0.parquet")
    (parquet / "validation-0.parquet").write_bytes((parquet / "test-0.parquet").read_bytes())
    data = load_data(Data(source="hub", root=str(parquet), val_fraction=0.2), seed=0)
    assert data.class_counts == [9, 5, 2]
    assert "data.val_fraction is not used: the set has validation images of its own" in data.remarks


def test_a_hub_test_set_is_numbered_as_training_is(parquet: Path) -> None:
    from pyarrow import Table
    from pyarrow import parquet as pq

    images = [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}]
    pq.write_table(Table.from_pydict({"image": images, "label": ["emu", "cat"]}), parquet / "test-0.parquet")
    data = load_data(Data(source="hub", root=str(parquet)), seed=0)
    assert data.test.labels.tolist() == [2, 0]
    pq.write_table(Table.from_pydict({"image": images, "label": ["emu", "yak"]}), parquet / "test-0.parquet")
    with pytest.raises(
        LongtailError, match="split test: class 'yak' is not among the training classes; there are: cat, dog, emu"
    ):
        load_data(Data(source="hub", root=str(parquet)), seed=0)


def write_set(folder: Path, columns: dict[str, list[Any]], split: str = "train", image_column: str = "image") -> None:
    """Write a split of a set in the Hub's layout, with an image for every row."""
    from pyarrow import Table, parquet

    rows = len(next(iter(columns.values())))
    images = [{"bytes": png(row), "path": None} for row in range(rows)]
    folder.mkdir(exist_ok=True)
    parquet.write_table(Table.from_pydict({image_column: images} | columns), folder / f"{split}-0.parquet")


def load(folder: Path, **settings: Any) -> LongTailedData:
    return load_data(Data(source="hub", root=str(folder), **settings), seed=0)


@pytest.mark.parametrize(
    ("image", "label"),
    [("Image", "Label"), ("IMG", "Category"), ("Picture", "class_id"), ("jpg", "Class Name"), ("photo", "TARGET")],
)
def test_columns_are_found_in_any_case(tmp_path: Path, image: str, label: str) -> None:
    write_set(tmp_path, {label: ["cat"] * 6 + ["dog"] * 4}, image_column=image)
    data = load(tmp_path, val_fraction=0)
    assert data.class_names == ("cat", "dog")
    assert len(data.train) + len(data.test) == 10


def test_columns_that_are_named(tmp_path: Path) -> None:
    write_set(tmp_path, {"Label": [0] * 5 + [1] * 5, "Species": ["a", "b"] * 5})
    assert load(tmp_path).class_names == ("0", "1")
    assert load(tmp_path, label_column="species", image_column="IMAGE").class_names == ("a", "b")
    with pytest.raises(
        LongtailError, match=r"has no column 'genus' \(data\.label_column\); there are: Label, Species$"
    ):
        load(tmp_path, label_column="genus")
    write_set(tmp_path, {"Species": ["a", "b"] * 5})
    assert load(tmp_path).class_names == ("a", "b")
    write_set(tmp_path, {"Kinds": ["a", "b"] * 5})
    with pytest.raises(
        LongtailError, match=r"which column holds the label\? Name it with --data\.label_column NAME; .*: Kinds$"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", ["Split", "SUBSET", "data split"])
def test_a_column_of_splits_divides_a_set_without_splits(tmp_path: Path, name: str) -> None:
    splits = ["Train", "Train", "Testing", "VALID"] * 5
    write_set(tmp_path, {"label": ["cat", "dog", "cat", "dog"] * 5, name: splits})
    data = load(tmp_path)
    assert data.val is not None
    assert (len(data.train), len(data.val), len(data.test)) == (10, 5, 5)
    assert data.test.labels.tolist() == [0] * 5
    assert data.val.labels.tolist() == [1] * 5
    assert not data.remarks
    # the images are those of the rows
    images = load(tmp_path, image_size=40).test.images.take(torch.tensor([0, 4]))
    for image, row in zip(images, (2, 18), strict=True):
        assert torch.equal(image, torch.from_numpy(np.array(Image.open(io.BytesIO(png(row))))).permute(2, 0, 1))


def test_a_column_of_splits_is_not_lost(tmp_path: Path) -> None:
    write_set(tmp_path, {"label": ["cat", "dog"] * 6, "Split": ["Train", "Train", "nowhere"] * 4})
    with pytest.raises(LongtailError, match="row 3: split 'nowhere' is not known: expected train, val or test"):
        load(tmp_path)
    write_set(tmp_path, {"label": ["cat", "dog"] * 6, "Split": ["Test"] * 12})
    with pytest.raises(LongtailError, match="column 'Split' has no row of train, only of test"):
        load(tmp_path)
    write_set(tmp_path, {"label": ["cat", "dog"] * 6, "Split": ["Train", "Test"] * 6})
    write_set(tmp_path, {"label": ["cat", "dog"], "Split": ["Test", "Test"]}, "test")
    data = load(tmp_path)
    assert (len(data.test), len(data.train)) == (2, 12)
    (remark,) = data.remarks
    assert remark.endswith("column 'Split' is not used: the set is divided already")
    with pytest.raises(LongtailError, match=r"^data\.split_column 'Split': .* is divided into train, test already"):
        load(tmp_path, split_column="Split")


def test_a_column_that_is_not_used_is_named(tmp_path: Path) -> None:
    write_set(
        tmp_path,
        {"label": ["cat", "dog"] * 6, "Category": [1, 2] * 6, "patient_id": list(range(12)), "note": ["a"] * 12},
    )
    remarks = load(tmp_path).remarks
    assert len(remarks) == 2
    assert (
        "column 'Category' is not used: labels are read from 'label'; --data.label_column names another" in remarks[0]
    )
    assert "column 'patient_id' is not used: images of one group may be in several splits" in remarks[1]


def test_splits_are_found_by_their_usual_names(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("holdout", 2), ("extra", 4)):
        labels = ["cat", "dog"] * (count // 2)
        write_set(tmp_path / split, {"label": labels}, split)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: {folder}/*.parquet\n"
            for split, folder in (("Training", "train"), ("HoldOut", "holdout"), ("extra", "extra"))
        )
        + "---\n"
    )
    data = load(tmp_path, val_fraction=0)
    assert (len(data.train), len(data.test)) == (8, 2)
    assert [remark.partition(": ")[2] for remark in data.remarks] == [
        "not used, since they are not train, val or test: extra"
    ]


def test_ids_from_a_database_name_the_classes(tmp_path: Path) -> None:
    ids = [17, 5_219_404, 50_000_000_000]
    write_set(tmp_path, {"label": [identity for identity in ids for _ in range(4)]})
    write_set(tmp_path, {"label": ids[::-1]}, "test")
    data = load(tmp_path, val_fraction=0)
    assert data.class_names == tuple(map(str, ids))
    assert data.test.labels.tolist() == [2, 1, 0]
    assert data.class_counts == [4, 4, 4]
    assert "3 different numbers from 17 to 50000000000: they name the classes" in data.remarks[0]
    write_set(tmp_path, {"label": [17, 18]}, "test")
    with pytest.raises(
        LongtailError, match="split test: label 18 is not among the 3 training classes, 17 to 50000000000"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10432", "a1b2", "77e1", "0009"], ("0009", "10432", "77e1", "a1b2")),
        (["0010", "0002", "0001", "0100"], ("0001", "0002", "0010", "0100")),
        (["2", "0", "1", "3"], ("0", "1", "2", "3")),
        (["10", "9", "8", "11"], ("8", "9", "10", "11")),
        ([2.0, 0.0, 1.0, 3.0], ("0", "1", "2", "3")),
    ],
)
def test_codes_as_labels(tmp_path: Path, labels: list[Any], names: tuple[str, ...]) -> None:
    write_set(tmp_path, {"label": labels * 3})
    write_set(tmp_path, {"label": labels}, "test")
    data = load(tmp_path, val_fraction=0)
    assert data.class_names == names
    spelled = [str(int(label)) if isinstance(label, float) else label for label in labels]
    assert [names[label] for label in data.test.labels.tolist()] == spelled


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, -1, 2], "split train, row 2: column 'label' holds '-1', expected a whole number of at least 0 or a class"),
        ([1.5, 2.0], "split train, row 1: column 'label' holds '1.5', expected a whole number"),
        ([[1], [2]], "split train: column 'label' holds .*, expected integers or names"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path: Path, labels: list[Any], message: str) -> None:
    write_set(tmp_path, {"label": labels})
    with pytest.raises(LongtailError, match=message):
        load(tmp_path)


def test_names_in_two_unicode_forms_are_one_class(tmp_path: Path) -> None:
    write_set(tmp_path, {"label": ["caf\u00e9", "cafe\u0301", "tea"] * 4})
    write_set(tmp_path, {"label": ["cafe\u0301", "tea"]}, "test")
    data = load(tmp_path, val_fraction=0)
    assert data.class_names == ("caf\u00e9", "tea")
    assert data.class_counts == [8, 4]
    assert data.test.labels.tolist() == [0, 1]


def write_declared(folder: Path, split: str, labels: list[int | None], names: list[str]) -> None:
    """Write a split whose labels are numbers with declared names."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [{"bytes": png(row), "path": None} for row in range(len(labels))]
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    rows.to_parquet(folder / f"{split}-0.parquet")


def test_declared_classes_without_an_image_are_no_classes(tmp_path: Path) -> None:
    names = ["zebra", "yak", "cat", "emu"]
    write_declared(tmp_path, "train", [0, 2, 3] * 4, names)
    write_declared(tmp_path, "test", [3, 2, 0], names)
    data = load(tmp_path, val_fraction=0)
    assert data.class_names == ("zebra", "cat", "emu")
    assert data.test.labels.tolist() == [2, 1, 0]
    assert "1 of 4 class names have no training image, and are no classes (yak)" in data.remarks[0]
    write_declared(tmp_path, "test", [3, 1], names)
    with pytest.raises(LongtailError, match="split test: class 'yak' is not among the training classes"):
        load(tmp_path)


@pytest.mark.parametrize("missing", [-1, None])
def test_labels_that_are_missing(tmp_path: Path, missing: int | None) -> None:
    write_declared(tmp_path, "train", [0, 1] * 4, ["cat", "dog"])
    write_declared(tmp_path, "test", [missing, missing], ["cat", "dog"])
    data = load(tmp_path, val_fraction=0)
    assert data.remarks == ("split test has no labels, and is left out",)
    assert len(data.test) == 8 - len(data.train)
    write_declared(tmp_path, "test", [0, missing], ["cat", "dog"])
    with pytest.raises(LongtailError, match="split test: expected labels 0 to 1 in 'label', got -1 to 0"):
        load(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    write_set(tmp_path, {"label": ["cat", None, "dog", "dog"]})
    with pytest.raises(
        LongtailError, match="split train, row 2: column 'label' holds nothing, expected a label; add it"
    ):
        load(tmp_path)


def test_an_imagefolder(photos: Path) -> None:
    data = load_data(Data(source="hub", root=str(photos), val_fraction=0.2), seed=0)
    assert data.class_names == ("cat", "dog", "emu")
    assert data.class_counts == [8, 4, 1]
    assert data.val is not None
    assert torch.bincount(data.val.labels).tolist() == [2, 1, 1]


def arrays(count: int, seed: int, shape: tuple[int, ...] = (16, 16, 3)) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return (rng.integers(0, 100, (count, *shape)) + 50 * labels.reshape(-1, *[1] * len(shape))).astype(np.uint8), labels


@pytest.mark.parametrize("shape", [(16, 16, 3), (3, 16, 16), (16, 16), (16, 16, 1)])
def test_arrays(shape: tuple[int, ...], tiny: Config, tmp_path: Path) -> None:
    data = from_arrays(arrays(40, 0, shape), arrays(12, 1, shape), class_names=["low", "mid", "high"])
    assert data.image_size == 16
    assert len(data.mean) == (3 if 3 in shape else 1)
    assert data.class_counts == [14, 13, 13]
    run = fit(tiny.replace(method="la", epochs=30, data={"augment": "none"}), tmp_path / "run", data=data, quiet=True)
    assert run.model_config.class_names == ("low", "mid", "high")
    assert run.metrics["balanced_accuracy"] > 60


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((np.zeros((4, 16, 16, 3)), np.arange(4)), "train images: expected .* of uint8, .* got .* of torch.float64"),
        ((np.zeros((4, 16, 15, 3), np.uint8), np.arange(4)), "train images: expected"),
        ((np.zeros((4, 16, 16, 3), np.uint8), np.arange(3)), "train labels: expected 4 integers"),
        ((np.zeros((4, 16, 16, 3), np.uint8), np.arange(4) / 2), "train labels: expected 4 integers"),
        ((np.zeros((4, 16, 16, 3), np.uint8), np.array([0, 2, 2, 0])), "class '1' has no training image"),
        ((np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 3), "expected one shape in every split"),
        (
            (np.zeros((4, 16, 16, 3), np.uint8), np.array(list("abca"))),
            r"train labels: expected an array of numbers, got <U1; numpy.unique\(names, return_inverse=True\)",
        ),
        ((np.array([["a"]]), np.zeros(1, np.int64)), "train images: expected an array of numbers, got <U1"),
    ],
)
def test_arrays_that_cannot_be_used(train: Any, message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        from_arrays(train, arrays(12, 1))


def test_arrays_that_torch_cannot_share() -> None:
    images, labels = arrays(40, 0)
    reversed_channels, frozen = images[..., ::-1], labels.copy()
    frozen.flags.writeable = False
    data = from_arrays((reversed_channels, frozen), (reversed_channels, frozen))
    expected = from_arrays((reversed_channels.copy(), labels), (reversed_channels.copy(), labels))
    assert data.mean == expected.mean
    assert data.class_counts == expected.class_counts


@pytest.mark.parametrize("memory", [4.0, 1e-9])
def test_images_that_cannot_be_read_are_left_out_and_named_by_split_and_row(tmp_path: Path, memory: float) -> None:
    for split, seed in (("train", 100), ("test", 200)):
        images = [png(seed + index) for index in range(12)]
        images[3] = images[3][:200]
        write_set(tmp_path, {"image": [{"bytes": image, "path": None} for image in images], "label": [0, 1] * 6}, split)
    data = Data(source="hub", root=str(tmp_path), memory_gib=memory, max_unreadable_fraction=0.2)
    bad = ["train, row 3", "test, row 3"]
    inspection = inspect(data, 0, Shots())
    assert [entry["path"] for entry in inspection.unreadable] == bad
    assert all("is damaged" in entry["reason"] for entry in inspection.unreadable)
    assert not inspection.duplicates + inspection.conflicts + inspection.leaks + inspection.errors
    summary = embed(data, "resnet8", tmp_path / "e.npz", pretrained="none", device="cpu")
    assert (summary["train"], summary["test"], summary["unreadable"]) == (11, 11, bad)
    arrays = load_embeddings(tmp_path / "e.npz")
    for split in ("train", "test"):
        assert arrays[f"{split}_labels"].tolist() == [0, 1, 0, *[0, 1] * 4]
        assert len(np.unique(arrays[split], axis=0)) == 11
