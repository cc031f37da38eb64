"""What all methods have in common: views, the classification loss, distillation, and messages about wrong settings."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longtail.config import Config, load_recipe, settings_type
from longtail.data.batch import Batch
from longtail.data.dataset import LongTailedData, from_arrays
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.losses import LDAMLoss, agreement, distillation, posterior_cross_entropy
from longtail.methods.base import Method
from longtail.methods.ldam import LDAM
from longtail.nn import CosineClassifier, ExpertClassifier
from longtail.registry import METHODS
from longtail.training.trainer import fit
from tests.methods.steps import batches, build_method, new_encoder, new_loader
from tests.training.runs import equal, fit_in_two, weights

CONTRASTIVE = ("supcon", "paco", "gpaco", "bcl", "proco")
FOR_IMAGES = [name for name in METHODS if "image" in METHODS[name].label_kinds]


@pytest.fixture
def data(tiny: Config) -> LongTailedData:
    return load_data(tiny.data, 0)


def test_every_registered_method_can_be_imported() -> None:
    classes = [METHODS[name] for name in METHODS]
    assert len(set(classes)) == len(classes) > 10
    assert all(issubclass(method_class, Method) for method_class in classes)
    # a method's own settings have its name
    for name, method_class in zip(METHODS, classes, strict=True):
        assert settings_type(name) is method_class.settings_class


@pytest.mark.parametrize("name", ["ce", "la"])
def test_classifiers_average_over_views(tiny: Config, data: LongTailedData, name: str) -> None:
    config = tiny.replace(classifier={"views": 2})
    method = METHODS[name](config, new_encoder(), data.class_counts).eval()
    assert method.view_plan(config).uses == method.view_plan(config).student == ("classification",) * 2
    batch = next(new_loader(data, 2).epoch(0))
    both = method(batch)["classifier"].item()
    alone = METHODS[name](tiny, new_encoder(), data.class_counts).eval()
    alone.load_state_dict(method.state_dict())
    each = [alone(Batch((view,), batch.labels, batch.ids))["classifier"].item() for view in batch.views]
    assert both == pytest.approx(sum(each) / 2, rel=1e-4)


def test_logit_adjustment_adds_the_log_prior(tiny: Config, data: LongTailedData) -> None:
    torch.manual_seed(0)
    la = METHODS["la"](tiny, new_encoder(), data.class_counts).eval()
    ce = METHODS["ce"](tiny, new_encoder(), data.class_counts).eval()
    ce.load_state_dict(la.state_dict())
    batch = next(new_loader(data, 1).epoch(0))
    scores = la.classifier(la.encoder(batch.views[0]))
    log_prior = torch.tensor(data.class_counts).float().div(len(data.train)).log()
    assert ce(batch)["classifier"].item() == pytest.approx(F.cross_entropy(scores, batch.labels).item(), rel=1e-5)
    expected = F.cross_entropy(scores + log_prior, batch.labels).item()
    assert la(batch)["classifier"].item() == pytest.approx(expected, rel=1e-5)


def test_without_adjustment_the_prior_stays_in_the_scores(tiny: Config, data: LongTailedData) -> None:
    config = tiny.replace(method="la", classifier={"logit_adjustment": False})
    method = build_method(config, data).eval()
    batch = batches(method, data)[0]
    scores = method.classifier(method.encoder(batch.views[0]))
    assert method(batch)["classifier"].item() == pytest.approx(F.cross_entropy(scores, batch.labels).item(), rel=1e-5)
    assert method.predicts_under(config) == "train"
    assert method.predicts_under(tiny.replace(method="la")) == "uniform"


@pytest.mark.parametrize("name", FOR_IMAGES)
def test_every_method_can_be_distilled_into(tiny: Config, data: LongTailedData, name: str) -> None:
    section = "gml" if name == "gml" else "classifier"
    plain = tiny.replace(method=name)
    assert METHODS[name].needs_teacher(plain) == (name == "gml")
    teacher = new_encoder()
    classifier = CosineClassifier(teacher.num_features, 10)
    config = plain.replace(**{section: {"distillation_weight": 0.5}})
    method = build_method(config, data, teacher, classifier).eval()
    batch = batches(method, data)[0]
    terms = method(batch)
    with torch.no_grad():
        teacher_scores = classifier(teacher.eval()(batch.views[0]))
        scores = method.classifier(method.encoder(batch.views[0]))
        if isinstance(method.classifier, ExpertClassifier):  # each of them learns from the teacher
            each = method.classifier.expert_scores(method.encoder(batch.views[0]))
            each = each - method.classifier.contained_log_prior
            assert torch.allclose(each.mean(dim=1), scores, atol=1e-5)
            expected = 0.5 * sum(distillation(each[:, e], teacher_scores).item() for e in range(3)) / 3
        else:
            if method.predicts_under(config) == "train":  # compared without the prior, of which a teacher is free
                scores = scores - torch.tensor(data.class_counts).float().div(len(data.train)).log()
            expected = 0.5 * distillation(scores, teacher_scores).item()
    assert terms["distillation"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "la", "classifier": {"views": 2, "distillation_weight": 0.5}},
        {
            "method": "gml",
            "gml": {"share_query": False, "distillation_weight": 0.5},
            "classifier": {"every_view": True},
        },
    ],
    ids=["la", "gml"],
)
def test_every_view_can_be_distilled(tiny: Config, data: LongTailedData, changes: dict[str, Any]) -> None:
    config = tiny.replace(**changes).replace(classifier={"distill_every_view": True})
    teacher = new_encoder()
    classifier = CosineClassifier(teacher.num_features, 10)
    method = build_method(config, data, teacher, classifier).eval()
    batch = batches(method, data)[0]
    with torch.no_grad():
        each = [
            distillation(method.classifier(method.encoder(view)), classifier(teacher.eval()(view))).item()
            for view in batch.views[:2]
        ]
    assert each[0] != each[1]
    assert method(batch)["distillation"].item() == pytest.approx(0.5 * sum(each) / 2, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "la", "classifier": {"views": 2}},
        {"method": "ce", "classifier": {"views": 2}},
        {"method": "focal", "classifier": {"views": 2}},
        {"method": "gml", "gml": {"share_query": False}, "classifier": {"every_view": True}},
        {"method": "bcl", "bcl": {"views": 2}, "classifier": {"every_view": True}},
    ],
    ids=["la", "ce", "focal", "gml", "bcl"],
)
def test_classified_views_can_be_made_to_agree(tiny: Config, data: LongTailedData, changes: dict[str, Any]) -> None:
    plain = tiny.replace(**changes)
    config = plain.replace(classifier={"agreement_weight": 0.5})
    method = build_method(config, data).eval()
    assert "agreement" not in build_method(plain, data).eval()(batches(method, data)[0])
    batch = batches(method, data)[0]
    scores = torch.stack([method.classifier(method.encoder(view)) for view in batch.views[:2]])
    # the posterior is that of the classification loss, which contains the prior where it is added
    log_prior = None if config.method in {"ce", "focal"} else method.prior.log_prior
    expected = 0.5 * agreement(scores, log_prior).item()
    assert method(batch)["agreement"].item() == pytest.approx(expected, rel=1e-3)
    one = config.replace(classifier={"views": 1, "every_view": False})
    with pytest.raises(LongtailError, match=r"classifier\.agreement_weight 0\.5: .* expected two or more"):
        METHODS[config.method].check(one, data.class_counts)


def test_every_view_can_be_classified(tiny: Config, data: LongTailedData) -> None:
    config = tiny.replace(method="bcl", bcl={"views": 2}, classifier={"every_view": True})
    method = build_method(config, data).eval()
    batch = batches(method, data)[0]
    each = [
        posterior_cross_entropy(method.classifier(method.encoder(view)), batch.labels, method.prior.log_prior).item()
        for view in batch.views
    ]
    assert method(batch)["classifier"].item() == pytest.approx(sum(each) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "counts", "message"),
    [
        ({"method": "paco"}, [10], "method paco: compares classes, expected at least 2 with training images, got 1"),
        ({"method": "bcl"}, [10, 0], "method bcl: compares classes"),
        ({"method": "supcon"}, [1, 1, 1], r"no image has a positive; set supcon\.views to 2"),
        ({"method": "proco", "proco": {"embedding_dim": 4}}, [9, 3], r"proco\.embedding_dim 4: .* at least 8"),
        ({"gml": {"query_all_views": True, "share_query": True}}, [9, 3], r"gml\.query_all_views: .* one student view"),
        ({"gml": {"keys": "momentum"}, "teacher": {"cache": 2}}, [9, 3], r"set teacher\.cache to 0"),
        (
            {"gml": {"feature_transfer": 2, "queues": "shared"}},
            [900, 3],
            r"gml\.feature_transfer 2: needs gml\.queues class, not shared",
        ),
        (
            {"gml": {"ensemble_weight": 1.0}, "optimizer": {"ema_decay": 0.9}},
            [9, 3],
            r"gml\.ensemble_weight: .*leave optimizer\.ema_decay out",
        ),
        ({"gml": {"feature_transfer": 2}}, [90, 60], r"gml\.feature_transfer: no class is in the shot group few"),
        (
            {"gml": {"queue_size": 19}},
            [10] * 10,
            r"gml.queue_size 19 with gml.queue_minimum 2: .*10 classes × 2 slots",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(
    tiny: Config, changes: dict[str, Any], counts: list[int], message: str
) -> None:
    config = tiny.replace(**changes)
    with pytest.raises(LongtailError, match=message):
        METHODS[config.method].check(config, counts)


def test_the_bayes_optimal_student_of_cross_entropy_has_nothing_to_learn_from_its_teacher(
    tiny: Config, data: LongTailedData
) -> None:
    counts = [*data.class_counts[:-1], 0]
    method = METHODS["ce"](tiny.replace(method="ce"), new_encoder(), counts)
    scores = torch.randn(6, 10)
    posterior = scores + torch.tensor([math.log(n / sum(counts)) if n else 0.0 for n in counts])
    counted = torch.ones(6, dtype=torch.bool)
    assert method.distillation_loss(posterior, scores, counted).item() == pytest.approx(0, abs=1e-5)
    assert method.distillation_loss(scores, scores, counted).item() > 0.01
    # its own moving average contains the prior as well
    ema = METHODS["ce"](tiny.replace(method="ce", teacher={"source": "ema"}), new_encoder(), counts)
    assert ema.distillation_loss(posterior, posterior, counted).item() == pytest.approx(0, abs=1e-5)


def test_late_weights_of_ldam_leave_the_size_of_the_gradient(tiny: Config, data: LongTailedData) -> None:
    counts = data.class_counts
    method = METHODS["ldam"](tiny.replace(method="ldam"), new_encoder(), counts)
    by_hand = [(1 - 0.9999) / (1 - 0.9999**n) for n in counts]
    mean = sum(n * w for n, w in zip(counts, by_hand, strict=True)) / sum(counts)
    assert isinstance(method, LDAM)
    assert method.weights.tolist() == pytest.approx([w / mean for w in by_hand], rel=1e-5)
    # the loss alone has the same
    assert method.weights.tolist() == pytest.approx(LDAMLoss(counts, class_weights="auto").weights.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", ["la", "experts"])
def test_scores_are_in_full_precision_under_autocast(tiny: Config, data: LongTailedData, name: str) -> None:
    method = METHODS[name](tiny.replace(method=name), new_encoder(), data.class_counts)
    features = torch.randn(8, method.encoder.num_features)
    with torch.autocast("cpu", torch.bfloat16):
        scores = method.classifier(features)
    assert torch.equal(scores, method.classifier(features))


def without_class(batch: Batch, label: int, absent: int) -> Batch:
    """Return the batch, whose samples of one class have the label of another."""
    return dataclasses.replace(batch, labels=batch.labels.masked_fill(batch.labels == label, absent))


@pytest.mark.parametrize("name", ["la", "cb", "ldam"])
@pytest.mark.parametrize("epoch_fraction", [0.0, 0.9])
def test_samples_of_a_class_without_training_images_are_left_out(
    tiny: Config, data: LongTailedData, name: str, epoch_fraction: float
) -> None:
    config, counts = tiny.replace(method=name), [*data.class_counts[:-1], 0]
    METHODS[name].check(config, counts)
    method = METHODS[name](config, new_encoder(), counts).eval()
    whole = batches(method, data)[0]
    assert int((whole.labels == 7).sum()) > 1
    batch = dataclasses.replace(without_class(whole, 7, 9), epoch_fraction=epoch_fraction)
    kept = (batch.labels != 9).nonzero().flatten()
    rest = Batch((batch.views[0][kept],), batch.labels[kept], batch.ids[kept], epoch_fraction=epoch_fraction)
    loss = method(batch)["classifier"]
    assert loss.item() == pytest.approx(method(rest)["classifier"].item(), rel=1e-5)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)
    # some class is weighted otherwise late in the training
    if name == "ldam":
        early = method(dataclasses.replace(rest, epoch_fraction=0.0))["classifier"].item()
        assert (early == pytest.approx(loss.item(), rel=1e-3)) == (epoch_fraction == 0)


def test_ldam_weighs_the_classes_in_the_last_epoch_at_the_latest(tiny: Config, data: LongTailedData) -> None:
    # 0.8 of two epochs would be after the second one has begun
    method = METHODS["ldam"](tiny.replace(method="ldam"), new_encoder(), data.class_counts).eval()
    batch = batches(method, data)[0]
    early, late, later = (
        method(dataclasses.replace(batch, epoch_fraction=fraction))["classifier"].item() for fraction in (0.0, 0.5, 0.9)
    )
    assert early != pytest.approx(late, rel=1e-3)
    assert late == later


@pytest.mark.parametrize("epochs", [1, 3, 5])
@pytest.mark.parametrize(("sampler", "balanced"), [("deferred", {1, 3, 5}), ("progressive", {3, 5})])
def test_short_runs_predict_under_the_frequencies_that_they_show(
    tiny: Config, sampler: str, balanced: set[int], epochs: int
) -> None:
    config = tiny.replace(method="ce", epochs=epochs, data={"sampler": sampler})
    assert METHODS["ce"].predicts_under(config) == ("uniform" if epochs in balanced else "train")


@pytest.mark.parametrize("name", FOR_IMAGES)
def test_every_method_trains_where_a_class_has_no_image(tiny: Config, data: LongTailedData, name: str) -> None:
    config, counts = tiny.replace(method=name), [*data.class_counts[:-1], 0]
    METHODS[name].check(config, counts)
    teacher, classifier = None, None
    if METHODS[name].needs_teacher(config):
        teacher = new_encoder()
        classifier = CosineClassifier(teacher.num_features, 10)
    method = METHODS[name](config, new_encoder(), counts, teacher, classifier).train()
    for batch in batches(method, data)[:2]:
        terms = method(without_class(batch, 9, 0))
        torch.stack(list(terms.values())).sum().backward()
        assert all(bool(term.isfinite()) for term in terms.values())
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)


VARIANTS: dict[str, dict[str, Any]] = {
    "shared queue": {"gml": {"queues": "shared", "queue_size": 100}},
    "batch alone": {"gml": {"queues": "batch"}},
    "momentum keys": {"gml": {"keys": "momentum"}},
    "momentum keys, distilled": {"gml": {"keys": "momentum", "distillation_weight": 1.0}},
    "both keys": {"gml": {"keys": "both"}},
    "both keys, distilled": {"gml": {"keys": "both", "distillation_weight": 1.0}},
    "mean teacher": {
        "method": "la",
        "teacher": {"source": "ema", "ema_decay": 0.9},
        "classifier": {"distillation_weight": 1.0, "views": 2, "distill_every_view": True},
    },
    "momentum keys, mean teacher": {"gml": {"keys": "momentum"}, "teacher": {"source": "ema"}},
    "self-pairs for both": {"gml": {"self_pairs": "both"}},
    "no self-pairs": {"gml": {"self_pairs": "none"}},
    "query all views": {"gml": {"query_all_views": True}, "classifier": {"every_view": True}},
    "feature transfer": {"gml": {"feature_transfer": 3}},
    "fixed temperature": {"gml": {"learn_temperature": False}},
    **{name: {"method": name} for name in CONTRASTIVE},
    "experts": {"method": "experts", "classifier": {"distillation_weight": 1.0}},
}
# the states that a checkpoint has to hold: a moving average and a teacher, random draws in a step, a queue, statistics
SAMPLE = {"both keys, distilled", "mean teacher", "feature transfer", "paco", "proco", "experts"}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in VARIANTS]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    config = tiny.replace(**VARIANTS[variant])
    fit(config, tmp_path / "whole", quiet=True)
    fit_in_two(config, tmp_path / "cut", 8, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert (tmp_path / "teachers").exists() == METHODS[config.method].needs_teacher(config)


@pytest.mark.parametrize("method", ["ce", "focal"])
@pytest.mark.parametrize("sampler", ["instance", "class", "deferred"])
def test_the_scores_of_a_sampler_contain_the_frequencies_that_it_shows(
    method: str, sampler: str, tmp_path: Path
) -> None:
    """One grey level an image, normal in each class: the Bayes rule of equal frequencies is the level between them."""
    draws, levels = np.random.default_rng(0), {0: 112, 1: 144}
    train, test = np.repeat([0, 1], [2000, 40]), np.repeat([0, 1], [400, 400])

    def images(labels: np.ndarray) -> np.ndarray:
        grey = draws.normal([levels[int(label)] for label in labels], 16).clip(0, 255).round().astype(np.uint8)
        return np.broadcast_to(grey[:, None, None, None], (len(labels), 8, 8, 1)).copy()

    data = from_arrays((images(train), train), (images(test), test), class_names=("common", "rare"))
    config = load_recipe("digits-lt").config.replace(
        method=method, network="conv8-tiny", epochs=6, batch_size=64, data={"sampler": sampler, "augment": "none"}
    )
    run = fit(config, tmp_path / "run", data=data, quiet=True)
    common, rare = run.test_metrics["uniform"]["per_class"]
    assert min(common, rare) > 55, (common, rare)  # a prior that is subtracted once too often gives 5 and 100
    assert run.model_config.predicts_under == ("train" if sampler == "instance" else "uniform")
