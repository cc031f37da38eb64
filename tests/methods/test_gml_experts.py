"""The mixture as an expert: stages of its own beside those of the classifier, on one stem."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from longtail.config import Config
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.inference.export import export_onnx
from longtail.inference.recognizer import Recognizer
from longtail.methods.gml import GML
from longtail.nn import CosineClassifier, MixtureEnsembleHead
from longtail.nn.experts import relative_operations
from longtail.tasks.loading import load_model
from longtail.training.trainer import fit
from tests.conftest import Command
from tests.methods.steps import batches, build_method
from tests.training.runs import weights


@pytest.fixture
def experts(tiny: Config) -> Config:
    return tiny.replace(gml={"stages": 2, "ensemble_weight": 1.0, "distillation_weight": 1.0})


def test_the_terms_reach_the_part_that_is_theirs(experts: Config) -> None:
    data = load_data(experts.data, 0)
    method = build_method(experts, data)
    assert isinstance(method, GML)
    batch = batches(method, data)[0]
    width = method.encoder.num_features // 2
    assert method.classifier.weight.shape == (10, width)
    for name, part, other in (("classifier", 0, 1), ("distillation", 0, 1), ("mixture", 1, 0)):
        method.zero_grad()
        features: list[torch.Tensor] = []

        def keep(*call: Any, kept: list[torch.Tensor] = features) -> None:
            call[-1].retain_grad()
            kept.append(call[-1])

        hook = method.encoder.register_forward_hook(keep)
        method(batch)[name].backward()
        hook.remove()
        gradients = [f.grad.unflatten(1, (2, width)).abs().sum(dim=(0, 2)) for f in features if f.grad is not None]
        total = torch.stack(gradients).sum(dim=0)
        assert total[part] > 0, name
        assert total[other] == 0, name


def test_the_scores_are_those_of_loops(experts: Config, tmp_path: Path) -> None:
    fit(experts, tmp_path / "run", quiet=True)
    model = Recognizer.load(tmp_path / "run")
    assert (model.config.head, model.config.experts, model.config.expert_stages) == ("mixture_ensemble", 2, 2)
    head = model.classifier
    assert isinstance(head, MixtureEnsembleHead)
    images = torch.rand(4, 1, 8, 8)
    features = model.encoder(images).detach()
    width = features.shape[1] // 2
    queries = head.query_mlp(features[:, width:]).double().detach()
    for row, score in enumerate(model.scores(images)):
        own = features[row, :width].double()
        for label in range(10):
            weight = head.weight[label].detach().double()
            cosine = 30 * float(own @ weight / own.norm() / weight.norm())
            keys = [key.double() for key, of in zip(head.keys, head.key_labels.tolist(), strict=True) if of == label]
            densities = [math.exp(float(queries[row] @ key) / float(head.temperature)) for key in keys]
            assert float(score[label]) == pytest.approx(cosine + math.log(sum(densities) / len(densities)), rel=1e-4)
    model.save(tmp_path / "again")
    assert torch.equal(Recognizer.load(tmp_path / "again").scores(images), model.scores(images))


@pytest.mark.slow
def test_a_run_is_used_as_any_other(experts: Config, tmp_path: Path, command: Command) -> None:
    run = fit(experts.replace(data={"val_fraction": 0.2}), tmp_path / "run", quiet=True)
    cost = relative_operations("conv8-tiny", 2, 2)
    assert GML.pass_cost(experts) == cost > 1
    plain = fit(experts.replace(gml={"stages": None}, data={"val_fraction": 0.2}), tmp_path / "gml", quiet=True)
    assert run.student_passes == pytest.approx(cost * plain.student_passes, rel=0.01)
    card = (tmp_path / "run" / "recognizer" / "README.md").read_text()
    assert "with 2 experts, whose last 2 stages are their own" in card
    export_onnx(load_model(tmp_path / "run"), tmp_path / "model.onnx")
    for arguments in (("evaluate", tmp_path / "run"), ("rebalance", tmp_path / "run", "--out", tmp_path / "b")):
        code, _, error = command(*arguments)
        assert (code, error) == (0, "")
    assert Recognizer.load(tmp_path / "b").predict(torch.rand(3, 1, 8, 8)).probabilities.shape == (3, 10)


def test_one_network_learns_from_both(experts: Config, tmp_path: Path) -> None:
    fit(experts, tmp_path / "teacher", quiet=True)
    config = experts.replace(
        method="la", teacher={"source": str(tmp_path / "teacher")}, classifier={"distillation_weight": 1.0}
    )
    fit(config, tmp_path / "student", quiet=True)
    student = Recognizer.load(tmp_path / "student")
    assert student.config.experts == 1
    assert isinstance(student.classifier, CosineClassifier)


@pytest.mark.parametrize("stages", [0, 2])
def test_both_start_from_the_weights_of_one_network(experts: Config, tmp_path: Path, stages: int) -> None:
    fit(experts.replace(method="la"), tmp_path / "la", quiet=True)
    still = experts.replace(
        init=str(tmp_path / "la"), epochs=1, optimizer={"learning_rate": 1e-12}, gml={"stages": stages}
    )
    fit(still, tmp_path / "gml", quiet=True)
    before, after = weights(tmp_path / "la"), weights(tmp_path / "gml")
    torch.testing.assert_close(after["classifier.classifier.weight"], before["classifier.weight"])


def test_class_means_are_those_of_the_classifiers_own_features(experts: Config, tmp_path: Path) -> None:
    fit(experts.replace(method="la"), tmp_path / "la", quiet=True)
    still = experts.replace(
        init=str(tmp_path / "la"),
        epochs=1,
        optimizer={"learning_rate": 1e-12},
        classifier={"init": "class_means"},
    )
    fit(still, tmp_path / "gml", quiet=True)
    head = Recognizer.load(tmp_path / "gml").classifier
    assert isinstance(head, MixtureEnsembleHead)
    assert head.weight.shape[1] == head.query_mlp.in_features


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gml": {"ensemble_weight": 0.0}}, r"gml\.stages 2: .*set gml\.ensemble_weight to 1"),
        ({"tune": "head"}, r"gml\.stages: tune head"),
        ({"teacher": {"source": "ema"}, "gml": {"keys": "momentum"}}, r"gml\.stages: .*teacher\.source ema"),
    ],
)
def test_settings_that_do_not_fit_are_named(experts: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        GML.check(experts.replace(**changes), [9, 3])
