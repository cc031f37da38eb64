"""Corrected detectors are saved in the format that they came in, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import detection

import longtail
from longtail.detector_calibration.heads import find_class_head
from longtail.detector_calibration.storage import load_detector, quiet, write_folder
from longtail.errors import LongtailError
from tests.detector_calibration.models import spread, transformers_model
from tests.detector_calibration.test_heads import COUNTS, VARIANTS, pixels, same_bits


@pytest.mark.parametrize("kind", VARIANTS)
def test_transformers(kind: str, tmp_path: Path) -> None:
    name, options = VARIANTS[kind]
    model = spread(transformers_model(name, **options))
    with quiet():
        model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("card")
    stored = load_detector(str(tmp_path / "model"))
    assert same_bits(stored.model, model)
    corrected = longtail.calibrate_detector(stored.model, COUNTS, power=0.5)
    write_folder(tmp_path / "out", lambda folder: stored.save(corrected, folder), {"power": 0.5}, overwrite=False)
    again = load_detector(str(tmp_path / "out")).model
    assert type(again) is type(model)
    assert same_bits(again, corrected)
    assert (tmp_path / "out" / "README.md").read_text() == "card"
    with torch.no_grad():
        assert torch.equal(again(pixel_values=pixels()).logits, corrected(pixel_values=pixels()).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "maskrcnn_resnet50_fpn",
        "keypointrcnn_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "ssd300_vgg16",
        "ssdlite320_mobilenet_v3_large",
    ],
)
def test_torchvision_finds_the_number_of_classes(name: str, tmp_path: Path) -> None:
    classes = 7
    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=classes)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    stored = load_detector(f"torchvision:{name}", tmp_path / "checkpoint.pth")
    assert find_class_head(stored.model).num_outputs == classes
    assert same_bits(stored.model, model)
    stored.save(stored.model, tmp_path)
    again = load_detector(f"torchvision:{name}", tmp_path / "checkpoint.pth", classes)
    assert same_bits(again.model, model)


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(LongtailError, match="No space left on device"):
        write_folder(out, fail, {}, overwrite=False)
    assert list(tmp_path.iterdir()) == []
    write_folder(out, lambda folder: None, {"power": 1}, overwrite=False)
    with pytest.raises(LongtailError, match="No space left on device"):
        write_folder(out, fail, {}, overwrite=True)
    assert json.loads((out / "calibration.json").read_text()) == {"power": 1}
    assert [path.name for path in out.iterdir()] == ["calibration.json"]


def test_an_earlier_result_stays_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_folder(out, lambda folder: None, {"power": 1}, overwrite=False)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(LongtailError, match="Input/output error"):
        write_folder(out, lambda folder: None, {"power": 2}, overwrite=True)
    assert json.loads((out / "calibration.json").read_text()) == {"power": 1}
    assert list(tmp_path.iterdir()) == [out]


def test_other_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match="contains no model"):
        load_detector(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LongtailError, match=r"config\.json: cannot be read as JSON"):
        load_detector(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "detr", "architectures": ["DetrForObjectDetection"]}')
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(LongtailError, match="cannot be read as a detector of transformers"):
        load_detector(str(tmp_path))


def test_weights_that_lack_a_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with quiet():
        transformers_model("Yolos").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["class_labels_classifier.layers.2.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LongtailError, match=r"class_labels_classifier\.layers\.2\.bias is missing or another"):
        load_detector(str(tmp_path))


def test_classifiers_are_not_detectors(tmp_path: Path) -> None:
    import importlib

    transformers: Any = importlib.import_module("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic")
    with quiet():
        transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(LongtailError, match="ResNetForImageClassification is not a detector"):
        load_detector(str(tmp_path))
