"""Sharpness-aware steps: the gradient against its formula, the state that a step leaves, and whole trainings."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longtail.config import Config, load_recipe
from longtail.data.batch import Batch
from longtail.data.dataset import LongTailedData
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.losses import distillation
from longtail.methods.base import Method
from longtail.nn import CosineClassifier
from longtail.registry import METHODS
from longtail.training.checkpoint import load_checkpoint
from longtail.training.metric_log import read_metrics
from longtail.training.sharpness import SharpnessAware, passes_per_step, perturbation, state_tensors
from longtail.training.trainer import fit
from tests.losses.host import TensorsOfTheHost
from tests.methods.steps import batches, build_method, new_encoder
from tests.processes import start_longtail
from tests.training.operations import CountsOperations
from tests.training.test_distributed import without_batchnorm

KINDS = ["sam", "imbsam", "focal"]
FOR_IMAGES = [name for name in METHODS if "image" in METHODS[name].label_kinds]


@pytest.fixture
def data(tiny: Config) -> LongTailedData:
    return load_data(tiny.data, 0)


def passes(method: nn.Module, scale: float = 1.0) -> Callable[..., dict[str, Tensor]]:
    """Return a pass over parts of a batch, as the trainer makes it, with the scale of the loss of half precision."""

    def backward(parts: Sequence[Batch], sync: bool = True) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        total = sum(map(len, parts))
        several = isinstance(method, DistributedDataParallel) and not sync
        with method.no_sync() if several else contextlib.nullcontext():  # type: ignore[operator]
            for part in parts:
                terms = method(part)
                (torch.stack(list(terms.values())).sum() * (scale * len(part) / total)).backward()
        return terms

    return backward


def step_gradient(method: Method, config: Config, parts: Sequence[Batch], scale: float = 1.0) -> dict[str, Tensor]:
    """Return the gradient of a sharpness-aware step by parameter."""
    method.zero_grad()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    SharpnessAware(config, method, method.prior.class_counts.tolist(), optimizer).backward(parts, passes(method, scale))
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def loop_gradient(
    method: Method, weights: Sequence[float], teacher: Callable[[Tensor], Tensor], batch: Batch
) -> dict[str, Tensor]:
    """Return the gradient of the loss whose images are weighted, image by image."""
    scores = method.classifier(method.encoder(batch.views[0]))
    teacher_scores = teacher(batch.views[0])
    prior = method.prior.class_counts.double() / method.prior.class_counts.sum()
    loss = torch.zeros((), dtype=torch.float64)
    for image, weight in enumerate(weights):
        posterior = scores[image].exp() * prior / (scores[image].exp() * prior).sum()
        of_labels = batch.targets(10)[image] if batch.mixed_labels is not None else torch.eye(10)[batch.labels[image]]
        one = -(of_labels * posterior.log()).sum()
        one = one + 0.5 * distillation(scores[image][None], teacher_scores[image][None], 4.0)
        loss = loss + weight * one / len(batch)
    names, parameters = zip(*method.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
def test_the_gradient_is_that_of_the_formula(tiny: Config, data: LongTailedData, kind: str, mixed: bool) -> None:
    settings = {"sharpness": kind, "rho": 0.2, "sharpness_weight": 0.7, "sharpness_gamma": 2.5}
    config = tiny.replace(method="la", optimizer=settings, classifier={"distillation_weight": 0.5})
    torch.manual_seed(1)
    encoder = new_encoder().double().eval()
    classifier = CosineClassifier(encoder.num_features, 10).double()
    method = build_method(config, data, encoder, classifier).double()
    batch = batches(method, data)[0]
    batch = dataclasses.replace(batch, views=tuple(view.double() for view in batch.views))
    if mixed:
        others, shares = batch.labels.roll(1), torch.linspace(0, 1, len(batch), dtype=torch.float64)
        batch = dataclasses.replace(batch, mixed_labels=others, label_weights=shares)

    def teacher(view: Tensor) -> Tensor:
        with torch.no_grad():
            scores: Tensor = classifier(encoder(view))
            return scores

    counts = torch.tensor(data.class_counts, dtype=torch.float64)
    omega = {
        "sam": torch.ones(10, dtype=torch.float64),
        "imbsam": torch.tensor([1.0 if count < 20 else 0.0 for count in data.class_counts], dtype=torch.float64),
        "focal": (1 - counts / counts.sum()) ** 2.5,
    }[kind]
    weights = omega[batch.labels]
    if mixed:
        weights = shares * weights + (1 - shares) * omega[others]
    assert 0 < weights.mean() <= 1
    factor = 0.7 if kind == "focal" else 1.0
    original = copy.deepcopy(method)
    plain = loop_gradient(copy.deepcopy(original), [1.0] * len(batch), teacher, batch)
    there = loop_gradient(copy.deepcopy(original), weights.tolist(), teacher, batch)
    norm = torch.stack([(gradient**2).sum() for gradient in there.values()]).sum().sqrt()
    moved = copy.deepcopy(original)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.add_(0.2 * there[name] / norm)
    beyond = loop_gradient(moved, weights.tolist(), teacher, batch)
    found = step_gradient(method, config, [batch])
    assert found.keys() == plain.keys()
    for name in plain:
        expected = plain[name] + factor * (beyond[name] - there[name])
        # the log prior is rounded to float32
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(expected, plain[name], rtol=1e-2, atol=1e-8), name
    for name, parameter in original.named_parameters():
        assert torch.equal(dict(method.named_parameters())[name], parameter)  # bit by bit


@pytest.mark.parametrize("name", FOR_IMAGES)
def test_a_step_leaves_the_state_of_one_pass(tiny: Config, data: LongTailedData, name: str) -> None:
    """Statistics of BatchNorm, queues, moving averages and class means are those of the weights as they are, once."""
    config = tiny.replace(method=name, gml={"distillation_weight": 1.0, "keys": "both"}, optimizer={"sharpness": "sam"})
    method, other = build_method(config, data), build_method(config, data)
    other.load_state_dict(method.state_dict())
    before = [tensor.clone() for tensor in state_tensors(method)]
    for batch in batches(method, data)[:2]:
        torch.manual_seed(3)
        step_gradient(method, config, [batch])
        torch.manual_seed(3)
        other(batch)
    changed = 0
    for ours, theirs, start in zip(state_tensors(method), state_tensors(other), before, strict=True):
        assert torch.equal(ours, theirs)
        changed += not torch.equal(ours, start)
    assert changed >= 3  # at least what BatchNorm has
    assert all(torch.equal(p, q) for p, q in zip(method.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["la", "supcon", "paco", "proco", "gml"])
def test_the_second_pass_sees_the_queues_of_the_first(tiny: Config, data: LongTailedData, name: str) -> None:
    config = tiny.replace(method=name, optimizer={"sharpness": "sam", "rho": 0.5})
    method = build_method(config, data)
    first, second = batches(method, data)[:2]
    method(first)
    here, there = copy.deepcopy(method), copy.deepcopy(method)
    passes(here)([second])
    gradients = {name: p.grad for name, p in here.named_parameters() if p.grad is not None}
    norm = torch.stack([(gradient.double() ** 2).sum() for gradient in gradients.values()]).sum().sqrt()
    with torch.no_grad():
        for parameter_name, parameter in there.named_parameters():
            if parameter_name in gradients:
                parameter.add_(0.5 * gradients[parameter_name] / norm.float())
    passes(there)([second])
    found = step_gradient(method, config, [second])
    for parameter_name, parameter in there.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[parameter_name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_loss_scales_the_gradient_and_an_overflow_leaves_the_weights(
    tiny: Config, data: LongTailedData, kind: str
) -> None:
    """What the scaler of 16-mixed relies on: it divides the gradient, or skips the step and lowers the scale."""
    config = tiny.replace(method="la", optimizer={"sharpness": kind})
    method = build_method(config, data)
    batch = batches(method, data)[0]
    start = copy.deepcopy(method.state_dict())
    plain = step_gradient(method, config, [batch])
    after = copy.deepcopy(method.state_dict())
    method.load_state_dict(start)
    scaled = step_gradient(method, config, [batch], 2.0**16)
    for name, gradient in plain.items():
        torch.testing.assert_close(scaled[name] / 2**16, gradient, rtol=1e-3, atol=1e-6)
    method.load_state_dict(start)
    overflown = step_gradient(method, config, [batch], 3e38)
    assert not all(bool(gradient.isfinite().all()) for gradient in overflown.values())
    assert all(torch.equal(value, after[name]) for name, value in method.state_dict().items() if value is not None)


def test_parts_of_a_batch_have_the_gradient_of_the_whole(tiny: Config, data: LongTailedData) -> None:
    config = tiny.replace(method="la", optimizer={"sharpness": "focal"})
    method = build_method(config, data).double()
    without_batchnorm(method)
    batch = batches(method, data)[0]
    batch = dataclasses.replace(batch, views=tuple(view.double() for view in batch.views))
    whole, parts = step_gradient(method, config, [batch]), step_gradient(method, config, batch.split(3))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-8)


def test_a_gradient_of_zero_does_not_move_the_weights() -> None:
    steps = perturbation([torch.zeros(3), torch.zeros(2, 2)], 0.05)
    assert all(bool((step == 0).all()) for step in steps)
    steps = perturbation([torch.tensor([3.0]), torch.tensor([[4.0]])], 0.05)
    torch.testing.assert_close(torch.cat([step.flatten() for step in steps]), torch.tensor([0.03, 0.04]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_reads_a_value_on_the_host(tiny: Config, data: LongTailedData, kind: str) -> None:
    config = tiny.replace(method="la", optimizer={"sharpness": kind})
    method = build_method(config, data).train()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    batch = batches(method, data)[0]
    sharpness = SharpnessAware(config, method.to("meta"), data.class_counts, optimizer)
    assert sharpness.class_weights is None or sharpness.class_weights.is_meta
    batch = dataclasses.replace(batch.to(torch.device("meta")), epoch_fraction=torch.zeros((), device="meta"))
    with TensorsOfTheHost() as host:
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            sharpness.backward([batch], passes(method))
            optimizer.step()
    assert not host.operations


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_the_device_train_the_same_and_passes_are_counted(tiny: Config, tmp_path: Path, kind: str) -> None:
    config, found = tiny.replace(method="la", optimizer={"sharpness": kind, "grad_accumulation_steps": 2}), []
    for where in ("host", "device"):
        run = fit(config.replace(accelerator={"batches": where}), tmp_path / where, quiet=True)
        assert run.student_passes == passes_per_step(config) * 2 * sum(load_data(config.data, 0).class_counts)
        assert read_metrics(tmp_path / where / "metrics.jsonl")[1]["student_passes"] == run.student_passes
        found.append(load_checkpoint(tmp_path / where / "last.ckpt")["method"])
    for name, value in found[0].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[1][name], value, rtol=5e-3, atol=3e-3)
    assert passes_per_step(config) == {"sam": 2, "imbsam": 3, "focal": 3}[kind]
    assert passes_per_step(tiny) == 1


def test_in_half_precision_too(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(method="la", precision="bf16-mixed", optimizer={"sharpness": "focal"})
    fit(config, tmp_path / "run", quiet=True)
    state = load_checkpoint(tmp_path / "run" / "last.ckpt")["method"]
    assert all(value.dtype == torch.float32 for name, value in state.items() if name.endswith("weight"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gml", "optimizer": {"sharpness": "imbsam"}}, "imbsam: weighs .* method gml cannot be split up"),
        ({"method": "paco", "optimizer": {"sharpness": "focal"}}, "focal: weighs .* method paco cannot .* use sam"),
        (
            {"method": "la", "optimizer": {"sharpness": "imbsam", "sharpness_below": 2}},
            "imbsam: expected a class with fewer than 2 training images, the smallest has 2; raise",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tiny: Config, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LongtailError, match=f"optimizer.sharpness {message}") as caught:
        fit(tiny.replace(**changes), tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_sam_goes_with_labels_of_pixels_and_the_others_do_not(segmenting: Config, tmp_path: Path) -> None:
    fit(segmenting.replace(epochs=1, optimizer={"sharpness": "sam"}), tmp_path / "run", quiet=True)
    with pytest.raises(LongtailError, match=r"optimizer\.sharpness focal: .* labels of pixels cannot be split"):
        fit(segmenting.replace(optimizer={"sharpness": "focal"}), tmp_path / "other", quiet=True)


def sharp_steps(rank: int, world: int, folder: str, kind: str) -> None:
    """Train four steps as one of several processes, and write the weights to ``folder``."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/{kind}{world}", rank=rank, world_size=world)
    config = load_recipe("digits-lt").config.replace(method="la", network="conv8-tiny", optimizer={"sharpness": kind})
    data = load_data(config.data, 0)
    method = build_method(config, data)
    without_batchnorm(method)
    whole = batches(method, data)
    wrapped = method if world == 1 else DistributedDataParallel(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    sharpness = SharpnessAware(config, method, data.class_counts, optimizer)
    for batch in whole[:4]:
        optimizer.zero_grad()
        sharpness.backward([batch.split(world)[rank]], passes(wrapped))
        optimizer.step()
    torch.save(method.state_dict(), f"{folder}/{kind}-{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["sam", pytest.param("focal", marks=pytest.mark.slow)])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, kind: str) -> None:
    sharp_steps(0, 1, str(tmp_path), kind)
    step = "from tests.training.test_sharpness import sharp_steps; sharp_steps({}, 2, {!r}, {!r})"
    ranks = [start_longtail("--version", prelude=step.format(rank, str(tmp_path), kind)) for rank in range(2)]
    for process in ranks:
        assert process.wait(timeout=120) == 0, process.stderr
    alone = torch.load(tmp_path / f"{kind}-1-0.pt", weights_only=True)
    both = [torch.load(tmp_path / f"{kind}-2-{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in alone.items():
        if isinstance(tensor, Tensor):
            assert torch.equal(both[0][name], both[1][name]), name
            torch.testing.assert_close(both[0][name], tensor, rtol=1e-3, atol=1e-4)


def test_values_are_copied_by_one_operation_for_all_tensors_of_a_type(tiny: Config, data: LongTailedData) -> None:
    """On an accelerator each is a launch."""
    config = tiny.replace(method="la", optimizer={"sharpness": "sam"})
    method = build_method(config, data)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    steps = SharpnessAware(config, method, data.class_counts, optimizer)
    batch = batches(method, data)[0]

    def backward(parts: Sequence[Batch], sync: bool = True) -> dict[str, Tensor]:
        for parameter in method.parameters():
            parameter.grad = torch.ones_like(parameter)
        return {}

    with CountsOperations() as counted:
        steps.backward([batch], backward)
    tensors = len(state_tensors(method)) + len(steps.parameters)
    copies = sum(n for name, n in counted.operations.items() if any(each in name for each in ("copy", "clone", "add_")))
    assert tensors > 20
    assert copies < 14  # of floats, whole numbers and weights: saved and restored, and the step to the nearby weights
