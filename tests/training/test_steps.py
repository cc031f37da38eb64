"""Training on batches that are made on the device, here a CPU: without a CUDA graph, all else as on an accelerator."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longtail.config import Config, read_config
from longtail.data.batch import Batch
from longtail.errors import LongtailError
from longtail.methods.base import Method, TeacherOutput
from longtail.methods.views import CLASSIFICATION, CONTRAST, ViewPlan
from longtail.registry import METHODS
from longtail.training import steps as training_steps
from longtail.training import trainer
from longtail.training.checkpoint import load_checkpoint
from longtail.training.metric_log import read_metrics
from longtail.training.trainer import fit

ON_DEVICE = {"batches": "device"}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_checkpoint(folder / "last.ckpt")["method"].items() if isinstance(v, torch.Tensor)}


CAPTURED = "the step is captured"


def _record_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps on a CPU go as far as recording a graph, which then says that it was tried."""
    started = set[int]()
    launch = training_steps.DeviceSteps.launch

    def records(self: Any, size: int) -> None:
        self.record = self.record or id(self) not in started
        started.add(id(self))
        launch(self, size)

    def capture(*_: object, **__: object) -> None:
        raise RuntimeError(CAPTURED)

    monkeypatch.setattr(training_steps.DeviceSteps, "launch", records)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", capture)


def _reason(log: str) -> str:
    """Return the one reason against a graph, without the line of code where an error was raised."""
    (line,) = (line for line in log.splitlines() if "a step cannot be one CUDA graph" in line)
    return re.sub(r" \(\S+:\d+\)$", "", line.rpartition("operation by operation: ")[2])


def _epochs(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "epoch"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in {"la", "paco", "gml"} else pytest.mark.slow)
        for name in METHODS
        if "image" in METHODS[name].label_kinds
    ],
)
def test_every_method_trains_as_with_batches_of_the_host(
    tiny: Config, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny.replace(method=name, gml={"distillation_weight": 1.0})
    fit(config, tmp_path / "host", quiet=True)
    _record_graphs(monkeypatch)
    with caplog.at_level(logging.INFO, logger="longtail"):
        fit(config.replace(accelerator=ON_DEVICE), tmp_path / "device", quiet=True)
    assert _reason(caplog.text) == CAPTURED  # nothing in the method speaks against it
    host, device = _weights(tmp_path / "host"), _weights(tmp_path / "device")
    assert host.keys() == device.keys()
    for key, value in host.items():
        torch.testing.assert_close(device[key], value, rtol=5e-3, atol=3e-3)
    for ours, theirs in zip(_epochs(tmp_path / "device"), _epochs(tmp_path / "host"), strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            if key.startswith("loss") or key in {"step", "learning_rate", "gradient_norm", "student_passes"}:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-2, abs=1e-5), key


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "adamw", "learning_rate": 0.002, "grad_clip_norm": 1.0}},
        {"optimizer": {"ema_decay": 0.9, "grad_accumulation_steps": 2}},
        {"teacher": {"cache": 2}},
        {"classifier": {"views": 2, "distillation_weight": 1.0, "distill_every_view": True}, "method": "la"},
        {
            "classifier": {"views": 2, "distillation_weight": 1.0, "distill_every_view": True},
            "optimizer": {"grad_accumulation_steps": 2},
            "method": "la",
        },
        {
            "classifier": {"views": 2, "distillation_weight": 1.0, "distill_every_view": True},
            "teacher": {"source": "ema", "ema_decay": 0.9, "ema_warmup": 0.6},
            "method": "la",
        },
        {"teacher": {"count": 2, "generations": 2, "views": 2, "epochs": 1}, "gml": {"distillation_weight": 1.0}},
        {"method": "la", "second_stage": "crt"},
        {"method": "la", "tune": "lora:2"},
        {"method": "ldam", "ldam": {"reweight_from": 0.5}},
    ],
)
def test_so_does_every_kind_of_step(
    tiny: Config,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tiny.replace(**changes)
    fit(config, tmp_path / "host", quiet=True)
    _record_graphs(monkeypatch)
    with caplog.at_level(logging.INFO, logger="longtail"):
        fit(config.replace(accelerator=ON_DEVICE), tmp_path / "device", quiet=True)
    assert _reason(caplog.text) == CAPTURED
    states = [load_checkpoint(tmp_path / name / "last.ckpt") for name in ("host", "device")]
    for part in {"method", "ema"} & states[0].keys():
        host, device = ({k: v for k, v in state[part].items() if isinstance(v, torch.Tensor)} for state in states)
        for key, value in host.items():
            torch.testing.assert_close(device[key], value, rtol=5e-3, atol=3e-3)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny.replace(method="la", epochs=1, accelerator=ON_DEVICE)
    fit(config, tmp_path / "eager", quiet=True)
    with caplog.at_level(logging.INFO, logger="longtail"):
        fit(config.replace(compile=True), tmp_path / "compiled", quiet=True)
    assert "the first step, with the compilation of the network" in caplog.text
    for ours, theirs in zip(_epochs(tmp_path / "compiled"), _epochs(tmp_path / "eager"), strict=True):
        assert ours["loss/classifier"] == pytest.approx(theirs["loss/classifier"], rel=1e-3)
    eager, compiled = _weights(tmp_path / "eager"), _weights(tmp_path / "compiled")
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=5e-3, atol=3e-3)


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.replace(accelerator=ON_DEVICE)
    complete = fit(config, tmp_path / "whole", quiet=True)
    teachers = tmp_path / "teachers"
    launch, seen = training_steps.DeviceSteps.launch, [0]

    class StopError(Exception):
        pass

    def stops(self: Any, size: int) -> None:
        seen[0] += 1
        if seen[0] == 9:
            raise StopError
        launch(self, size)

    monkeypatch.setattr(training_steps.DeviceSteps, "launch", stops)
    with pytest.raises(StopError):
        fit(config, tmp_path / "stopped", quiet=True, teachers=teachers)
    monkeypatch.undo()
    again = fit(config, tmp_path / "stopped", quiet=True, resume=True, teachers=teachers)
    whole, resumed = _weights(tmp_path / "whole"), _weights(tmp_path / "stopped")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert again.metrics == complete.metrics


def test_a_run_goes_on_where_batches_are_made_elsewhere(tiny: Config, tmp_path: Path) -> None:
    """A checkpoint of an accelerator can be continued on a CPU, and the other way round."""
    for first, second in (("device", "host"), ("host", "device")):
        folder = tmp_path / first
        config = tiny.replace(method="ce", optimizer={"name": "adamw"}, epochs=1)
        fit(config.replace(accelerator={"batches": first}), folder, quiet=True)
        state = load_checkpoint(folder / "last.ckpt")
        # one more epoch, as if the run had been longer
        longer = read_config(folder / "config.yaml").replace(epochs=2, accelerator={"batches": second})
        (folder / "config.yaml").write_text(longer.to_yaml())
        run = fit(longer, folder, quiet=True, resume=True)
        assert load_checkpoint(folder / "last.ckpt")["tracker"]["step"] == 2 * state["tracker"]["step"]
        assert run.student_passes == 2 * state["tracker"]["student_passes"]


def test_a_loss_that_is_not_finite_is_named_with_its_step(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = training_steps.DeviceSteps.step, [0]

    def breaks(self: Any, size: int) -> None:
        seen[0] += 1
        if seen[0] == 5:
            with torch.no_grad():
                self.student.method.classifier.weight.fill_(float("nan"))
        step(self, size)

    monkeypatch.setattr(training_steps.DeviceSteps, "step", breaks)
    config = tiny.replace(method="ce", accelerator=ON_DEVICE, checkpoint_seconds=60.0)
    with pytest.raises(LongtailError, match="'classifier' is nan at step 5"):
        fit(config, tmp_path / "run", quiet=True)


def test_the_teacher_sees_the_key_view_of_a_method(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one with ``teacher_outputs`` of its own, called ahead of the step where batches are made on the device."""
    plan = ViewPlan(student=(CLASSIFICATION, CLASSIFICATION), keys=(CONTRAST,), num_classified=1)

    def teacher_outputs(self: Method, batch: Batch) -> TeacherOutput:
        assert self.teacher is not None
        with torch.no_grad():
            return TeacherOutput(self.teacher(batch.views[-1]), None)

    def auxiliary_loss(
        self: Method, features: torch.Tensor, scores: torch.Tensor, batch: Batch, teacher_output: TeacherOutput
    ) -> dict[str, torch.Tensor]:
        assert teacher_output.features is not None
        similarity = torch.nn.functional.cosine_similarity(features[len(batch) :], teacher_output.features)
        return {"features": 1 - similarity.mean()}

    for name, hook in {
        "view_plan": classmethod(lambda cls, config: plan),
        "needs_teacher": classmethod(lambda cls, config: True),
        "needs_teacher_features": classmethod(lambda cls, config: True),
        "teacher_outputs": teacher_outputs,
        "auxiliary_loss": auxiliary_loss,
    }.items():
        monkeypatch.setattr(METHODS["ce"], name, hook)
    config = tiny.replace(method="ce", epochs=1, teacher={"epochs": 1})
    for place in ("host", "device"):
        settings = config.replace(accelerator={"batches": place})
        fit(settings, tmp_path / place, quiet=True, teachers=tmp_path / "teachers")
    host, device = _weights(tmp_path / "host"), _weights(tmp_path / "device")
    for key, value in host.items():
        torch.testing.assert_close(device[key], value, rtol=5e-3, atol=3e-3)
    losses = [_epochs(tmp_path / place)[0]["loss/features"] for place in ("host", "device")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda scores: scores.logsumexp(dim=1), r"loss term 'classifier': expected a scalar tensor, got \(\d+,\)"),
        (lambda scores: 1.5, "loss term 'classifier': expected a scalar tensor, got 1.5"),
        (lambda scores: None, "loss term 'classifier': expected a scalar tensor, got nothing"),
        (lambda scores: scores.detach().sum(), "expected loss terms with a gradient for what is trained, got class"),
    ],
    ids=["one per image", "number", "nothing", "detached"],
)
@pytest.mark.parametrize("batches", ["host", "device"])
def test_a_loss_that_is_no_loss_is_refused_at_the_first_step(
    tiny: Config, batches: str, loss: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS["ce"], "loss", lambda self, scores, labels, batch: loss(scores))
    with pytest.raises(LongtailError, match=f"method ce: {message}"):
        fit(tiny.replace(method="ce", accelerator={"batches": batches}), tmp_path / "run", quiet=True)


def test_a_method_without_loss_terms_is_refused(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS["ce"], "classification_loss", lambda self, scores, labels, batch: {})
    with pytest.raises(LongtailError, match=r"method ce: expected loss terms with a gradient .*, got no terms"):
        fit(tiny.replace(method="ce"), tmp_path / "run", quiet=True)


def test_what_cannot_be_on_the_device_is_said(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(method="ce", tune="head", accelerator=ON_DEVICE)
    with pytest.raises(
        LongtailError, match=r"accelerator\.batches device: tune head trains on kept features, not on images; use auto"
    ):
        fit(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_batches_are_made_by_the_host_where_too_little_memory_is_free(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, optimizer: str
) -> None:
    """The images are within the limit, but other programs have taken more of the device than that leaves."""

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(training_steps, "DeviceLoader", fails)
    monkeypatch.setattr(trainer, "batches_on_device", lambda *_: (True, "kept on the device"))
    config = tiny.replace(method="ce", epochs=1, optimizer={"name": optimizer})
    with caplog.at_level(logging.INFO, logger="longtail"):
        fit(config, tmp_path / "run", quiet=True)
    assert "training images are not kept on cpu after all: not enough of its memory is free" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):  # asked for
        fit(config.replace(accelerator=ON_DEVICE), tmp_path / "asked", quiet=True)


def test_where_the_images_are_is_said(tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="longtail"):
        fit(tiny.replace(method="ce", epochs=1, accelerator=ON_DEVICE), tmp_path / "run", quiet=True)
    assert "training images are kept on cpu and augmented there" in caplog.text


class Memory:
    """An attribute of a method that is no module."""

    position = 0


def _counts(method: Any) -> None:
    method.calls = getattr(method, "calls", 0) + 1


def _counts_in_a_module(method: Any) -> None:
    method.classifier.state = ("calls", getattr(method.classifier, "state", (0, 0))[1] + 1)


def _counts_in_a_memory(method: Any) -> None:
    method.memory = getattr(method, "memory", Memory())
    method.memory.position += 1


def _replaces_a_tensor(method: Any) -> None:
    method.average = 0.9 * getattr(method, "average", torch.zeros(3))


def _sets_once(method: Any) -> None:
    method.ready, method.limit, method.ids = True, math.nan, (1, None)
    method.seen = getattr(method, "seen", torch.zeros(()))
    method.seen += 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (_counts, "method ce changes its value 'calls' in every step, which is no tensor"),
        (_counts_in_a_module, "method ce changes its value 'classifier.state' in every step, which is no tensor"),
        (_counts_in_a_memory, "method ce changes its value 'memory.position' in every step, which is no tensor"),
        (_replaces_a_tensor, "method ce replaces its tensor 'average' in every step"),
        (_sets_once, CAPTURED),
    ],
)
def test_a_step_that_a_graph_would_freeze_is_not_recorded(
    tiny: Config,
    changes: Callable[[Any], None],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loss = METHODS["ce"].loss

    def changing(self: Any, *arguments: Any) -> torch.Tensor:
        changes(self)
        return loss(self, *arguments)

    monkeypatch.setattr(METHODS["ce"], "loss", changing)
    _record_graphs(monkeypatch)
    with caplog.at_level(logging.INFO, logger="longtail"):
        fit(tiny.replace(method="ce", epochs=1, accelerator=ON_DEVICE), tmp_path / "run", quiet=True)
    assert _reason(caplog.text) == reason
