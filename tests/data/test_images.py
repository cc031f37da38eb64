from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longtail.config import Data, Shots
from longtail.data import image_io, images
from longtail.data.dataset import LongTailedData
from longtail.data.image_io import open_image
from longtail.data.images import ArrayImages, CopiedImages, EncodedImages, FileImages
from longtail.data.inspection import inspect
from longtail.data.sources import from_listing, load_data
from longtail.errors import LongtailError
from tests.conftest import save_image
from tests.inference.test_recognizer import build_recognizer


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


Load = Callable[..., tuple[LongTailedData, list[str]]]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, photos: Path, cache: Path) -> Load:
    """Load these images; returns the data and the names of the files that were decoded."""
    opened: list[str] = []
    open_square = image_io.open_square

    def recorded(path: Path, *arguments: Any) -> Any:
        opened.append(path.name)
        return open_square(path, *arguments)

    monkeypatch.setattr(images, "open_square", recorded)

    def run(root: Path = photos, **settings: Any) -> tuple[LongTailedData, list[str]]:
        opened.clear()
        values: dict[str, Any] = {
            "source": "folder",
            "root": str(root),
            "cache": str(cache),
            "val_fraction": 0.2,
        } | settings
        return load_data(Data(**values), seed=0), opened[:]

    return run


def all_pixels(data: LongTailedData) -> torch.Tensor:
    assert data.val is not None
    return torch.cat([part.images.take(torch.arange(len(part))) for part in (data.train, data.val, data.test)])


def test_the_second_time_nothing_is_decoded(load: Load, cache: Path) -> None:
    plain, _ = load(cache="none")
    assert isinstance(plain.train.images, ArrayImages)
    assert not cache.exists()
    assert not plain.remarks
    first, decoded = load()
    assert len(decoded) == 21
    assert "21 of 21 images were decoded" in first.remarks[-1]
    assert f"{cache / 'images'} (0.1 MiB)" in first.remarks[-1]
    second, decoded = load()
    assert not decoded
    assert "decoded" not in "".join(second.remarks)
    for data in (first, second):
        assert isinstance(data.train.images, CopiedImages)
        assert not data.train.images.lazy
        assert torch.equal(all_pixels(data), all_pixels(plain))
        assert data.fingerprint == plain.fingerprint
        image, copy = plain.test.images.open_with_fallback(1), data.test.images.open_with_fallback(1)
        assert image.tobytes() == copy.tobytes()
    # of another seed and tail, only the images that were not used before are decoded
    _, decoded = load(seed=5, profile="exponential", imbalance=3.0)
    assert not decoded


def test_only_new_and_changed_files_are_decoded(load: Load, photos: Path) -> None:
    load()
    save_image(photos / "cat" / "new.png", seed=50)
    save_image(photos / "dog" / "1.png", seed=51)
    data, decoded = load()
    assert sorted(decoded) == ["1.png", "new.png"]
    assert "2 of 22 images were decoded" in data.remarks[-1]
    assert torch.equal(all_pixels(data), all_pixels(load(cache="none")[0]))


def test_files_of_one_size_and_time_are_told_apart(load: Load, tmp_path: Path) -> None:
    root, then = tmp_path / "archive", 10**18
    for index in range(12):  # an archive sets the times
        path = save_image(root / ("cat" if index < 6 else "dog") / f"{index % 6}.bmp", seed=index)
        os.utime(path, ns=(then, then))
    load(root)
    for old, new in (("cat", "other"), ("dog", "cat"), ("other", "dog")):
        (root / old).rename(root / new)
    assert torch.equal(all_pixels(load(root)[0]), all_pixels(load(root, cache="none")[0]))
    assert not load(root)[1]
    path = save_image(root / "cat" / "3.bmp", seed=50)
    os.utime(path, ns=(then, then))
    assert load(root)[1] == ["3.bmp"]


def test_what_pixels_depend_on_is_part_of_the_name(
    load: Load, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    assert len(load(image_size=64)[1]) == 21
    # another folder's files may have the same names, sizes and times
    other = shutil.copytree(photos, tmp_path / "other")
    assert len(load(other)[1]) == 21
    monkeypatch.setattr(from_listing.PIL, "__version__", "99.0")  # type: ignore[attr-defined]
    assert len(load()[1]) == 21


def test_a_disk_with_little_space_keeps_nothing(load: Load, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 21 * 32 * 32 * 3
    with monkeypatch.context() as patch:
        patch.setattr(from_listing.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 2 * needed - 1))  # type: ignore[attr-defined]
        data, decoded = load()
    assert len(decoded) == 21
    assert isinstance(data.train.images, ArrayImages)
    assert "no resized copies of the images are kept: 0.1 MiB are needed" in data.remarks[-1]
    assert not cache.exists()
    load()
    with monkeypatch.context() as patch:  # copies that are there need no space
        patch.setattr(from_listing.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
        assert not load()[1]


def test_a_folder_that_cannot_be_written_keeps_nothing(load: Load, cache: Path) -> None:
    cache.touch()
    data, decoded = load()
    assert len(decoded) == 21
    assert isinstance(data.train.images, ArrayImages)
    assert "no resized copies of the images are kept" in data.remarks[-1]
    assert "cannot be written" in data.remarks[-1]


def test_a_set_that_memory_does_not_hold_is_read_from_its_copies(load: Load, photos: Path, cache: Path) -> None:
    for index, path in enumerate(sorted(photos.rglob("*.png"))):
        save_image(path, (150, 140), seed=index)
    # the published augmentation starts from full-size images
    data, _ = load(memory_gib=1e-9)
    assert data.augment == "imagenet"
    assert type(data.train.images) is FileImages
    assert not cache.exists()
    data, decoded = load(memory_gib=1e-9, augment="photo")
    assert len(decoded) == 21
    assert isinstance(data.train.images, CopiedImages)
    assert data.train.images.lazy
    again, decoded = load(memory_gib=1e-9, augment="photo")
    assert not decoded
    plain, _ = load(memory_gib=1e-9, augment="photo", cache="none")
    assert type(plain.train.images) is FileImages
    assert again.fingerprint == plain.fingerprint
    assert torch.equal(all_pixels(again), all_pixels(plain))
    # in memory the same copies are used
    assert not load()[1]


def test_of_a_large_set_an_unreadable_image_has_no_copy_and_is_left_out(load: Load, photos: Path) -> None:
    for index, path in enumerate(sorted(photos.rglob("*.png"))):
        save_image(path, (150, 140), seed=index)
    settings = {"memory_gib": 1e-9, "augment": "photo", "max_unreadable_fraction": 0.5}
    data, _ = load(cache="none", **settings)
    assert isinstance(data.train.images, FileImages)
    path = photos / data.train.images.names[3]
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    for _ in range(2):  # the second time with the copies of the others
        skipping, _ = load(**settings)
        assert isinstance(skipping.train.images, CopiedImages)
        assert [name for name, _ in skipping.unreadable] == [data.train.images.names[3]]
        assert "is damaged" in skipping.unreadable[0][1]
        assert skipping.train.ids.tolist() == [*data.train.ids[:3].tolist(), *data.train.ids[4:].tolist()]
        assert "1 of 21 images cannot be read, and are left out" in " ".join(skipping.remarks)
    with pytest.raises(LongtailError, match=r"is damaged"):
        load(**settings, unreadable="error")
    # without copies it is found when it is taken, and replaced by another of its class
    lazy, _ = load(cache="none", **settings)
    lazy.train.images.take(torch.arange(len(lazy.train)))
    assert list(lazy.train.images.unreadable) == [3]
    # a file that is repaired is used again
    path.write_bytes(whole)
    assert len(load(**settings)[0].train) == len(data.train)
    assert torch.equal(
        load(**settings)[0].train.images.take(torch.tensor([3])), data.train.images.take(torch.tensor([3]))
    )


def test_copies_are_pickled_without_their_pixels(load: Load) -> None:
    data, _ = load()
    pickled = pickle.dumps(data.train.images)
    indices = torch.tensor([3, 0, 3])
    assert len(pickled) < 5000 < len(data.train) * 32 * 32 * 3
    assert torch.equal(pickle.loads(pickled).take(indices), data.train.images.take(indices))


def test_batches_are_channels_last_as_they_are_without_copies(load: Load) -> None:
    indices = torch.tensor([3, 0, 5])
    for data in (load()[0], load(cache="none")[0], load(memory_gib=1e-9, cache="none")[0]):
        batch = data.train.images.take(indices)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        batch.zero_()  # a batch belongs to its caller
        assert data.train.images.take(indices).any()


def test_an_inspection_reads_the_files_rather_than_their_copies(
    load: Load, photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileImages, "version", lambda _images, _index: b"")  # nothing tells that a file has changed
    load()
    path = photos / "cat" / "3.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(len(whole) - 100))
    assert not load()[1]
    inspection = inspect(Data(source="folder", root=str(photos), cache=str(cache)), 0, Shots())
    assert [entry["path"] for entry in inspection.unreadable] == ["cat/3.png"]


def test_a_file_is_predicted_from_the_pixels_that_it_is_trained_on(tmp_path: Path) -> None:
    paths = [save_image(tmp_path / f"{index}.jpg", (330, 250), seed=index) for index in range(3)]
    recognizer = build_recognizer()
    files = FileImages(tmp_path, [path.name for path in paths], recognizer.config.stored_size)
    trained = recognizer.predict(files.plain(torch.arange(3), recognizer.config.image_size))
    predicted = recognizer.predict(paths).probabilities
    assert torch.equal(predicted, trained.probabilities)
    # at their full size they are slightly different images
    assert not torch.equal(predicted, recognizer.predict([open_image(path) for path in paths]).probabilities)


@pytest.mark.parametrize(
    ("kind", "reason"), [("TIFF", "has values from -5 to 0, expected 0 to 1"), ("EPS", "is not an image that Pillow")]
)
def test_an_encoded_image_is_opened_as_a_file_is(kind: str, reason: str) -> None:
    content = io.BytesIO()
    image = Image.fromarray(np.array([[0, -5]], dtype=np.float32))
    (image if kind == "TIFF" else image.convert("L")).save(content, kind)
    encoded = EncodedImages(lambda _: content.getvalue(), 1, "table", size=8)
    assert encoded.name(0) == "table, row 0"
    for read in (encoded.open, encoded.open_square):
        with pytest.raises(LongtailError, match=f"^table, row 0: {reason}"):
            read(0)
