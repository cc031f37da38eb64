"""What the engine offers beside the plain step: parts of a batch, clipping, averages, the teacher's cache, logs."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longtail.config import Config
from longtail.data.loaders import Batch, TrainLoader
from longtail.data.scenes import DenseData
from longtail.data.sources import load_data
from longtail.data.views import build_view
from longtail.engine.books import Books, Watch, read_metrics
from longtail.engine.cache import view_keys
from longtail.engine.choices import build_views, resolve
from longtail.engine.files import load_checkpoint
from longtail.engine.fit import fit
from longtail.errors import LongtailError
from longtail.methods import FOR_PIXELS, METHODS, ONLY_FOR_PIXELS, method_class
from longtail.methods.base import Method
from longtail.methods.gml import GML
from longtail.nn import CosineClassifier, Encoder
from tests.engine.test_fit import equal, fit_in_two, weights

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "key shared": {"gml": {"share_key": True}},
    "query shared": {"gml": {"share_query": True}},
    "one view": {"gml": {"share_key": True, "share_query": True}},
    "all classified": {"classifier": {"every_view": True}},
    "cached": {"teacher": {"cache": 3}},
    "cached, one view": {"teacher": {"cache": 3}, "gml": {"share_query": True}},
    "cached, key shared": {"teacher": {"cache": 2}, "gml": {"share_key": True}},
}


@pytest.mark.parametrize("distillation", [0.0, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_and_resumes(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, distillation: float
) -> None:
    changes = {name: dict(values) for name, values in LAYOUTS[layout].items()}
    changes.setdefault("gml", {})["distillation_weight"] = distillation
    config = tiny.replace(**changes)
    run = fit(config, tmp_path / "whole", quiet=True)
    images, views = len(load_data(config.data, 0).train), GML.student_views(config)
    assert run.student_passes == 2 * images * views
    assert views == (1 if changes["gml"].get("share_query") else 2)
    fit_in_two(config, tmp_path / "cut", 8, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_the_cache_holds_what_the_teacher_makes_of_the_very_view(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.replace(gml={"distillation_weight": 1.0}, teacher={"cache": 3}, epochs=4)
    seen: list[tuple[Batch, int]] = []
    original, teacher_passes = GML.training_step, 0

    def watching(self: GML, batch: Batch) -> dict[str, torch.Tensor]:
        nonlocal teacher_passes
        teacher, classifier = self._frozen
        assert teacher is not None
        assert classifier is not None
        assert batch.teacher_scores is not None
        assert batch.key_features is not None
        with torch.no_grad():
            again = classifier(teacher(batch.views[0]))
        assert torch.allclose(again, batch.teacher_scores, atol=1e-4)
        assert len(batch.views) == 2  # classification and query: the key was not drawn
        # the key is another view than the classification's
        assert not torch.allclose(teacher(batch.views[0]), batch.key_features, atol=1e-3)
        seen.append((batch, len(seen)))
        return original(self, batch)

    monkeypatch.setattr(GML, "training_step", watching)
    fit(config, tmp_path / "run")
    assert "teacher: 3 views of 357 images once" in capsys.readouterr().err
    files = sorted(path.name.rpartition("-")[2] for path in (tmp_path / "teachers" / "cache").iterdir())
    assert files == ["features.npy", "scores.npy"]
    # epoch 4 shows the first view again
    data = load_data(config.data, 0)
    view = build_view("digits", 8)
    for batch, number in seen:
        positions = torch.tensor([data.train.ids.tolist().index(image) for image in batch.ids.tolist()])
        pixels = data.train.images.take(positions)
        expected = view(pixels, batch.ids, view_keys(0, (number // 6) % 3))
        assert torch.allclose(batch.views[0], expected, atol=1e-6)
    # found again by another run with the same teacher and views
    fit(config.replace(gml={"embedding_dim": 8}), tmp_path / "other")
    assert "views of" not in capsys.readouterr().err


def test_parts_of_a_batch_make_the_step_of_the_whole(tiny: Config, tmp_path: Path, monkeypatch: Any) -> None:
    """With statistics of the whole batch in both; the queue sees every image once."""
    data = load_data(tiny.data, 0)
    pushed: list[int] = []
    results = []
    for parts in (1, 3):
        torch.manual_seed(0)
        teacher = Encoder("conv8-tiny", [0.3], [0.4])
        method = GML(tiny, Encoder("conv8-tiny", [0.3], [0.4]), data.class_counts, teacher, None).eval()
        source = TrainLoader(data.train, 64, [build_view("digits", 8)] * 3, seed=0)
        method.queues.push(torch.zeros(1, teacher.num_features), torch.tensor([0]), torch.tensor([-5]))
        push = method.queues.push

        def counted(*given: Any, push: Any = push) -> None:
            pushed.append(len(given[0]))
            push(*given)

        monkeypatch.setattr(method.queues, "push", counted)
        batch = next(source.epoch(0))
        total = torch.zeros(())
        for part in batch.split(parts):
            total = total + method(part)["classifier"] * (len(part) / len(batch))
        results.append(total.item())
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert pushed == [60, 20, 20, 20]
    config = tiny.replace(optimizer={"accumulate": 3})
    fit(config, tmp_path / "run", quiet=True)
    assert load_checkpoint(tmp_path / "run" / "last.ckpt")["books"]["step"] == 12


def test_parts_that_are_too_small_are_refused(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match=r"optimizer\.accumulate 40: leaves 1 of 59 images a part"):
        fit(tiny.replace(optimizer={"accumulate": 40}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_clipped_gradient_is_no_longer_than_it_may_be(tiny: Config, tmp_path: Path, monkeypatch: Any) -> None:
    norms = []
    step = torch.optim.SGD.step

    def measured(self: torch.optim.SGD, *given: Any, **named: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        return step(self, *given, **named)

    monkeypatch.setattr(torch.optim.SGD, "step", measured)
    fit(tiny.replace(method="la", optimizer={"clip": 0.5}), tmp_path / "run", quiet=True)
    assert max(norms) <= 0.5001
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["gradient_norm"] > 0.5  # as it was before


def test_half_precision_trains(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(epochs=1, precision="bf16-mixed", gml={"distillation_weight": 1.0})
    run = fit(config, tmp_path / "run", quiet=True)
    plain = fit(config.replace(precision="32-true"), tmp_path / "plain", quiet=True, teachers=tmp_path / "other")
    lines = [read_metrics(one.folder / "metrics.jsonl")[0] for one in (run, plain)]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=0.05)
    assert lines[0]["loss"] != lines[1]["loss"]


def test_the_average_is_kept_and_resumes(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(method="la", epochs=3, optimizer={"ema": 0.9})
    fit(config, tmp_path / "run", quiet=True)
    plain = fit(config.replace(optimizer={"ema": None}), tmp_path / "plain", quiet=True)
    assert not equal(weights(tmp_path / "run"), weights(tmp_path / "plain"))
    state = load_checkpoint(tmp_path / "run" / "last.ckpt")
    kept = weights(tmp_path / "run")
    assert all(torch.equal(kept[name], tensor) for name, tensor in state["average"].items())
    # the student itself went the same way
    student = {n: t for n, t in state["method"].items() if n.startswith("encoder.")}
    reference = load_checkpoint(plain.folder / "last.ckpt")["method"]
    assert all(torch.equal(tensor, reference[name]) for name, tensor in student.items())


def test_logs_have_the_same_names_everywhere(tiny: Config, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = tiny.replace(log=("csv", "tensorboard"))
    fit(config, tmp_path / "run", quiet=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in lines if line["kind"] == "epoch"]
    wanted = {"information_bits", "temperature", "queue_fill", "queue_turnovers", "gradient_norm", "images_per_second"}
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
    assert line["information_bits"] == pytest.approx(entropy - line["mixture"] / math.log(2), rel=1e-6)


def test_a_missing_logger_names_its_extra(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LongtailError, match=r"log wandb: the package is not installed: .*longtail\[wandb\]"):
        fit(tiny.replace(method="la", log=("wandb",)), tmp_path / "run", quiet=True)


def test_a_loss_that_is_no_number_is_told_with_step_and_term(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.add(6, {"classifier": torch.tensor(1.0), "mixture": torch.tensor(2.0)})
    with pytest.raises(LongtailError, match=r"'mixture' is nan at step 7; .*optimizer\.clip \(there is no checkpoint"):
        watch.add(7, {"classifier": torch.tensor(1.0), "mixture": torch.tensor(math.nan)})
    (tmp_path / "last.ckpt").write_bytes(b"x")
    with pytest.raises(LongtailError, match=r"last\.ckpt is from before"):
        watch.add(8, {"classifier": torch.tensor(math.inf)})


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ONLY_FOR_PIXELS])
def test_no_step_reads_a_value_on_the_host(tiny: Config, name: str) -> None:
    config = tiny.replace(gml={"distillation_weight": 1.0})
    data = load_data(config.data, 0)
    kind = method_class(name)
    parts: tuple[Any, ...] = ()
    if kind.needs_teacher(config):
        teacher = Encoder("conv8-tiny", [0.3], [0.4])
        parts = (teacher, CosineClassifier(teacher.num_features, 10))
    method = kind(config, Encoder("conv8-tiny", [0.3], [0.4]), data.class_counts, *parts).train()
    batch = next(TrainLoader(data.train, 32, [build_view("digits", 8)] * len(kind.views(config)), seed=0).epoch(0))
    _two_steps_without_values(method, batch)


# the library's Lovász loss picks out the pixels that count, and waits for their number
@pytest.mark.parametrize("name", [name for name in FOR_PIXELS if name != "lovasz"])
def test_no_step_over_pixels_does_either(segmenting: Config, name: str) -> None:
    data = load_data(segmenting.data, 0)
    assert isinstance(data, DenseData)
    config = resolve(segmenting.replace(method=name, gml={"distillation_weight": 1.0}), data)
    kind = method_class(name)
    teacher = Encoder(config.network, data.mean, data.std)
    parts: tuple[Any, Any] = (None, None)
    if kind.needs_teacher(config):
        parts = (teacher, CosineClassifier(teacher.num_features, 3))
    student = Encoder(config.network, data.mean, data.std)
    method = kind(config, student, data.class_counts, *parts, list(data.draw_counts)).train()
    batch = next(TrainLoader(data.train, 4, build_views(config, data, kind.views(config)), seed=0, workers=0).epoch(0))
    _two_steps_without_values(method, batch)


def _two_steps_without_values(method: Method, batch: Batch) -> None:
    """Under FakeTensorMode there are no values: forward, losses, backward, queue push and optimiser, all of a step."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode() as mode:
            method._apply(mode.from_tensor)
            fake = batch._map(mode.from_tensor, None)
            optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
            for _ in range(2):
                terms = method(fake)
                optimizer.zero_grad()
                torch.stack(list(terms.values())).sum().backward()
                optimizer.step()
            assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
            books = Books()
            books.add(terms, len(batch), len(batch))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/longtail-was-here",)


def test_a_malicious_checkpoint_does_nothing(tiny: Config, tmp_path: Path) -> None:
    trap = Path("/tmp/longtail-was-here")
    trap.unlink(missing_ok=True)
    config, out = tiny.replace(method="la"), tmp_path / "run"
    fit(config, out, quiet=True)
    for content in (pickle.dumps(_Evil()), None):
        if content is None:
            torch.save({"format": 1, "books": _Evil()}, out / "last.ckpt")
        else:
            (out / "last.ckpt").write_bytes(content)
        with pytest.raises(LongtailError, match="is truncated or no checkpoint of longtail"):
            fit(config, out, resume=True, quiet=True)
    assert not trap.exists()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root on Linux")
def test_a_disk_that_fills_ends_the_run_with_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        command = [sys.executable, "-m", "longtail", "train", "digits-lt", "--network", "conv8", "--method", "la"]
        command += ["--epochs", "400", "--checkpoint_seconds", "0", "--quiet", "--out", str(disk / "run")]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not (disk / "run" / "last.ckpt").is_file() and process.poll() is None:
            pass
        whole = load_checkpoint(disk / "run" / "last.ckpt")["books"]["step"]
        with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while process.poll() is None:  # the run gives back and takes space all the time
                ballast.write(bytes(4096))
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert "cannot be written: " in said
        assert len(said.strip().splitlines()) == 1
        assert load_checkpoint(disk / "run" / "last.ckpt")["books"]["step"] >= whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)
