"""Options of the training: layouts of views, micro-batches, clipping, precision, moving average of the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.data.loader import TrainLoader
from longtail.data.sources import load_data
from longtail.data.transforms import build_transform
from longtail.errors import LongtailError
from longtail.methods.base import Method
from longtail.methods.gml import GML
from longtail.nn import Encoder
from longtail.training.checkpoint import load_checkpoint
from longtail.training.metric_log import read_metrics
from longtail.training.trainer import fit
from tests.training.runs import equal, fit_in_two, weights

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "key shared": {"gml": {"share_key": True}},
    "query shared": {"gml": {"share_query": True}},
    "one view": {"gml": {"share_key": True, "share_query": True}},
    "all classified": {"classifier": {"every_view": True}},
    "two experts": {"gml": {"stages": 2, "ensemble_weight": 1.0}},
    "cached": {"teacher": {"cache": 3}},
    "cached, one view": {"teacher": {"cache": 3}, "gml": {"share_query": True}},
    "cached, key shared": {"teacher": {"cache": 2}, "gml": {"share_key": True}},
}
SAMPLE = {("paper", 1.0), ("two experts", 1.0), ("cached, key shared", 0.0)}


@pytest.mark.parametrize(
    ("layout", "distillation"),
    [
        pytest.param(layout, weight, marks=() if (layout, weight) in SAMPLE else pytest.mark.slow)
        for layout in LAYOUTS
        for weight in (0.0, 1.0)
    ],
)
def test_every_layout_trains_and_resumes(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, distillation: float
) -> None:
    changes = {name: dict(values) for name, values in LAYOUTS[layout].items()}
    changes.setdefault("gml", {})["distillation_weight"] = distillation
    config = tiny.replace(**changes)
    run = fit(config, tmp_path / "whole", quiet=True)
    images, views = len(load_data(config.data, 0).train), GML.view_plan(config).num_student
    assert run.student_passes == pytest.approx(2 * images * views * GML.pass_cost(config), rel=1e-3)
    assert views == (1 if changes["gml"].get("share_query") else 2)
    fit_in_two(config, tmp_path / "cut", 8, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_micro_batches_make_the_step_of_the_whole_batch(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With statistics of the whole batch in both; the queue gets every image once."""
    data = load_data(tiny.data, 0)
    pushed: list[int] = []
    losses = []
    for parts in (1, 3):
        torch.manual_seed(0)
        teacher = Encoder("conv8-tiny", [0.3], [0.4])
        method = GML(tiny, Encoder("conv8-tiny", [0.3], [0.4]), data.class_counts, teacher, None).eval()
        loader = TrainLoader(data.train, 64, [build_transform("digits", 8)] * 3, seed=0)
        method.queues.push(torch.zeros(1, teacher.num_features), torch.tensor([0]), torch.tensor([-5]))
        push = method.queues.push

        def counted(features: torch.Tensor, *args: Any, push: Any = push) -> None:
            pushed.append(len(features))
            push(features, *args)

        monkeypatch.setattr(method.queues, "push", counted)
        batch = next(loader.epoch(0))
        total = torch.zeros(())
        for part in batch.split(parts):
            total = total + method(part)["classifier"] * (len(part) / len(batch))
        losses.append(total.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert pushed == [60, 20, 20, 20]
    config = tiny.replace(optimizer={"grad_accumulation_steps": 3})
    fit(config, tmp_path / "run", quiet=True)
    assert load_checkpoint(tmp_path / "run" / "last.ckpt")["tracker"]["step"] == 12


def test_micro_batches_that_are_too_small_are_refused(tiny: Config, tmp_path: Path) -> None:
    message = r"optimizer\.grad_accumulation_steps 40: leaves 1 of 59 images per part"
    with pytest.raises(LongtailError, match=message):
        fit(tiny.replace(optimizer={"grad_accumulation_steps": 40}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_norm_of_a_clipped_gradient_is_bounded(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    step = torch.optim.SGD.step

    def measured(self: torch.optim.SGD, *args: Any, **options: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", measured)
    fit(tiny.replace(method="la", optimizer={"grad_clip_norm": 0.5}), tmp_path / "run", quiet=True)
    assert max(norms) <= 0.5001
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["gradient_norm"] > 0.5  # before clipping


def test_half_precision_trains(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(epochs=1, precision="bf16-mixed", gml={"distillation_weight": 1.0})
    run = fit(config, tmp_path / "run", quiet=True)
    plain = fit(config.replace(precision="32-true"), tmp_path / "plain", quiet=True, teachers=tmp_path / "other")
    lines = [read_metrics(one.folder / "metrics.jsonl")[0] for one in (run, plain)]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=0.05)
    assert lines[0]["loss"] != lines[1]["loss"]


def test_half_precision_does_not_round_the_batch(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, dict[str, torch.Tensor]] = {}
    forward = Method.forward

    def recorded(self: Method, batch: Batch) -> dict[str, torch.Tensor]:
        fields = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        seen[precision] = {**fields, "view": batch.views[0]}  # the last is of the student
        return forward(self, batch)

    monkeypatch.setattr(Method, "forward", recorded)
    config = tiny.replace(
        method="la",
        epochs=1,
        mixing={"kind": "mixup"},
        classifier={"distillation_weight": 1.0},
        teacher={"cache": 1, "epochs": 1},
    )
    for precision in ("32-true", "bf16-mixed"):
        teachers = tmp_path / f"teachers of {precision}"
        fit(config.replace(precision=precision), tmp_path / precision, quiet=True, teachers=teachers)
    plain, half = seen["32-true"], seen["bf16-mixed"]
    assert {"view", "teacher_scores", "label_weights"} <= set(half)
    assert {name: value.dtype for name, value in half.items()} == {name: value.dtype for name, value in plain.items()}
    assert all(torch.equal(half[name], plain[name]) for name in half if name != "teacher_scores")


def test_the_moving_average_of_the_weights_is_saved(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(method="la", epochs=3, optimizer={"ema_decay": 0.9})
    fit(config, tmp_path / "run", quiet=True)
    plain = fit(config.replace(optimizer={"ema_decay": None}), tmp_path / "plain", quiet=True)
    assert not equal(weights(tmp_path / "run"), weights(tmp_path / "plain"))
    state = load_checkpoint(tmp_path / "run" / "last.ckpt")
    saved = weights(tmp_path / "run")
    assert all(torch.equal(saved[name], tensor) for name, tensor in state["ema"].items())
    # the student itself is trained as without it
    student = {n: t for n, t in state["method"].items() if n.startswith("encoder.")}
    reference = load_checkpoint(plain.folder / "last.ckpt")["method"]
    assert all(torch.equal(tensor, reference[name]) for name, tensor in student.items())
