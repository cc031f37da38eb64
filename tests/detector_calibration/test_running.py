"""One pass with many corrections finds what each corrected detector finds; the power is chosen by AP."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import longtail
from longtail.data.detection import Detections, read_coco
from longtail.detector_calibration import DetectorRunner, choose_power, logit_statistics
from longtail.detector_calibration.calibrate import evaluate_corrections, find_images
from longtail.errors import LongtailError
from longtail.evaluation.detector_scores import LogitStatistics, logn_correction, norcal_correction
from tests.detector_calibration.models import TORCHVISION, fasterrcnn, spread, transformers_model

COUNTS = [3000, 400, 50, 8, 1]
POWERS = (0.0, 0.5, 1.0)


def images(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (60 + 8 * i, 80, 3), dtype=np.uint8)) for i in range(count)]


def processor(kind: str) -> Any:
    import transformers

    size = {"height": 64, "width": 64}
    if kind == "Detr":
        return transformers.DetrImageProcessor(size=size, do_pad=False)
    return transformers.RTDetrImageProcessor(size=size)


@pytest.mark.parametrize("kind", TORCHVISION)
def test_torchvision(kind: str) -> None:
    model = spread(TORCHVISION[kind]())
    getattr(model, "roi_heads", model).nms_thresh = 0.5
    runner = DetectorRunner(model, batch_size=2)
    corrections = [norcal_correction(torch.tensor(COUNTS), power, runner.head.background) for power in POWERS]
    found = list(runner.detect(images(), corrections))
    assert len(found) == 3
    # bit by bit with power 0; else up to rounding, which decides between boxes of equal scores in suppression
    getattr(model, "roi_heads", model).nms_thresh = 1.0
    unsuppressed = list(runner.detect(images(), corrections))
    getattr(model, "roi_heads", model).nms_thresh = 0.5
    for column, power in enumerate(POWERS):
        twin = longtail.calibrate_detector(model, COUNTS, power=power)
        getattr(twin, "roi_heads", twin).nms_thresh = 0.5 if power == 0 else 1.0
        found = found if power == 0 else unsuppressed
        for first in (0, 2):  # the same batches: smaller images are padded
            batch = images()[first : first + 2]
            with torch.no_grad():
                outputs = twin([pil_to_tensor(image).float() / 255 for image in batch])
            for image, by_correction, expected in zip(batch, found[first:], outputs, strict=False):
                got = by_correction[column]
                assert len(got.scores) == len(expected["scores"]) > 0
                torch.testing.assert_close(got.scores, expected["scores"], rtol=1e-3, atol=1e-4)
                assert int(got.labels.min()) >= 0
                assert got.boxes[:, 2].max() <= image.width + 1e-3
                if power == 0:
                    assert torch.equal(got.labels, expected["labels"] - runner.head.first_label)
                    assert torch.equal(got.boxes, expected["boxes"])
    # the model is as it was
    assert "postprocess_detections" not in vars(model) | vars(getattr(model, "roi_heads", model))
    with torch.no_grad():
        assert len(model([torch.rand(3, 64, 64)])[0]["scores"]) > 0


@pytest.mark.parametrize("kind", ["Detr", "RTDetr"])
def test_transformers(kind: str) -> None:
    model, process = spread(transformers_model(kind)), processor(kind)
    runner = DetectorRunner(model, process)
    corrections = [norcal_correction(torch.tensor(COUNTS), power, runner.head.background) for power in POWERS]
    found = list(runner.detect(images(), corrections))
    for column, power in enumerate(POWERS):
        twin = longtail.calibrate_detector(model, COUNTS, power=power)
        for image, by_correction in zip(images(), found, strict=True):
            with torch.no_grad():
                outputs = twin(**process(images=[image], return_tensors="pt"))
            (expected,) = process.post_process_object_detection(
                outputs, threshold=0.0, target_sizes=[(image.height, image.width)]
            )
            got = by_correction[column]
            order = expected["scores"].argsort(descending=True, stable=True)
            torch.testing.assert_close(got.scores, expected["scores"][order], rtol=1e-3, atol=1e-4)
            if power == 0:
                torch.testing.assert_close(got.boxes, expected["boxes"][order], rtol=1e-3, atol=1e-2)
                assert torch.equal(got.labels, expected["labels"][order])


class Distinct(nn.Module):
    """Logits and boxes without equal scores, of which the order in suppression would be left to chance."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.cls_score, self.outputs = nn.Linear(1024, outputs), outputs

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(len(features), self.outputs, generator=generator)
        return logits, torch.randn(len(features), 4 * self.outputs, generator=generator) * 0.3


# where a class keeps few boxes, the threshold has to be lowered
@pytest.mark.parametrize(("wanted", "nms", "lowered"), [(3, 0.5, False), (40, 0.5, False), (150, 0.0, True)])
def test_fewer_candidates_give_the_same_detections(
    wanted: int, nms: float, lowered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fasterrcnn(60).eval()
    model.roi_heads.box_predictor = Distinct(61)
    model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 1e-6, wanted
    model.roi_heads.nms_thresh = nms
    compared: list[int] = []
    batched_nms = torchvision.ops.boxes.batched_nms

    def count(boxes: Any, scores: Any, labels: Any, threshold: float) -> Any:
        if threshold == nms:
            compared.append(len(boxes))
        return batched_nms(boxes, scores, labels, threshold)

    monkeypatch.setattr(torchvision.models.detection.roi_heads.box_ops, "batched_nms", count)
    same = norcal_correction(torch.arange(1, 61), 0.0, "first")
    ((got,),) = DetectorRunner(model).detect(images(1), [same])
    ours = compared.copy()
    with torch.no_grad():
        (expected,) = model([pil_to_tensor(images(1)[0]).float() / 255])
    assert ours[0] < compared[-1] / 3
    assert (len(ours) > 1) == lowered
    assert len(expected["scores"]) == wanted
    torch.testing.assert_close(got.scores, expected["scores"])
    assert torch.equal(got.labels + 1, expected["labels"])
    torch.testing.assert_close(got.boxes, expected["boxes"])
    assert model.roi_heads.score_thresh == 1e-6


def test_limits() -> None:
    model = spread(TORCHVISION["fasterrcnn"]())
    same = norcal_correction(torch.tensor(COUNTS), 0.0, "first")
    ((few,),) = DetectorRunner(model, max_detections=3).detect(images(1), [same])
    ((sure,),) = DetectorRunner(model, score_threshold=0.2).detect(images(1), [same])
    assert len(few.scores) == 3
    assert len(sure.scores) == 0 or float(sure.scores.min()) > 0.2
    assert model.roi_heads.detections_per_img == 100
    assert model.roi_heads.score_thresh == 0.01


def test_statistics_are_those_of_the_class_layer() -> None:
    for kind in ("fasterrcnn", "retinanet", "ssd"):
        model = spread(TORCHVISION[kind]())
        runner, over = DetectorRunner(model), LogitStatistics(0)
        over = LogitStatistics(runner.head.num_outputs)

        def take(_: Any, __: Any, output: torch.Tensor, over: LogitStatistics = over) -> None:
            over.update(output.unflatten(1, (-1, len(over.mean))).movedim(2, -1) if output.ndim == 4 else output)

        handles = [layer.register_forward_hook(take) for layer in dict.fromkeys(runner.head.layers)]
        got = runner.statistics(images())
        for handle in handles:
            handle.remove()
        assert got.count == over.count > 2
        torch.testing.assert_close(got.mean, over.mean)
        torch.testing.assert_close(got.deviation, over.deviation)


class Colours(nn.Module):
    """A detector of three classes by the colour of an image's squares, with the prior of a long tail in its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.class_layer, self.background = nn.Linear(3, 4), "first"
        with torch.no_grad():
            self.class_layer.weight.copy_(torch.cat([torch.zeros(1, 3), 6 * torch.eye(3)]))
            self.class_layer.bias.copy_(torch.tensor([4.0, 1000, 30, 1]).log())

    @torch.no_grad()
    def find(self, batch: list[Image.Image], score_threshold: float = 0.0, max_detections: int = 100) -> Any:
        for image in batch:
            boxes, scores, labels = [], [], []
            for left in range(0, image.width, 16):
                pixel = torch.tensor(image.getpixel((left + 8, 8))).float() / 255
                probability = self.class_layer(pixel).softmax(0)[1:]
                boxes.append([float(left), 0.0, left + 16.0, 16.0])
                scores.append(probability.max().item())
                labels.append(int(probability.argmax()))
            order = torch.tensor(scores).argsort(descending=True)
            yield Detections(torch.tensor(boxes)[order], torch.tensor(labels)[order], torch.tensor(scores)[order])


def coco(root: Path, name: str, labels: list[list[int]], ids: tuple[int, ...] = (1, 2, 3)) -> Path:
    """Write images whose squares have the colour of their class, mixed with others, and their annotations."""
    rng = np.random.default_rng(len(labels))
    root.mkdir(exist_ok=True)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": identity, "name": f"colour {identity}"} for identity in ids],
    }
    for number, of_image in enumerate(labels):
        pixels = np.zeros((16, 16 * len(of_image), 3), dtype=np.uint8)
        for place, label in enumerate(of_image):
            colour = rng.uniform(0, 0.35, 3)
            colour[label] = rng.uniform(0.6, 1)
            pixels[:, 16 * place : 16 * place + 16] = 255 * colour
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number + 10,
                    "category_id": ids[label],
                    "bbox": [16 * place, 0, 16, 16],
                    "area": 256,
                    "iscrowd": 0,
                }
            )
        file = f"{name}-{number}.png"
        Image.fromarray(pixels).save(root / file)
        content["images"].append({"id": number + 10, "file_name": file, "height": 16, "width": 16 * len(of_image)})
    path = root / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def test_the_power_is_chosen_and_helps(tmp_path: Path) -> None:
    train = read_coco(coco(tmp_path, "train", [[0] * 10] * 90 + [[1, 1]] * 15 + [[2]]))
    validation = read_coco(coco(tmp_path, "val", [[0, 1, 2]] * 12))
    runner = DetectorRunner(Colours())
    seen: list[int] = []
    search = choose_power(runner, train, validation, tmp_path, progress=seen.append)
    assert sum(seen) == 12
    assert list(search.metrics) == [round(0.1 * i, 1) for i in range(11)]
    assert search.best > 0.3
    assert search.metrics[search.best]["ap"] > search.metrics[0.0]["ap"] + 5
    assert search.metrics[search.best]["ap"] == max(row["ap"] for row in search.metrics.values())
    # the groups are those of the training images: 90, 15 and 1
    assert search.metrics[0.0]["frequent"] is None
    assert search.metrics[search.best]["rare"] > search.metrics[0.0]["rare"]
    twin = longtail.calibrate_detector(Colours(), train, power=search.best)
    (again,) = evaluate_corrections(DetectorRunner(twin), [None], train, validation, tmp_path)
    assert again == pytest.approx(search.metrics[search.best], abs=1e-6)


@pytest.mark.parametrize(("ids", "order"), [((0, 1, 2), "auto"), ((0, 1, 2), "index"), ((1, 2, 3), "id")])
def test_the_order_of_the_classes_is_that_of_the_training_annotations(
    tmp_path: Path, ids: tuple[int, ...], order: Any
) -> None:
    """Also where a class has no object in the validation images, so that all ids there might be labels."""
    train = read_coco(coco(tmp_path, "train", [[0] * 10] * 30 + [[1, 1]] * 15 + [[2]], ids))
    validation = read_coco(coco(tmp_path, "val", [[1, 2]] * 6, ids))
    found = evaluate_corrections(DetectorRunner(Colours()), [None], train, validation, tmp_path, order)[0]["ap"]
    assert found > 30  # 0 with the classes shifted
    moved = json.loads((tmp_path / "val.json").read_text())  # categories of other ids, without one
    moved["categories"] = [entry | {"id": entry["id"] + 6} for entry in moved["categories"][1:]]
    for entry in moved["annotations"]:
        entry["category_id"] += 6
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    if order != "id":
        other = read_coco(tmp_path / "moved.json")
        assert evaluate_corrections(DetectorRunner(Colours()), [None], train, other, tmp_path, order)[0]["ap"] == found
        moved["categories"][0]["name"] = "another"
        (tmp_path / "moved.json").write_text(json.dumps(moved))
        with pytest.raises(LongtailError, match="classes: the detector has no class 'another' of the annotations"):
            evaluate_corrections(
                DetectorRunner(Colours()), [None], train, read_coco(tmp_path / "moved.json"), tmp_path, order
            )


def test_statistics_of_training_images_and_logn(tmp_path: Path) -> None:
    train = read_coco(coco(tmp_path, "train", [[0] * 4] * 20 + [[1]] * 3 + [[2]]))
    runner = DetectorRunner(Colours())
    few = logit_statistics(runner, train, tmp_path, max_images=5)
    full = logit_statistics(runner, train, tmp_path, max_images=None)
    assert full.count == 20 * 4 + 3 + 1
    assert few.count < full.count
    twin = longtail.calibrate_detector(Colours(), method="logn", statistics=full)
    colour = torch.rand(7, 3)
    with torch.no_grad():
        expected = logn_correction(full, "first").apply(runner.model.class_layer(colour))
        torch.testing.assert_close(twin.class_layer(colour), expected)


def test_logn_leaves_outputs_without_a_category(tmp_path: Path) -> None:
    train = read_coco(coco(tmp_path, "train", [[0] * 4] * 5 + [[1]], ids=(1, 2, 3)))
    two = dataclasses.replace(train, class_names=train.class_names[:2], class_ids=train.class_ids[:2])
    model = Colours()
    with torch.no_grad():
        model.class_layer.bias[3] = -50  # no object has raised it
    statistics = logit_statistics(DetectorRunner(model), train, tmp_path)
    has_category = torch.tensor([True, True, False])
    twin = longtail.calibrate_detector(model, two, method="logn", statistics=statistics, class_order="id")
    assert torch.equal(twin.class_layer.weight[[0, 3]], model.class_layer.weight[[0, 3]])
    assert torch.equal(twin.class_layer.bias[[0, 3]], model.class_layer.bias[[0, 3]])
    assert float(twin.class_layer.bias[1].detach()) > -10
    values = torch.rand(7, 3)
    with torch.no_grad():
        expected = logn_correction(statistics, "first", has_category).apply(model.class_layer(values))
        torch.testing.assert_close(twin.class_layer(values), expected)


class Few(Colours):
    """Returns no more than so many."""

    def find(self, batch: list[Image.Image], score_threshold: float = 0.0, max_detections: int = 100) -> Any:
        for found in super().find(batch, score_threshold):
            yield Detections(*(part[:max_detections] for part in found[:3]))


class Unlimited(Colours):
    """Has no limit to set."""

    def find(self, batch: list[Image.Image]) -> Any:  # type: ignore[override]
        return super().find(batch)


def test_as_many_objects_as_lvis_evaluates(tmp_path: Path) -> None:
    """300 of an image, where a detector returns 100 by itself; not where another number was given."""
    train = read_coco(coco(tmp_path, "train", [[0], [1], [2]]))
    validation = read_coco(coco(tmp_path, "val", [[0] * 150]))
    federated = dataclasses.replace(validation, negatives=(frozenset(),), incomplete=(frozenset(),))

    def ap(model: Any, annotations: Any, limit: int | None = None) -> Any:
        runner = DetectorRunner(model, max_detections=limit)
        return choose_power(runner, train, annotations, tmp_path, [0.0]).metrics[0.0]["ap"]

    assert ap(Few(), federated) == ap(Unlimited(), federated) == pytest.approx(100)
    assert ap(Few(), validation) == ap(Few(), federated, 100) == pytest.approx(100 * 67 / 101)
    model = fasterrcnn(60).eval()
    model.roi_heads.box_predictor, model.roi_heads.score_thresh, model.roi_heads.nms_thresh = Distinct(61), 0.0, 1.0
    for runner, expected in ((DetectorRunner(model), 100), (DetectorRunner(model).up_to(300), 300)):
        ((found,),) = runner.detect(images(1), [None])
        assert len(found.scores) == expected


def test_post_processing_of_transformers_keeps_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    process = transformers.DeformableDetrImageProcessor(size={"height": 64, "width": 64}, do_pad=False)
    model = spread(transformers_model("DeformableDetr"))
    for runner, expected in ((DetectorRunner(model, process), 12 * 5), (DetectorRunner(model, process).up_to(7), 7)):
        ((found,),) = runner.detect(images(1), [None])
        assert len(found.scores) == expected
    seen: list[int] = []
    original = type(process).post_process_object_detection

    def post_process(self: Any, outputs: Any, threshold: float, target_sizes: Any, top_k: int = 100) -> Any:
        seen.append(top_k)
        return original(self, outputs, threshold, target_sizes, top_k)

    monkeypatch.setattr(type(process), "post_process_object_detection", post_process)
    list(DetectorRunner(model, process).detect(images(1), [None]))
    list(DetectorRunner(model, process).up_to(300).detect(images(1), [None]))
    assert seen == [100, 300]


def test_missing_images_and_processors_are_one_line(tmp_path: Path) -> None:
    train = read_coco(coco(tmp_path, "train", [[0, 1, 2]]))
    (tmp_path / "train-0.png").unlink()
    with pytest.raises(LongtailError, match=r"train-0\.png: there is no such image"):
        choose_power(DetectorRunner(Colours()), train, train, tmp_path)
    with pytest.raises(LongtailError, match="needs its image processor"):
        DetectorRunner(transformers_model("Detr"))


def test_images_are_found_by_their_paths_or_by_the_last_parts(tmp_path: Path) -> None:
    train = read_coco(coco(tmp_path, "train", [[0], [1]]))
    for site in ("a", "b"):
        (tmp_path / site).mkdir()
    (tmp_path / "train-0.png").rename(tmp_path / "a" / "1.png")
    (tmp_path / "train-1.png").rename(tmp_path / "b" / "1.png")
    both = dataclasses.replace(train, files=("a/1.png", "b/1.png"))
    assert find_images(both, tmp_path).names == ("a/1.png", "b/1.png")
    with pytest.raises(LongtailError, match=r"a/1\.png: may be a/1\.png or b/1\.png of the annotations"):
        find_images(both, tmp_path / "a")
    (tmp_path / "a" / "2.png").write_bytes((tmp_path / "b" / "1.png").read_bytes())
    last = dataclasses.replace(train, files=("x/1.png", "y/2.png"))
    assert find_images(last, tmp_path / "a").names == ("1.png", "2.png")
    with pytest.raises(LongtailError, match=r"b/y/2\.png: there is no such image, nor .*b/2\.png"):
        find_images(last, tmp_path / "b")


def test_images_are_found_in_either_unicode_form(tmp_path: Path) -> None:
    """macOS decomposes the names that it writes."""
    train = read_coco(coco(tmp_path, "train", [[0]]))
    (tmp_path / "train-0.png").rename(tmp_path / unicodedata.normalize("NFD", "caf\u00e9.png"))
    found = find_images(dataclasses.replace(train, files=("caf\u00e9.png",)), tmp_path)
    assert len(list(found.open_each(range(1)))) == 1


def test_validation_images_without_objects(tmp_path: Path) -> None:
    train = read_coco(coco(tmp_path, "train", [[0, 1, 2]]))
    empty = json.loads((tmp_path / "train.json").read_text()) | {"annotations": []}
    (tmp_path / "empty.json").write_text(json.dumps(empty))
    with pytest.raises(LongtailError, match="no category has an object"):
        choose_power(DetectorRunner(Colours()), train, read_coco(tmp_path / "empty.json"), tmp_path)


class Sure(Colours):
    """Leaves out low scores, unless another threshold is given."""

    def find(self, batch: list[Image.Image], score_threshold: float = 0.99, max_detections: int = 100) -> Any:
        for found in super().find(batch, score_threshold, max_detections):
            kept = found.scores >= score_threshold
            yield Detections(*(part[kept] for part in found[:3]))


def test_low_scores_count_in_average_precision(tmp_path: Path) -> None:
    """From 0.001 on, as evaluate has it, not from the detector's own threshold; unless one is given."""
    train = read_coco(coco(tmp_path, "train", [[0], [1], [2]]))
    validation = read_coco(coco(tmp_path, "val", [[0, 1, 2]] * 4))

    def ap(model: Any, threshold: float | None = None) -> Any:
        runner = DetectorRunner(model, score_threshold=threshold)
        return evaluate_corrections(runner, [None], train, validation, tmp_path)[0]["ap"]

    assert ap(Sure()) == ap(Colours()) > ap(Sure(), 0.99)
    for runner, expected in (
        (DetectorRunner(fasterrcnn(3)), 0.001),  # torchvision's own is 0.05
        (DetectorRunner(fasterrcnn(3), score_threshold=0.1), 0.1),
        (DetectorRunner(Colours()), None),  # its own is 0
        (DetectorRunner(Unlimited()), None),
        (DetectorRunner(transformers_model("Detr"), processor("Detr")), None),  # has none
    ):
        assert runner.down_to(0.001).score_threshold == expected
