"""The metrics of a run, the loggers they go to, and the guard against losses that are not finite."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from longtail.config import Config
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.training.metric_log import MetricLogger, MetricTracker, NonFiniteLossGuard, read_metrics
from longtail.training.trainer import fit


def test_logs_have_the_same_names_everywhere(tiny: Config, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = tiny.replace(log=("csv", "tensorboard"))
    fit(config, tmp_path / "run", quiet=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in lines if line["kind"] == "epoch"]
    wanted = {"information_bits", "temperature", "queue_fill", "queue_turnovers", "gradient_norm", "images_per_second"}
    wanted |= {"loss/classifier", "loss/mixture"}
    assert wanted | {"memory_mib"} <= rows[0].keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert {f"epoch/{name}" for name in wanted} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("epoch/loss")] == [6, 12]


def test_the_information_bound_is_in_bits(tiny: Config, tmp_path: Path) -> None:
    fit(tiny.replace(epochs=1), tmp_path / "run", quiet=True)
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    counts = load_data(tiny.data, 0).class_counts
    entropy = -sum(n / sum(counts) * math.log2(n / sum(counts)) for n in counts)
    assert line["information_bits"] == pytest.approx(entropy - line["loss/mixture"] / math.log(2), rel=1e-6)


def test_a_missing_logger_names_its_extra(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LongtailError, match=r"log wandb: the package is not installed: .*longtail\[wandb\]"):
        fit(tiny.replace(method="la", log=("wandb",)), tmp_path / "run", quiet=True)


def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path: Path) -> None:
    guard = NonFiniteLossGuard(tmp_path)
    guard.add(6, {"classifier": torch.tensor(1.0), "mixture": torch.tensor(2.0)})
    message = r"'mixture' is nan at step 7; .*optimizer\.grad_clip_norm \(there is no earlier checkpoint"
    with pytest.raises(LongtailError, match=message):
        guard.add(7, {"classifier": torch.tensor(1.0), "mixture": torch.tensor(math.nan)})
    (tmp_path / "last.ckpt").write_bytes(b"x")
    with pytest.raises(LongtailError, match=r"last\.ckpt is from an earlier step"):
        guard.add(8, {"classifier": torch.tensor(math.inf)})


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    MetricLogger(tmp_path, (), "run", 0).add({"kind": "epoch", "step": 1, "gradient_norm": math.inf, "loss": 2.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "kind": "epoch",
        "step": 1,
        "gradient_norm": None,
        "loss": 2.0,
    }


def test_a_truncated_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "epoch", "step": 1}) + '\n{"kind": "ep')
    assert read_metrics(path) == [{"kind": "epoch", "step": 1}]


def test_a_tracker_keeps_its_fields_and_what_an_earlier_version_did_not_keep_is_as_at_first() -> None:
    tracker = MetricTracker()
    tracker.add_terms({"classifier": torch.tensor(2.0)}, 4)
    tracker.add_norm(torch.tensor(3.0))
    tracker.count(4, 8)
    state = tracker.state()
    fields = {"step", "student_passes", "seconds", "best", "images", "sums", "norms", "epoch_start"}
    assert state.keys() == fields
    again = MetricTracker()
    again.restore(state, torch.device("cpu"))
    assert (again.step, again.student_passes, again.images) == (1, 8, 4)
    assert again.means() == {"classifier": 2.0}
    assert again.norm() == 3.0
    older = MetricTracker()
    older.restore({name: value for name, value in state.items() if name != "norms"}, torch.device("cpu"))
    assert older.norms == []
    with pytest.raises(KeyError):
        MetricTracker().restore({"seconds": 1.0}, torch.device("cpu"))
