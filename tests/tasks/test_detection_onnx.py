"""An exported detector: prediction under the class frequencies in the file, and images that the network pads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtail.data.dataset import IMAGENET_MEAN, IMAGENET_STD
from longtail.errors import LongtailError
from longtail.inference.model_config import ModelConfig
from longtail.inference.onnx_model import ONNXModel
from longtail.nn import Encoder
from longtail.nn.detection import DetectionNetwork, build_detection_network
from longtail.tasks.detection.detector import Detector
from longtail.tasks.detection.task import DETECTION
from tests.conftest import Command, save_image

NAMES, COUNTS = ["red", "green", "blue"], [16, 8, 4]
GIVEN = {"red": 2.0, "green": 3.0, "blue": 5.0}


def write_model(path: Path, prior: Any) -> None:
    """Write a file that finds the same two objects in every image."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    arrays: dict[str, np.ndarray[Any, Any]] = {
        "boxes": np.array([[4, 4, 20, 20], [30, 30, 60, 50]], dtype=np.float32),
        "labels": np.array([2, 0], dtype=np.int64),
        "scores": np.array([0.9, 0.6], dtype=np.float32),
    }
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)) for name, array in arrays.items()
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 64, 64, 3])]
    outputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in arrays.items()
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    metadata = {
        "label_maps": False,
        "finds_objects": True,
        "class_names": NAMES,
        "class_counts": COUNTS,
        "channels": 3,
        "shape": [64, 64],
        "stored_size": 64,
        "prior": prior,
        "score_threshold": 0.05,
    }
    helper.set_model_props(model, {"longtail": json.dumps(metadata)})
    onnx.save(model, path)


def write_frequencies(path: Path, frequencies: dict[str, float]) -> Path:
    path.write_text(json.dumps(frequencies), encoding="utf-8")
    return path


def test_the_class_frequencies_in_a_file(tmp_path: Path, command: Command) -> None:
    pytest.importorskip("onnxruntime")
    image = save_image(tmp_path / "a.png", (64, 64))
    inside = write_frequencies(tmp_path / "inside.json", GIVEN)
    others = write_frequencies(tmp_path / "others.json", {**GIVEN, "red": 2.1})
    counts = write_frequencies(tmp_path / "counts.json", dict(zip(NAMES, map(float, COUNTS), strict=True)))
    given = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log().float().exp().tolist()  # as an export writes it
    cases: list[tuple[Any, list[Path | str], list[Path | str]]] = [
        (given, [inside], ["uniform", "train", others]),
        ("train", ["train", counts], ["uniform", inside]),
        ("uniform", ["uniform"], ["train", inside]),
    ]
    for prior, accepted, refused in cases:
        write_model(tmp_path / "m.onnx", prior)
        for wanted in (None, *accepted):
            flags = [] if wanted is None else ["--prior", wanted]
            code, shown, err = command("predict", tmp_path / "m.onnx", image, *flags)
            assert (code, "blue" in shown) == (0, True), err
            note = {"train": "the frequencies of training", "uniform": None}.get(str(prior), "given frequencies")
            assert note is None or f"scores under {note}" in shown
        for wanted in refused:
            code, _, err = command("predict", tmp_path / "m.onnx", image, "--prior", wanted)
            what = prior if isinstance(prior, str) else "other frequencies"
            assert (code, f"has {what} inside" in err, err.count("\n")) == (2, True, 1), err


def build_detector(side: int) -> Detector:
    torch.manual_seed(0)
    name = "fasterrcnn:test_efficientnet:32"
    encoder = Encoder(name, IMAGENET_MEAN, IMAGENET_STD, build=build_detection_network)
    assert isinstance(encoder.backbone, DetectionNetwork)
    encoder.backbone.set_image_size(side)
    config = ModelConfig(
        class_names=tuple(NAMES),
        class_counts=tuple(COUNTS),
        network=name,
        task="detection",
        scale=1.0,
        head="regions",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=side,
        stored_size=side,
        predicts_under="uniform",
    )
    return Detector(encoder, Detector.build_classifier(config, encoder), config)


@pytest.mark.slow
def test_an_export_of_a_size_that_is_padded(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    side = 80
    detector = build_detector(side)
    with torch.no_grad():  # an untrained class layer finds nothing with certainty
        detector.class_layer.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    images = [save_image(tmp_path / f"{seed}.png", (side, side), seed) for seed in range(3)]
    exported = DETECTION.export(detector, tmp_path / "m.onnx", "uniform", images, "none")
    assert exported.difference < 1e-3


def test_a_torch_that_cannot_convert_the_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.onnx.OnnxExporterError("Failed to convert")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(LongtailError, match=r"^export: torch .* cannot convert this model: Failed to convert; use a"):
        DETECTION.export(build_detector(64), tmp_path / "m.onnx", "uniform", [], "none")
    assert not (tmp_path / "m.onnx").exists()


def test_a_detector_does_not_classify(tmp_path: Path) -> None:
    write_model(tmp_path / "m.onnx", "uniform")
    model = ONNXModel(tmp_path / "m.onnx")
    for predict in (model.predict, lambda image: next(model.predict_batches([image]))):
        with pytest.raises(LongtailError, match="predict: this model finds objects; use find"):
            predict(np.zeros((40, 60, 3), np.uint8))


def test_a_batch_has_an_image() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    for batch_size in (0, -1):
        with pytest.raises(LongtailError, match=f"batch_size: expected at least 1, got {batch_size}"):
            next(build_detector(64).find([image], batch_size=batch_size))
