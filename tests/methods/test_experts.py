"""The product of experts against float64 loops, and a run of it wherever a run is used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.data.dataset import LongTailedData
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.experiments.compare import plan
from longtail.inference.export import export_onnx
from longtail.inference.recognizer import Recognizer
from longtail.methods.experts import ExpertsSettings, ProductOfExperts
from longtail.nn import CosineClassifier, Encoder
from longtail.nn.experts import relative_operations
from longtail.tasks.loading import load_model
from longtail.training.teacher import load_teacher
from longtail.training.trainer import fit
from tests.conftest import Command
from tests.methods.steps import batches, build_method, new_encoder
from tests.training.runs import weights


@pytest.fixture
def experts(tiny: Config) -> Config:
    return tiny.replace(method="experts")


@pytest.fixture
def data(tiny: Config) -> LongTailedData:
    return load_data(tiny.data, 0)


def scores_by_hand(method: ProductOfExperts, view: Tensor) -> list[list[list[float]]]:
    """Return the scores [image][expert][class] of a view, from a loop over the experts."""
    features, weight = method.encoder(view).double().detach(), method.classifier.weight.double().detach()
    count = method.classifier.num_experts
    width = features.shape[1] // count
    scores = []
    for feature in features:
        rows = []
        for e in range(count):
            part, own = feature[e * width : (e + 1) * width], weight[:, e * width : (e + 1) * width]
            rows.append([30 * float(part @ w / part.norm() / w.norm()) for w in own])
        scores.append(rows)
    return scores


def log_softmax(values: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value) for value in values))
    return [value - total for value in values]


def log_prior(data: LongTailedData) -> list[float]:
    return [math.log(count / sum(data.class_counts)) for count in data.class_counts]


@pytest.mark.parametrize("strengths", [(0.0, 1.0, 2.0), (0.5, 1.0)])
def test_the_terms_against_loops(experts: Config, data: LongTailedData, strengths: tuple[float, ...]) -> None:
    config = experts.replace(
        experts={"strengths": strengths, "self_distillation_weight": 0.3},
        classifier={"views": 2, "distillation_weight": 0.5, "distill_every_view": True, "agreement_weight": 0.7},
        teacher={"distillation_temperature": 2.0},
    )
    teacher = new_encoder()
    classifier = CosineClassifier(teacher.num_features, 10)
    method = build_method(config, data, teacher, classifier).eval()
    assert isinstance(method, ProductOfExperts)
    batch = batches(method, data)[0]
    batch = Batch(tuple(view[:7] for view in batch.views), batch.labels[:7], batch.ids[:7])
    terms = method(batch)
    assert set(terms) == {"classifier", "self_distillation", "distillation", "agreement"}
    prior, count = log_prior(data), len(strengths)
    classification, distilled, among, agree = 0.0, 0.0, 0.0, 0.0
    views = [scores_by_hand(method, view) for view in batch.views]

    def soft_divergence(target: list[float], scores: list[float]) -> float:
        p, q = log_softmax([v / 2 for v in target]), log_softmax([v / 2 for v in scores])
        return 4 * sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))

    for view, by_image in zip(batch.views, views, strict=True):
        teacher_scores = classifier(teacher.eval()(view)).double().tolist()
        for image, (rows, label) in enumerate(zip(by_image, batch.labels.tolist(), strict=True)):
            corrected = [
                [s - (1 - tau) * p for s, p in zip(row, prior, strict=True)]
                for row, tau in zip(rows, strengths, strict=True)
            ]
            product = [sum(column) / count for column in zip(*corrected, strict=True)]
            for row, free, tau in zip(rows, corrected, strengths, strict=True):
                classification -= log_softmax([s + tau * p for s, p in zip(row, prior, strict=True)])[label]
                distilled += soft_divergence(teacher_scores[image], free)
                among += soft_divergence(product, free)
    for image in range(7):
        for e, tau in enumerate(strengths):
            one, two = (log_softmax([s + tau * p for s, p in zip(v[image][e], prior, strict=True)]) for v in views)
            for a, b in zip(one, two, strict=True):
                mean = (math.exp(a) + math.exp(b)) / 2
                agree += (math.exp(a) * math.log(math.exp(a) / mean) + math.exp(b) * math.log(math.exp(b) / mean)) / 2
    assert terms["classifier"].item() == pytest.approx(classification / (14 * count), rel=1e-4)
    assert terms["distillation"].item() == pytest.approx(0.5 * distilled / (14 * count), rel=1e-4)
    assert terms["self_distillation"].item() == pytest.approx(0.3 * among / (14 * count), rel=1e-4)
    assert terms["agreement"].item() == pytest.approx(0.7 * agree / (7 * count), rel=1e-4)


@pytest.mark.parametrize("strengths", [(0.0, 1.0, 2.0), (0.0, 0.0), (1.5, 3.0)])
def test_the_product_is_that_of_posteriors_free_of_the_prior(
    experts: Config, data: LongTailedData, strengths: tuple[float, ...]
) -> None:
    config = experts.replace(experts={"strengths": strengths})
    method = build_method(config, data).eval()
    assert isinstance(method, ProductOfExperts)
    view, prior = batches(method, data)[0].views[0][:5], log_prior(data)
    predicted = method.classifier(method.encoder(view)).log_softmax(dim=1)
    for scores, rows in zip(predicted.tolist(), scores_by_hand(method, view), strict=True):
        # what an expert says of an image of the training set, by Bayes' rule under equal frequencies, multiplied
        product = [0.0] * 10
        for row, tau in zip(rows, strengths, strict=True):
            trained = log_softmax([s + tau * p for s, p in zip(row, prior, strict=True)])
            balanced = log_softmax([t - p for t, p in zip(trained, prior, strict=True)])
            product = [a + b / len(strengths) for a, b in zip(product, balanced, strict=True)]
        assert scores == pytest.approx(log_softmax(product), abs=1e-4)
    assert method.predicts_under(config) == "uniform"
    if strengths == (0.0, 1.0, 2.0):  # whose remainders cancel
        raw = method.classifier.expert_scores(method.encoder(view)).mean(dim=1)
        torch.testing.assert_close(method.classifier(method.encoder(view)), raw, rtol=1e-4, atol=1e-4)


def test_without_adjustment_all_are_cross_entropy_and_contain_the_prior(experts: Config, data: LongTailedData) -> None:
    config = experts.replace(classifier={"logit_adjustment": False})
    method = build_method(config, data).eval()
    assert isinstance(method, ProductOfExperts)
    batch = batches(method, data)[0]
    scores = method.classifier.expert_scores(method.encoder(batch.views[0]))
    each = [torch.nn.functional.cross_entropy(scores[:, e], batch.labels).item() for e in range(3)]
    assert method(batch)["classifier"].item() == pytest.approx(sum(each) / 3, rel=1e-5)
    assert method.predicts_under(config) == "train"
    assert not method.classifier.contained_log_prior.any()


def test_a_class_without_images_gets_no_gradient_that_is_not_finite(experts: Config, data: LongTailedData) -> None:
    config = experts.replace(
        experts={"self_distillation_weight": 1.0}, classifier={"views": 2, "agreement_weight": 1.0}
    )
    method = ProductOfExperts(config, new_encoder(), [*data.class_counts[:-1], 0])
    batch = batches(method, data)[0]
    terms = method(Batch(batch.views, batch.labels.masked_fill(batch.labels == 9, 0), batch.ids))
    torch.stack(list(terms.values())).sum().backward()
    assert all(bool(term.isfinite()) for term in terms.values())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in method.parameters())
    assert bool(method.classifier.contained_log_prior.isfinite().all())


@pytest.mark.slow
def test_a_run_is_used_as_any_other(experts: Config, tmp_path: Path, command: Command) -> None:
    run = fit(experts.replace(data={"val_fraction": 0.2}), tmp_path / "run", quiet=True)
    model = Recognizer.load(tmp_path / "run")
    assert (model.config.head, model.config.experts, model.config.expert_stages) == ("experts", 3, 2)
    assert (model.config.network, model.config.predicts_under) == ("conv8-tiny", "uniform")
    images = torch.rand(5, 1, 8, 8)
    probabilities = model.predict(images).probabilities
    # the saved model has the scores of the method, and its own folder gives it again
    model.save(tmp_path / "again")
    assert torch.equal(Recognizer.load(tmp_path / "again").predict(images).probabilities, probabilities)
    expected = model.classifier(model.encoder(images)).div(model.config.temperature).softmax(dim=1)
    torch.testing.assert_close(probabilities, expected)
    export_onnx(load_model(tmp_path / "run"), tmp_path / "model.onnx")
    code, shown, error = command("evaluate", tmp_path / "run", "--tta", "flip")
    assert (code, error) == (0, "")
    assert "balanced accuracy" in shown
    card = (tmp_path / "run" / "recognizer" / "README.md").read_text()
    assert "with 3 experts, whose last 2 stages are their own" in card
    code, _, error = command("rebalance", tmp_path / "run", "--method", "crt", "--epochs", "1", "--out", tmp_path / "b")
    assert (code, error) == (0, "")
    assert Recognizer.load(tmp_path / "b").predict(images).probabilities.shape == (5, 10)
    # a pass counts as the operations of all experts
    cost = relative_operations("conv8-tiny", 3, 2)
    plain = fit(experts.replace(method="la", data={"val_fraction": 0.2}), tmp_path / "la", quiet=True)
    assert run.student_passes == pytest.approx(cost * plain.student_passes, rel=0.01)


@pytest.mark.parametrize("method", ["la", "gml", "experts"])
def test_one_network_learns_from_a_run_of_experts(
    experts: Config, data: LongTailedData, tmp_path: Path, method: str
) -> None:
    fit(experts, tmp_path / "teacher", quiet=True)
    config = experts.replace(
        method=method,
        teacher={"source": str(tmp_path / "teacher")},
        classifier={"distillation_weight": 1.0},
    )
    teacher = load_teacher(config, data, distils=True)
    images = torch.rand(4, 1, 8, 8)
    model = Recognizer.load(tmp_path / "teacher")
    assert teacher.classifier is not None
    with torch.no_grad():
        # the product's scores, not those of an expert
        torch.testing.assert_close(teacher.classifier(teacher.encoder(images)), model.scores(images))
    fit(config, tmp_path / "student", quiet=True)
    student = Recognizer.load(tmp_path / "student")
    assert student.config.experts == (3 if method == "experts" else 1)


def test_cached_scores_of_experts_are_the_same(experts: Config, tmp_path: Path) -> None:
    fit(experts, tmp_path / "teacher", quiet=True)
    config = experts.replace(
        method="la",
        data={"augment": "none"},
        teacher={"source": str(tmp_path / "teacher")},
        classifier={"distillation_weight": 1.0},
    )
    fit(config, tmp_path / "plain", quiet=True)
    fit(config.replace(teacher={"cache": 1}), tmp_path / "cached", quiet=True)
    plain, cached = weights(tmp_path / "plain"), weights(tmp_path / "cached")
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-2, atol=1e-2)


def test_the_teacher_that_is_trained_first_is_one_network(experts: Config, tmp_path: Path) -> None:
    fit(experts.replace(classifier={"distillation_weight": 1.0}), tmp_path / "run", quiet=True)
    (teacher,) = (folder for folder in (tmp_path / "teachers").iterdir() if folder.is_dir())
    assert Recognizer.load(teacher).config.experts == 1


def test_experts_start_from_the_weights_of_one_network(experts: Config, tmp_path: Path, command: Command) -> None:
    fit(experts.replace(method="la"), tmp_path / "la", quiet=True)
    still = experts.replace(init=str(tmp_path / "la"), epochs=1, optimizer={"learning_rate": 1e-12})
    fit(still, tmp_path / "experts", quiet=True)
    before, after = weights(tmp_path / "la"), weights(tmp_path / "experts")
    for third in after["classifier.weight"].split(before["classifier.weight"].shape[1], dim=1):
        torch.testing.assert_close(third, before["classifier.weight"])
    name = "encoder.backbone.layers.14.weight"
    own = [value for key, value in after.items() if ".experts." in key and value.shape == before[name].shape]
    assert sum(torch.allclose(value, before[name]) for value in own) == 3
    flags = ["--method", "la", "--init", tmp_path / "experts", "--out", tmp_path / "x", "--quiet"]
    code, _, error = command("train", "digits-lt", *flags)
    assert code == 2
    assert "is a network of 3 experts" in error
    assert "--teacher.source" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": "head"}, r"tune head: method experts"),
        (
            {"classifier": {"agreement_weight": 0.5}},
            r"agreement_weight 0\.5: method experts classifies one",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(experts: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        ProductOfExperts.check(experts.replace(**changes), [9, 3])


def test_one_strength_is_no_ensemble(command: Command, tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match=r"experts\.strengths: expected at least two"):
        ExpertsSettings(strengths=(1.0,))
    flags = ["--method", "experts", "--out", tmp_path / "x"]
    code, _, error = command("train", "digits-lt", *flags, "--experts.strengths", "1")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("longtail: error: experts.strengths: expected at least two")
    code, _, error = command("train", "digits-lt", *flags, "--network", "resnet8", "--experts.stages", "3")
    assert (code, error.count("\n")) == (2, 1)
    assert "expected at most 2" in error
    assert not (tmp_path / "x").exists()


def test_equal_passes_are_equal_operations(experts: Config) -> None:
    config = experts.replace(network="resnet20", epochs=10)
    epochs = {each.config.method: each.config.epochs for each in plan(config, ["la", "experts"], [0], "passes")}
    assert epochs == {"experts": 10, "la": round(10 * relative_operations("resnet20", 3, 2))}
    assert epochs["la"] == 23


def test_a_prepared_encoder_stays_as_it_is(experts: Config) -> None:
    encoder = Encoder("conv8-tiny", [0.3], [0.4])
    ProductOfExperts.prepare_encoder(encoder, experts)
    backbone = encoder.backbone
    ProductOfExperts.prepare_encoder(encoder, experts)
    assert encoder.backbone is backbone


def test_distillation_without_adjustment_is_free_of_the_prior(experts: Config, data: LongTailedData) -> None:
    """A student that is its teacher under the training prior has nothing to learn from it."""
    config = experts.replace(classifier={"logit_adjustment": False, "distillation_weight": 1.0})
    method = build_method(config, data)
    teacher_scores = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    scores = (teacher_scores + torch.tensor(log_prior(data)))[:, None].expand(-1, 3, -1)
    counted = torch.ones(6, dtype=torch.bool)
    assert method.distillation_loss(scores, teacher_scores, counted).item() == pytest.approx(0, abs=1e-5)
    assert method.distillation_loss(scores.flip(2), teacher_scores, counted).item() > 0.1
