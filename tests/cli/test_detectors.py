"""longtail calibrate-detector on models of torchvision and transformers and on result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import longtail
from longtail.detector_calibration.storage import load_detector, quiet, read_state_dict
from tests.conftest import Command
from tests.data.detection.drawn import drawn_images, write_voc_layout
from tests.detector_calibration.models import CLASSES, spread, transformers_model

COUNTS = (40, 12, 5, 2, 1)
NAME = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"


def write_annotations(root: Path, name: str, images: int, counts: tuple[int, ...], offset: int = 0) -> Path:
    """Write random images with a box for each class in as many of them as ``counts`` says."""
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(offset)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": label + 1, "name": f"class {label}"} for label in range(CLASSES)],
    }
    for number in range(images):
        file = f"{name}-{number}.png"
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / file)
        content["images"].append({"id": number + 1, "file_name": file, "height": 64, "width": 64})
        content["annotations"] += [
            {
                "id": 10 * number + label + 1,
                "image_id": number + 1,
                "category_id": label + 1,
                "bbox": [8.0 * label, 4.0, 24.0, 24.0],
                "area": 576.0,
                "iscrowd": 0,
            }
            for label, count in enumerate(counts)
            if number < count
        ]
    path = root / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_annotations(tmp_path / "images", "train", 40, COUNTS)


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    return write_annotations(tmp_path / "images", "val", 2, (2, 2, 2, 2, 2), offset=1)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(spread(build(CLASSES + 1)).state_dict(), path)
    return path


@pytest.fixture
def detr(tmp_path: Path) -> Path:
    import transformers

    folder = tmp_path / "detr"
    with quiet():  # its progress bar
        spread(transformers_model("Detr")).save_pretrained(folder)
    transformers.DetrImageProcessor(size={"height": 64, "width": 64}, do_pad=False).save_pretrained(folder)
    return folder


def build(classes: int) -> Any:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    return fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=classes).eval()


def test_torchvision_with_a_power(command: Command, tmp_path: Path, train: Path, weights: Path) -> None:
    out = tmp_path / "out"
    code, printed, errors = command(
        *("calibrate-detector", NAME, "--weights", weights, "--annotations", train, "--power", "0.5", "--out", out),
        *("--json", tmp_path / "record.json"),
    )
    assert (code, errors) == (0, "")
    assert "5 categories matched label = category id" in printed
    note = json.loads((out / "calibration.json").read_text())
    assert note == json.loads((tmp_path / "record.json").read_text())
    assert note["power"] == 0.5
    assert note["layers"] == ["roi_heads.box_predictor.cls_score"]
    assert note["class_counts"]["class 0"] == 40
    model = build(CLASSES + 1)
    model.load_state_dict(read_state_dict(weights))
    expected = longtail.calibrate_detector(model, COUNTS, power=0.5).state_dict()
    got = torch.load(out / "weights.pth", weights_only=True)
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, got[name])]
    assert changed == ["roi_heads.box_predictor.cls_score.bias"]


def test_power_0_saves_the_same_weights(command: Command, tmp_path: Path, train: Path, weights: Path) -> None:
    safe = tmp_path / "model.safetensors"
    save_file(read_state_dict(weights), safe)
    code, printed, _ = command(
        *("calibrate-detector", NAME, "--weights", safe, "--classes", CLASSES + 1, "--annotations", train),
        *("--power", "0", "--out", tmp_path / "out", "--quiet"),
    )
    assert (code, printed) == (0, "")
    before, after = load_file(safe), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)


def test_transformers_with_validation(
    command: Command, tmp_path: Path, train: Path, validation: Path, detr: Path
) -> None:
    out = tmp_path / "out"
    arguments = [
        *("calibrate-detector", detr, "--annotations", train, "--validation", validation),
        *("--images", train.parent, "--out", out),
    ]
    code, printed, errors = command(*arguments)
    assert (code, errors) == (0, "")
    note = json.loads((out / "calibration.json").read_text())
    assert note["class_order"] == "name"
    assert note["layers"] == ["class_labels_classifier"]
    assert list(note["search"]) == [f"{step / 10:g}" for step in range(11)]
    assert note["search"]["0"] == pytest.approx(note["before"], abs=1e-6)
    assert note["search"][f"{note['power']:g}"]["ap"] == pytest.approx(note["after"]["ap"], abs=0.1)
    assert "corrected" in printed
    again = load_detector(str(out))
    assert again.processor is not None
    original = load_detector(str(detr))
    expected = longtail.calibrate_detector(original.model, COUNTS, power=note["power"]).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    # another time
    code, _, errors = command(*arguments)
    assert code == 2
    assert "exists already; use --overwrite" in errors
    assert command(*arguments, "--power", "0", "--overwrite", "--quiet")[0] == 0
    assert json.loads((out / "calibration.json").read_text())["power"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detr", "images", "out"]


def test_logn(command: Command, tmp_path: Path, train: Path, detr: Path) -> None:
    out = tmp_path / "out"
    code, _, errors = command(
        *("calibrate-detector", detr, "--annotations", train, "--images", train.parent, "--method", "logn"),
        *("--statistics_images", "3", "--out", out),
    )
    assert (code, errors) == (0, "")
    note = json.loads((out / "calibration.json").read_text())
    assert note["method"] == "logn"
    assert note["proposals"] == 3 * 12
    before, after = (load_detector(str(folder)).model.class_labels_classifier for folder in (detr, out))
    assert torch.equal(before.weight[-1], after.weight[-1])
    assert torch.equal(before.bias[-1], after.bias[-1])
    assert not torch.equal(before.weight[:-1], after.weight[:-1])


def test_logn_leaves_outputs_without_a_category(command: Command, tmp_path: Path, train: Path) -> None:
    """As torchvision's labels of COCO that are no category."""
    model, weights, out = spread(build(CLASSES + 3)), tmp_path / "wide.pth", tmp_path / "out"
    layer = model.roi_heads.box_predictor.cls_score
    with torch.no_grad():
        layer.bias[-2:] = -50
    torch.save(model.state_dict(), weights)
    code, printed, errors = command(
        *("calibrate-detector", NAME, "--weights", weights, "--classes", CLASSES + 3, "--annotations", train),
        *("--images", train.parent, "--method", "logn", "--statistics_images", "2", "--out", out),
    )
    assert (code, errors) == (0, "")
    assert "2 outputs have no category" in printed
    after = torch.load(out / "wide.pth", weights_only=True)
    unchanged = [0, CLASSES + 1, CLASSES + 2]
    for name, before in (("weight", layer.weight), ("bias", layer.bias)):
        assert torch.equal(after[f"roi_heads.box_predictor.cls_score.{name}"][unchanged], before[unchanged])
        assert not torch.equal(after[f"roi_heads.box_predictor.cls_score.{name}"][1], before[1])


def test_a_result_file(command: Command, tmp_path: Path, train: Path, validation: Path) -> None:
    results = tmp_path / "results.json"
    rng = np.random.default_rng(0)
    entries: list[dict[str, Any]] = [
        {
            "image_id": image,
            "category_id": label + 1,
            "bbox": [8.0 * label + float(rng.normal()), 4.0, 24.0, 24.0],
            "score": float(rng.uniform(0.1, 1)),
            "extra": "kept",
        }
        for image in (1, 2)
        for label in range(CLASSES)
    ]
    results.write_text(json.dumps(entries))
    out = tmp_path / "out"
    code, printed, errors = command(
        "calibrate-detector", results, "--annotations", train, "--power", "0.5", "--out", out
    )
    assert (code, errors) == (0, "")
    assert "no renormalisation over classes" in printed
    got = json.loads((out / "results.json").read_text())
    for before, after in zip(entries, got, strict=True):
        assert after["extra"] == "kept"
        count = COUNTS[before["category_id"] - 1]
        assert after["score"] == pytest.approx(before["score"] / count**0.5)
    assert (
        command(*("calibrate-detector", results, "--annotations", train, "--power", "0", "--out", out, "--overwrite"))[
            0
        ]
        == 0
    )
    assert json.loads((out / "results.json").read_text()) == entries
    code, printed, errors = command(
        *("calibrate-detector", results, "--annotations", train, "--validation", validation, "--out", out),
        "--overwrite",
    )
    assert (code, errors) == (0, "")
    assert "search" in json.loads((out / "calibration.json").read_text())
    # ids of another program, beside the names of the classes
    ids = {label: 70 + label for label in range(CLASSES)}
    for entry in entries:
        label = entry["category_id"] - 1
        entry |= {"category_id": ids[label], "category_name": f"class {label}"}
    results.write_text(json.dumps(entries))
    assert (
        command(
            *("calibrate-detector", results, "--annotations", train, "--power", "0.5", "--out", out, "--overwrite")
        )[0]
        == 0
    )
    again = json.loads((out / "results.json").read_text())
    assert [entry["score"] for entry in again] == [entry["score"] for entry in got]
    assert again[0]["category_id"] == 70
    del entries[0]["category_name"]
    entries[0]["category_id"] = 77
    results.write_text(json.dumps(entries))
    code, _, errors = command(
        "calibrate-detector", results, "--annotations", train, "--power", "0.5", "--out", tmp_path / "other"
    )
    assert code == 2
    assert "entry 0: category_id 77 is not among the annotations' categories" in errors


def test_annotations_in_a_folder(command: Command, tmp_path: Path) -> None:
    """The counts are those of its training images, and the power is chosen on its validation images."""
    images = drawn_images(8)
    root, out = write_voc_layout(tmp_path / "set", {"train": images, "val": images[:3]}), tmp_path / "out"
    results = tmp_path / "results.json"
    entries = [
        {"image_id": f"val{image:03}", "category_id": label, "bbox": [5, 5, 9, 9], "score": 0.5}
        for image in range(3)
        for label in (1, 2, 3)
    ]
    results.write_text(json.dumps(entries))
    code, _, errors = command(
        "calibrate-detector", results, "--annotations", root, "--validation", root, "--power", "1", "--out", out
    )
    assert (code, errors) == (0, "")
    note = json.loads((out / "calibration.json").read_text())
    assert note["class_counts"] == {"blue": 2, "green": 4, "red": 8}
    assert list(note["search"]) == ["0", "1"]
    scaled = json.loads((out / "results.json").read_text())
    assert [entry["score"] for entry in scaled[:3]] == pytest.approx([0.5, 0.25, 0.125])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL"], "--power auto: needs --validation and --images"),
        (["MODEL", "--power", "-1"], "--power -1: expected auto or a number"),
        (["MODEL", "--power", "much"], "--power much: expected auto or a number"),
        (["MODEL", "--method", "logn"], "--method logn: needs --images"),
        (["MODEL", "--method", "logn", "--images", "IMAGES", "--power", "1"], "--power: is for --method norcal"),
        (["MODEL", "--power", "1", "--validation", "TRAIN"], "--validation: needs --images"),
        (["MODEL", "--power", "1", "--images", "nowhere"], "--images nowhere: there is no such folder"),
        (["nowhere", "--power", "1"], "nowhere: there is no such folder; expected the folder of a model"),
        (["nowhere", "--power", "1", "--classes", "3"], "are for torchvision:NAME"),
        (["torchvision:fasterrcn", "--power", "1"], "no such detector of torchvision"),
        ([NAME, "--power", "1"], "expected its weights, --weights FILE"),
        ([NAME, "--power", "1", "--weights", "PICKLE"], "without running code from it"),
        ([NAME, "--power", "1", "--weights", "nothing.pth"], "nothing.pth: cannot be read: No such file"),
        ([NAME, "--power", "1", "--weights", "WEIGHTS", "--classes", "3"], "does not fit fasterrcnn"),
        ([NAME, "--power", "1", "--weights", "OTHER"], "has no roi_heads.box_predictor.cls_score.bias"),
        (
            ["torchvision:ssdlite320_mobilenet_v3_large", "--power", "1", "--weights", "WEIGHTS"],
            "expected the state dict",
        ),
        (["results.json", "--power", "1", "--export", "x.onnx"], "--export is for a detector, not for a result file"),
        (["results.json", "--power", "1"], "results.json: cannot be read: No such file"),
        (["MODEL", "--power", "1", "--export", "x.pt"], "expected a name that ends in .onnx"),
        *(
            (["results.json", "--power", "1", *given], f"{given[0]} is for a detector, not for a result file")
            for given in (
                ["--class_order", "id"],
                ["--score_threshold", "0.1"],
                ["--classes", "3"],
                ["--statistics_images", "5"],
            )
        ),
        (["MODEL", "--power", "1", "--statistics_images", "5"], "--statistics_images: is for --method logn"),
        *(
            (["MODEL", "--method", "logn", "--images", "IMAGES", *given], f"{given[0]}: is for --method norcal")
            for given in (["--counts", "objects"], ["--normalization", "paper"])
        ),
        (
            ["MODEL", "--images", "IMAGES", "--validation", "TRAIN"],
            "train.json: is --annotations; expected annotations",
        ),
        (["MODEL", "--power", "1", "--json", "TRAIN"], "is among what this command reads, and would be overwritten"),
        (["TRAIN", "--power", "1", "--json", "TRAIN"], "is among what this command reads, and would be overwritten"),
    ],
)
def test_bad_input_is_one_line(
    command: Command, tmp_path: Path, train: Path, arguments: list[str], message: str
) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return (print, ("code ran",))

    places = {"MODEL": tmp_path, "IMAGES": train.parent, "TRAIN": train}
    for name, value in {"PICKLE": Runs(), "OTHER": {"a": torch.zeros(1)}}.items():
        if name in arguments:
            places[name] = tmp_path / f"{name}.pth"
            torch.save(value, places[name])
    if "WEIGHTS" in arguments:
        places["WEIGHTS"] = tmp_path / "weights.pth"
        torch.save(build(CLASSES + 1).state_dict(), places["WEIGHTS"])
    values = [places.get(argument, argument) for argument in arguments]
    out = tmp_path / "out"
    code, printed, errors = command("calibrate-detector", *values, "--annotations", train, "--out", out)
    assert code == 2
    assert printed == ""
    assert message in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_inputs_are_not_overwritten(command: Command, tmp_path: Path, train: Path, validation: Path) -> None:
    results, link = tmp_path / "results.json", tmp_path / "link.json"
    results.write_text("[]")
    link.symlink_to(validation)
    for path in (train, link, results):
        before = path.read_text()
        code, _, errors = command(
            *("calibrate-detector", results, "--annotations", train, "--validation", validation, "--json", path),
            *("--out", tmp_path / "out"),
        )
        assert (code, errors.count("\n")) == (2, 1)
        assert f"--json {path}: is among what this command reads" in errors
        assert path.read_text() == before
    # annotations in a folder
    code, _, errors = command(
        *("calibrate-detector", results, "--annotations", train.parent, "--json", train, "--out", tmp_path / "out"),
        *("--power", "1"),
    )
    assert (code, "is among what this command reads" in errors) == (2, True)


def test_a_correction_is_not_corrected(command: Command, tmp_path: Path, train: Path, weights: Path) -> None:
    results, out = tmp_path / "results.json", tmp_path / "out"
    results.write_text(json.dumps([{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5}]))
    arguments = ("--annotations", train, "--power", "0.5", "--quiet", "--out")
    for source, corrected in (
        ([results], [out / results.name]),
        ([NAME, "--weights", weights], [NAME, "--weights", out / weights.name]),
    ):
        assert command("calibrate-detector", *source, *arguments, out, "--overwrite")[0] == 0
        code, _, errors = command("calibrate-detector", *corrected, *arguments, tmp_path / "again")
        assert (code, errors.count("\n")) == (2, 1)
        assert f"{out}: was corrected already (it has calibration.json)" in errors


@pytest.mark.parametrize("place", ["out/x.onnx", "out/sub/x.onnx", "x.onnx"])
def test_where_the_export_is_written(
    command: Command, tmp_path: Path, train: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def write(model: Any, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text("model")

    monkeypatch.setattr("longtail.detector_calibration.workflow.export_detector", write)
    for further in ((), ("--overwrite",)):
        code, _, errors = command(
            *("calibrate-detector", NAME, "--weights", weights, "--annotations", train, "--power", "0.5", "--quiet"),
            *("--out", tmp_path / "out", "--export", tmp_path / place, *further),
        )
        assert (code, errors) == (0, "")
        assert (tmp_path / place).read_text() == "model"
        assert (tmp_path / "out" / "weights.pth").is_file()


def test_a_class_that_the_model_lacks(command: Command, tmp_path: Path, train: Path, detr: Path) -> None:
    content = json.loads(train.read_text())
    content["categories"][2]["name"] = "zebra"
    train.write_text(json.dumps(content))
    code, _, errors = command(
        "calibrate-detector", detr, "--annotations", train, "--power", "1", "--out", tmp_path / "out"
    )
    assert code == 2
    assert "the detector has no class 'zebra'" in errors


def test_pickled_weights_of_transformers_are_not_read(
    command: Command, tmp_path: Path, train: Path, detr: Path
) -> None:
    (detr / "model.safetensors").rename(detr / "pytorch_model.bin")
    code, _, errors = command(
        "calibrate-detector", detr, "--annotations", train, "--power", "1", "--out", tmp_path / "out"
    )
    assert code == 2
    assert "may run code when they are read" in errors


def test_what_else_is_in_the_folder_stays(command: Command, tmp_path: Path, train: Path, detr: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "1.jpg").write_text("mine")
    code, _, errors = command(
        "calibrate-detector", detr, "--annotations", train, "--power", "1", "--out", out, "--overwrite"
    )
    assert code == 2
    assert "is not a folder that this command wrote" in errors
    assert (out / "1.jpg").read_text() == "mine"


@pytest.mark.slow
def test_the_corrected_faster_rcnn_is_exported(command: Command, tmp_path: Path, train: Path, weights: Path) -> None:
    import onnxruntime

    file = tmp_path / "detector.onnx"
    code, _, errors = command(
        *("calibrate-detector", NAME, "--weights", weights, "--annotations", train, "--power", "0.5"),
        *("--out", tmp_path / "out", "--export", file),
    )
    assert (code, errors) == (0, "")
    model = build(CLASSES + 1)
    model.load_state_dict(torch.load(tmp_path / "out" / "weights.pth", weights_only=True))
    session = onnxruntime.InferenceSession(file)
    for size in ((320, 320), (240, 300)):
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            (expected,) = model([image])
        got = dict(zip(("boxes", "labels", "scores"), session.run(None, {"image": image.numpy()}), strict=True))
        assert len(got["scores"]) > 0
        number = min(len(got["scores"]), 20)
        np.testing.assert_allclose(got["scores"][:number], expected["scores"][:number].numpy(), atol=1e-3)


@pytest.mark.slow
def test_the_corrected_detr_is_exported(command: Command, tmp_path: Path, train: Path, detr: Path) -> None:
    import onnxruntime

    file = tmp_path / "detr.onnx"
    code, _, errors = command(
        *("calibrate-detector", detr, "--annotations", train, "--power", "0.5", "--out", tmp_path / "out"),
        *("--export", file),
    )
    assert (code, errors) == (0, "")
    model = load_detector(str(tmp_path / "out")).model
    image = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(1))
    logits, boxes = onnxruntime.InferenceSession(file).run(None, {"pixel_values": image.numpy()})
    with torch.no_grad():
        expected = model(pixel_values=image)
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-3)
    np.testing.assert_allclose(boxes, expected.pred_boxes.numpy(), atol=1e-3)
