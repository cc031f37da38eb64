"""Checkpoints: broken, foreign and malicious ones, and disks that fill."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric.plugins.precision import MixedPrecision

from longtail.config import Config
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.training.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from longtail.training.fabric import build_fabric
from longtail.training.trainer import fit
from tests.processes import start_longtail
from tests.training.runs import equal, fit_in_two, weights


def test_broken_and_foreign_checkpoints(tiny: Config, tmp_path: Path) -> None:
    config, out = tiny.replace(method="la"), tmp_path / "run"
    fit(config, out, quiet=True)
    path = out / "last.ckpt"
    whole = path.read_bytes()

    def message() -> str:
        with pytest.raises(LongtailError) as caught:
            fit(config, out, resume=True, quiet=True)
        return str(caught.value)

    path.write_bytes(whole[: len(whole) // 2])
    assert "is truncated or not a checkpoint" in message()
    path.write_bytes(b"")
    assert "is truncated or not a checkpoint" in message()
    torch.save({"weights": torch.ones(3)}, path)
    assert "is not a checkpoint of longtail" in message()
    torch.save({"format": 99}, path)
    assert "has format 99" in message()
    save_checkpoint(path, {"images": "others"})
    assert "was trained on other images" in message()
    here = load_data(config.data, config.seed).fingerprint
    save_checkpoint(path, {"images": here, "method": {"a": torch.ones(1)}, "optimizer": {}, "tracker": {}})
    assert "is another recipe's checkpoint" in message()


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    weights = torch.arange(1000.0)
    save_checkpoint(path, {"weights": weights})
    content = bytearray(path.read_bytes())
    content[content.index(weights.numpy().tobytes()) + 403] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(LongtailError, match=r"last\.ckpt: is damaged; start again with --overwrite"):
        load_checkpoint(path)


def test_whatever_unpickling_raises_is_one_line(tmp_path: Path) -> None:
    """A pickle within an intact file that names a text as the type of a storage."""
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"weights": torch.ones(3)})
    changed = tmp_path / "changed.ckpt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"ctorch\nFloatStorage\n") == 1
                content = content.replace(b"ctorch\nFloatStorage\n", b"X\x01\x00\x00\x00a")
            target.writestr(name, content)
    with pytest.raises(AttributeError):
        torch.load(changed, weights_only=True)
    with pytest.raises(LongtailError, match="is truncated or not a checkpoint of longtail"):
        load_checkpoint(changed)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"step": 1})

    def full(*_: object, **__: object) -> None:
        (tmp_path / ".last.ckpt.partial").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(LongtailError, match="No space left on device"):
        save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_is_named_where_torch_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **__: object) -> None:
        raise RuntimeError("unexpected pos 768 vs 662")

    monkeypatch.setattr(torch, "save", short)
    with pytest.raises(LongtailError, match="unexpected pos"):
        save_checkpoint(tmp_path / "last.ckpt", {})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    with pytest.raises(LongtailError, match=r"last\.ckpt: cannot be written: No space left on device$"):
        save_checkpoint(tmp_path / "last.ckpt", {})


def test_the_scale_of_the_loss_goes_on(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric has no 16-mixed on a CPU: here its class for it scales the loss in float32."""
    scalers = []

    def build(config: Config) -> Any:
        fabric = build_fabric(config)
        precision: Any = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 256.0, growth_interval=4))
        monkeypatch.setattr(precision, "forward_context", contextlib.nullcontext)
        precision.convert_input = precision.convert_output = lambda data: data
        fabric.strategy.precision = fabric._precision = precision
        scalers.append(precision.scaler)
        return fabric

    monkeypatch.setattr("longtail.training.trainer.build_fabric", build)
    config = tiny.replace(method="ce")
    fit(config, tmp_path / "whole", quiet=True)
    fit_in_two(config, tmp_path / "two", 6, monkeypatch)
    whole, interrupted, resumed = (scaler.state_dict() for scaler in scalers)
    assert interrupted["scale"] == 512  # doubled after four steps
    assert resumed == whole
    assert equal(weights(tmp_path / "two"), weights(tmp_path / "whole"))
    # a checkpoint of an older version has none
    path = tmp_path / "two" / "last.ckpt"
    state = load_checkpoint(path)
    del state["format"], state["precision"]
    save_checkpoint(path, state)
    fit(config, tmp_path / "two", resume=True, quiet=True)
    assert scalers[-1].get_scale() == 256


class _Evil:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.trap}'",)


def test_a_malicious_checkpoint_runs_no_code(tiny: Config, tmp_path: Path) -> None:
    trap, evil = tmp_path / "trap", _Evil(tmp_path / "trap")
    pickle.loads(pickle.dumps(evil))
    assert trap.exists()
    trap.unlink()
    config, out = tiny.replace(method="la"), tmp_path / "run"
    fit(config, out, quiet=True)
    for content in (pickle.dumps(evil), None):
        if content is None:
            torch.save({"format": FORMAT, "tracker": evil}, out / "last.ckpt")
        else:
            (out / "last.ckpt").write_bytes(content)
        with pytest.raises(LongtailError, match="is truncated or not a checkpoint of longtail"):
            fit(config, out, resume=True, quiet=True)
    assert not trap.exists()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root on Linux")
def test_a_disk_that_fills_ends_the_run_with_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        arguments = ["train", "digits-lt", "--network", "conv8", "--method", "la", "--epochs", "400"]
        arguments += ["--checkpoint_seconds", "0", "--quiet", "--out", str(disk / "run")]
        with start_longtail(*arguments) as process:
            while not (disk / "run" / "last.ckpt").is_file() and process.poll() is None:
                pass
            whole = load_checkpoint(disk / "run" / "last.ckpt")["tracker"]["step"]
            with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
                while process.poll() is None:  # the run gives back and takes space all the time
                    ballast.write(bytes(4096))
            process.wait(timeout=120)
        assert process.returncode == 2, process.stderr
        assert "cannot be written: " in process.stderr
        assert len(process.stderr.strip().splitlines()) == 1
        assert load_checkpoint(disk / "run" / "last.ckpt")["tracker"]["step"] >= whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)
