"""Embeddings of real digits and of a folder, written, read, and fitted on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtail import LongTailClassifier, Recognizer
from longtail.config import Config, Data
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.experiments.embed import embed, load_embeddings
from longtail.training.trainer import fit
from tests.conftest import Command


def test_by_the_encoder_of_a_run(tiny: Config, tmp_path: Path) -> None:
    fit(tiny.replace(method="la", network="conv8", epochs=10), tmp_path / "run", quiet=True)
    summary = embed(tiny.data, str(tmp_path / "run"), tmp_path / "e.npz")
    arrays = load_embeddings(tmp_path / "e.npz")
    data = load_data(tiny.data, 0)
    assert summary == {"classes": 10, "train": len(data.train), "test": len(data.test), "width": 64}
    assert np.array_equal(arrays["train_labels"], data.train.labels.numpy())
    assert arrays["class_names"].tolist() == list(data.class_names)
    recognizer = Recognizer.load(tmp_path / "run")
    pixels = data.test.images.take(data.test.ids.argsort()[:5]).float() / 255
    rows = data.test.ids.argsort()[:5].numpy()
    assert np.allclose(arrays["test"][rows], recognizer.encoder(pixels).detach().numpy(), atol=1e-4)
    model = LongTailClassifier(hidden=64, random_state=0).fit(arrays["train"], arrays["train_labels"])
    assert model.score(arrays["test"], arrays["test_labels"]) > 0.6


@pytest.mark.slow
def test_by_a_timm_model(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name in ("a.npz", "b.npz"):
        summary = embed(Data(source="digits-lt"), "test_resnet", tmp_path / name, pretrained="none", seed=1)
    a, b = (load_embeddings(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert sorted(a) == ["class_names", "test", "test_labels", "train", "train_labels"]
    assert a["test"].shape == (summary["test"], summary["width"])
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_by_a_timm_model_on_the_command_line(photos: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "e.npz"
    code, shown, err = command(
        "embed", photos, "--model", "test_resnet", "--pretrained", "none", "--data.val_fraction", "0.2", "--out", out
    )
    assert code == 0, err
    assert "train" in shown
    arrays = load_embeddings(out)
    assert arrays["train"].shape[1] == arrays["val"].shape[1] > 8
    assert arrays["class_names"].tolist() == ["cat", "dog", "emu"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "resnet1"], "network 'resnet1' is not known"),
        (["--model", "test_resnet.none"], "network 'test_resnet.none': Invalid pretrained tag"),
        (["--model", "upernet:resnet18"], "network 'upernet:resnet18' is not known"),
        (["--model", "test_resnet", "--out", "e.txt"], "expected a name that ends in .npz"),
        (["--model", "test_resnet", "--pretrained", "no.pth"], "there is no such file"),
    ],
)
def test_what_cannot_be_embedded(photos: Path, command: Command, flags: list[str], message: str) -> None:
    code, _, err = command("embed", photos, *flags)
    assert (code, message in err, len(err.splitlines())) == (2, True, 1), err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "tpuu"}, "device 'tpuu': cannot be used"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"out": "folder.npz"}, "folder.npz: is a folder, expected a file"),
        ({"out": "file/e.npz"}, "file: cannot be made"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    arguments = {**change, "out": tmp_path / change.get("out", "e.npz")}
    with pytest.raises(LongtailError, match=message) as raised:
        embed(Data(source="digits-lt"), "conv8-tiny", pretrained="none", **arguments)
    assert "\n" not in str(raised.value)


def test_segmentations_have_none(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match="masks: has labels of pixels"):
        embed(Data(source="masks", root=str(scenes)), "test_resnet", tmp_path / "e.npz", pretrained="none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": np.full((3, 4), np.nan)}, "train: expected finite numbers, got some that are not"),
        ({"train": np.array([["a"] * 4] * 3)}, r"train: expected \(N, D\) numbers, got \(3, 4\) of <U1"),
        ({"train": np.float64(3)}, r"train: expected \(N, D\) numbers, got \(\) of float64"),
        ({"test": np.zeros((2, 5))}, r"test: expected \(N, 4\) numbers, got \(2, 5\)"),
        ({"test": None}, "has no array 'test'"),
        ({"train_labels": np.zeros(9, np.int64)}, "train_labels: expected one integer for each of 3 rows"),
        ({"train_labels": np.full(3, 0.5)}, "train_labels: expected one integer for each of 3 rows"),
        ({"test_labels": np.array([0, 2])}, "test_labels: expected 0 to 1, the places in class_names"),
        ({"class_names": None}, "class_names: expected one name for each class"),
        ({"class_names": np.array([object()])}, "cannot be read as embeddings"),
    ],
)
def test_files_that_are_none(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays: dict[str, Any] = {"train": np.zeros((3, 4)), "train_labels": np.zeros(3, np.int64)}
    arrays |= {"test": np.zeros((2, 4)), "test_labels": np.zeros(2, np.int64), "class_names": np.array(["a", "b"])}
    arrays |= change
    np.savez(tmp_path / "e.npz", **{name: values for name, values in arrays.items() if values is not None})
    with pytest.raises(LongtailError, match=message):
        load_embeddings(tmp_path / "e.npz")
    (tmp_path / "text.npz").write_text("none")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "e.npz").read_bytes()[:300])
    with pytest.raises(LongtailError, match=r"cut\.npz"):
        load_embeddings(tmp_path / "cut.npz")
    with pytest.raises(LongtailError, match=r"text\.npz"):
        load_embeddings(tmp_path / "text.npz")
