from __future__ import annotations

import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from longtail.config import Data, Shots
from longtail.data.dataset import LongTailedData
from longtail.data.image_io import open_image
from longtail.data.images import FileImages, to_square
from longtail.data.sources import Source, is_balanced, load_data
from longtail.errors import LongtailError
from longtail.registry import SOURCES
from tests.conftest import save_image


def test_digits() -> None:
    data = load_data(Data(source="digits-lt", imbalance=50, class_order="random"), seed=3)
    assert max(data.class_counts) / min(data.class_counts) > 40
    assert data.class_names == tuple("0123456789")
    assert torch.bincount(data.test.labels).tolist() == [50] * 10
    assert not set(data.train.ids.tolist()) & set(data.test.ids.tolist())
    again, other = (load_data(Data(source="digits-lt", imbalance=50, class_order="random"), seed=s) for s in (3, 4))
    assert torch.equal(again.train.ids, data.train.ids)
    # another seed makes another digit the head
    heads = [counts.index(max(counts)) for counts in (data.class_counts, other.class_counts)]
    assert heads[0] != heads[1]


def test_digits_labels_follow_the_names() -> None:
    from sklearn.datasets import load_digits

    truth = load_digits().target
    data = load_data(Data(source="digits-lt", imbalance=10, class_order="random"), seed=1)
    for part in (data.train, data.test):
        named = [int(data.class_names[label]) for label in part.labels.tolist()]
        assert named == truth[part.ids.numpy()].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "digitslt"}, "perhaps you meant digits-lt"),
        ({"source": "digits-lt", "imbalance": 5000.0}, "leaves the smallest class without an image"),
        ({"source": "digits-lt", "test_per_class": 500}, "expected less than"),
        ({"source": "folder"}, "data.root is missing"),
        ({"source": "cifar100-lt", "root": "/nowhere"}, "there is no such folder"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        load_data(Data(**settings), seed=0)  # type: ignore[arg-type]


def test_cifar_from_parquet(cifar_folder: Path) -> None:
    data = load_data(Data(source="cifar100-lt", root=str(cifar_folder), imbalance=100), seed=0)
    assert len(data.train) == 10_847
    assert min(data.class_counts) == 5
    assert len(data.test) == 10_000
    assert data.class_names[0] == "apple"
    assert data.train.images.take(torch.tensor([0, 5])).shape == (2, 3, 32, 32)


@pytest.fixture
def cifar10_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's own layout, at a hundredth of its size; torchvision is given these files' digests."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, object]) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch() -> dict[str, object]:
        return {"data": rng.integers(0, 256, (100, 3072), dtype=np.uint8), "labels": list(range(10)) * 10}

    kind = torchvision.datasets.CIFAR10
    train = [[f"data_batch_{n}", write(f"data_batch_{n}", batch())] for n in range(1, 6)]
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", [["test_batch", write("test_batch", batch())]])
    digest = write("batches.meta", {"label_names": [f"name {n}" for n in range(10)]})
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": digest})
    return tmp_path


def test_cifar_from_torchvisions_layout(cifar10_layout: Path) -> None:
    data = load_data(Data(source="cifar10-lt", root=str(cifar10_layout), imbalance=10), seed=0)
    assert data.class_counts == [50, 38, 29, 23, 17, 13, 10, 8, 6, 5]
    assert data.class_names[3] == "name 3"
    assert data.test.images.take(torch.tensor([0])).shape == (1, 3, 32, 32)
    (cifar10_layout / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"broken")
    with pytest.raises(LongtailError, match="unbroken cifar-10-batches-py"):
        load_data(Data(source="cifar10-lt", root=str(cifar10_layout)), seed=0)


def test_a_download_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("LONGTAIL_CACHE", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    with pytest.raises(LongtailError, match=r"could not be downloaded \(no route to host\).*--data.root"):
        load_data(Data(source="cifar100-lt"), seed=0)


def folder(root: Path, **settings: object) -> LongTailedData:
    return load_data(Data(source="folder", root=str(root), **settings), seed=0)  # type: ignore[arg-type]


def test_folder_holds_out_a_test_split(photos: Path) -> None:
    data = folder(photos)
    assert data.class_names == ("cat", "dog", "emu")
    assert data.class_counts == [10, 5, 2]
    assert torch.bincount(data.test.labels).tolist() == [2, 1, 1]
    assert not set(data.train.ids.tolist()) & set(data.test.ids.tolist())
    assert data.image_size == 32
    # a new file does not rename the others
    save_image(photos / "cat" / "00.png", seed=9)
    assert set(data.train.ids.tolist()) | set(data.test.ids.tolist()) <= {
        *folder(photos).train.ids.tolist(),
        *folder(photos).test.ids.tolist(),
    }


def test_folder_with_splits(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    for split in ("train", "val", "test"):
        (root / split).parent.mkdir(exist_ok=True)
        (root / split).symlink_to(photos)
    data = folder(root)
    assert data.class_counts == [12, 6, 3]
    assert data.val is not None
    assert len(data.test) == len(data.val) == 21
    (root / "test").unlink()
    data = folder(root)
    assert data.val is None
    assert len(data.test) == 21


def test_a_folder_too_large_for_memory_is_decoded_on_demand(photos: Path) -> None:
    held, lazy = folder(photos), folder(photos, memory_gib=1e-9, cache="none")
    assert isinstance(lazy.train.images, FileImages)
    indices = torch.tensor([4, 0, 11])
    assert torch.equal(held.train.images.take(indices), lazy.train.images.take(indices))


def test_folders_that_cannot_be_used(photos: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(LongtailError, match="expected a sub-folder with images for each class, found no images"):
        folder(empty)
    (empty / "only").mkdir()
    with pytest.raises(LongtailError, match="class 'only' has no images"):
        folder(empty)
    save_image(empty / "only" / "a.png")
    with pytest.raises(LongtailError, match="at least two classes"):
        folder(empty)
    save_image(photos / "fox" / "a.png")
    with pytest.raises(LongtailError, match=r"class 'fox' has 1 image .*at least 2"):
        folder(photos)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"hello", "notes.txt: is not an image by its name"),
        ("bad.jpg", b"", "bad.jpg: is empty"),
        ("bad.jpg", b"hello", "bad.jpg: is not an image that Pillow can read"),
        ("bad.png", None, "bad.png: is damaged"),
    ],
)
@pytest.mark.parametrize("memory", [4.0, 1e-9])
@pytest.mark.parametrize("cache", ["auto", "none"])
def test_a_bad_file_is_named(
    photos: Path, name: str, content: bytes | None, message: str, memory: float, cache: str
) -> None:
    whole = (photos / "cat" / "0.png").read_bytes()
    (photos / "cat" / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    if content is None and memory < 1 and cache == "none":
        # a damage that only decoding shows is reported when the image is taken
        data = folder(photos, memory_gib=memory, cache=cache)
        part = data.train if f"cat/{name}" in data.train.images.names else data.test  # type: ignore[attr-defined]
        with pytest.raises(LongtailError, match=message):
            part.images.take(torch.arange(len(part)))
    else:
        with pytest.raises(LongtailError, match=message):
            folder(photos, memory_gib=memory, cache=cache)


def test_a_test_class_that_was_not_trained_is_named(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    root.mkdir()
    (root / "train").symlink_to(photos)
    save_image(root / "test" / "catt" / "a.png")
    with pytest.raises(LongtailError, match="class 'catt' is not among the training classes; perhaps you meant cat"):
        folder(root)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_colour(tmp_path: Path, mode: str) -> None:
    path = save_image(tmp_path / ("x.tiff" if mode == "CMYK" else "x.png"), (40, 20), mode=mode)
    assert to_square(open_image(path), 32).shape == (3, 32, 32)
    assert to_square(open_image(path), 32, channels=1).shape == (1, 32, 32)


def test_sixteen_bits_keep_their_grey(tmp_path: Path) -> None:
    Image.fromarray(np.full((9, 9), 128 * 257, dtype=np.uint16)).save(tmp_path / "x.png")
    assert to_square(open_image(tmp_path / "x.png"), 9).unique().tolist() == [128]
    halves = Image.fromarray(np.full((9, 9), 0.5, dtype=np.float32))
    assert to_square(halves, 9).unique().tolist() == [128]


def test_transparent_pixels_are_white() -> None:
    assert to_square(Image.new("RGBA", (9, 9), (10, 20, 30, 0)), 9).unique().tolist() == [255]


def test_an_empty_split_is_none(tmp_path: Path) -> None:
    for name in ("cat", "dog", "emu"):
        for number in range(2):
            save_image(tmp_path / "two" / name / f"{number}.png", seed=number)
            save_image(tmp_path / "split" / "train" / name / f"{number}.png", seed=number)
        save_image(tmp_path / "split" / "test" / name / "0.png").write_bytes(b"none")
    data = load_data(Data(source="folder", root=str(tmp_path / "two"), val_fraction=0.2), 0)
    assert data.val is None
    assert any(remark.startswith("there is no validation image") for remark in data.remarks)
    settings = Data(source="folder", root=str(tmp_path / "split"), max_unreadable_fraction=0.5)
    with pytest.raises(LongtailError, match="there is no test image, or none that can be read"):
        load_data(settings, 0)


def test_a_set_with_a_test_split_holds_validation_images_out_of_its_training_images(
    photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "split" / "train")
    for index, name in enumerate(("cat", "dog", "emu")):
        save_image(tmp_path / "split" / "test" / name / "0.png", seed=900 + index)
    save_image(tmp_path / "split" / "train" / "fox" / "0.png", seed=990)
    save_image(tmp_path / "split" / "test" / "fox" / "0.png", seed=991)
    for source in ("folder", "hub"):
        config = Data(source=source, root=str(tmp_path / "split"), val_fraction=0.25)
        data = load_data(config, seed=0)
        assert data.val is not None
        assert torch.bincount(data.val.labels, minlength=4).tolist() == [3, 2, 1, 0]
        assert data.class_counts == [9, 4, 2, 1]  # a class of one image keeps it
        assert len(data.test) == 4
        assert load_data(Data(source=source, root=str(tmp_path / "split")), seed=0).val is None


def test_sources_are_registered_by_place() -> None:
    for name in SOURCES:
        source = SOURCES[name]
        assert isinstance(source, Source)
        assert is_balanced(name) == (name in {"digits-lt", "cifar10-lt", "cifar100-lt"})
    with pytest.raises(TypeError):
        Source()


def test_groups_follow_the_thresholds() -> None:
    data = load_data(Data(source="digits-lt", imbalance=50), seed=0)
    shots = Shots(many_above=50, few_below=20)
    assert data.groups(shots) == shots.groups(data.class_counts)
    assert set(data.groups(shots)) == set(data.group_names)
    assert (data.task, data.counted) == ("classification", "training images")
