"""ONNX files against PyTorch, on real networks."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from longtail import Recognizer, Segmenter
from longtail.config import Config
from longtail.errors import LongtailError
from longtail.experiments.compare import compare
from longtail.experiments.embed import embed
from longtail.experiments.evaluate import evaluate
from longtail.experiments.rebalance import RebalanceSettings, rebalance
from longtail.inference.export import export_onnx
from longtail.inference.onnx_model import ONNXModel
from longtail.tasks.loading import load_model
from longtail.training.trainer import fit
from tests.conftest import Command
from tests.inference.test_recognizer import build_recognizer


def metadata(session: onnxruntime.InferenceSession) -> dict[str, object]:
    values: dict[str, object] = json.loads(session.get_modelmeta().custom_metadata_map["longtail"])
    return values


@pytest.mark.parametrize(
    ("method", "prior"),
    [
        ("ce", "train"),
        ("gml", "uniform"),
        pytest.param("ce", "uniform", marks=pytest.mark.slow),
        pytest.param("gml", "train", marks=pytest.mark.slow),
    ],
)
def test_a_recogniser(tiny: Config, tmp_path: Path, method: str, prior: str) -> None:
    fit(tiny.replace(method=method), tmp_path / "run", quiet=True)
    exported = export_onnx(load_model(tmp_path / "run"), tmp_path / "m.onnx", prior)
    assert exported.difference < 1e-4
    assert exported.shape == (8, 8, 1)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    (got,) = session.run(None, {"images": images})
    expected = Recognizer.load(tmp_path / "run").predict(torch.from_numpy(images).permute(0, 3, 1, 2), prior)
    assert np.abs(got - expected.probabilities.numpy()).max() < 1e-4
    values = metadata(session)
    assert values["class_names"] == [str(digit) for digit in range(10)]
    assert (values["prior"], values["task"], values["shape"]) == (prior, "classification", [8, 8])


@pytest.mark.slow
def test_other_frequencies_than_those_of_a_file_without_some_class(tmp_path: Path) -> None:
    recognizer = build_recognizer()
    recognizer.config = dataclasses.replace(recognizer.config, class_counts=(5, 3, 0))
    export_onnx(recognizer, tmp_path / "m.onnx", "train")
    model = ONNXModel(tmp_path / "m.onnx")
    probabilities = np.array([[0.75, 0.25, 0.0]])
    changed = model.change_prior(probabilities, "uniform")
    # 0.75 / 5 to 0.25 / 3; the file says nothing about c
    np.testing.assert_allclose(changed, [[9 / 14, 5 / 14, 0.0]], rtol=1e-4)
    model.prior = "uniform"
    # in single precision nothing is left of a and b
    np.testing.assert_allclose(model.change_prior(np.array([[0, 0, 1.0]]), "train"), [[5 / 8, 3 / 8, 0.0]], rtol=1e-4)


def test_images_of_every_kind_and_options_of_the_session(tmp_path: Path) -> None:
    export_onnx(build_recognizer(), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = ONNXModel(tmp_path / "m.onnx", ["CPUExecutionProvider"], options)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    expected = ONNXModel(tmp_path / "m.onnx").predict([Image.fromarray(each) for each in pixels])
    for images in (pixels, list(pixels), [tmp_path / "a.png", pixels[1]]):
        np.testing.assert_array_equal(model.predict(images), expected)
    for image in (str(tmp_path / "a.png"), tmp_path / "a.png", pixels[0], Image.fromarray(pixels[0])):
        np.testing.assert_array_equal(model.predict(image), expected[:1])
    assert model.predict(pixels[0, :, :, 0]).shape == model.predict(pixels[0, :, :, :1]).shape == (1, 3)
    for batch_size in (0, -1):
        with pytest.raises(LongtailError, match=f"batch_size: expected at least 1, got {batch_size}"):
            model.predict(pixels, batch_size)
    for wrong in (pixels[0].astype(float), pixels[0, 0, 0], [3], [None]):
        with pytest.raises(LongtailError, match=r"^image: expected a file, a Pillow image or an array of uint8"):
            model.predict(wrong)  # type: ignore[arg-type]
    with pytest.raises(LongtailError, match=r"^providers: Cpu is not available, expected some of .*CPUExecution"):
        ONNXModel(tmp_path / "m.onnx", ["Cpu"])


@pytest.mark.slow
def test_names_of_classes_that_are_not_utf8(tmp_path: Path) -> None:
    recognizer, names = build_recognizer(), (os.fsdecode(b"caf\xe9"), "h\u00f4tel", "bar")
    recognizer.config = dataclasses.replace(recognizer.config, class_names=names)
    export_onnx(recognizer, tmp_path / "m.onnx")
    assert ONNXModel(tmp_path / "m.onnx").class_names == list(names)


@pytest.mark.slow
def test_a_mixture_ensemble(tiny: Config, tmp_path: Path) -> None:
    fit(tiny.replace(gml={"ensemble_weight": 0.5}), tmp_path / "run", quiet=True)
    assert export_onnx(load_model(tmp_path / "run"), tmp_path / "m.onnx").difference < 1e-4


@pytest.mark.slow
def test_a_segmenter(segmenting: Config, scenes: Path, tmp_path: Path, command: Command) -> None:
    fit(segmenting.replace(method="ce"), tmp_path / "run", quiet=True)
    test = scenes / "images" / "test"
    code, shown, _ = command("export", tmp_path / "run", test)
    assert code == 0
    assert "(N, 50, 66, 3) uint8" in shown
    session = onnxruntime.InferenceSession(tmp_path / "run" / "model.onnx")
    pixels = np.stack([np.array(Image.open(test / f"{number:02}.png")) for number in range(3)])
    (got,) = session.run(None, {"images": pixels})
    assert got.shape == (3, 3, 50, 66)
    expected = torch.stack(list(Segmenter.load(tmp_path / "run").segment([test / f"{n:02}.png" for n in range(3)])))
    assert (got.argmax(axis=1) == expected.numpy()).mean() > 0.999
    # as the run does, also for other frequencies and an image of another size
    Image.open(test / "00.png").resize((132, 100)).save(tmp_path / "large.png")
    for number, flags in enumerate((["--prior", "uniform"], ["--prior", "train"])):
        tables = []
        for name, model in (("run", tmp_path / "run"), ("file", tmp_path / "run" / "model.onnx")):
            out, table = tmp_path / f"{name}{number}", tmp_path / f"{name}{number}.json"
            assert command("predict", model, test, *flags, "--out", out, "--json", table)[0] == 0
            tables.append(json.loads(table.read_text()))
        for a, b in zip(*tables, strict=True):
            assert a["shares"] == pytest.approx(b["shares"], abs=2e-3)
            labels = [np.array(Image.open(each["labels"])) for each in (a, b)]
            assert (labels[0] == labels[1]).mean() > 0.998
    code, shown, _ = command(
        "predict", tmp_path / "run" / "model.onnx", tmp_path / "large.png", "--out", tmp_path / "l"
    )
    assert code == 0
    assert np.array(Image.open(tmp_path / "l" / "large.png")).shape == (100, 132)
    code, _, err = command("export", tmp_path / "run")
    assert (code, "exists already; use --overwrite" in err) == (2, True)
    code, _, err = command("export", tmp_path / "run", "--out", tmp_path / "x.pt")
    assert (code, "expected a name that ends in .onnx" in err) == (2, True)


def test_a_file_that_is_not_the_model_is_not_written(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    fit(tiny.replace(method="la"), tmp_path / "run", quiet=True)
    monkeypatch.setattr("longtail.inference.export.PARITY", 0.0)
    code, _, err = command("export", tmp_path / "run")
    assert code == 2
    assert "nothing was written" in err
    assert not (tmp_path / "run" / "model.onnx").exists()


def test_predictions_of_a_file_have_the_prior_that_it_was_exported_with(
    tiny: Config, photos: Path, tmp_path: Path, command: Command
) -> None:
    fit(tiny.replace(method="la"), tmp_path / "run", quiet=True)
    for prior in ("train", "uniform"):
        assert command("export", tmp_path / "run", "--prior", prior, "--out", tmp_path / f"{prior}.onnx")[0] == 0
    image = photos / "cat" / "0.png"
    _, inside, _ = command("predict", tmp_path / "train.onnx", image)
    assert "probabilities under the frequencies of training, as the file was exported" in inside
    _, same, _ = command("predict", tmp_path / "train.onnx", image, "--prior", "train")
    assert inside.splitlines()[:3] == same.splitlines()[:3]
    _, uniform, _ = command("predict", tmp_path / "train.onnx", image, "--prior", "uniform")
    _, exported, _ = command("predict", tmp_path / "uniform.onnx", image)
    assert uniform.splitlines()[:3] == exported.splitlines()[:3]
    assert uniform.splitlines()[2] != same.splitlines()[2]


def test_a_torch_that_cannot_convert_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        try:
            raise AttributeError("'OpOverload' object\nhas no attribute 'x'")
        except AttributeError as cause:
            raise torch.onnx.OnnxExporterError("Failed to convert.\n\nNext steps:\n- Report it") from cause

    build_recognizer().save(tmp_path / "saved")
    monkeypatch.setattr(torch.onnx, "export", fail)
    code, _, err = command("export", tmp_path / "saved", "--out", tmp_path / "m.onnx")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"longtail: error: export: torch {torch.__version__} with onnxscript ")
    assert "cannot convert this model: 'OpOverload' object has no attribute 'x'; use a later torch" in err
    assert not (tmp_path / "m.onnx").exists()


def test_folders_and_files_given_as_text(tiny: Config, tmp_path: Path) -> None:
    run, config = str(tmp_path / "run"), tiny.replace(method="la", epochs=1)
    fit(config, run, quiet=True)
    assert evaluate(run)["prior"] == "uniform"
    assert embed(config.data, run, str(tmp_path / "e.npz"))["classes"] == 10
    assert export_onnx(Recognizer.load(run), str(tmp_path / "m.onnx")).path == tmp_path / "m.onnx"
    assert set(rebalance(run, str(tmp_path / "new"), RebalanceSettings(method="tau"))) == {"uniform", "train"}
    assert len(compare(config, ["la"], [0], str(tmp_path / "compared"), quiet=True)) == 1
