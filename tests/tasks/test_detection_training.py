"""Detection from the first step to the saved model, on small images of coloured rectangles."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from longtail.config import Config, load_recipe
from longtail.data.batch import Batch
from longtail.data.detection import Detections, PostProcessing, letterbox
from longtail.data.loader import TrainLoader
from longtail.errors import LongtailError
from longtail.losses import compute_log_prior, posterior_cross_entropy
from longtail.losses.seesaw import seesaw_loss
from longtail.methods.base import Method
from longtail.nn import Encoder, RegionClassifier
from longtail.nn.detection import DetectionNetwork, FasterRCNN, Regions
from longtail.registry import METHODS, TASKS
from longtail.tasks.detection.detector import Detector, select_detections
from longtail.tasks.detection.evaluator import DetectionEvaluator, FoundRegions
from longtail.tasks.detection.regions import RegionAdapter, class_shift
from longtail.tasks.detection.settings import DetectionSettings
from longtail.training.auto_config import auto_config
from longtail.training.metric_log import read_metrics
from longtail.training.trained_model import build_model, modules_to_save
from longtail.training.trainer import fit
from tests.tasks.boxes import average_precision, draw_data, draw_images, evaluated
from tests.training.runs import equal, fit_in_two, weights

__all__ = ["evaluated"]  # a fixture

FOR_BOXES = [name for name in METHODS if "boxes" in METHODS[name].label_kinds]


@pytest.fixture
def detecting() -> Config:
    """A detection by a network of 100,000 parameters, for two epochs."""
    config = load_recipe("bccd").config.replace(
        method="la", network="fasterrcnn:test_efficientnet:16", pretrained="none", epochs=2, validate_every=1
    )
    return config.replace(
        batch_size=8, checkpoint_seconds=0.0, data={"workers": 0}, detection={"scale": (0.9, 1.1), "jitter": 0.0}
    )


def build(config: Config, counts: tuple[int, ...] = (80, 9, 1)) -> Method:
    torch.manual_seed(0)
    encoder = Encoder(config.network, [0.5] * 3, [0.5] * 3, build=Detector.build_backbone)
    network = encoder.backbone
    assert isinstance(network, DetectionNetwork)
    network.set_image_size(64)
    adapter = RegionAdapter(config.section(DetectionSettings), config.network, list(counts))
    teacher = copy.deepcopy(encoder) if METHODS[config.method].needs_teacher(config) else None
    return METHODS[config.method](config, encoder, list(counts), teacher, adapter=adapter).train()


def batch_of(config: Config, tmp_path: Path) -> Batch:
    data = draw_data(tmp_path)
    views = TASKS["detection"].build_transforms(config, data, ["classification"])
    return next(TrainLoader(data.train, 4, views, seed=0, workers=0).epoch(0))


def test_which_methods_train_on_boxes() -> None:
    assert FOR_BOXES == ["ce", "la", "gml", "seesaw"]


@pytest.mark.parametrize("detector", ["fasterrcnn", "retinanet"])
@pytest.mark.parametrize("method", FOR_BOXES)
def test_a_step_of_every_method(detecting: Config, tmp_path: Path, method: str, detector: str) -> None:
    config = detecting.replace(method=method, network=f"{detector}:test_efficientnet:8")
    refusals = {
        "seesaw": "compares the classes of a softmax, and retinanet does not",
        "gml": "has no features of boxes",
    }
    if detector == "retinanet" and method in refusals:
        with pytest.raises(LongtailError, match=refusals[method]):
            TASKS["detection"].check(config)
        return
    trained, batch = build(config), batch_of(config, tmp_path)
    terms = trained(batch)
    of_regions = {"objectness", "proposals"} if detector == "fasterrcnn" else set()
    of_mixture = {"mixture", "temperature_likelihood"} if method == "gml" else set()
    assert set(terms) == {"classifier", "boxes"} | of_regions | of_mixture
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.parameters())


def losses(config: Config, scores: torch.Tensor, labels: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    method = build(config, counts)
    return method.loss(scores, labels, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("detector", ["fasterrcnn", "retinanet"])
def test_la_is_ce_where_all_counts_are_equal(detecting: Config, detector: str) -> None:
    config = detecting.replace(network=f"{detector}:test_efficientnet:8")
    scores, labels = torch.randn(40, 3 + (detector == "fasterrcnn")), torch.randint(-1, 4, (40,))
    plain, adjusted = config.replace(method="ce"), config.replace(method="la")
    for counts, equals in (((5, 5, 5), True), ((50, 5, 1), False)):
        pair = losses(plain, scores, labels, counts), losses(adjusted, scores, labels, counts)
        assert torch.allclose(pair[0], pair[1], rtol=1e-6 if equals else 1e-2) == equals


def test_la_leaves_the_background_as_it_is_and_a_class_without_objects_too(detecting: Config) -> None:
    scores, labels = torch.randn(40, 4), torch.randint(-1, 4, (40,))
    loss = losses(detecting.replace(method="la"), scores, labels, (6, 0, 2))
    shift = torch.tensor([6 / 4, 1.0, 2 / 4, 1.0]).log()
    assert torch.allclose(loss, posterior_cross_entropy(scores + shift, labels), rtol=1e-6)


def test_seesaw_takes_its_settings(detecting: Config) -> None:
    scores, labels, counts = torch.randn(40, 4), torch.randint(-1, 4, (40,)), (50, 5, 1)
    config = detecting.replace(method="seesaw", seesaw={"mitigation": 0.3, "compensation": 1.0})
    assert torch.equal(
        losses(config, scores, labels, counts), seesaw_loss(scores, labels, torch.tensor(counts), 0.3, 1.0)
    )


def test_the_federated_loss_leaves_classes_out(detecting: Config) -> None:
    config = detecting.replace(method="ce", network="retinanet:test_efficientnet:8", detection={"federated": 1})
    scores = torch.randn(40, 3, requires_grad=True)
    losses(config, scores, torch.tensor([1] * 4 + [3] * 36), (50, 5, 1)).backward()
    assert scores.grad is not None
    assert scores.grad.abs().sum(dim=0).gt(0).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "resnet18"}, r"network resnet18: returns one feature vector per image; .* fasterrcnn:resnet18"),
        ({"method": "ldam"}, r"method ldam: does not train networks for detection, .* use one of ce, la, gml, seesaw"),
        ({"detection": {"federated": 4}}, r"detection.federated 4: needs a yes or no for each class"),
        ({"tune": "head"}, r"tune head: is not supported for detection; leave it out"),
        ({"second_stage": "crt"}, r"second_stage crt: re-trains a classifier of whole images"),
        ({"classifier": {"views": 2}}, r"classifier.views above 1: is not supported for detection"),
    ],
)
def test_settings_that_do_not_fit(detecting: Config, changes: dict[str, object], message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        TASKS["detection"].check(detecting.replace(**changes))


def test_scales_in_the_wrong_order() -> None:
    with pytest.raises(LongtailError, match=r"detection.scale \(2.0, 1.0\): expected the smaller value first"):
        DetectionSettings(scale=(2.0, 1.0))


def test_a_step_has_room_for_an_object() -> None:
    """torchvision draws the whole part of regions · fraction, which may be none."""
    with pytest.raises(
        LongtailError, match=r"detection.objects 0.05: of 8 regions .* expected at least 0.125, or more"
    ):
        DetectionSettings(regions_per_image=8, objects=0.05)
    for regions in range(8, 300):
        with pytest.raises(LongtailError, match=r"detection\.objects") as error:
            DetectionSettings(regions_per_image=regions, objects=0.999 / regions)
        least = str(error.value).partition("expected at least ")[2].partition(",")[0]
        DetectionSettings(regions_per_image=regions, objects=float(least))


def test_a_missing_extra_is_found_before_the_training(
    detecting: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw_data(tmp_path)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.delitem(sys.modules, "faster_coco_eval.core", raising=False)
    with pytest.raises(LongtailError, match=r"needs the extra det: pip install 'longtail\[det\]'"):
        fit(detecting, tmp_path / "run", data=data, quiet=True)
    assert not (tmp_path / "run").exists()


def test_an_extra_that_is_too_old_is_found_before_the_training(
    detecting: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw_data(tmp_path)
    monkeypatch.setattr("faster_coco_eval.COCOeval_faster", lambda: None)
    with pytest.raises(LongtailError, match=r"faster-coco-eval .* is installed, expected 1\.7 or later"):
        fit(detecting, tmp_path / "run", data=data, quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_is_pretrained_stays_as_it_is(detecting: Config, tmp_path: Path) -> None:
    data, task = draw_data(tmp_path), TASKS["detection"]
    for pretrained, settings, frozen in (
        ("none", {}, set()),
        ("timm", {}, {"bn", "early"}),
        ("timm", {"freeze_early": False}, {"bn"}),
        ("none", {"freeze_batch_norm": True}, {"bn"}),
    ):
        encoder = Encoder(detecting.network, [0.5] * 3, [0.5] * 3, build=Detector.build_backbone)
        task.prepare_encoder(encoder, detecting.replace(pretrained=pretrained, detection=settings), data)
        names = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
        kinds = {"bn" if "bn" in name else "early" for name in names}
        assert kinds == frozen
        assert isinstance(encoder.backbone, DetectionNetwork)
        assert encoder.backbone.anchors.base.item() == 16


@pytest.mark.usefixtures("evaluated")
def test_a_run(detecting: Config, tmp_path: Path) -> None:
    data = draw_data(tmp_path)
    config = detecting.replace(optimizer={"ema_decay": 0.9})
    run = fit(config, tmp_path / "run", quiet=True, data=data)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["kind"] for line in lines] == ["epoch", "validation", "epoch", "validation", "test"]
    assert lines[0]["information_bits"] is None, "what is background is no class"
    assert set(run.metrics) >= {"ap", "ap50"}
    detector = Detector.load(tmp_path / "run")
    assert (detector.config.task, detector.config.head, detector.config.image_size) == ("detection", "regions", 64)
    assert detector.config.class_names == ("red", "green", "blue")
    assert detector.config.predicts_under == "uniform"
    assert "longtail import Detector" in (tmp_path / "run" / "recognizer" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("evaluated")
def test_an_interrupted_run_gives_the_same_weights(
    detecting: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw_data(tmp_path)
    monkeypatch.setattr("longtail.training.trainer.load_data", lambda *_: data)
    fit(detecting, tmp_path / "whole", quiet=True)
    fit_in_two(detecting, tmp_path / "parts", 3, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
@pytest.mark.usefixtures("evaluated")
@pytest.mark.parametrize(("network", "least"), [("fasterrcnn", 40), ("retinanet", 12)])
def test_it_learns_to_find_rectangles(detecting: Config, tmp_path: Path, network: str, least: float) -> None:
    data = draw_data(tmp_path, train=32, test=8)
    config = detecting.replace(network=f"{network}:test_efficientnet:32", epochs=14, validate_every=14)
    config = config.replace(optimizer={"learning_rate": 5e-3})
    run = fit(config, tmp_path / "run", quiet=True, data=data)
    epochs = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert epochs[-1]["loss"] < 0.7 * epochs[0]["loss"]
    assert run.metrics["ap50"] > least


@pytest.mark.parametrize(("sampler", "is_noted"), [("repeat_factor", True), ("instance", False)])
def test_a_sampler_and_the_removed_prior_favour_rare_classes_twice(
    tmp_path: Path, detecting: Config, sampler: str, is_noted: bool
) -> None:
    config = detecting.replace(method="ce", data={"sampler": sampler})
    notes = [line for line in auto_config(config, draw_data(tmp_path))[1] if line.startswith("data.sampler")]
    assert [note.endswith("favoured twice; the row «training» is without") for note in notes] == [True] * is_noted


def saved_detector(tmp_path: Path, detecting: Config, method: str = "ce", network: str = "fasterrcnn") -> Detector:
    """Return an untrained detector of three classes that was written and read again."""
    config = detecting.replace(method=method, network=f"{network}:test_efficientnet:8")
    data = dataclasses.replace(draw_data(tmp_path / "images"), val=None)
    config, _ = auto_config(config, data)
    trained = build(config, tuple(data.class_counts))
    model = build_model(modules_to_save(trained, None), config, data)
    assert isinstance(model, Detector)
    with torch.no_grad():
        model.class_layer.weight.mul_(50)
    model.save(tmp_path / "model")
    loaded = Detector.load(tmp_path / "model")
    images = torch.rand(2, 3, 64, 64)
    for own, other in zip(model.regions(images)[:2], loaded.regions(images)[:2], strict=True):
        assert torch.allclose(own, other, atol=1e-5)
    return loaded


@pytest.mark.parametrize("network", ["fasterrcnn", "retinanet"])
def test_a_detector_is_read_as_it_was_written(detecting: Config, tmp_path: Path, network: str) -> None:
    detector = saved_detector(tmp_path, detecting, network=network)
    found = detector.detect(torch.rand(2, 3, 64, 64), PostProcessing(score_threshold=0.001, max_detections=7))
    assert len(found) == 2
    for detections in found:
        assert 0 < len(detections.boxes) <= 7
        assert detections.boxes.shape == (len(detections.scores), 4)
        assert detections.labels.dtype == torch.int64
        assert (detections.scores.diff() <= 0).all()


@pytest.mark.parametrize("network", ["fasterrcnn", "retinanet"])
def test_the_prior_of_the_objects(detecting: Config, tmp_path: Path, network: str) -> None:
    """Under the training prior, plain cross-entropy predicts what its layer says; its scores under the uniform one are
    NorCal's with a power of 1 and counts divided by their mean.
    """
    detector = saved_detector(tmp_path, detecting, network=network)
    images = torch.rand(1, 3, 64, 64)
    raw = detector.raw_scores(images)
    regions = detector.regions(images)
    as_trained = detector.probabilities(regions.scores, "train")
    plain = raw.softmax(dim=1)[:, :-1] if detector.background else raw.sigmoid()
    assert torch.allclose(as_trained, plain, atol=1e-6)
    if detector.background:
        counts = torch.tensor(detector.config.class_counts, dtype=torch.float32)
        weights = torch.cat([counts.mean() / counts, torch.ones(1)])
        corrected = raw.softmax(dim=1) * weights
        expected = (corrected / corrected.sum(dim=1, keepdim=True))[:, :-1]
        assert torch.allclose(detector.probabilities(regions.scores), expected, atol=1e-6)
    shift = class_shift(compute_log_prior(detector.config.class_counts), detector.background)
    assert shift is not None
    assert torch.allclose(regions.scores, raw - shift, atol=1e-5)
    fewer = detector.probabilities(regions.scores, [0.001, 0.4995, 0.4995])
    assert (fewer[:, 0] < detector.probabilities(regions.scores)[:, 0]).all()
    with pytest.raises(LongtailError, match=r"prior: expected 3 frequencies"):
        detector.probabilities(regions.scores, [0.5, 0.5])


def test_an_affine_correction_of_the_logits_folds_into_the_class_layer(detecting: Config, tmp_path: Path) -> None:
    detector = saved_detector(tmp_path, detecting)
    images, factors, offsets = torch.rand(1, 3, 64, 64), torch.tensor([2.0, 0.5, 1.0, 1.0]), torch.randn(4)
    raw = detector.raw_scores(images)
    with torch.no_grad():
        detector.class_layer.weight.mul_(factors[:, None])
        detector.class_layer.bias.mul_(factors).add_(offsets)
    assert torch.allclose(detector.raw_scores(images), factors * raw + offsets, atol=1e-5)


def test_what_is_found_is_in_pixels_of_the_stored_image(detecting: Config, tmp_path: Path) -> None:
    detector = saved_detector(tmp_path, detecting)
    image = Image.effect_noise((90, 45), 60).convert("RGB")
    image.save(tmp_path / "wide.png")
    every = PostProcessing(score_threshold=0.001)
    found = next(detector.find([tmp_path / "wide.png"], every))
    square, scales = letterbox(image, 64)
    inside = detector.detect(detector.preprocess(image), every, sizes=[image.size])[0]
    assert square.size == (64, 64)
    expected = (inside.boxes / torch.tensor(scales * 2)).clamp(max=torch.tensor([90.0, 45.0] * 2))
    assert torch.allclose(found.boxes, expected, atol=1e-4)
    assert torch.equal(found.labels, inside.labels)
    both = list(detector.find([image, image.resize((30, 60))], every, batch_size=1))
    assert torch.equal(both[0].boxes, found.boxes)
    assert (both[1].boxes[:, 2] <= 30).all()


def test_boxes_in_the_padding_take_no_place(detecting: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of 64 × 20 pixels in a square: more regions below it than detections are kept, and one in it."""
    detector = saved_detector(tmp_path, detecting)
    corners = torch.cartesian_prod(torch.arange(1.0, 61, 4), torch.arange(21.0, 61, 4))
    padding = torch.cat([corners, corners + 2], dim=1)
    half = torch.tensor([[8.0, 4, 24, 50]])  # of which a part is in the image
    boxes = torch.cat([padding, half])

    def propose(self: FasterRCNN, images: torch.Tensor) -> Regions:
        features = torch.zeros(len(images) * len(boxes), detector.encoder.num_features)
        return Regions(features, boxes.repeat(len(images), 1), (len(boxes),) * len(images))

    monkeypatch.setattr(FasterRCNN, "propose", propose)
    image = Image.new("RGB", (32, 10))
    limits = PostProcessing(score_threshold=0.001)
    assert len(padding) > 100
    kept = [next(detector.find(image, limits)), next(detector.find_corrected([image], [None], limits))[0]]
    data = draw_data(tmp_path / "evaluated", test=1)
    evaluator = TASKS["detection"].evaluator(detector, data.test, detecting, {"uniform": None}, False)
    assert isinstance(evaluator, DetectionEvaluator)
    evaluator.update(
        torch.tensor([0]), FoundRegions(detector.regions(torch.zeros(1, 3, 64, 64)), (image.size,)), torch.zeros(1, 0)
    )
    kept += evaluator.found["uniform"].values()
    for found in kept:
        assert found.boxes.tolist() == [[4, 2, 12, 10]] * 3  # of each class
    # of a square that is a whole image all are objects
    assert len(detector.detect(torch.zeros(1, 3, 64, 64), limits)[0].boxes) == 100
    # and what has no area in the image is left out at last
    outside = Detections(padding, torch.zeros(len(padding)).long(), torch.ones(len(padding)))
    assert len(detector.to_stored(outside, image.size).boxes) == 0


def test_selection_of_detections() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40], [0, 0, 10, 10]], dtype=torch.float32)
    probabilities = torch.tensor([[0.9, 0.2], [0.8, 0.3], [0.04, 0.6], [0.5, 0.0]])
    first, second = select_detections(boxes, probabilities, (3, 1), PostProcessing(max_detections=10))
    # the second box is suppressed for class 0 by the first, and suppresses it for class 1
    assert first.labels.tolist() == [0, 1, 1]
    assert first.scores.tolist() == pytest.approx([0.9, 0.6, 0.3])
    assert torch.equal(first.boxes, boxes[[0, 2, 1]])
    assert second.labels.tolist() == [0]
    assert len(select_detections(boxes, probabilities, (3, 1), PostProcessing(max_detections=1))[0].scores) == 1
    empty = select_detections(boxes[:0], probabilities[:0], (0,))[0]
    assert len(empty.boxes) == 0


def test_the_average_precision_of_these_tests(tmp_path: Path) -> None:
    """The yardstick itself: what is there is found in full, and half of it in part."""
    wanted = draw_images(tmp_path, 4, seed=7)
    found = []
    for image in range(4):
        objects = wanted.objects_of(image)
        found.append(Detections(wanted.boxes[objects], wanted.labels[objects], torch.ones(len(objects))))
    assert average_precision(found, wanted) == [100, 100, 100]
    none = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert average_precision([*found[:2], none, none], wanted)[0] == 50


def test_a_classifier_of_regions() -> None:
    layer = RegionClassifier(5, 3, background=False, regions_per_feature=2)
    assert layer.weight.shape == (6, 5)
    assert torch.allclose(layer.bias.sigmoid(), torch.full((6,), 0.01))
    scores = layer(torch.randn(7, 5))
    assert scores.shape == (14, 3)
    assert RegionClassifier(5, 3)(torch.randn(7, 5)).shape == (7, 4)
