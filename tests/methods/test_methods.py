"""A step of every method, looked at from inside."""

from __future__ import annotations

import pytest
import torch

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.loaders import Batch, TrainLoader
from longtail.data.sources import load_data
from longtail.data.views import build_view
from longtail.errors import LongtailError
from longtail.methods import METHODS, method_class
from longtail.methods.gml import GML
from longtail.nn import CosineClassifier, Encoder


@pytest.fixture
def data(tiny: Config) -> LongTailedData:
    return load_data(tiny.data, 0)


def encoder() -> Encoder:
    return Encoder("conv8-tiny", [0.3], [0.4])


def gml(config: Config, data: LongTailedData) -> GML:
    torch.manual_seed(0)
    teacher = encoder()
    return GML(config, encoder(), data.class_counts, teacher, CosineClassifier(teacher.num_features, 10))


def loader(data: LongTailedData, views: int) -> TrainLoader:
    return TrainLoader(data.train, 64, [build_view("digits", 8)] * views, seed=0)


def test_every_method_in_the_table_is_there() -> None:
    for name in METHODS:
        assert method_class(name).__name__ == METHODS[name][1]


@pytest.mark.parametrize("name", ["ce", "la"])
def test_classifiers_average_over_views(tiny: Config, data: LongTailedData, name: str) -> None:
    config = tiny.replace(classifier={"views": 2})
    method = method_class(name)(config, encoder(), data.class_counts).eval()
    assert method.views(config) == ("classification",) * method.student_views(config) == ("classification",) * 2
    batch = next(loader(data, 2).epoch(0))
    both = method(batch)["classifier"].item()
    alone = method_class(name)(tiny, encoder(), data.class_counts).eval()
    alone.load_state_dict(method.state_dict())
    each = [alone(Batch((view,), batch.labels, batch.ids))["classifier"].item() for view in batch.views]
    assert both == pytest.approx(sum(each) / 2, rel=1e-4)


def test_logit_adjustment_is_the_priors_difference(tiny: Config, data: LongTailedData) -> None:
    torch.manual_seed(0)
    la = method_class("la")(tiny, encoder(), data.class_counts).eval()
    ce = method_class("ce")(tiny, encoder(), data.class_counts).eval()
    ce.load_state_dict(la.state_dict())
    batch = next(loader(data, 1).epoch(0))
    scores = la.classifier(la.encoder(batch.views[0]))
    prior = torch.tensor(data.class_counts).float().div(len(data.train)).log()
    cross_entropy = torch.nn.functional.cross_entropy
    assert ce(batch)["classifier"].item() == pytest.approx(cross_entropy(scores, batch.labels).item(), rel=1e-5)
    assert la(batch)["classifier"].item() == pytest.approx(cross_entropy(scores + prior, batch.labels).item(), rel=1e-5)


def test_gml_trains_all_but_the_teacher(tiny: Config, data: LongTailedData) -> None:
    method = gml(tiny.replace(gml={"distillation_weight": 1.0}), data)
    source = loader(data, 3)
    method.fill(lambda splits, r: source.batches(splits, -r - 1), data.train.labels)
    assert len(method.queues) == method.queues.size == len(data.train)
    terms = method.train()(next(source.epoch(0)))
    assert terms.keys() == {"classifier", "mixture", "temperature_likelihood", "distillation"}
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        # a bias before BatchNorm or normalisation may cancel; nothing else is left without a gradient
        assert parameter.grad.abs().sum() > 0, name
    teacher = method._frozen[0]
    assert teacher is not None
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in name or "_frozen" in name for name in method.state_dict())


def test_the_teacher_keeps_no_books(tiny: Config, data: LongTailedData, monkeypatch: pytest.MonkeyPatch) -> None:
    method = gml(tiny.replace(gml={"distillation_weight": 1.0}), data)
    passes: dict[str, int] = {"teacher": 0, "student": 0}
    graphs = []
    for name, module in (("teacher", method._frozen[0]), ("student", method.encoder)):
        assert module is not None

        def count(_module: object, inputs: tuple[torch.Tensor], output: torch.Tensor, name: str = name) -> None:
            passes[name] += len(inputs[0])
            if name == "teacher":
                graphs.append(output.grad_fn)

        module.register_forward_hook(count)
    batch = next(loader(data, 3).epoch(0))
    method(batch)
    # nothing runs twice: two views each, and the teacher's pass has no graph
    assert passes == {"teacher": 2 * len(batch.labels), "student": 2 * len(batch.labels)}
    assert graphs == [None]


def test_the_queues_are_full_before_the_first_step_even_when_larger_than_the_set(
    tiny: Config, data: LongTailedData
) -> None:
    method = gml(tiny.replace(gml={"queue_size": 900}), data)
    source = loader(data, 3)
    method.fill(lambda splits, r: source.batches(splits, -r - 1), data.train.labels)
    assert len(method.queues) == 900
    # an image in several slots is there in several views
    slots = method.queues.slots()
    image = slots.ids.mode().values
    copies = slots.features[slots.ids == image]
    assert len(copies) > 1
    assert len(copies.unique(dim=0)) == len(copies)


def test_state_holds_the_queues(tiny: Config, data: LongTailedData) -> None:
    method, other = gml(tiny, data), gml(tiny, data)
    method(next(loader(data, 3).epoch(0)))
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.queues.slots().features, method.queues.slots().features)
    assert len(other.queues) > 0


def test_moving_a_method_moves_teacher_and_queues(tiny: Config, data: LongTailedData) -> None:
    method = gml(tiny, data).to("meta")
    assert method.queues.slots().features.is_meta
    teacher = method._frozen[0]
    assert teacher is not None
    assert next(teacher.parameters()).is_meta


def test_queues_that_do_not_fit_are_named(tiny: Config, data: LongTailedData) -> None:
    with pytest.raises(LongtailError, match=r"gml.queue_size 19 with gml.queue_minimum 2: .*10 classes × 2 slots"):
        GML.check(tiny.replace(gml={"queue_size": 19}), data.class_counts)
