"""Rivals and GML's parts, a step at a time and whole runs cut in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.loaders import Batch, TrainLoader
from longtail.data.sources import load_data
from longtail.data.views import build_view
from longtail.engine.fit import fit
from longtail.engine.judge import judge
from longtail.errors import LongtailError
from longtail.memory import Slots
from longtail.methods import METHODS, ONLY_FOR_PIXELS, method_class
from longtail.methods.base import Method
from longtail.methods.gml import GML, Lending
from longtail.methods.paco import PaCo
from longtail.methods.proco import ProCo
from longtail.nn import CosineClassifier, Encoder, JoinedClassifier, ProjectionMLP
from longtail.objectives import class_log_likelihood, distillation, gml_loss, posterior_cross_entropy
from longtail.recognizer import Recognizer
from tests.conftest import save_image
from tests.engine.test_fit import equal, fit_in_two, weights

CONTRASTIVE = ("supcon", "paco", "gpaco", "bcl", "proco")


@pytest.fixture
def data(tiny: Config) -> LongTailedData:
    return load_data(tiny.data, 0)


def built(config: Config, data: LongTailedData) -> Method:
    torch.manual_seed(0)
    kind = method_class(config.method)
    kind.check(config, data.class_counts)
    encoder = Encoder("conv8-tiny", [0.3], [0.4])
    teacher = Encoder("conv8-tiny", [0.3], [0.4])
    parts: tuple[Any, ...] = (teacher, CosineClassifier(teacher.num_features, 10)) if kind.needs_teacher(config) else ()
    return kind(config, encoder, data.class_counts, *parts).train()


def batches(method: Method, data: LongTailedData) -> list[Batch]:
    views = [build_view("digits", 8)] * len(method.views(method.config))
    return list(TrainLoader(data.train, 64, views, seed=0).epoch(0))


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize(("views", "share", "passes"), [(1, True, 1), (2, True, 2), (2, False, 3)])
def test_layouts(tiny: Config, data: LongTailedData, name: str, views: int, share: bool, passes: int) -> None:
    config = tiny.replace(method=name, contrast={"views": views, "share_view": share})
    method = built(config, data)
    assert method.student_views(config) == passes
    assert len(method.views(config)) == passes + (name == "paco")
    seen = 0

    def count(_module: object, inputs: tuple[torch.Tensor], _output: object) -> None:
        nonlocal seen
        seen += len(inputs[0])

    method.encoder.register_forward_hook(count)
    for batch in batches(method, data)[:2]:
        seen = 0
        terms = method(batch)
        assert seen == passes * len(batch)
        assert terms.keys() == ({"contrast"} if "paco" in name else {"classifier", "contrast"})
        torch.stack(list(terms.values())).sum().backward()
    for parameter_name, parameter in method.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, parameter_name


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ONLY_FOR_PIXELS])
def test_every_method_can_be_distilled_into(tiny: Config, data: LongTailedData, name: str) -> None:
    section = "gml" if name == "gml" else "classifier"
    plain = tiny.replace(method=name)
    assert method_class(name).needs_teacher(plain) == (name == "gml")
    method = built(plain.replace(**{section: {"distillation_weight": 0.5}}), data).eval()
    batch = batches(method, data)[0]
    terms = method(batch)
    teacher, classifier = method._frozen
    assert teacher is not None
    assert classifier is not None
    with torch.no_grad():
        taught = classifier(teacher(batch.views[0]))
        scores = method.classifier(method.encoder(batch.views[0]))
    assert terms["distillation"].item() == pytest.approx(0.5 * distillation(scores, taught).item(), rel=1e-4)


def test_the_classifiers_term_of_every_view(tiny: Config, data: LongTailedData) -> None:
    config = tiny.replace(method="bcl", contrast={"views": 2}, classifier={"every_view": True})
    method = built(config, data).eval()
    batch = batches(method, data)[0]
    each = [
        posterior_cross_entropy(method.classifier(method.encoder(view)), batch.labels, method.prior.log).item()
        for view in batch.views
    ]
    assert method(batch)["classifier"].item() == pytest.approx(sum(each) / 2, rel=1e-4)


def test_without_adjustment_the_prior_stays_in_the_scores(tiny: Config, data: LongTailedData) -> None:
    config = tiny.replace(method="la", classifier={"adjust": False})
    method = built(config, data).eval()
    batch = batches(method, data)[0]
    scores = method.classifier(method.encoder(batch.views[0]))
    assert method(batch)["classifier"].item() == pytest.approx(F.cross_entropy(scores, batch.labels).item(), rel=1e-5)
    assert method.predicts_under(config) == "train"
    assert method.predicts_under(tiny.replace(method="la")) == "uniform"


def test_pacos_keys_are_a_slow_averages_and_go_into_the_queue(tiny: Config, data: LongTailedData) -> None:
    method = built(tiny.replace(method="paco", contrast={"momentum": 0.9}), data)
    assert isinstance(method, PaCo)
    before = [p.clone() for p in method.slow.average.parameters()]
    with torch.no_grad():
        for p in (*method.encoder.parameters(), *method.embed.parameters()):
            p.add_(1.0)
    first, second = batches(method, data)[:2]
    method(first)
    after = list(method.slow.average.parameters())
    assert all(torch.allclose(new, old + 0.1, atol=1e-5) for new, old in zip(after, before, strict=True))
    assert not any(p.requires_grad for p in after)
    slots = method.queue.slots()
    assert len(method.queue) == len(first)
    assert slots.ids[: len(first)].tolist() == first.ids.tolist()
    assert torch.allclose(slots.features[: len(first)].norm(dim=1), torch.ones(len(first)))
    method(second)["contrast"].backward()
    assert len(method.queue) == len(first) + len(second)


def test_procos_means_are_those_of_the_last_epoch_and_this_one(tiny: Config, data: LongTailedData) -> None:
    method = built(tiny.replace(method="proco"), data)
    assert isinstance(method, ProCo)
    labels = torch.tensor([0, 0, 1])
    embeddings = [F.normalize(torch.randn(3, 32), dim=1) for _ in range(4)]
    for epoch, z in zip([0.0, 0.0, 0.5, 0.75], embeddings, strict=True):
        method._note(z, labels, epoch)
    # epochs 0.5 and 0.75 are the last two; the two batches of epoch 0 are forgotten
    expected = embeddings[2][:2].sum(0) + embeddings[3][:2].sum(0)
    assert torch.allclose(method.sums.sum(0)[0], expected, atol=1e-6)
    assert method.counts.sum(0)[:3].tolist() == [4, 2, 0]


@pytest.mark.parametrize(
    ("changes", "counts", "message"),
    [
        ({"method": "paco"}, [10], "method paco: compares classes, expected at least 2 with training images, got 1"),
        ({"method": "bcl"}, [10, 0], "method bcl: compares classes"),
        ({"method": "supcon"}, [1, 1, 1], r"no image has a positive; set contrast\.views to 2"),
        ({"method": "proco", "contrast": {"embedding_dim": 4}}, [9, 3], r"contrast\.embedding_dim 4: .* at least 8"),
        ({"gml": {"mix_all": True, "share_query": True}}, [9, 3], r"gml\.mix_all: .* one student view"),
        ({"gml": {"keys": "momentum"}, "teacher": {"cache": 2}}, [9, 3], r"set teacher\.cache to 0"),
        ({"gml": {"borrow": 2, "queues": "plain"}}, [900, 3], r"gml\.borrow 2: needs gml\.queues class"),
        ({"gml": {"join_weight": 1.0}, "optimizer": {"ema": 0.9}}, [9, 3], r"leave optimizer\.ema out"),
        ({"gml": {"borrow": 2}}, [90, 60], r"gml\.borrow: no class is in the shot group few"),
    ],
)
def test_what_cannot_be_had_is_said(tiny: Config, changes: dict[str, Any], counts: list[int], message: str) -> None:
    config = tiny.replace(**changes)
    with pytest.raises(LongtailError, match=message):
        method_class(config.method).check(config, counts)


def test_a_batch_without_positives_adds_nothing(tiny: Config, data: LongTailedData) -> None:
    method = built(tiny.replace(method="supcon"), data)
    whole = batches(method, data)[0]
    first = torch.stack([(whole.labels == c).nonzero()[0, 0] for c in whole.labels.unique()])
    alone = Batch(tuple(view[first] for view in whole.views), whole.labels[first], whole.ids[first])
    terms = method(alone)
    assert terms["contrast"].item() == 0
    assert method.watched()["with_positives"].item() == 0
    torch.stack(list(terms.values())).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in method.parameters() if p.grad is not None)


PARTS: dict[str, dict[str, Any]] = {
    "plain queue": {"gml": {"queues": "plain", "queue_size": 100}},
    "batch alone": {"gml": {"queues": "batch"}},
    "momentum keys": {"gml": {"keys": "momentum"}},
    "momentum keys, distilled": {"gml": {"keys": "momentum", "distillation_weight": 1.0}},
    "both keys": {"gml": {"keys": "both"}},
    "both keys, distilled": {"gml": {"keys": "both", "distillation_weight": 1.0}},
    "self-pairs for both": {"gml": {"self_pairs": "both"}},
    "no self-pairs": {"gml": {"self_pairs": "none"}},
    "mixture on every view": {"gml": {"mix_all": True}, "classifier": {"every_view": True}},
    "borrowed spread": {"gml": {"borrow": 3}},
    "fixed temperature": {"gml": {"learn_temperature": False}},
    **{name: {"method": name} for name in CONTRASTIVE},
}


@pytest.mark.parametrize("part", PARTS)
def test_a_run_that_is_cut_equals_a_whole_one(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    config = tiny.replace(**PARTS[part])
    fit(config, tmp_path / "whole", quiet=True)
    fit_in_two(config, tmp_path / "cut", 8, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert (tmp_path / "teachers").exists() == method_class(config.method).needs_teacher(config)


def test_the_batch_alone_holds_the_batch(tiny: Config, data: LongTailedData) -> None:
    method = built(tiny.replace(gml={"queues": "batch"}), data)
    assert isinstance(method, GML)
    for batch in batches(method, data):
        method(batch)
        newest = set(method.queues.ids.tolist())
        assert set(batch.ids.tolist()) <= newest
        # batches differ in size by at most one, so at most a few of the last one's are left
        assert len(method.queues) <= method.config.batch_size


def test_without_self_pairs_no_query_meets_its_own_image(tiny: Config, data: LongTailedData) -> None:
    method = built(tiny.replace(gml={"self_pairs": "none"}), data).eval()
    assert isinstance(method, GML)
    batch = batches(method, data)[0]
    terms = method(batch)
    assert terms.keys() == {"classifier", "mixture"}
    slots = method.queues.slots()
    expected = gml_loss(
        method.query_mlp(method.encoder(batch.views[1])),
        batch.labels,
        method.key_mlp(slots.features),
        slots.labels,
        method.prior.log,
        method.mixture.temperature,
        ids=batch.ids,
        key_ids=slots.ids,
    )
    assert terms["mixture"].item() == pytest.approx(expected.item(), rel=1e-5)
    terms["mixture"].backward()
    assert method.mixture.temperature_logit.grad is not None
    assert method.mixture.temperature_logit.grad.abs() > 0


def test_the_tail_borrows_the_heads_spread(tiny: Config) -> None:
    counts = [400, 30, 3]
    sizes = torch.tensor([6, 2, 2])
    lending = Lending(tiny.replace(gml={"borrow": 500}), counts, sizes)
    torch.manual_seed(0)
    features = torch.randn(10, 4)
    labels = torch.tensor([0] * 6 + [1, 1, 2, -1])
    features[9] = 0
    made = lending.spread(Slots(features, labels, torch.arange(10)))
    assert torch.equal(made.features[:10], features)
    assert len(made.features) == 10 + 500 * 2
    moved, origins = made.features[10:], made.labels[10:]
    assert set(origins.tolist()) == {2, -1}
    assert set(made.ids[10:].tolist()) == {8, 9}
    # the copies of slot 8 scatter around it as class 0 does around its mean
    copies = moved[origins == 2]
    offsets = features[:6] - features[:6].mean(dim=0)
    found = copies - features[8]
    assert torch.cdist(found, offsets).min(dim=1).values.max() < 5e-3
    assert len(torch.cdist(found, offsets).argmin(dim=1).unique()) == 6


def test_the_mixture_joins_the_classifier_at_prediction(tiny: Config, data: LongTailedData, tmp_path: Path) -> None:
    plain = fit(tiny, tmp_path / "plain", quiet=True, data=data)
    joined = fit(tiny.replace(gml={"join_weight": 30.0}), tmp_path / "joined", quiet=True, data=data)
    assert equal(weights(tmp_path / "plain"), _plain_weights(tmp_path / "joined"))
    assert joined.metrics["per_class"] != plain.metrics["per_class"]
    kept = Recognizer.load(tmp_path / "joined")
    assert kept.card.head == "joined"
    assert isinstance(kept.classifier, JoinedClassifier)
    assert kept.card.keys == (len(data.train), 32)
    again = judge(kept, data.test, joined.config)["uniform"]
    assert again["per_class"] == joined.metrics["per_class"]
    # the scores are the classifier's and the mixture's log-likelihood, weighed
    images = torch.rand(5, 1, 8, 8)
    features = kept.encoder(images)
    head = kept.classifier
    likelihood = class_log_likelihood(head.query_mlp(features), head.keys, head.key_labels, 10, head.temperature)
    expected = head.classifier(features) + 30 * likelihood
    assert torch.allclose(kept.scores(images), expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(head.keys.norm(dim=1), torch.ones(len(head.keys)), atol=1e-5)


def _plain_weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a joined recogniser's encoder and classifier under a plain one's names."""
    return {
        name.replace("classifier.classifier.", "classifier."): tensor
        for name, tensor in weights(run).items()
        if name.startswith(("encoder.", "classifier.classifier."))
    }


def test_a_joined_class_without_keys_is_no_likelier_than_the_least() -> None:
    torch.manual_seed(0)
    head = JoinedClassifier(
        CosineClassifier(6, 3),
        ProjectionMLP(6, 4).eval(),
        F.normalize(torch.randn(5, 4)),
        torch.tensor([0, 0, 1, -1, -1]),
        torch.tensor(0.2),
        1.0,
    )
    features = torch.randn(7, 6)
    extra = head(features) - head.classifier(features)
    assert torch.allclose(extra[:, 2], extra[:, :2].amin(dim=1), atol=1e-5)
    assert bool(torch.isfinite(extra).all())


def test_the_epoch_that_validation_picks_keeps_its_own_keys(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(epochs=4, gml={"join_weight": 1.0}, data={"source": "folder", "val_fraction": 0.2})
    for label in range(3):
        for number in range(12):
            save_image(tmp_path / "photos" / str(label) / f"{number}.png", size=(8, 8), seed=label * 50 + number)
    config = config.replace(data={"root": str(tmp_path / "photos"), "augment": "none"}, network="resnet8", batch_size=8)
    run = fit(config, tmp_path / "run", quiet=True)
    kept = Recognizer.load(tmp_path / "run")
    data = load_data(config.data, config.seed)
    assert judge(kept, data.test, run.config)["uniform"]["per_class"] == run.metrics["per_class"]
    assert "best_step" in kept.card.trained
