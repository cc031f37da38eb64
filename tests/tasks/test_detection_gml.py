"""The mixture on regions of images: queries, keys, prior and labels, against loops in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from longtail.box_labels import IGNORED_TARGET, PADDING_TARGET
from longtail.config import Config, load_recipe
from longtail.data.batch import Batch
from longtail.data.detection import PostProcessing
from longtail.data.loader import TrainLoader
from longtail.errors import LongtailError
from longtail.methods.gml import GML
from longtail.nn import Encoder, RegionClassifier
from longtail.nn.detection import FasterRCNN, RegionSamples
from longtail.registry import TASKS
from longtail.tasks.detection.detector import Detector
from longtail.tasks.detection.regions import RegionAdapter
from longtail.tasks.detection.settings import DetectionSettings
from longtail.training.auto_config import auto_config
from longtail.training.metric_log import read_metrics
from longtail.training.trained_model import build_model
from longtail.training.trainer import fit
from tests.tasks.boxes import draw_data, evaluated
from tests.training.runs import equal, fit_in_two, weights

__all__ = ["evaluated"]  # a fixture

COUNTS = (80, 9, 1)
OBJECTS = 16
"""Regions of objects that are drawn from an image at most."""


@pytest.fixture
def gml() -> Config:
    """A detection with method gml by a network of 100,000 parameters, for two epochs."""
    config = load_recipe("bccd").config.replace(
        method="gml", network="fasterrcnn:test_efficientnet:16", pretrained="none", epochs=2, validate_every=1
    )
    return config.replace(
        batch_size=8,
        checkpoint_seconds=0.0,
        data={"workers": 0},
        detection={"scale": (0.9, 1.1), "jitter": 0.0},
        gml={"share_key": True, "distillation_weight": 0.0, "queue_size": 100},
    )


def new_encoder(network: str, seed: int) -> Encoder:
    torch.manual_seed(seed)
    encoder = Encoder(network, [0.5] * 3, [0.5] * 3, build=Detector.build_backbone)
    assert isinstance(encoder.backbone, FasterRCNN)
    encoder.backbone.set_image_size(64)
    return encoder


def build(config: Config) -> GML:
    student, teacher = (new_encoder(config.network, seed) for seed in range(2))
    adapter = RegionAdapter(config.section(DetectionSettings), config.network, list(COUNTS))
    return GML(config, student, list(COUNTS), teacher, adapter=adapter).train()


def batches_of(config: Config, tmp_path: Path) -> list[Batch]:
    data = draw_data(tmp_path)
    views = TASKS["detection"].build_transforms(config, data, ["classification"])
    batches = list(TrainLoader(data.train, 4, views, seed=0, workers=0).epoch(0))
    batches[0].labels[0, 0, 4] = IGNORED_TARGET
    batches[0].labels[1, 0, 2] = batches[0].labels[1, 0, 0]  # without area
    return batches


def record_samples(method: GML, monkeypatch: pytest.MonkeyPatch) -> list[RegionSamples]:
    network, recorded = method.encoder.backbone, list[RegionSamples]()
    assert isinstance(network, FasterRCNN)
    sample = network.sample

    def recording(images: torch.Tensor, targets: torch.Tensor, foreground: float, regions: int) -> RegionSamples:
        recorded.append(sample(images, targets, foreground, regions))
        return recorded[-1]

    monkeypatch.setattr(network, "sample", recording)
    return recorded


def embed(mlp: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    embedded: torch.Tensor = copy.deepcopy(mlp).double().eval()(features.detach().double())
    return embedded


def expected_keys(method: GML, teacher: Encoder, batches: list[Batch]) -> list[tuple[torch.Tensor, int, int]]:
    """Return embedding, class and image of every object, pooled from its image alone."""
    keys = []
    network = teacher.backbone
    assert isinstance(network, FasterRCNN)
    for batch in batches:
        for view, targets, image in zip(batch.views[0], batch.labels, batch.ids.tolist(), strict=True):
            for x1, y1, x2, y2, label in targets.tolist():
                if label < 0 or x2 <= x1 or y2 <= y1:
                    continue
                box = torch.tensor([[x1, y1, x2, y2]])
                with torch.no_grad():
                    feature = network.pool(teacher.normalize(view[None]), [box])
                keys.append((embed(method.key_mlp, feature)[0], int(label), image))
    return keys


def loss_of(
    query: torch.Tensor, label: int, keys: list[tuple[torch.Tensor, int, int]], temperature: float
) -> float | None:
    """Return −log p(y|z), where p(z|c) is the mean of exp(z·k/τ) over the keys of class c; None without such keys."""
    joint = [0.0] * len(COUNTS)
    for index, count in enumerate(COUNTS):
        own = [math.exp((query @ key).item() / temperature) for key, other, _ in keys if other == index]
        if own:
            joint[index] = count / sum(COUNTS) * sum(own) / len(own)
    return None if joint[label] == 0 else -math.log(joint[label] / sum(joint))


@pytest.mark.parametrize("self_pairs", ["mixture", "none"])
def test_the_terms_of_a_step(gml: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, self_pairs: str) -> None:
    config = gml.replace(gml={"self_pairs": self_pairs, "mixture_weight": 0.7, "temperature": 0.2})
    method, batches = build(config), batches_of(config, tmp_path)[:3]
    for mlp in (method.query_mlp, method.key_mlp):
        mlp.eval()  # a query does not depend on the others then
    recorded = record_samples(method, monkeypatch)
    for batch in batches:
        terms = method(batch)
    keys = expected_keys(method, new_encoder(config.network, 1).eval(), batches)
    assert {label for _, label, _ in keys} == {0, 1, 2}
    samples, temperature = recorded[-1], method.mixture.temperature.item()
    assert samples.labels.shape == (4 * 64,)
    queries, losses, without_own = embed(method.query_mlp, samples.features), list[float](), list[float]()
    for query, label, image in zip(queries, samples.labels.tolist(), samples.image_index.tolist(), strict=True):
        if label < 0:
            continue
        others = [key for key in keys if key[2] != int(batches[-1].ids[image]) or key[1] != label]
        for chosen, into in ((keys, losses), (others, without_own)):
            loss = loss_of(query, label, chosen, temperature)
            into += [] if loss is None else [loss]
    assert len(losses) > 8
    mixture, temperature_term = (0.7 * sum(values) / len(values) for values in (losses, without_own))
    if self_pairs == "mixture":
        assert terms["mixture"].item() == pytest.approx(mixture, rel=1e-4)
        assert terms["temperature_likelihood"].item() == pytest.approx(temperature_term, rel=1e-4)
    else:
        assert terms["mixture"].item() == pytest.approx(temperature_term, rel=1e-4)
        assert "temperature_likelihood" not in terms


def test_what_the_queues_hold(gml: Config, tmp_path: Path) -> None:
    method, batch = build(gml), batches_of(gml, tmp_path)[0]
    terms = method(batch)
    targets, slots = batch.labels, method.queues
    counted = (targets[..., 4] >= 0) & (targets[..., 2:4] > targets[..., :2]).all(dim=2)
    images = batch.ids[:, None].expand_as(counted)
    expected = sorted(zip(targets[..., 4][counted].long().tolist(), images[counted].tolist(), strict=True))
    assert sorted(zip(slots.labels.tolist(), slots.ids.tolist(), strict=True)) == expected
    assert slots.sizes.tolist() == [86, 11, 3], "slots by training objects"
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_the_shape_of_the_queries_does_not_depend_on_the_images(gml: Config, tmp_path: Path) -> None:
    method, batch = build(gml), batches_of(gml, tmp_path)[0]
    for targets in (batch.labels, batch.labels[:, :1], torch.full_like(batch.labels, PADDING_TARGET)):
        changed = dataclasses.replace(batch, labels=targets.contiguous())
        features, regions, _ = method.adapter.encode(method.encoder, changed.views, changed)
        queries, labels, ids, _ = method.adapter.queries(features, regions)
        assert queries.shape == (4 * OBJECTS, method.encoder.num_features)
        is_object = (regions.labels >= 0) & (regions.labels < 3)
        number = int(is_object.sum())
        assert torch.equal(labels[:number], regions.labels[is_object])
        assert torch.equal(ids[:number], regions.ids[is_object])
        assert torch.equal(queries[:number], features[is_object])
        assert (labels[number:] == -1).all()
        if number:  # what fills up are objects too
            assert torch.equal(queries[number : 2 * number], queries[:number][: len(queries) - number])
        assert all(torch.isfinite(term) for term in method(changed).values())


@pytest.mark.usefixtures("evaluated")
def test_a_run(gml: Config, tmp_path: Path) -> None:
    run = fit(gml.replace(epochs=1), tmp_path / "run", quiet=True, data=draw_data(tmp_path))
    epochs = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    terms = ("classifier", "mixture", "temperature_likelihood", "objectness", "proposals", "boxes")
    for line in epochs:
        assert {name for name in line if name.startswith("loss/")} == {f"loss/{term}" for term in terms}
        assert all(math.isfinite(line[f"loss/{term}"]) for term in terms)
        assert line["information_bits"] is None
        assert 0 < line["queue_fill"] <= 1
    assert run.teacher_seconds > 0
    detector = Detector.load(tmp_path / "run")
    assert (detector.config.head, detector.config.predicts_under) == ("regions", "uniform")
    assert len(detector.detect(torch.rand(2, 3, 64, 64), PostProcessing(score_threshold=0.0))) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("evaluated")
def test_a_teacher_that_is_a_run(gml: Config, tmp_path: Path) -> None:
    data = draw_data(tmp_path)
    fit(gml.replace(method="la", epochs=1), tmp_path / "la", quiet=True, data=data)
    config = gml.replace(epochs=1, teacher={"source": str(tmp_path / "la")})
    run = fit(config, tmp_path / "run", quiet=True, data=data)
    assert run.teacher_seconds == 0
    assert not (tmp_path / "teachers").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("evaluated")
def test_an_interrupted_run_gives_the_same_weights(
    gml: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw_data(tmp_path)
    monkeypatch.setattr("longtail.training.trainer.load_data", lambda *_: data)
    fit(gml, tmp_path / "whole", quiet=True)
    fit_in_two(gml, tmp_path / "parts", 3, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    states = [
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["method"]["_extra_state"]
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_what_has_one_possible_value_is_chosen(gml: Config, tmp_path: Path) -> None:
    config = gml.replace(gml={"share_key": False, "distillation_weight": None, "queue_size": None})
    data = draw_data(tmp_path)
    config, reasons = auto_config(config, data)
    settings = config.section(type(gml.section(GML.settings_class)))
    assert (settings.share_key, settings.distillation_weight) == (True, 0.0)
    assert settings.queue_size == sum(data.class_counts)
    assert "gml.share_key true: an image with boxes has one view" in reasons


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "retinanet:resnet18"}, "network retinanet:resnet18: has no features of boxes, .* or method la"),
        (
            {"teacher": {"network": "retinanet:resnet18"}},
            "teacher.network retinanet:resnet18: has no features of boxes",
        ),
        ({"gml": {"share_query": False}}, "gml.share_query false: is not supported for detection; leave it out"),
        ({"gml": {"keys": "momentum"}}, "gml.keys momentum: is not supported"),
        ({"gml": {"queues": "batch"}}, "gml.queues batch: is not supported"),
        ({"gml": {"feature_transfer": 2}}, "gml.feature_transfer: is not supported"),
        ({"gml": {"ensemble_weight": 1.0}}, "gml.ensemble_weight: is not supported"),
        ({"gml": {"distillation_weight": 1.0}}, "gml.distillation_weight above 0: is not supported"),
        ({"teacher": {"cache": 2}}, "teacher.cache: is not supported"),
        ({"teacher": {"count": 2}}, "teacher.count above 1: is not supported"),
        ({"teacher": {"source": ("a", "b")}}, "more than one teacher.source: is not supported"),
        ({"teacher": {"generations": 2}}, "teacher.generations above 1: is not supported"),
        ({"teacher": {"views": 2}}, "teacher.views above 1: is not supported"),
        ({"teacher": {"tune": "head"}}, "teacher.tune head: is not supported"),
    ],
)
def test_settings_that_do_not_fit(gml: Config, changes: dict[str, object], message: str) -> None:
    with pytest.raises(LongtailError, match=message) as raised:
        TASKS["detection"].check(gml.replace(**changes))
    assert "\n" not in str(raised.value)


def test_a_teacher_without_features_of_boxes(gml: Config, tmp_path: Path) -> None:
    encoder = Encoder("conv8", [0.5] * 3, [0.5] * 3)
    with pytest.raises(LongtailError, match=r"teacher\.source 'runs/x': has no features of boxes; expected train, or"):
        TASKS["detection"].check_teacher(encoder, "runs/x")
    data = draw_data(tmp_path)
    config, _ = auto_config(gml.replace(network="retinanet:test_efficientnet:8", method="ce"), data)
    network = Encoder(config.network, data.mean, data.std, build=Detector.build_backbone)
    modules = nn.ModuleDict({"encoder": network, "classifier": RegionClassifier(network.num_features, 3, False, 6)})
    build_model(modules, config, data).save(tmp_path / "given")
    with pytest.raises(LongtailError, match=r"teacher.source '.*given': has no features of boxes"):
        fit(gml.replace(teacher={"source": str(tmp_path / "given")}), tmp_path / "run", quiet=True, data=data)
    assert not (tmp_path / "run").exists()
