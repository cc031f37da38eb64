"""What the library datasets reads, offline, and arrays that are in memory already."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longtail.config import Config, Data
from longtail.data.dataset import from_arrays
from longtail.data.images import EncodedImages
from longtail.data.source_spec import source_of
from longtail.data.sources import load_data
from longtail.errors import LongtailError
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
    assert isinstance(data.train.images, EncodedImages) == (memory < 1)
    assert data.train.images.take(torch.tensor([0, 15])).shape == (2, 3, 32, 32)
    thin = load_data(Data(source="hub", root=str(parquet), profile="exponential", imbalance=3), seed=0)
    assert thin.class_counts == [9, 5, 2]
    with pytest.raises(LongtailError, match=r"expected a column species, there are image, label"):
        load_data(Data(source="hub", root=str(parquet), label_column="species"), seed=0)


def test_a_hub_test_set_is_numbered_as_training_is(parquet: Path) -> None:
    from pyarrow import Table
    from pyarrow import parquet as pq

    images = [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}]
    pq.write_table(Table.from_pydict({"image": images, "label": ["emu", "cat"]}), parquet / "test-0.parquet")
    data = load_data(Data(source="hub", root=str(parquet)), seed=0)
    assert data.test.labels.tolist() == [2, 0]
    pq.write_table(Table.from_pydict({"image": images, "label": ["emu", "yak"]}), parquet / "test-0.parquet")
    with pytest.raises(LongtailError, match="split test: the class 'yak' is not among the training classes"):
        load_data(Data(source="hub", root=str(parquet)), seed=0)


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
    ],
)
def test_arrays_that_cannot_be_used(train: Any, message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        from_arrays(train, arrays(12, 1))
