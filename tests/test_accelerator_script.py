"""The script for accelerators, rehearsed on a CPU: every phase, with small networks and two epochs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "accelerator.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("accelerator", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "accelerator", module)  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pack(script: ModuleType, tmp_path: Path) -> Path:
    """Ten classes of noise around a grey of their own: 100 images of the first, 10 of the last."""
    random = np.random.default_rng(0)
    counts = [round(100 * 0.1 ** (index / 9)) for index in range(10)]
    labels = np.concatenate([np.repeat(np.arange(10), counts), np.repeat(np.arange(10), 10)])
    pixels = (20 * labels[:, None, None, None] + random.integers(0, 60, (len(labels), 32, 32, 3))).astype(np.uint8)
    blobs = [script.encode(image) for image in pixels]
    path = tmp_path / "images.npz"
    np.savez(
        path,
        blob=np.frombuffer(b"".join(blobs), dtype=np.uint8),
        cifar10_ends=np.cumsum([len(blob) for blob in blobs]),
        cifar10_labels=labels.astype(np.uint8),
        cifar10_ids=np.arange(sum(counts)),
        cifar10_names=np.array([f"grey {index}" for index in range(10)]),
    )
    return path


def _run(pack: Path, out: Path, phases: str) -> subprocess.CompletedProcess[str]:
    options = ["--pack", str(pack), "--out", str(out), "--phases", phases, "--seeds", "1", "--jobs", "2", "--rehearse"]
    command = [sys.executable, str(SCRIPT), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_every_phase_runs_and_writes_its_figures(script: ModuleType, pack: Path, tmp_path: Path) -> None:
    phases = [name for name in script.PHASES if name != "product"]
    ended = _run(pack, tmp_path / "out", ",".join(phases))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert found.keys() == {*phases, "second-teacher"}
    assert all(told["command"] and told["hardware"] and told["seconds"] > 0 for told in found.values())
    speed = found["speed"]
    assert {"la", "gml", "teacher"} <= speed["steps"].keys()
    assert all(row["milliseconds"] > 0 and row["networks_alone"] > 0 for row in speed["steps"].values())
    assert speed["views_per_second"] > 0
    assert speed["side_by_side"]["runs"] == 2
    methods = {record["method"] for record in found["mixture"]["records"]}
    assert methods == {"la distilled on two views", "gml with both views classified and distilled"}
    assert all(len(found[phase]["records"]) == 2 for phase in ("rows", "longer", "wide", "parts"))


@pytest.mark.slow
def test_the_product_works_as_it_is_used(pack: Path, tmp_path: Path) -> None:
    ended = _run(pack, tmp_path / "out", "product")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads((tmp_path / "out" / "product.json").read_text())
    assert told["train"]["exit"] == 0, told["train"]["errors"]
    assert told["resume"]["exit"][1] == 0, told["resume"]["errors"]
    assert told["resume"]["equal"] is True
    assert told["predict"]["exit"] == 0, told["predict"]["errors"]
    assert all(row["losses_apart"] == 0 for row in told["methods"].values()), told["methods"]


@pytest.mark.slow
def test_what_is_packed_is_what_the_package_loads(
    script: ModuleType, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longtail.config import Data
    from longtail.data.sources import load_data

    monkeypatch.setattr(script, "IMBALANCES", (100.0, 50.0))
    path = tmp_path / "cifar.npz"
    assert script.main(["--prepare", str(cifar_folder), "--pack", str(path)]) == 0
    for factor in (100.0, 50.0):
        ours = script.load_packed(Data(source="cifar100-packed", root=str(path), imbalance=factor), 0, "cifar100")
        theirs = load_data(Data(source="cifar100-lt", root=str(cifar_folder), imbalance=factor, seed=0), 0)
        assert ours.fingerprint == theirs.fingerprint
        assert ours.class_counts == theirs.class_counts


def test_a_phase_that_does_not_exist_is_named(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no sped; expected some of product"):
        script.main(["--pack", str(tmp_path / "images.npz"), "--rehearse", "--phases", "sped"])
