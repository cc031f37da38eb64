"""A detector in use: metrics, several processes, prediction, drawings, report, web page, result files, ONNX."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from longtail.config import Config, load_recipe
from longtail.data.detection import Detections, PostProcessing
from longtail.data.detection.coco import write_coco
from longtail.data.palette import class_colors
from longtail.data.sources import load_data
from longtail.detector_calibration import DetectorRunner, calibrate_detector
from longtail.detector_calibration.heads import corrected_copy
from longtail.errors import LongtailError
from longtail.evaluation.detection import detection_metrics
from longtail.evaluation.detection_results import read_results, to_results
from longtail.evaluation.detector_scores import norcal_correction
from longtail.experiments.evaluate import evaluate
from longtail.inference.model_config import ModelConfig
from longtail.inference.options import InferenceOptions
from longtail.report import run_report
from longtail.serve import build_app
from longtail.tasks.base import PredictionRequest
from longtail.tasks.classification import predict as classification
from longtail.tasks.detection.detector import Detector
from longtail.tasks.detection.drawing import crop_with_boxes, draw_detections
from longtail.tasks.detection.evaluator import predict_split
from longtail.tasks.detection.examples import error_examples, precision_recall_curves
from longtail.tasks.detection.export import detection_difference
from longtail.tasks.detection.predict import predict_files
from longtail.tasks.detection.report import report_sections
from longtail.tasks.detection.task import DETECTION
from longtail.tasks.loading import load_run
from longtail.tasks.segmentation import predict as segmentation
from longtail.training.metric_log import read_metrics
from longtail.training.trainer import fit
from tests.conftest import Command
from tests.evaluation.detections import draw_detections as random_detections
from tests.processes import start_ranks
from tests.tasks.boxes import draw_images

NETWORK = "fasterrcnn:test_efficientnet:32"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured rectangles on images, with annotations in COCO's format."""
    root = tmp_path_factory.mktemp("rectangles")
    for seed, (split, count) in enumerate({"train": 16, "val": 4, "test": 7}.items()):
        write_coco(draw_images(root, count, seed), root / f"{split}.json")
    return root


def settings(root: Path, **changes: Any) -> Config:
    config = load_recipe("bccd").config.replace(
        network=NETWORK, pretrained="none", epochs=1, batch_size=8, validate_every=1, **changes
    )
    files = {split: str(root / f"{split}.json") for split in ("train", "val", "test")}
    return config.replace(data={"source": "boxes", "root": str(root), "image_size": 64, "workers": 0, **files})


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector") / "run"
    fit(settings(root), folder, quiet=True)
    return folder


@pytest.fixture
def detector(run: Path) -> Detector:
    return Detector.load(run)


@pytest.fixture
def sees_rectangles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that finds one object in every image, by its colour and without a network."""

    def find(self: Detector, images: Any, post_processing: PostProcessing, prior: Any) -> Iterator[Any]:
        for image in images:
            assert image.mode == "RGB"
            red = np.asarray(image)[..., 0] > 180
            rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
            boxes = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], [0, 0, 9, 9]]).float()
            yield Detections(boxes, torch.tensor([0, 2]), torch.tensor([0.9, 0.3 if prior == "uniform" else 0.6]))

    monkeypatch.setattr(Detector, "find", find)


def test_training_logs_the_metrics(run: Path, root: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["kind"] for line in lines] == ["epoch", "validation", "test"]
    assert {"ap", "ap50"} <= set(lines[1])
    test = lines[-1]
    assert set(test) >= {"uniform", "train"}
    counts = load_data(settings(root).data, 0).image_counts  # type: ignore[attr-defined]
    assert Detector.load(run).config.image_counts == tuple(counts)
    main, other = test["train"], test["uniform"]  # plain cross-entropy predicts under the training prior
    assert main["objects"] == [7, 4, 2]
    assert main["images"] == 7
    assert main["frequent"] is None
    assert {"curves", "examples", "intervals"} <= set(main)
    assert "examples" not in other


def test_evaluation_is_that_of_the_detections(run: Path) -> None:
    """The evaluator selects under every prior from one pass; finding in the files gives the same."""
    model, config, data = load_run(run)
    assert isinstance(model, Detector)
    annotations = data.test.images.annotations  # type: ignore[attr-defined]
    evaluator = DETECTION.evaluator(model, data.test, config, {"uniform": None, "train": None}, False)
    for positions, found, labels in predict_split(model, data.test):
        evaluator.update(positions, found, labels)
    metrics = evaluator.compute()
    for prior in ("uniform", "train"):
        files = [data.test.images.open(index) for index in range(7)]
        again = list(model.find(files, PostProcessing(score_threshold=0.001), prior))
        expected = detection_metrics(again, annotations, image_counts=model.config.image_counts)
        assert metrics[prior]["per_class"] == expected["per_class"]
        assert metrics[prior]["intervals"] == expected["intervals"]


def test_validation_computes_no_more_than_it_needs(run: Path) -> None:
    model, config, data = load_run(run)
    evaluator = DETECTION.evaluator(model, data.test, config, {"uniform": None, "train": None}, True)  # type: ignore[arg-type]
    for positions, found, labels in predict_split(model, data.test):  # type: ignore[arg-type]
        evaluator.update(positions, found, labels)
    metrics = evaluator.compute()
    assert list(metrics) == ["train"]
    assert not {"curves", "examples", "intervals"} & set(metrics["train"])


@pytest.mark.slow
def test_two_processes(root: Path, tmp_path: Path) -> None:
    flags: list[str | Path] = [
        "--data.source",
        "boxes",
        "--data.root",
        root,
        "--data.image_size",
        "64",
        "--data.workers",
        "0",
    ]
    flags += [part for split in ("train", "val", "test") for part in (f"--data.{split}", root / f"{split}.json")]
    flags += ["--network", NETWORK, "--pretrained", "none", "--epochs", "1", "--batch_size", "8", "--device", "cpu"]
    for process in start_ranks(2, "train", "bccd", *flags, "--out", tmp_path / "run", "--quiet"):
        assert process.wait(timeout=300) == 0, process.stderr
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["uniform"]
    again = evaluate(tmp_path / "run")
    assert metrics["per_class"] == pytest.approx(again["per_class"], abs=1e-4)
    assert metrics["images"] == 7


def test_evaluate_prints_groups_and_classes(run: Path, command: Command, tmp_path: Path) -> None:
    code, shown, err = command("evaluate", run, "--json", tmp_path / "metrics.json")
    assert code == 0, err
    for part in ("AP50", "AP frequent", "AP rare", "training", "under the uniform prior:", "95 % interval"):
        assert part in shown
    assert "7 test objects" in shown
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["class_names"] == ["red", "green", "blue"]
    assert metrics["priors"]["uniform"]["per_class"] == metrics["per_class"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prior", "estimate"], "--prior estimate and --coverage"),
        (["--test_prior", "forward"], "--test_prior forward: is for models that classify"),
        (["--tta", "flip"], "--tta flip is not for models that find boxes"),
        (["--annotations", "missing.json"], "is a folder; expected a file of results (.json)"),
        (["--train_annotations", "missing.json"], "is for a file of results"),
    ],
)
def test_evaluate_refuses(run: Path, command: Command, flags: list[str], message: str) -> None:
    code, _, err = command("evaluate", run, *flags)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("sees_rectangles")
def test_predict_writes_tables_drawings_and_results(run: Path, root: Path, command: Command, tmp_path: Path) -> None:
    out, images = tmp_path / "out", root / "images2"
    code, shown, err = command("predict", run, images, "--out", out, "--json", tmp_path / "found.json")
    assert code == 0, err
    records = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [len(record["objects"]) for record in records] == [1] * 7
    assert records[0]["objects"][0]["class"] == "red"
    assert "objects with a score of at least 0.5" in shown
    assert f"{images / '000.png'}    red  0.900" in shown
    assert len(list(out.glob("*-objects.jpg"))) == 7
    results = json.loads((out / "detections.json").read_text(encoding="utf-8"))
    assert results[0]["category_id"] == 1
    assert [entry["image_id"] for entry in results] == list(range(7))  # the numbers in the names
    left, top, width, height = results[0]["bbox"]
    assert records[0]["objects"][0]["box"] == [left, top, left + width, top + height]
    with Image.open(records[0]["drawing"]) as drawing:
        assert max(drawing.size) == 640
    code, shown, _ = command("predict", run, images / "000.png", "--threshold", "0.2", "--top", "1", "--quiet")
    assert (code, shown) == (0, "")
    two = predict_files(Detector.load(run), [images / "000.png"], PredictionRequest(threshold=0.2))
    assert [row[1] for row in two.rows] == ["red", "blue"]
    none = predict_files(Detector.load(run), [images / "000.png"], PredictionRequest(threshold=0.95))
    assert none.rows == [[str(images / "000.png"), "nothing found", "", ""]]
    other = predict_files(Detector.load(run), [images / "000.png"], PredictionRequest(prior="train"))
    assert len(other.rows) == 2


@pytest.mark.usefixtures("sees_rectangles")
def test_what_predict_writes_is_evaluated(run: Path, root: Path, command: Command, tmp_path: Path) -> None:
    """With the ids of other annotations too, whose images and classes have another order; the model may have none."""
    images, config = root / "images2", run / "recognizer" / "config.json"
    saved = config.read_text(encoding="utf-8")
    content = json.loads((root / "test.json").read_text(encoding="utf-8"))
    for image in content["images"]:
        image["id"] = 6 - image["id"]
    for annotation in content["annotations"]:
        annotation["image_id"], annotation["category_id"] = 6 - annotation["image_id"], 4 - annotation["category_id"]
    for category in content["categories"]:
        category["id"] = 4 - category["id"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content), encoding="utf-8")
    found = []
    for class_ids in ([4, 2, 8], []):
        config.write_text(json.dumps({**json.loads(saved), "class_ids": class_ids}), encoding="utf-8")
        out = tmp_path / f"out{len(class_ids)}"
        code, shown, err = command("predict", run, images, "--out", out, "--threshold", "0.001")
        assert code == 0, err
        entry = json.loads((out / "detections.json").read_text(encoding="utf-8"))[0]
        assert (entry["category_name"], entry["category_id"]) == ("red", 4 if class_ids else 1)
        assert f"category {entry['category_id']} is red" in shown
        assert entry["file_name"] == str(images / "000.png")
        for truth in (root / "test.json", other):
            code, _, err = command(
                *("evaluate", out / "detections.json", "--annotations", truth, "--json", tmp_path / "m.json")
            )
            assert code == 0, err
            metrics = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
            found.append(metrics["per_class"][metrics["class_names"].index("red")])
    config.write_text(saved, encoding="utf-8")
    assert found == [found[0]] * 4
    assert found[0] > 90


def test_a_model_knows_the_ids_of_its_classes(run: Path) -> None:
    config = json.loads((run / "recognizer" / "config.json").read_text(encoding="utf-8"))
    assert config["class_ids"] == [1, 2, 3]
    del config["class_ids"]  # as models of earlier versions
    assert TypeAdapter(ModelConfig).validate_python(config).class_ids == ()


@pytest.mark.usefixtures("sees_rectangles")
def test_images_of_one_name_have_drawings_of_their_own(run: Path, root: Path, tmp_path: Path) -> None:
    files = [root / "images0" / "000.png", root / "images2" / "000.png"]
    output = predict_files(Detector.load(run), files, PredictionRequest(out=tmp_path))
    assert [record["image_id"] for record in output.records] == [1, 2]
    assert sorted(path.name for path in tmp_path.glob("*.jpg")) == ["000-2-objects.jpg", "000-objects.jpg"]


@pytest.mark.usefixtures("sees_rectangles")
def test_predict_leaves_out_unreadable_images(run: Path, root: Path, tmp_path: Path) -> None:
    files = [root / "images2" / "000.png", tmp_path / "001.png", root / "images2" / "002.png"]
    (tmp_path / "001.png").write_bytes(b"not an image")
    output = predict_files(Detector.load(run), files, PredictionRequest(out=tmp_path))
    alone = [predict_files(Detector.load(run), [file], PredictionRequest()) for file in (files[0], files[2])]
    assert [record["objects"] for record in output.records] == [each.records[0]["objects"] for each in alone]
    assert [Path(record["drawing"]).name for record in output.records] == ["000-objects.jpg", "002-objects.jpg"]
    assert {entry["image_id"] for entry in json.loads((tmp_path / "detections.json").read_text())} <= {0, 2}
    assert list(output.unreadable) == [files[1]]
    with pytest.raises(LongtailError, match=r"001\.png: is not an image"):
        predict_files(Detector.load(run), [files[1]], PredictionRequest())


def test_predict_refuses(run: Path, root: Path, command: Command) -> None:
    for flags, message in (
        (["--threshold", "1.5"], "expected a score from 0 to 1"),
        (["--coverage", "0.9"], "are for models that classify whole images"),
        (["--sliding_window", "64"], "--sliding_window"),
        (["--prior", "missing.json"], "missing.json"),
    ):
        code, _, err = command("predict", run, root / "images2", *flags)
        assert code == 2
        assert message in err


@pytest.mark.parametrize("predict", [classification.predict_files, segmentation.predict_files])
def test_a_threshold_is_for_detectors_alone(predict: Any) -> None:
    with pytest.raises(LongtailError, match=r"--threshold 0\.3: is for models that find objects"):
        predict(None, [], PredictionRequest(threshold=0.3))


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    detections, annotations = random_detections(0, masks=True)
    annotations = dataclasses.replace(annotations, class_ids=(3, 7, 8, 20), image_ids=tuple(range(100, 124)))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(to_results(detections, annotations.image_ids, annotations.class_ids)))
    again = read_results(path, annotations)
    for one, other in zip(detections, again, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.scores, other.scores)
    for iou_type in ("bbox", "segm"):
        expected = detection_metrics(detections, annotations, iou_type=iou_type, resamples=0)
        found = detection_metrics(again, annotations, iou_type=iou_type, resamples=0)
        assert found["ap"] == pytest.approx(expected["ap"], abs=1e-6)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}, "image_id 99 is not among the images"),
        ({"image_id": 0, "category_id": 9, "bbox": [0, 0, 1, 1], "score": 0.5}, "category_id 9 is not among"),
        ({"image_id": 0, "category_id": 1, "bbox": [0, 0, 1], "score": 0.5}, "expected a bbox of four numbers"),
        ({"image_id": 0, "category_id": 1, "score": 0.5}, "expected a bbox of four numbers"),
        ({"image_id": 0, "bbox": [0, 0, 1, 1]}, "expected image_id, category_id, bbox and score"),
        ([], "expected image_id, category_id, bbox and score"),
    ],
)
def test_broken_results(tmp_path: Path, entry: Any, message: str) -> None:
    _, annotations = random_detections(0)
    (tmp_path / "results.json").write_text(json.dumps([entry]))
    with pytest.raises(LongtailError, match=f"results.json: entry 0: .*{message}"):
        read_results(tmp_path / "results.json", annotations)
    for text, message in (("{", "is not valid JSON"), ("{}", "expected a list of detections")):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(LongtailError, match=message):
            read_results(tmp_path / "results.json", annotations)


def test_a_file_of_results_is_evaluated(root: Path, command: Command, tmp_path: Path) -> None:
    annotations = load_data(settings(root).data, 0).test.images.annotations  # type: ignore[attr-defined]
    detections = []
    for index in range(7):
        mine = annotations.objects_of(index)
        detections.append(Detections(annotations.boxes[mine], annotations.labels[mine], torch.full((len(mine),), 0.5)))
    results = tmp_path / "results.json"
    results.write_text(json.dumps(to_results(detections, annotations.image_ids, (1, 2, 3))))
    flags = ["--annotations", root / "test.json", "--train_annotations", root / "train.json"]
    code, shown, err = command("evaluate", results, *flags, "--json", tmp_path / "metrics.json")
    assert code == 0, err
    assert shown.splitlines()[2].split()[:5] == ["as", "given", "100.0", "100.0", "100.0"]
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["common"] == metrics["rare"] == 100
    assert metrics["class_counts"] == [16, 8, 4]
    code, shown, _ = command("evaluate", results, "--annotations", root / "test.json")
    assert code == 0
    assert "n/a" in shown
    for arguments, message in (
        ([results], "name the annotations of its images by --annotations"),
        ([results, "--annotations", root / "test.json", "--prior", "train"], "--prior: needs a run"),
    ):
        code, _, err = command("evaluate", *arguments)
        assert code == 2
        assert message in err


def test_corrections_share_a_pass(detector: Detector, root: Path) -> None:
    """As many results as corrections, each that of a corrected copy, from one pass through the network."""
    images, passes = sorted((root / "images2").glob("*.png")), []
    corrections = [norcal_correction(torch.tensor([100, 10, 1]), power, "last") for power in (0.0, 1.0)]
    limits = PostProcessing(score_threshold=0.001, nms_threshold=1.0)  # rounding decides between no boxes
    handle = detector.class_layer.register_forward_hook(lambda *_: passes.append(1))
    functions = [None, *(correction.apply for correction in corrections)]
    found = list(detector.find_corrected(images, functions, limits, batch_size=4))
    handle.remove()
    assert len(passes) == 2
    models = [detector, *(corrected_copy(detector, correction) for correction in corrections)]
    for column, model in enumerate(models):
        for by_correction, expected in zip(found, model.find(images, limits, batch_size=4), strict=True):
            torch.testing.assert_close(by_correction[column].scores, expected.scores, atol=1e-5, rtol=0)
    assert not torch.allclose(found[0][1].scores, found[0][2].scores, atol=1e-3)


def test_a_correction_counts_the_detections_that_evaluate_counts(detector: Detector, root: Path) -> None:
    """From a score of 0.001 on; the detector's own threshold is 0.05."""
    with torch.no_grad():
        detector = corrected_copy(detector, norcal_correction(torch.tensor([1, 1, 1]), 0.0, "last"))
        detector.class_layer.bias[-1] += 4  # so that scores are low
    runner = DetectorRunner(detector)
    (found,) = next(runner.down_to(0.001).detect([Image.open(root / "images2" / "000.png")], [None]))
    assert 0.001 < found.scores.min() < 0.05
    given = DetectorRunner(detector, score_threshold=0.3)
    assert given.down_to(0.001) is given


def test_a_corrected_run_is_used_like_a_run(run: Path, root: Path, command: Command, tmp_path: Path) -> None:
    out, same = tmp_path / "corrected", tmp_path / "same"
    train = ("--annotations", root / "train.json")
    code, shown, err = command(
        *("calibrate-detector", run, *train, "--validation", root / "val.json", "--images", root, "--out", out)
    )
    assert (code, err) == (0, "")
    assert "3 categories matched by name" in shown
    note = json.loads((out / "calibration.json").read_text())
    assert note["search"][f"{note['power']:g}"]["ap"] == pytest.approx(note["after"]["ap"], abs=0.1)
    assert note["layers"] == ["classifier"]
    assert sorted(path.name for path in out.iterdir()) == ["calibration.json", "config.yaml", "recognizer"]
    config = Detector.load(out).config
    assert config.metrics == {}  # they are those of the detector as it was
    assert config.training_info["calibrated"] is True
    assert "corrected for rare classes" in (out / "recognizer" / "README.md").read_text()
    assert command("evaluate", out, "--json", tmp_path / "metrics.json", "--quiet") == (0, "", "")
    code, _, err = command("report", out)
    assert code == 2
    assert "since its scores were corrected after the training; use longtail evaluate" in err
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == 7
    assert command("predict", out, root / "images2" / "000.png", "--out", tmp_path / "found")[0] == 0
    code, _, err = command("calibrate-detector", run, *train, "--power", "0", "--out", same, "--quiet")
    assert (code, err) == (0, "")
    files = [folder / "recognizer" / "model.safetensors" for folder in (run, same, out)]
    assert files[0].read_bytes() == files[1].read_bytes()
    # the folder of the model, without settings, is corrected as such
    code, _, err = command(
        "calibrate-detector", run / "recognizer", *train, "--power", "1", "--out", tmp_path / "model"
    )
    assert (code, err) == (0, "")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert Detector.load(tmp_path / "model").config.predicts_under == "uniform"
    for corrected in (out, out / "recognizer"):
        code, _, err = command("calibrate-detector", corrected, *train, "--power", "1", "--out", tmp_path / "twice")
        assert (code, "was corrected already" in err, len(err.splitlines())) == (2, True, 1)
    with pytest.raises(LongtailError, match="was corrected already"):
        calibrate_detector(Detector.load(out), [3, 2, 1], power=1)


def test_examples_and_curves() -> None:
    detections, annotations = random_detections(0)
    counts = [200, 50, 3, 1]
    examples = error_examples(detections, annotations, counts)
    scores = [entry["score"] for entry in examples["false"]]
    assert scores == sorted(scores, reverse=True)
    for entries in examples.values():
        images = [entry["image"] for entry in entries]
        assert len(images) == len(set(images)) > 0
        assert all([entry["class"] for entry in entries].count(label) <= 3 for label in range(4))
    missed = [counts[entry["class"]] for entry in examples["missed"]]
    assert missed == sorted(missed)
    others = [entry for entry in examples["false"] if entry["kind"] == "other"]
    assert others
    assert all(entry["other"] != entry["class"] for entry in others)
    curves = precision_recall_curves(detections, annotations, counts)
    assert [curve["class"] for curve in curves] == [0, 1, 2]
    for curve in curves:
        assert curve["recall"] == sorted(curve["recall"])
        assert curve["precision"] == sorted(curve["precision"], reverse=True)


def test_kinds_of_false_detections() -> None:
    _, annotations = random_detections(1, crowd=False)
    first = annotations.select([0, 0, 0, 0])
    index = int(first.objects_of(0)[0])
    box, label = first.boxes[index], int(first.labels[index])
    alone = dataclasses.replace(
        first,
        image_index=torch.arange(4),
        boxes=box.repeat(4, 1),
        labels=torch.full((4,), label),
        ignored=torch.zeros(4, dtype=torch.bool),
        areas=first.areas[index].repeat(4),
    )
    shifted = box + torch.tensor([1.0, 0, 1, 0]) * (box[2] - box[0]) * 0.6

    def one(boxes: list[torch.Tensor], labels: list[int]) -> Detections:
        return Detections(torch.stack(boxes), torch.tensor(labels), torch.linspace(0.9, 0.8, len(labels)))

    other = (label + 1) % 3
    found = [one([box, box], [label, label]), one([box], [other]), one([shifted], [label]), one([box + 400], [label])]
    examples = error_examples(found, alone, [1, 1, 1, 1])
    kinds = {entry["image"]: entry["kind"] for entry in examples["false"]}
    assert kinds == {0: "double", 1: "other", 2: "shifted", 3: "nothing"}
    assert {entry["image"] for entry in examples["missed"]} == {1, 2, 3}


def test_the_report(run: Path, tmp_path: Path) -> None:
    page = run_report(run).read_text(encoding="utf-8")
    for part in ("AP over training images", "Precision and recall at IoU 0.5", "test objects", "95 % interval", "AP50"):
        assert part in page
    model, _, _ = load_run(run)
    detections, annotations = random_detections(0)
    counts = [200, 50, 3, 1]
    metrics = detection_metrics(detections, annotations, image_counts=counts)
    metrics["curves"] = precision_recall_curves(detections, annotations, counts)
    config = dataclasses.replace(
        model.config, class_names=("a", "b", "$c$", "d"), class_counts=(400, 60, 3, 1), image_counts=tuple(counts)
    )
    sections = report_sections(tmp_path, config, {"train": metrics, "uniform": metrics}, DETECTION.columns)
    assert [row[0] for row in sections.classes] == ["a", "b", "$c$", "d"]
    assert [row[3] for row in sections.classes] == ["frequent", "common", "rare", "rare"]
    assert sections.classes[3][5:] == [None, "", None, "", None, None]
    assert sections.group_sizes == {"frequent": 1, "common": 1, "rare": 2}
    assert sections.errors == []  # no pictures are in that folder


def test_pictures_of_errors_are_kept(run: Path, root: Path) -> None:
    model, _, data = load_run(run)
    entry = {"image": 0, "class": 1, "box": [5.0, 5.0, 25.0, 30.0], "score": 80.0, "kind": "other", "other": 0}
    missed = {"image": 2, "class": 2, "box": [0.0, 0.0, 12.0, 12.0]}
    examples = {"false": [entry], "missed": [missed]}
    DETECTION.save_examples(run, data.test, {"examples": examples})
    assert sorted(path.name for path in (run / "errors").iterdir()) == ["false-0.jpg", "missed-0.jpg"]
    test = read_metrics(run / "metrics.jsonl")[-1]
    main = {**test["train"], "examples": examples}
    sections = report_sections(run, model.config, {"train": main}, DETECTION.columns)
    (heading, ((source, caption, text),)), (other, ((_, plain, _),)) = sections.errors
    assert (heading, other) == ("False detections of highest score", "Missed objects, rare classes first")
    assert source.startswith("data:image/jpeg;base64,")
    assert "on red" in str(caption)
    assert text == "green, 80\N{NO-BREAK SPACE}%: on red"
    assert plain == "blue"


@pytest.mark.parametrize("size", [(40, 30), (700, 500), (3000, 100)])
def test_a_drawing_shows_every_box_in_its_colour(size: tuple[int, int]) -> None:
    width, height = size
    boxes = torch.tensor([[2.0, 2, width / 2, height - 2], [width / 2, 0, width, height]])
    detections = Detections(boxes, torch.tensor([0, 1]), torch.tensor([0.9, 0.8]))
    image = Image.new("RGB", size, "white")
    drawing = draw_detections(image, detections, ["a\nclass", "another"])
    assert max(drawing.size) >= 640
    assert drawing.width / drawing.height == width / height
    assert image.getcolors() == [(width * height, (255, 255, 255))]  # it is not drawn on
    seen = {color for _, color in drawing.getcolors(10**7)}  # type: ignore[union-attr]
    assert set(class_colors(2)) <= seen
    nothing = draw_detections(image, Detections(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0)), ["a"])
    assert nothing.getcolors() == [(drawing.width * drawing.height, (255, 255, 255))]


def test_masks_are_translucent() -> None:
    mask = {"size": [40, 40], "counts": [0, 800, 800]}  # the left half
    detections = Detections(torch.tensor([[0.0, 0, 20, 40]]), torch.tensor([0]), torch.tensor([0.9]), (mask,))
    drawing = np.asarray(draw_detections(Image.new("RGB", (40, 40), "white"), detections, ["a"], min_side=40))
    tint = np.array(class_colors(1)[0])
    np.testing.assert_allclose(drawing[28, 10], 0.4 * tint + 0.6 * 255, atol=1)
    assert (drawing[28, 30] == 255).all()


def test_a_crop_is_a_square_around_its_box() -> None:
    image = Image.new("RGB", (200, 100), "white")
    crop = crop_with_boxes(image, (90, 40, 110, 60), [((90, 40, 110, 60), (255, 0, 0), False)], 80)
    pixels = np.asarray(crop).astype(int)
    assert pixels.shape == (80, 80, 3)
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 90)
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (20, 59, 20, 59)
    edge = crop_with_boxes(image, (0, 0, 20, 20), [((0, 0, 20, 20), (255, 0, 0), True)], 80)
    assert np.asarray(edge)[79, 79].tolist() == [255, 255, 255]  # moved into the image


@pytest.mark.usefixtures("sees_rectangles")
def test_the_web_page(detector: Detector, root: Path) -> None:
    client = TestClient(build_app(detector, None, "rectangles"))
    body = (root / "images2" / "000.png").read_bytes()
    response = client.post("/predict", content=body).json()
    assert response["size"] == [64, 64]
    assert [entry["class"] for entry in response["objects"]] == ["red", "blue"]
    assert response["objects"][0]["color"] == "rgb" + str(class_colors(3)[0])
    assert client.post("/predict?prior=train", content=body).json()["objects"][1]["score"] == pytest.approx(0.6)
    held = io.BytesIO()
    rotated = Image.open(io.BytesIO(body)).resize((64, 40))
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(held, "JPEG", exif=exif)
    assert client.post("/predict", content=held.getvalue()).json()["size"] == [40, 64]  # as a browser shows it
    page = client.get("/").text
    assert 'type="range" id="threshold"' in page
    assert "Probabilities" not in page


def test_serve_refuses_augmentation(run: Path, command: Command) -> None:
    code, _, err = command("serve", run, "--tta", "flip", "--port", "0")
    assert code == 2
    assert "--tta flip: is for models that classify whole images" in err


@pytest.mark.slow
@pytest.mark.parametrize("network", [NETWORK, "retinanet:test_efficientnet:32"])
def test_an_exported_file_finds_the_same(root: Path, tmp_path: Path, command: Command, network: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    fit(settings(root).replace(network=network), tmp_path / "run", quiet=True)
    detector = Detector.load(tmp_path / "run")
    with torch.no_grad():  # an untrained class layer finds nothing with certainty
        detector.class_layer.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    detector.save(tmp_path / "run" / "recognizer")
    code, shown, err = command("export", tmp_path / "run", root / "images2", "--prior", "train")
    assert code == 0, err
    assert "takes (1, 64, 64, 3) uint8, prior train" in shown
    session = onnxruntime.InferenceSession(str(tmp_path / "run" / "model.onnx"))
    info = json.loads(session.get_modelmeta().custom_metadata_map["longtail"])
    assert info["class_names"] == ["red", "green", "blue"]
    found = 0
    for number in range(3, 7):  # others than those that the export has compared
        with Image.open(root / "images2" / f"{number:03}.png") as image:
            pixels = detector.export_input(image, (64, 64))
        got = session.run(None, {"images": pixels[None].numpy()})
        want = detector.detect(pixels[None].permute(0, 3, 1, 2).float() / 255, prior="train")[0]
        found += len(want.labels)
        assert len(got[1]) == len(want.labels)
        assert detection_difference(tuple(got), tuple(each.numpy() for each in want[:3]), 64) < 1e-3  # type: ignore[arg-type]
    assert found > 10  # else nothing was compared
    _predict_finds_the_same(root, tmp_path, command)


def _predict_finds_the_same(root: Path, folder: Path, command: Command) -> None:
    """``predict`` with the exported file: as with the run, and one line for what it cannot do."""
    (folder / "images").mkdir()
    for file in sorted((root / "images2").iterdir())[:4]:
        shutil.copy(file, folder / "images")
    objects = []
    for model in (folder / "run", folder / "run" / "model.onnx"):
        code, _, err = command(
            *("predict", model, folder / "images", "--prior", "train", "--threshold", "0.1", "--json", folder / "json")
        )
        assert code == 0, err
        objects.append(json.loads((folder / "json").read_text()))
    assert sum(len(record["objects"]) for record in objects[0]) > 10
    for want, got in zip(*objects, strict=True):
        assert want["path"] == got["path"]
        assert len(want["objects"]) == len(got["objects"])
        assert detection_difference(_arrays(want), _arrays(got), 64) < 1e-3
    with Image.open(root / "images2" / "000.png") as image:
        image.resize((100, 50)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"no image")
    code, shown, err = command(
        *("predict", folder / "run" / "model.onnx", folder / "wide.png", folder / "broken.png", "--threshold", "0.05"),
        *("--top", "2", "--json", folder / "json"),
    )
    assert code == 1
    assert "broken.png" in err
    assert "the frequencies of training" in shown
    found, unread = json.loads((folder / "json").read_text())
    assert set(unread) == {"path", "error"}
    assert len(found["objects"]) == 2
    for entry in found["objects"]:
        x1, y1, x2, y2 = entry["box"]
        assert 0 <= x1 < x2 <= 100
        assert 0 <= y1 < y2 <= 50
    for flags, message in (
        (["--threshold", "0.01"], "gives scores from 0.05 up"),
        (["--prior", "0.2,0.3,0.5"], "there is no such file"),
        (["--out", folder / "out"], "--out needs the run"),
    ):
        code, _, err = command("predict", folder / "run" / "model.onnx", folder / "wide.png", *flags)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1


def _arrays(record: dict[str, Any]) -> Any:
    objects = record["objects"]
    return tuple(np.array([entry[name] for entry in objects]) for name in ("box", "class", "score"))


def test_difference_of_detections() -> None:
    boxes, labels, scores = np.array([[0.0, 0, 10, 10], [20, 20, 40, 40]]), np.array([0, 1]), np.array([0.9, 0.5])
    one = (boxes, labels, scores)
    assert detection_difference(one, one, 100) == 0
    assert detection_difference(one, (boxes[::-1], labels[::-1], scores[::-1]), 100) == 0
    assert detection_difference(one, (boxes + 1, labels, scores), 100) == pytest.approx(0.01)
    assert detection_difference(one, (boxes, labels, scores - 0.2), 100) == pytest.approx(0.2)
    assert detection_difference(one, (boxes[:1], labels[:1], scores[:1]), 100) == 1
    at_the_threshold = (np.vstack([boxes, [[0.0, 0, 5, 5]]]), np.array([0, 1, 2]), np.array([0.9, 0.5, 0.0501]))
    assert detection_difference(one, at_the_threshold, 100) == 0


def test_options_are_refused_in_python(detector: Detector, root: Path) -> None:
    request = PredictionRequest(options=InferenceOptions(tta_scales=(1.0, 2.0)))
    with pytest.raises(LongtailError, match="are not for models that find objects"):
        predict_files(detector, [root / "images2" / "000.png"], request)


def test_pictures_of_an_earlier_prediction_are_not_predicted(
    run: Path, root: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(root / "images2", tmp_path / "photos")
    shown = [command("predict", run, tmp_path / "photos", "--out", tmp_path / "photos" / "out")[1] for _ in range(2)]
    assert list((tmp_path / "photos" / "out").glob("*.jpg"))
    assert shown[0] == shown[1]
