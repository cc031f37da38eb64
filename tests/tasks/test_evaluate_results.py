"""Result files evaluated on annotations as they are written: the figures are those of pycocotools and lvis-api."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtail.tasks.detection.evaluate_results import evaluate_results
from tests.conftest import Command

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def objects(*entries: dict[str, Any], **of_images: Any) -> dict[str, Any]:
    """Return annotations of one class in images of 64 pixels."""
    images = sorted({entry["image_id"] for entry in entries})
    return {
        "images": [
            {"id": image, "file_name": f"{image}.png", "height": 64, "width": 64, **of_images} for image in images
        ],
        "annotations": [
            {"id": number, "category_id": 1, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0, **entry}
            for number, entry in enumerate(entries, 1)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }


def found(*boxes: list[float], image: int = 1) -> list[dict[str, Any]]:
    scores = np.linspace(0.9, 0.5, len(boxes)).tolist()
    pairs = zip(boxes, scores, strict=True)
    return [{"image_id": image, "category_id": 1, "bbox": box, "score": score} for box, score in pairs]


def one(box: list[float], **changes: Any) -> dict[str, Any]:
    return {"image_id": 1, "bbox": box, **changes}


FILES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "without area": (objects(one([5, 5, 20, 20]), one([40, 5, 0, 20])), found([5, 5, 20, 20])),
    "partly outside": (objects(one([50, 1, 40, 20])), found([50, 1, 40, 20])),
    "outside": (objects(one([5, 5, 20, 20]), one([80, 80, 20, 20])), found([5, 5, 20, 20], [80, 80, 20, 20])),
    "ignore": (objects(one([5, 5, 20, 20], ignore=1), one([30, 30, 9, 9])), found([5, 5, 20, 20])),
    "ignored crowd": (
        objects(one([5, 5, 20, 20], ignore=0, iscrowd=1), one([30, 30, 9, 9])),
        found([6, 6, 5, 5], [12, 12, 5, 5], [30, 30, 9, 9]),
    ),
}


def compare(tmp_path: Path, annotations: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the figures of two files with those of pycocotools, and return them."""
    truth, results = write(tmp_path / "a.json", annotations), write(tmp_path / "b.json", detections)
    metrics = evaluate_results(results, truth, None)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = (*evaluation.stats[:6], evaluation.stats[8])
    for name, value in zip(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar"), figures, strict=True):
        expected = None if value < 0 else pytest.approx(100 * value, abs=1e-6)
        assert metrics[name] == expected, name
    return metrics


@pytest.mark.parametrize("kind", FILES)
def test_files_are_evaluated_as_pycocotools_evaluates_them(tmp_path: Path, kind: str) -> None:
    compare(tmp_path, *FILES[kind])


def test_random_files_are_evaluated_as_pycocotools_evaluates_them(tmp_path: Path) -> None:
    """Boxes that leave their images, some without width, some to be ignored."""
    rng, entries, results = np.random.default_rng(0), [], []
    for image in range(1, 21):
        for _ in range(4):
            box = [float(value) for value in (*rng.integers(-20, 60, 2), *rng.integers(0, 40, 2))]
            entries.append({"image_id": image, "bbox": box, "iscrowd": int(rng.random() < 0.1)})
            entries[-1]["ignore"] = int(rng.random() < 0.3)
            near = [value + float(rng.integers(-2, 3)) for value in box]
            results += [{**found([*near[:2], abs(near[2]), abs(near[3])], image=image)[0], "score": rng.random()}]
    metrics = compare(tmp_path, objects(*entries), results)
    assert metrics["objects"] == [sum(not entry["iscrowd"] for entry in entries)]


def test_ignored_objects_of_lvis_are_no_crowds(tmp_path: Path) -> None:
    """lvis-api matches each of them once, by the usual IoU, and does not look at iscrowd."""
    entries = (one([5, 5, 20, 20], ignore=1), one([40, 40, 20, 20], iscrowd=1))
    content = objects(*entries, neg_category_ids=[], not_exhaustive_category_ids=[])
    truth = write(tmp_path / "truth.json", content)
    # the first is on the ignored object, the second too and so false, the third a part of it and so false
    results = found([5, 5, 20, 20], [5, 5, 20, 20], [5, 5, 8, 8], [40, 40, 20, 20])
    metrics = evaluate_results(write(tmp_path / "results.json", results), truth, None)
    assert metrics["objects"] == [1]
    assert metrics["ap"] == pytest.approx(100 / 3)
    for entry in content["annotations"]:
        del entry["area"]
    again = evaluate_results(tmp_path / "results.json", write(truth, content), None)
    assert again["ap"] == metrics["ap"]


def test_what_is_left_out_of_the_training_counts_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = objects(one([5, 5, 20, 20]), one([40, 5, 0, 20]))
    truth, results = write(tmp_path / "a.json", content), write(tmp_path / "b.json", found([5, 5, 20, 20]))
    with caplog.at_level(logging.INFO, logger="longtail"):
        metrics = evaluate_results(results, truth, truth)
    assert metrics["class_counts"] == [1]
    assert metrics["objects"] == [2]
    (remark,) = (record.message for record in caplog.records)
    assert remark.startswith("1 box has no")
    assert remark.endswith("a.json: annotation 2 of 1.png")


def test_class_names_are_printed_without_control_characters(tmp_path: Path, command: Command) -> None:
    """Those of annotations come from elsewhere."""
    annotations = {**objects(one([5, 5, 20, 20])), "categories": [{"id": 1, "name": "c\x1b[31mat"}]}
    truth, results = write(tmp_path / "a.json", annotations), write(tmp_path / "b.json", found([5, 5, 20, 20]))
    code, shown, err = command("evaluate", results, "--annotations", truth)
    assert (code, r"c\x1b[31mat" in shown, "\x1b" in shown) == (0, True, False), err
