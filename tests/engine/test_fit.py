"""Real runs, from the first step to the recogniser, on real digits."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longtail.config import Config, read_config
from longtail.data.sources import load_data
from longtail.engine.books import read_metrics
from longtail.engine.choices import explained
from longtail.engine.evaluate import evaluate
from longtail.engine.files import load_checkpoint, save_checkpoint
from longtail.engine.fit import fit
from longtail.engine.teacher import teacher_folder
from longtail.errors import LongtailError
from longtail.methods import method_class
from longtail.recognizer import Recognizer
from tests.conftest import TINY, save_image


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(folder / "recognizer" / "model.safetensors")
    return loaded


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["ce", "la", "gml"])
def test_a_run_leaves_everything(tiny: Config, tmp_path: Path, method: str) -> None:
    config = tiny.replace(method=method, gml={"distillation_weight": 1.0})
    run = fit(config, tmp_path / "run", quiet=True)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "last.ckpt", "recognizer", "mistakes"}
    assert {path.name for path in (tmp_path / "run" / "recognizer").iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
    }
    images = len(load_data(config.data, config.seed).train)
    assert run.student_passes == 2 * images * (2 if method == "gml" else 1)
    assert (run.teacher_seconds > 0) == (method == "gml")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["kind"] for line in lines] == ["epoch", "epoch", "test"]
    terms = {"classifier"} | ({"mixture", "temperature_likelihood", "distillation"} if method == "gml" else set())
    assert terms <= lines[0].keys()
    assert lines[0]["loss"] == pytest.approx(sum(lines[0][term] for term in terms))
    assert read_config(tmp_path / "run" / "config.yaml") == run.config
    judged = evaluate(tmp_path / "run")
    assert judged["balanced_accuracy"] == run.judged["uniform"]["balanced_accuracy"]
    assert judged["images"] == 500


def test_the_same_seed_gives_the_same_weights(tiny: Config, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(tiny.replace(seed=seed), tmp_path / name, quiet=True, teachers=tmp_path / name / "../teachers")
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))
    # and a caller's own random numbers are left alone
    assert torch.equal(torch.get_rng_state(), state)


def fit_in_two(config: Config, out: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, stop without a word after some steps, and go on."""
    kind, done = method_class(config.method), 0
    original = kind.training_step

    def interrupted(self: Any, batch: Any) -> Any:
        nonlocal done
        if done == steps:
            raise KeyboardInterrupt
        done += 1
        return original(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(config, out, quiet=True)
    fit(config, out, resume=True, quiet=True)


@pytest.mark.parametrize("stop_at", [1, 4, 6, 9])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    fit(tiny, tmp_path / "whole", quiet=True)
    fit_in_two(tiny, tmp_path / "cut", stop_at, monkeypatch)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    timed = {"seconds", "images_per_second", "memory_mib"}  # what the machine does, not what the run is
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    untimed = [[{k: v for k, v in line.items() if k not in timed} for line in log] for log in logs]
    assert untimed[0] == untimed[1]


def test_killed_at_twenty_moments_and_resumed(tmp_path: Path) -> None:
    """SIGKILL, as a machine that goes away would; the checkpoint is whole whatever the moment, the end the same."""
    settings = [*TINY, "--epochs", "120", "--teacher.epochs", "2", "--checkpoint_seconds", "0"]
    command = [sys.executable, "-m", "longtail", "train", "digits-lt", *settings]

    def start(name: str, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "--out", str(tmp_path / name), *more], stdout=subprocess.DEVNULL)

    assert start("whole").wait(timeout=300) == 0
    moments, checkpoint, step = random.Random(0), tmp_path / "cut" / "last.ckpt", 0
    for kill in range(20):
        process = start("cut", *(["--resume"] if kill else []))
        # let it make some progress, then kill it at any moment of its steps, its writing and its start
        reached = step + moments.randint(1, 40)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            lines = read_metrics(tmp_path / "cut" / "metrics.jsonl")
            if lines and lines[-1]["step"] >= reached:
                break
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        step = load_checkpoint(checkpoint)["books"]["step"]
    assert not (tmp_path / "cut" / "recognizer").exists()
    assert start("cut", "--resume").wait(timeout=300) == 0
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_the_teacher_is_kept_and_found(tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny, tmp_path / "first")
    assert "teacher: training conv8-tiny first" in capsys.readouterr().err
    # what only the student depends on does not ask for another teacher
    other = tiny.replace(gml={"embedding_dim": 8, "queue_minimum": 1})
    fit(other, tmp_path / "second")
    assert "teacher: found in" in capsys.readouterr().err
    data = load_data(tiny.data, tiny.seed)
    here = teacher_folder(tiny, data, tmp_path)
    assert teacher_folder(other, data, tmp_path) == here
    assert teacher_folder(tiny.replace(data={"root": "/elsewhere"}), data, tmp_path) == here
    for changed in (tiny.replace(seed=1), tiny.replace(epochs=3), tiny.replace(data={"imbalance": 10.0})):
        assert teacher_folder(changed, data, tmp_path) != here
    # the same settings over other images: another teacher
    assert teacher_folder(tiny, load_data(tiny.data, 1), tmp_path) != here


def test_a_run_can_be_the_teacher(tiny: Config, tmp_path: Path) -> None:
    fit(tiny.replace(method="la"), tmp_path / "teacher", quiet=True)
    given = tiny.replace(teacher={"source": str(tmp_path / "teacher")})
    run = fit(given, tmp_path / "student", quiet=True)
    assert run.config.gml.distillation_weight == 1
    assert not (tmp_path / "teachers").exists()


def test_a_teacher_of_other_classes_is_not_distilled(tiny: Config, photos: Path, tmp_path: Path) -> None:
    other = tiny.replace(method="la", data={"source": "folder", "root": str(photos), "image_size": 16})
    fit(other.replace(network="resnet8", data={"augment": "none"}), tmp_path / "teacher", quiet=True)
    grey = tiny.replace(teacher={"source": str(tmp_path / "teacher")})
    with pytest.raises(LongtailError, match="expects images of 3 channels"):
        fit(grey, tmp_path / "student", quiet=True)
    data = load_data(tiny.data, 0)
    chosen, reasons = explained(grey, data)
    assert chosen.gml.distillation_weight == 0
    assert "the teacher's classes are not these" in " ".join(reasons)


def test_a_timm_model_can_be_teacher_and_student(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    # its weights lie on a hub; what is tested is everything but the download
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kw: create(name, pretrained=False, **kw))
    config = tiny.replace(
        epochs=1, network="resnet10t", teacher={"source": "timm:test_convnext"}, data={"imbalance": 100.0}
    )
    run = fit(config, tmp_path / "run", quiet=True)
    assert run.teacher_seconds == 0
    assert run.config.gml.distillation_weight == 0
    assert Recognizer.load(tmp_path / "run").card.network == "resnet10t"
    with pytest.raises(LongtailError, match="no classifier for these classes to distil from"):
        fit(config.replace(gml={"distillation_weight": 1.0}), tmp_path / "other", quiet=True)
    with pytest.raises(LongtailError, match="timm has no model 'resnet999'"):
        fit(config.replace(teacher={"source": "timm:resnet999"}), tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_the_validation_set_picks_the_epoch(tiny: Config, photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    root.mkdir()
    for split in ("train", "val", "test"):
        (root / split).symlink_to(photos)
    config = tiny.replace(method="la", network="conv8-tiny", epochs=4, data={"source": "folder", "root": str(root)})
    run = fit(config, tmp_path / "run", quiet=True)
    lines = read_metrics(run.folder / "metrics.jsonl")
    scores = {line["step"]: line["balanced_accuracy"] for line in lines if line["kind"] == "validation"}
    assert len(scores) == 4
    best = max(scores.values())
    assert run.card.trained["best_step"] == min(step for step, score in scores.items() if score == best)
    # val and test are the same images here, so the weights that were kept show the best score again
    assert run.metrics["balanced_accuracy"] == pytest.approx(best)


def test_an_existing_run_is_not_touched(tiny: Config, tmp_path: Path) -> None:
    config, out = tiny.replace(method="la", epochs=1), tmp_path / "run"
    fit(config, out, quiet=True)
    before = weights(out)
    with pytest.raises(LongtailError, match="holds a run already; use --resume, --overwrite"):
        fit(config, out, quiet=True)
    with pytest.raises(LongtailError, match="was started with epochs 1, not 2"):
        fit(config.replace(epochs=2), out, resume=True, quiet=True)
    assert equal(weights(out), before)
    fit(config.replace(epochs=2), out, overwrite=True, quiet=True)
    assert not equal(weights(out), before)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(LongtailError, match="no run of longtail"):
        fit(config, other, overwrite=True, quiet=True)
    assert (other / "thesis.txt").read_text() == "years of work"


def test_a_run_is_not_judged_on_what_it_was_trained_on(tiny: Config, photos: Path, tmp_path: Path) -> None:
    config = tiny.replace(method="la", epochs=1, data={"source": "folder", "root": str(photos)})
    fit(config, tmp_path / "run", quiet=True)
    evaluate(tmp_path / "run")
    save_image(photos / "cat" / "new.png", seed=5)  # the split is made anew, with other images in it
    with pytest.raises(LongtailError, match=r"was trained on other images than .* has for training now"):
        evaluate(tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(LongtailError, match="was trained on other images than there are now"):
        fit(config, tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


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
    assert "is truncated or no checkpoint" in message()
    path.write_bytes(b"")
    assert "is truncated or no checkpoint" in message()
    torch.save({"weights": torch.ones(3)}, path)
    assert "is no checkpoint of longtail" in message()
    torch.save({"format": 99}, path)
    assert "has format 99" in message()
    save_checkpoint(path, {"images": "others"})
    assert "was trained on other images" in message()
    here = load_data(config.data, config.seed).fingerprint
    save_checkpoint(path, {"images": here, "method": {"a": torch.ones(1)}, "optimizer": {}, "books": {}})
    assert "is another recipe's checkpoint" in message()


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


def test_a_loss_that_blows_up_is_named(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longtail.methods.classifier import LogitAdjustment

    original = LogitAdjustment.training_step
    monkeypatch.setattr(
        LogitAdjustment, "training_step", lambda self, batch: {"classifier": original(self, batch)["classifier"] / 0.0}
    )
    with pytest.raises(LongtailError, match=r"'classifier' is (inf|nan) at step 1; .*no checkpoint"):
        fit(tiny.replace(method="la"), tmp_path / "run", quiet=True)


def test_metrics_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "epoch", "step": 1}) + '\n{"kind": "ep')
    assert read_metrics(path) == [{"kind": "epoch", "step": 1}]
