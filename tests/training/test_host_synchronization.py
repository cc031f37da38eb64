"""No step waits for the accelerator: nothing reads a value of a tensor on the host, or copies one from there.

What holds here lets a step be recorded as a CUDA graph.
"""

from __future__ import annotations

import pytest
import torch

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.data.loader import TrainLoader
from longtail.data.sources import load_data
from longtail.data.transforms import build_transform
from longtail.methods.base import Method
from longtail.nn import ClassifierEnsemble, CosineClassifier, Encoder, EncoderEnsemble
from longtail.nn.tuning import set_trainable
from longtail.registry import METHODS, TASKS
from longtail.training.auto_config import auto_config
from longtail.training.metric_log import MetricTracker
from tests.losses.host import TensorsOfTheHost


@pytest.mark.parametrize("name", [name for name in METHODS if "image" in METHODS[name].label_kinds])
def test_no_step_reads_a_value_on_the_host(tiny: Config, name: str) -> None:
    config = tiny.replace(gml={"distillation_weight": 1.0})
    data = load_data(config.data, 0)
    method_class = METHODS[name]
    teacher, classifier = None, None
    if method_class.needs_teacher(config):
        teacher = Encoder("conv8-tiny", [0.3], [0.4])
        classifier = CosineClassifier(teacher.num_features, 10)
    student = Encoder("conv8-tiny", [0.3], [0.4])
    method = method_class(config, student, data.class_counts, teacher, classifier).train()
    views = [build_transform("digits", 8)] * len(method_class.view_plan(config).uses)
    _two_steps_without_values(method, next(TrainLoader(data.train, 32, views, seed=0).epoch(0)))


@pytest.mark.parametrize("name", ["la", "ldam", "gml"])
def test_no_step_with_a_moving_average_as_the_teacher_does(tiny: Config, name: str) -> None:
    config = tiny.replace(
        method=name,
        teacher={"source": "ema"},
        gml={"keys": "momentum", "distillation_weight": 1.0, "queues": "batch"},
        classifier={"distillation_weight": 1.0, "views": 2, "every_view": True, "distill_every_view": True},
    )
    data = load_data(config.data, 0)
    method = METHODS[name](config, Encoder("conv8-tiny", [0.3], [0.4]), data.class_counts).train()
    views = [build_transform("digits", 8)] * len(method.plan.uses)
    _two_steps_without_values(method, next(TrainLoader(data.train, 32, views, seed=0).epoch(0)))


def test_no_step_of_low_rank_updates_does(tiny: Config) -> None:
    data = load_data(tiny.data, 0)
    student = Encoder("test_vit(img_size=16)", [0.3], [0.4], resize=16)
    set_trainable(student.backbone, "lora")
    method = METHODS["la"](tiny, student, data.class_counts).train()
    _two_steps_without_values(
        method, next(TrainLoader(data.train, 32, [build_transform("digits", 8)], seed=0).epoch(0))
    )


def test_no_step_with_several_teachers_does(tiny: Config) -> None:
    config = tiny.replace(gml={"distillation_weight": 1.0})
    data = load_data(config.data, 0)
    encoders = [Encoder("conv8-tiny", [0.3], [0.4]) for _ in range(2)]
    together = EncoderEnsemble(encoders)
    classifier = ClassifierEnsemble([CosineClassifier(width, 10) for width in together.widths], together.widths, 4.0)
    student = Encoder("conv8-tiny", [0.3], [0.4])
    method = METHODS["gml"](config, student, data.class_counts, together, classifier.requires_grad_(False)).train()
    views = [build_transform("digits", 8)] * len(method.plan.uses)
    _two_steps_without_values(method, next(TrainLoader(data.train, 32, views, seed=0).epoch(0)))


# the library's Lovász loss selects the labelled pixels, and waits for their number
@pytest.mark.parametrize(
    "name", [name for name in METHODS if "pixels" in METHODS[name].label_kinds and name != "lovasz"]
)
def test_no_step_over_label_maps_does_either(segmenting: Config, name: str) -> None:
    data = load_data(segmenting.data, 0)
    task, method_class = TASKS[data.task], METHODS[name]
    config, _ = auto_config(segmenting.replace(method=name, gml={"distillation_weight": 1.0}), data)

    def new_encoder() -> Encoder:
        return Encoder(config.network, data.mean, data.std, build=task.model_class.build_backbone)

    teacher, classifier = None, None
    if method_class.needs_teacher(config):
        teacher = new_encoder()
        classifier = CosineClassifier(teacher.num_features, 3)
    adapter = task.sample_adapter(config, data)
    method = method_class(config, new_encoder(), data.class_counts, teacher, classifier, adapter=adapter).train()
    views = task.build_transforms(config, data, method_class.view_plan(config).uses)
    _two_steps_without_values(method, next(TrainLoader(data.train, 4, views, seed=0, workers=0).epoch(0)))


def test_a_tensor_of_the_host_is_noticed() -> None:
    with TensorsOfTheHost() as host:
        torch.zeros(3, device="meta") + 1
        assert not host.operations
        torch.tensor([1.0, 2.0]).to("meta")
        assert host.operations


def _two_steps_without_values(method: Method, batch: Batch) -> None:
    """Forward, losses, backward, queue push and optimizer, where tensors have no values: on the device meta."""
    method.to("meta")
    batch = batch.to(torch.device("meta"))
    with pytest.raises(RuntimeError, match="meta"):
        batch.labels.max().item()
    batch.epoch_fraction = torch.zeros((), device="meta")
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    with TensorsOfTheHost() as host:
        for _ in range(2):
            terms = method(batch)
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
    assert not host.operations
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    tracker = MetricTracker()
    tracker.add_terms(terms, len(batch))
