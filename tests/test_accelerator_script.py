"""The script for accelerators: its plan, and a rehearsal of every phase on a CPU with small networks, two epochs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "accelerator.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the script adds to
    return _module("accelerator", SCRIPT, monkeypatch)


def _module(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pack(script: ModuleType, tmp_path: Path) -> Path:
    """Ten classes of noise around a grey of their own: 100 images of the first, 10 of the last."""
    random = np.random.default_rng(0)
    counts = [round(100 * 0.1 ** (index / 9)) for index in range(10)]
    labels = np.concatenate([np.repeat(np.arange(10), counts), np.repeat(np.arange(10), 10)])
    pixels = (20 * labels[:, None, None, None] + random.integers(0, 60, (len(labels), 32, 32, 3))).astype(np.uint8)
    encoded = [script.images.encode(image) for image in pixels]
    names = [f"grey {index}" for index in range(10)]
    path = tmp_path / "images.npz"
    script.images.write_pack(path, "cifar10", encoded, labels, range(sum(counts)), names, [100.0, 50.0])
    return path


def _run(pack: Path, out: Path, phases: str, *more: str) -> subprocess.CompletedProcess[str]:
    options = ["--pack", str(pack), "--out", str(out), "--phases", phases, "--rehearse", "--minutes", "60"]
    # as on a machine where the package is not installed: without the files of site-packages that name its folder
    command = [sys.executable, "-S", str(SCRIPT), *options, "--seeds", "1", "--jobs", "2", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(np.__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_phase_and_variant_runs_and_its_results_become_a_table(
    script: ModuleType, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    phases = [name for name in script.ORDER if name not in {"product", "best"}]
    ended = _run(pack, out, ",".join(phases))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    # a later call has the teachers of an earlier one, and trains those that are missing
    later = _run(pack, tmp_path / "later", "best", "--teachers", str(out / "teachers.zip"))
    assert later.returncode == 0, later.stdout + later.stderr
    assert {path.name for path in out.iterdir()} == {"runs.json", "predictions.npz", "steps.json", "teachers.zip"}
    assert all(path.is_file() for path in out.iterdir())  # the trainings are elsewhere

    runs = _read(out / "runs.json")
    variants, names = script.all_variants(2, {50.0: 1.0})
    expected = {name for phase in names if phase != "best" for name in names[phase]}
    expected |= {teacher for name in list(expected) for teacher, _ in variants[name].taught_by}
    assert {run["run"] for run in runs["runs"]} == expected
    assert runs["unfinished"] == []
    assert all(runs[key] for key in ("command", "hardware", "commit", "budget", "baseline"))
    for run in runs["runs"]:
        assert len(run["class_accuracies"]) == 10
        assert run["balanced_accuracy"] == pytest.approx(np.mean(run["class_accuracies"]))
        assert not run["error"]
    predictions = np.load(out / "predictions.npz")
    for run in runs["runs"]:
        right = predictions[f"{run['run']}, seed {run['seed']}"] == predictions["labels"]
        assert 100 * right.mean() == pytest.approx(run["balanced_accuracy"])

    steps = _read(out / "steps.json")["milliseconds"]
    recorded = _read(BENCHMARKS / "results" / "step-h200.json")["milliseconds"]
    assert {"la", "gml, not distilled", "gml, distilled, operation by operation"} <= steps.keys()
    keys = {key for row in recorded.values() for key in row} - {"kernels"}
    assert all(keys <= row.keys() for row in steps.values()), steps

    found = {run["run"]: run for run in _read(tmp_path / "later" / "runs.json")["runs"]}
    teacher = "teacher: la, ResNet-56"
    assert found.keys() == {*names["best"], teacher, "teacher: la on two views, ResNet-56"}
    assert found[teacher]["seed"] == 1  # that of seed 0 was there
    assert len(found["three experts on two views, taught by two"]["taught_by"]) == 2

    merged = tmp_path / "merged.json"
    assert script.main(["--merge", str(out), str(tmp_path / "later"), "--json", str(merged)]) == 0
    results = _read(merged)
    order = [(run["run"], run["seed"]) for run in results["runs"]]
    assert order[:2] == [(teacher, 0), (teacher, 1)]
    pairs = {(each["run"], each["baseline"]): each for each in results["differences"]}
    gap = pairs["la", results["baseline"]]
    accuracies = {run["run"]: run["balanced_accuracy"] for run in results["runs"]}
    assert gap["by_seed"] == [pytest.approx(accuracies["la"] - accuracies[results["baseline"]], abs=0.01)]
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert ("la, distilled", "la") in pairs
    where = ", imbalance 50"
    assert [other for run, other in pairs if run.endswith(where)] == [results["baseline"] + where] * 2
    lines = _module("refresh", BENCHMARKS / "refresh.py", monkeypatch).runs(results).splitlines()
    assert sum(line.startswith(f"| {teacher} | 2 |") for line in lines) == 1
    assert any(line.startswith(f"- la − {results['baseline']}: ") for line in lines)


def _jobs(script: ModuleType, phase: str, seeds: int, there: tuple[str, ...] = ()) -> list[Any]:
    variants, names = script.all_variants(200, {})
    seconds = {name: 17 * each.milliseconds for name, each in variants.items()}
    jobs: list[Any] = script.make_jobs(variants, names[phase], range(seeds), there, seconds, 200)
    return jobs


def _simulated(
    script: ModuleType, jobs: list[Any], minutes: float, start: float, slower: float = 1.0
) -> list[tuple[float, str, str]]:
    limit = 60 * minutes - script.RESERVE
    events = [(when, what, job.key) for when, what, job in script.simulate(script.Schedule(jobs, limit), start, slower)]
    assert all(when <= limit for when, what, _ in events if what == "ends")
    return events


TEACHER = "teacher: la, ResNet-56, seed 0"
LA2, GML2 = (f"{name} on two views, both classified and distilled, seed 0" for name in ("la", "gml"))


def test_eight_minutes_are_for_the_runs_that_are_worth_most(script: ModuleType) -> None:
    events = _simulated(script, _jobs(script, "core", 2), minutes=8, start=120)
    # all of core takes 10 minutes: what answers whether the mixture adds anything is trained, the rest is left out
    assert [key for _, what, key in events if what == "ends"] == [TEACHER, LA2, GML2]
    assert not [key for _, what, key in events if what == "is stopped"]


def test_nine_and_a_half_minutes_add_la_beside_the_teacher(script: ModuleType) -> None:
    events = _simulated(script, _jobs(script, "core", 2), minutes=9.5, start=120)
    assert [key for _, what, key in events if what == "starts"][:4] == [TEACHER, "la, seed 0", LA2, GML2]
    assert {key for _, what, key in events if what == "ends"} >= {TEACHER, "la, seed 0", LA2, GML2}


def test_all_of_core_and_then_a_further_seed_where_there_is_time(script: ModuleType) -> None:
    events = _simulated(script, _jobs(script, "core", 2), minutes=14, start=70)
    started = [key for _, what, key in events if what == "starts"]
    first = [key for key in started if key.endswith("seed 0")]
    assert len(first) == 6
    assert started[:6] == first  # no run of seed 1 before all of seed 0
    assert any(key.endswith("seed 1") for _, what, key in events if what == "ends")


@pytest.mark.parametrize("slower", [1.25, 1.5])
def test_steps_that_take_longer_cost_the_runs_of_least_worth(script: ModuleType, slower: float) -> None:
    events = _simulated(script, _jobs(script, "core", 2), minutes=9, start=70, slower=slower)
    assert {key for _, what, key in events if what == "ends"} >= {TEACHER, LA2}


def test_runs_that_would_all_be_late_are_thinned_out(script: ModuleType) -> None:
    from accelerator_plan import Job

    jobs = [Job(name, 0, 100.0, state="running") for name in ("worth most", "worth less")]
    schedule = script.Schedule(jobs, limit=160.0)
    for second in range(0, 30, 2):  # both as fast as two side by side at a gain of 1.0
        schedule.measure({job.key: 1 + second for job in jobs}, now=float(second))
    assert [job.name for job in schedule.late(30.0)] == ["worth less"]


def test_a_run_that_cannot_end_in_time_makes_room_for_the_next(script: ModuleType) -> None:
    from accelerator_plan import Job

    jobs = [Job("slow", 0, 100.0, state="running"), Job("quick", 0, 30.0)]
    schedule = script.Schedule(jobs, limit=160.0)
    for second in range(0, 30, 2):  # ten times slower than expected
        schedule.measure({"slow, seed 0": 1 + second // 5}, now=float(second))
    assert [job.name for job in schedule.late(30.0)] == ["slow"]


def test_a_teacher_alone_is_not_begun(script: ModuleType) -> None:
    events = _simulated(script, _jobs(script, "best", 1), minutes=4, start=30)
    assert not [key for _, what, key in events if what == "starts"]


def test_the_plan_is_printed_and_nothing_is_trained(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(["--plan", "--phases", "product,core,speed", "--minutes", "9"]) == 0
    printed = capsys.readouterr().out
    assert f"core: {LA2} starts" in printed
    assert f"core: {GML2} ends" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_leaves_the_others_their_results(
    script: ModuleType, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerator_plan import Variant
    from accelerator_runs import Trainings

    context = _context(script, pack, tmp_path)
    variants = {
        "good": Variant("good", {"method": "la"}, 1.0),
        "bad": Variant("bad", {"method": "la", "optimizer": {"learning_rate": 1e30}, "epochs": 4}, 1.0),
        "taught by bad": Variant("taught by bad", {"method": "la"}, 1.0, (("bad", None),)),
    }
    Trainings(context, "some", variants, ["bad", "good", "taught by bad"]).run()
    told = _read(tmp_path / "out" / "runs.json")
    assert [run["run"] for run in told["runs"]] == ["good"]
    states = {run["run"]: run for run in told["unfinished"]}
    assert states["bad"]["state"] == "failed"
    assert "learning_rate" in states["bad"]["error"]
    assert states["taught by bad"]["state"] == "skipped"


def test_a_run_that_is_stopped_is_not_a_result(
    script: ModuleType, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerator_plan import Schedule, Variant
    from accelerator_runs import Trainings

    context = _context(script, pack, tmp_path)
    variants = {
        name: Variant(name, {"method": "la", "epochs": epochs}, 1.0)
        for name, epochs in {"short": 2, "long": 500}.items()
    }
    monkeypatch.setattr(
        Schedule, "late", lambda self, now: [job for job in self.running if job.name == "long" and job.done > 2]
    )
    Trainings(context, "some", variants, ["long", "short"]).run()
    told = _read(tmp_path / "out" / "runs.json")
    assert [run["run"] for run in told["runs"]] == ["short"]
    assert told["unfinished"][0]["state"] == "stopped"


def _context(script: ModuleType, pack: Path, tmp_path: Path) -> Any:
    import time

    import torch

    script.images.register_packed()
    (tmp_path / "out").mkdir()
    context = script.Context(
        *(tmp_path / "out", tmp_path / "runs", pack, "cifar10", (0,), 2, 2, True, torch.device("cpu")),
        started=time.monotonic(),
        minutes=10.0,
    )
    context.runs.mkdir()
    return context


@pytest.mark.slow
def test_the_product_works_as_it_is_used(pack: Path, tmp_path: Path) -> None:
    ended = _run(pack, tmp_path / "out", "product")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = _read(tmp_path / "out" / "product.json")
    assert told["train"]["exit"] == 0, told["train"]["errors"]
    assert told["resume"]["exit"][1] == 0, told["resume"]["errors"]
    assert told["resume"]["equal"] is True
    assert told["predict"]["exit"] == 0, told["predict"]["errors"]
    assert all(row["losses_apart"] == 0 for row in told["methods"].values()), told["methods"]


@pytest.mark.slow
@pytest.mark.parametrize("factors", [(100.0,), (100.0, 50.0)])
def test_what_is_packed_is_what_the_package_loads(
    script: ModuleType, cifar_folder: Path, tmp_path: Path, factors: tuple[float, ...]
) -> None:
    from longtail.config import Data
    from longtail.data.sources import load_data
    from longtail.errors import LongtailError

    path = tmp_path / "cifar.npz"
    given = [f"{factor:g}" for factor in factors]
    assert script.main(["--prepare", str(cifar_folder), "--pack", str(path), "--imbalances", *given]) == 0
    for factor in factors:
        config = Data(source="cifar100-packed", root=str(path), imbalance=factor)
        ours = script.images.load_packed(config, 0, "cifar100")
        theirs = load_data(Data(source="cifar100-lt", root=str(cifar_folder), imbalance=factor, seed=0), 0)
        assert ours.fingerprint == theirs.fingerprint
        assert ours.class_counts == theirs.class_counts
    with pytest.raises(LongtailError, match="not cifar100 at 10; make another with --prepare"):
        script.images.load_packed(Data(source="cifar100-packed", root=str(path), imbalance=10.0), 0, "cifar100")


def test_what_is_not_there_is_said_in_one_line(script: ModuleType, pack: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no\.npz: there is no such file; make it with --prepare FOLDER"):
        script.main(["--pack", str(tmp_path / "no.npz"), "--rehearse"])
    options = ["--pack", str(pack), "--rehearse", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"--teachers .*teachers\.zip: there is no such file or folder"):
        script.main([*options, "--teachers", str(tmp_path / "teachers.zip")])
    with pytest.raises(SystemExit, match=r"--merge .*: has no runs\.json; give what --out was"):
        script.main(["--merge", str(tmp_path), "--json", str(tmp_path / "merged.json")])


def test_a_phase_that_does_not_exist_is_named(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no sped; expected some of product"):
        script.main(["--pack", str(tmp_path / "images.npz"), "--rehearse", "--phases", "sped"])
