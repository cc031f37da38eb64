"""GML and its variants: teacher, queues, mixture, feature transfer, and the ensemble at prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.sources import load_data
from longtail.inference.recognizer import Recognizer
from longtail.losses import class_log_likelihood, gml_loss
from longtail.memory import Slots
from longtail.methods.feature_transfer import FeatureTransfer
from longtail.methods.gml import GML
from longtail.nn import CosineClassifier, Encoder, MixtureEnsembleHead, ProjectionMLP
from longtail.tasks.evaluate import evaluate_split
from longtail.training.trainer import fit
from tests.conftest import save_image
from tests.methods.steps import batches, build_method, new_loader, recording_teacher
from tests.training.runs import equal, weights


@pytest.fixture
def data(tiny: Config) -> LongTailedData:
    return load_data(tiny.data, 0)


def build_gml(config: Config, data: LongTailedData, teacher: Encoder | None = None) -> GML:
    classifier = None if teacher is None else CosineClassifier(teacher.num_features, 10)
    method = build_method(config, data, teacher, classifier)
    assert isinstance(method, GML)
    return method


def test_gml_trains_all_but_the_teacher(tiny: Config, data: LongTailedData) -> None:
    teacher, backbone = recording_teacher()
    method = build_gml(tiny.replace(gml={"distillation_weight": 1.0}), data, teacher)
    loader = new_loader(data, 3)
    method.init_memory(lambda splits, number: loader.batches(splits, -number - 1), data.train.labels)
    assert len(method.queues) == method.queues.size == len(data.train)
    terms = method.train()(next(loader.epoch(0)))
    assert terms.keys() == {"classifier", "mixture", "temperature_likelihood", "distillation"}
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        # a bias before BatchNorm or normalisation may cancel; nothing else is left without a gradient
        assert parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert not any(record.training for record in backbone.passes)
    # optimizers and checkpoints do not contain it
    frozen = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert len(frozen) == 2
    assert not frozen & {parameter.data_ptr() for parameter in method.parameters()}
    state = method.state_dict()
    assert not frozen & {tensor.data_ptr() for tensor in state.values() if isinstance(tensor, torch.Tensor)}
    assert not any("teacher" in name for name in state)


def test_the_teacher_encodes_each_view_once_and_without_a_graph(tiny: Config, data: LongTailedData) -> None:
    teacher, backbone = recording_teacher()
    method = build_gml(tiny.replace(gml={"distillation_weight": 1.0}), data, teacher)
    images = 0

    def count(_module: object, inputs: tuple[torch.Tensor], _output: object) -> None:
        nonlocal images
        images += len(inputs[0])

    method.encoder.register_forward_hook(count)
    batch = next(new_loader(data, 3).epoch(0))
    method(batch)
    # two views each: classification and query, classification and key
    assert images == 2 * len(batch)
    assert sum(record.images for record in backbone.passes) == 2 * len(batch)
    assert not any(record.training or record.with_grad for record in backbone.passes)


def test_the_queues_are_full_before_the_first_step_even_when_larger_than_the_set(
    tiny: Config, data: LongTailedData
) -> None:
    method = build_gml(tiny.replace(gml={"queue_size": 900}), data)
    loader = new_loader(data, 3)
    method.init_memory(lambda splits, number: loader.batches(splits, -number - 1), data.train.labels)
    assert len(method.queues) == 900
    # an image in several slots is there in several views
    slots = method.queues.slots()
    image = slots.ids.mode().values
    copies = slots.features[slots.ids == image]
    assert len(copies) > 1
    assert len(copies.unique(dim=0)) == len(copies)


def test_the_state_contains_the_queues(tiny: Config, data: LongTailedData) -> None:
    method, other = build_gml(tiny, data), build_gml(tiny, data)
    method(next(new_loader(data, 3).epoch(0)))
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.queues.slots().features, method.queues.slots().features)
    assert len(other.queues) > 0


def test_moving_a_method_moves_teacher_and_queues(tiny: Config, data: LongTailedData) -> None:
    teacher, backbone = recording_teacher()
    method = build_gml(tiny, data, teacher).to("meta")
    assert method.queues.slots().features.is_meta
    assert backbone.linear.weight.is_meta


def test_the_batch_alone_holds_the_batch(tiny: Config, data: LongTailedData) -> None:
    method = build_gml(tiny.replace(gml={"queues": "batch"}), data)
    together = batches(method, data)
    assert {len(batch) for batch in together} == {59, 60}  # of at most 64
    for batch in together:
        method(batch)
        assert sorted(method.queues.ids.tolist()) == sorted(batch.ids.tolist())
    for batch in together:
        for number, part in enumerate(batch.split(3)):  # whose gradient is accumulated
            method(part)
            seen = torch.cat([each.ids for each in batch.split(3)[: number + 1]])
            assert sorted(method.queues.ids.tolist()) == sorted(seen.tolist())


@pytest.mark.parametrize("changes", [{}, {"queues": "batch"}, {"queues": "shared"}])
def test_slots_that_were_never_filled_do_not_count_in_the_statistics_of_the_keys(
    tiny: Config, data: LongTailedData, changes: dict[str, Any]
) -> None:
    method = build_gml(tiny.replace(gml=changes), data)
    passed: list[torch.Tensor] = []
    method.key_mlp.register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0]))
    for part in batches(method, data)[0].split(3)[:2]:  # whose gradient is accumulated
        method(part)
        features, filled = passed.pop(), method.queues.features
        assert len(filled) < 0.7 * len(features)
        rows, repeats = features.unique(dim=0, return_counts=True)
        assert torch.equal(rows, filled.unique(dim=0))
        assert repeats.max() - repeats.min() <= 1


def test_without_self_pairs_no_query_meets_its_own_image(tiny: Config, data: LongTailedData) -> None:
    method = build_gml(tiny.replace(gml={"self_pairs": "none"}), data).eval()
    batch = batches(method, data)[0]
    terms = method(batch)
    assert terms.keys() == {"classifier", "mixture"}
    slots = method.queues.slots()
    expected = gml_loss(
        method.query_mlp(method.encoder(batch.views[1])),
        batch.labels,
        method.key_mlp(slots.features),
        slots.labels,
        method.prior.log_prior,
        method.mixture.temperature,
        ids=batch.ids,
        key_ids=slots.ids,
    )
    assert terms["mixture"].item() == pytest.approx(expected.item(), rel=1e-5)
    terms["mixture"].backward()
    assert method.mixture.temperature_logit.grad is not None
    assert method.mixture.temperature_logit.grad.abs() > 0


def test_feature_transfer_spreads_the_tail_as_the_head(tiny: Config) -> None:
    sizes = torch.tensor([6, 2, 2])
    feature_transfer = FeatureTransfer(500, tiny.shots.groups([400, 30, 3]), sizes)
    torch.manual_seed(0)
    features = torch.randn(10, 4)
    labels = torch.tensor([0] * 6 + [1, 1, 2, -1])
    features[9] = 0
    slots = feature_transfer(Slots(features, labels, torch.arange(10)))
    assert torch.equal(slots.features[:9], features[:9])
    assert len(slots.features) == 10 + 500 * 2
    # an unfilled slot and its copies repeat the other ones
    kept = slots.labels >= 0
    assert (slots.features[~kept][:, None] == slots.features[kept]).all(dim=2).any(dim=1).all()
    moved, origins = slots.features[10:], slots.labels[10:]
    assert set(origins.tolist()) == {2, -1}
    assert set(slots.ids[10:].tolist()) == {8, 9}
    # the copies of slot 8 scatter around it as class 0 does around its mean
    differences = moved[origins == 2] - features[8]
    offsets = features[:6] - features[:6].mean(dim=0)
    assert torch.cdist(differences, offsets).min(dim=1).values.max() < 5e-3
    assert len(torch.cdist(differences, offsets).argmin(dim=1).unique()) == 6


def test_feature_transfer_leaves_unfilled_slots_out_of_the_means(tiny: Config) -> None:
    feature_transfer = FeatureTransfer(50, tiny.shots.groups([400, 3]), torch.tensor([4, 1]))
    features, labels = torch.tensor([[1.0], [3.0], [9.0], [9.0], [5.0]]), torch.tensor([0, 0, -1, -1, 1])
    torch.manual_seed(0)
    moved = feature_transfer(Slots(features, labels, torch.arange(5))).features[5:]
    assert set(moved[:, 0].tolist()) == {4.0, 5.0, 6.0}


def test_the_mixture_joins_the_classifier_at_prediction(tiny: Config, data: LongTailedData, tmp_path: Path) -> None:
    plain = fit(tiny, tmp_path / "plain", quiet=True, data=data)
    ensemble = fit(tiny.replace(gml={"ensemble_weight": 30.0}), tmp_path / "ensemble", quiet=True, data=data)
    assert equal(weights(tmp_path / "plain"), _plain_weights(tmp_path / "ensemble"))
    assert ensemble.metrics["per_class"] != plain.metrics["per_class"]
    model = Recognizer.load(tmp_path / "ensemble")
    assert model.config.head == "mixture_ensemble"
    head = model.classifier
    assert isinstance(head, MixtureEnsembleHead)
    assert model.config.mixture_keys == (len(data.train), 32)
    again = evaluate_split(model, data.test, ensemble.config)["uniform"]
    assert again["per_class"] == ensemble.metrics["per_class"]
    # the scores are the weighted sum of the classifier's and the mixture's log-likelihood
    images = torch.rand(5, 1, 8, 8)
    features = model.encoder(images)
    likelihood = class_log_likelihood(head.query_mlp(features), head.keys, head.key_labels, 10, head.temperature)
    expected = head.classifier(features) + 30 * likelihood
    assert torch.allclose(model.scores(images), expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(head.keys.norm(dim=1), torch.ones(len(head.keys)), atol=1e-5)


def _plain_weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of an ensemble's encoder and classifier under a plain model's names."""
    return {
        name.replace("classifier.classifier.", "classifier."): tensor
        for name, tensor in weights(run).items()
        if name.startswith(("encoder.", "classifier.classifier."))
    }


def test_in_an_ensemble_a_class_without_keys_is_no_likelier_than_the_others() -> None:
    torch.manual_seed(0)
    head = MixtureEnsembleHead(
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
    config = tiny.replace(epochs=4, gml={"ensemble_weight": 1.0}, data={"source": "folder", "val_fraction": 0.2})
    for label in range(3):
        for number in range(12):
            save_image(tmp_path / "photos" / str(label) / f"{number}.png", size=(8, 8), seed=label * 50 + number)
    config = config.replace(data={"root": str(tmp_path / "photos"), "augment": "none"}, network="resnet8", batch_size=8)
    run = fit(config, tmp_path / "run", quiet=True)
    model = Recognizer.load(tmp_path / "run")
    data = load_data(config.data, config.seed)
    assert evaluate_split(model, data.test, run.config)["uniform"]["per_class"] == run.metrics["per_class"]
    assert "best_step" in model.config.training_info
