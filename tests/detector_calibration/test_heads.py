"""A correction in the weights is the same correction of the logits, for every detector; the identity changes no bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import longtail
from longtail.data.detection import Detections
from longtail.detector_calibration.heads import SUPPORTED, corrected_copy, find_class_head
from longtail.detector_calibration.running import DetectorRunner
from longtail.errors import LongtailError
from longtail.evaluation.detector_scores import LogitCorrection, LogitStatistics, logn_correction, norcal_correction
from tests.detector_calibration.models import CLASSES, TORCHVISION, TRANSFORMERS, spread, transformers_model

COUNTS = [3000, 400, 50, 8, 1]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {kind: (kind, {}) for kind in TRANSFORMERS} | {
    "DeformableDetr refined": ("DeformableDetr", {"with_box_refine": True}),
    "DeformableDetr two-stage": ("DeformableDetr", {"with_box_refine": True, "two_stage": True}),
}


def pixels(seed: int = 0) -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def same_bits(first: Any, second: Any) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(
        one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in one
    )


def class_outputs(model: Any) -> list[Tensor]:
    """The outputs of the class layers in a forward pass, (…, L)."""
    head, seen = find_class_head(model), []

    def take(_: Any, __: Any, output: Tensor) -> None:
        seen.append(output.unflatten(1, (-1, head.num_outputs)).movedim(2, -1) if output.ndim == 4 else output)

    handles = [layer.register_forward_hook(take) for layer in dict.fromkeys(head.layers)]
    with torch.no_grad():
        model(list(pixels()))
    for handle in handles:
        handle.remove()
    return seen


def corrections(model: Any) -> dict[str, LogitCorrection]:
    head = find_class_head(model)
    chosen = {"norcal": norcal_correction(torch.tensor(COUNTS), 0.6, head.background)}
    if head.scaling_folds:
        statistics = LogitStatistics(head.num_outputs)
        statistics.update(torch.randn(50, head.num_outputs, generator=torch.Generator().manual_seed(2)) * 3 + 1)
        chosen["logn"] = logn_correction(statistics, head.background)
    return chosen


@pytest.mark.parametrize("kind", TORCHVISION)
def test_torchvision(kind: str) -> None:
    model = spread(TORCHVISION[kind]())
    head = find_class_head(model)
    assert head.num_classes == CLASSES
    assert same_bits(longtail.calibrate_detector(model, COUNTS, power=0.0), model)
    raw = class_outputs(model)
    for correction in corrections(model).values():
        corrected = corrected_copy(model, correction)
        got = class_outputs(corrected)
        assert len(got) == len(raw)
        for before, after in zip(raw, got, strict=True):
            torch.testing.assert_close(after, correction.apply(before), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            ours, theirs = corrected(list(pixels())), model(list(pixels()))
        assert ours[0].keys() == theirs[0].keys()
        assert not torch.equal(ours[0]["scores"], theirs[0]["scores"])


@pytest.mark.parametrize("kind", VARIANTS)
def test_transformers(kind: str) -> None:
    name, options = VARIANTS[kind]
    model = spread(transformers_model(name, **options))
    head = find_class_head(model)
    assert head.num_classes == CLASSES
    assert head.label_names == tuple(f"class {index}" for index in range(CLASSES))
    assert same_bits(longtail.calibrate_detector(model, COUNTS, power=0.0), model)
    with torch.no_grad():
        before = model(pixel_values=pixels())
        for correction in corrections(model).values():
            after = corrected_copy(model, correction)(pixel_values=pixels())
            torch.testing.assert_close(after.logits, correction.apply(before.logits), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(after.pred_boxes, before.pred_boxes)  # the boxes are chosen as before
            assert not torch.allclose(after.logits, before.logits, atol=0.1)


def test_the_identity_leaves_detections_as_they_are() -> None:
    model = spread(TORCHVISION["maskrcnn"]())
    twin = longtail.calibrate_detector(model, COUNTS, power=0)
    with torch.no_grad():
        ours, theirs = twin(list(pixels()))[0], model(list(pixels()))[0]
    assert len(ours["scores"]) > 0
    assert all(torch.equal(ours[name], theirs[name]) for name in ("boxes", "scores", "labels", "masks"))


def test_minus_zero_stays() -> None:
    layer = nn.Linear(2, 3)
    nn.init.constant_(layer.bias, -0.0)
    model = Own(layer, None)
    twin = corrected_copy(model, norcal_correction(torch.tensor([1.0, 2.0, 3.0]), 0.0, None))
    assert twin.class_layer.bias.detach().numpy().tobytes() == layer.bias.detach().numpy().tobytes()


class Own(nn.Module):
    """A detector as longtail's own declare it: one box, whose class scores are those of the mean colour."""

    def __init__(self, layer: Any, background: str | None) -> None:
        super().__init__()
        self.class_layer, self.background = layer, background

    @torch.no_grad()
    def find(self, images: list[Image.Image], score_threshold: float = 0.0) -> Any:
        for image in images:
            colour = torch.tensor(image.resize((1, 1)).getpixel((0, 0))).float() / 255
            scores, labels = self.class_layer(colour).softmax(0)[1:].max(0)
            yield Detections(torch.tensor([[0.0, 0.0, 4.0, 4.0]]), labels[None], scores[None])


def test_a_model_that_declares_its_class_layer() -> None:
    torch.manual_seed(0)
    model = Own(nn.Linear(3, 4), "first")
    twin = longtail.calibrate_detector(model, [100, 10, 1], power=1, normalization="paper")
    shift = twin.class_layer.bias - model.class_layer.bias
    torch.testing.assert_close(shift, -torch.tensor([1.0, 100, 10, 1]).log())
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    runner = DetectorRunner(model)
    same, raised = (norcal_correction(torch.tensor([100.0, 10, 1]), power, "first") for power in (0.0, 1.0))
    for by_correction, before, after in zip(
        runner.detect(images, [same, raised]),
        model.find(images),
        longtail.calibrate_detector(model, [100, 10, 1], power=1).find(images),
        strict=True,
    ):
        assert torch.equal(by_correction[0].scores, before.scores)
        assert torch.equal(by_correction[1].scores, after.scores)
    assert runner.statistics(images).count == 2


@dataclasses.dataclass(frozen=True)
class Config:
    class_names: tuple[str, ...]
    predicts_under: str


class RemovesPrior(Own):
    """As longtail's detectors after plain cross-entropy: the background is the last class, the prior is removed."""

    def __init__(self, counts: torch.Tensor) -> None:
        super().__init__(nn.Linear(3, len(counts) + 1), None)
        self.background = True  # type: ignore[assignment]
        self.config = Config(("red", "green", "blue"), "train")
        self.counts = counts

    @torch.no_grad()
    def find(self, images: list[Image.Image], score_threshold: float = 0.0) -> Any:
        for image in images:
            colour = torch.tensor(image.resize((1, 1)).getpixel((0, 0))).float() / 255
            scores = self.class_layer(colour)
            if self.config.predicts_under == "train":
                scores[:-1] -= self.counts.log()
            best, labels = scores.softmax(0)[:-1].max(0)
            yield Detections(torch.tensor([[0.0, 0.0, 4.0, 4.0]]), labels[None], best[None])


def test_the_correction_takes_the_place_of_the_models_own() -> None:
    torch.manual_seed(0)
    counts = torch.tensor([100.0, 10, 1])
    model = RemovesPrior(counts)
    assert find_class_head(model).label_names == ("red", "green", "blue")
    paper = norcal_correction(counts, 1.0, "last", "paper")
    image = [Image.new("RGB", (8, 8), "lime")]
    ((own, ours, none),) = DetectorRunner(model).detect(
        image, [None, paper, norcal_correction(counts, 0.0, "last", "paper")]
    )
    torch.testing.assert_close(ours.scores, own.scores)  # NorCal with a power of 1 is what it does by itself
    assert not torch.allclose(none.scores, own.scores, atol=1e-3)
    twin = longtail.calibrate_detector(model, {"red": 100, "green": 10, "blue": 1}, power=0)
    assert twin.config.predicts_under == "uniform"
    assert model.config.predicts_under == "train"
    assert torch.equal(next(twin.find(image)).scores, none.scores)


def test_anchors_of_a_declared_convolution() -> None:
    layer = nn.Conv2d(2, 6, 1)
    model = Own(layer, None)
    model.num_outputs = 3  # type: ignore[assignment]
    correction = norcal_correction(torch.tensor([9.0, 3.0, 1.0]), 1.0, None, "paper")
    shift = corrected_copy(model, correction).class_layer.bias - layer.bias
    torch.testing.assert_close(shift, -torch.tensor([9.0, 3, 1, 9, 3, 1]).log())


def test_others_are_named() -> None:
    with pytest.raises(LongtailError, match="Linear is not a detector") as error:
        longtail.calibrate_detector(nn.Linear(2, 2), [1], power=1)
    assert SUPPORTED in str(error.value)
    assert "detector_scores" in str(error.value)
    model = TORCHVISION["fasterrcnn"]()
    model.roi_heads.box_predictor = nn.Identity()
    with pytest.raises(LongtailError, match="has no Linear layer cls_score"):
        find_class_head(model)


def test_logn_where_the_box_quality_is_added() -> None:
    model = transformers_model("DFine")
    statistics = LogitStatistics(CLASSES)
    statistics.update(torch.randn(9, CLASSES))
    with pytest.raises(LongtailError, match="adds the quality of the box"):
        longtail.calibrate_detector(model, method="logn", statistics=statistics)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": [1, 2], "power": 1}, "2 numbers, but the detector has 5 classes"),
        ({"counts": COUNTS}, "NorCal: needs power"),
        ({"power": 1}, "NorCal: needs counts"),
        ({"method": "logn"}, "LogN: needs the statistics"),
        ({"counts": {"cat": 1}, "power": 1}, "no class names"),
    ],
)
def test_missing_arguments_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        longtail.calibrate_detector(TORCHVISION["retinanet"](), **arguments)


def test_counts_by_name() -> None:
    model = transformers_model("Detr")
    by_name = {f"Class {index}": count for index, count in enumerate(COUNTS)}
    first, second = (longtail.calibrate_detector(model, counts, power=1) for counts in (by_name, COUNTS))
    assert same_bits(first, second)
    with pytest.raises(LongtailError, match="no class 'class 7'"):
        longtail.calibrate_detector(model, {"class 7": 1}, power=1)
