"""Real runs on real digits, from the first step to the saved model: what they leave, and how they end and resume."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml

from longtail.config import Config, read_config
from longtail.data.sources import load_data
from longtail.errors import LongtailError, StoppedError
from longtail.experiments.evaluate import evaluate
from longtail.methods.classifier import LogitAdjustment
from longtail.training.checkpoint import load_checkpoint
from longtail.training.metric_log import MetricTracker, read_metrics
from longtail.training.run_io import run_folder
from longtail.training.trainer import fit
from tests.conftest import TINY, save_image
from tests.processes import LongtailProcess, start_longtail
from tests.training.runs import equal, fit_in_two, weights


@pytest.mark.parametrize("method", ["ce", "la", "gml"])
def test_the_files_and_metrics_of_a_run(tiny: Config, tmp_path: Path, method: str) -> None:
    config = tiny.replace(method=method, gml={"distillation_weight": 1.0})
    run = fit(config, tmp_path / "run", quiet=True)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "last.ckpt", "recognizer", "errors", "test_predictions.npz"}
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
    assert {name for name in lines[0] if name.startswith("loss/")} == {f"loss/{term}" for term in terms}
    assert lines[0]["loss"] == pytest.approx(sum(lines[0][f"loss/{term}"] for term in terms))
    assert read_config(tmp_path / "run" / "config.yaml") == run.config
    metrics = evaluate(tmp_path / "run")
    assert metrics["balanced_accuracy"] == run.test_metrics["uniform"]["balanced_accuracy"]
    assert metrics["images"] == 500


def test_the_same_seed_gives_the_same_weights(tiny: Config, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(tiny.replace(seed=seed), tmp_path / name, quiet=True, teachers=tmp_path / name / "../teachers")
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))
    # and the random state of the caller is as it was
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "stop_at", [1, pytest.param(4, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow), 9]
)
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


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_and_resumed_equals_an_uninterrupted_one(
    tmp_path: Path, random_seed: int, kills: int
) -> None:
    """SIGKILL at random moments, as when a machine goes away: the checkpoint is whole whatever the moment."""
    # steps enough for all kills, each at most 25 steps and 30 ms after the last checkpoint
    settings = [*TINY, "--epochs", str(10 * kills), "--teacher.epochs", "2", "--checkpoint_seconds", "0"]

    def start(name: str, *more: str) -> LongtailProcess:
        return start_longtail("train", "digits-lt", *settings, "--out", tmp_path / name, *more)

    with start("whole") as process:
        assert process.wait(timeout=300) == 0
    moments, checkpoint, step = random.Random(random_seed), tmp_path / "cut" / "last.ckpt", 0
    for kill in range(kills):
        with start("cut", *(["--resume"] if kill else [])) as process:
            # let it make some progress, then kill it at any moment of its steps, its writing and its start
            reached = step + moments.randint(1, 20)
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                lines = read_metrics(tmp_path / "cut" / "metrics.jsonl")
                if lines and lines[-1]["step"] >= reached:
                    break
                time.sleep(0.002)
            time.sleep(moments.random() * 0.03)
            assert process.poll() is None, f"it ended before it was killed: {process.stderr}"
            process.kill()
            assert process.wait(timeout=60) == -signal.SIGKILL
        step = load_checkpoint(checkpoint)["tracker"]["step"]
    assert not (tmp_path / "cut" / "recognizer").exists()
    with start("cut", "--resume") as process:
        assert process.wait(timeout=300) == 0
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


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
    assert run.model_config.training_info["best_step"] == min(step for step, score in scores.items() if score == best)
    # val and test are the same images here, so the weights that were kept have the best score again
    assert run.metrics["balanced_accuracy"] == pytest.approx(best)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_run_is_not_resumed_with_other_images_to_evaluate(
    tiny: Config, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    root = tmp_path / "split"
    for name in ("train", "val", "test"):
        shutil.copytree(photos, root / name)
    config = tiny.replace(method="la", data={"source": "folder", "root": str(root)})
    with pytest.raises(LongtailError, match=f"was {'validated' if split == 'val' else 'tested'} on other images"):
        fit_in_two(config, tmp_path / "run", 1, monkeypatch, lambda: (root / split / "cat" / "0.png").unlink())


def test_a_refused_resumption_leaves_the_record_of_the_images(tiny: Config, photos: Path, tmp_path: Path) -> None:
    config, out = tiny.replace(method="la", epochs=1, data={"source": "folder", "root": str(photos)}), tmp_path / "run"
    fit(config, out, quiet=True)
    before = (out / "train_images.npy").read_bytes()
    save_image(photos / "cat" / "new.png")
    with pytest.raises(LongtailError, match="was trained on other images"):
        fit(config, out, resume=True, quiet=True)
    assert (out / "train_images.npy").read_bytes() == before


def test_a_signal_at_the_last_step_stops_before_the_evaluation(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.replace(method="la", epochs=1)
    count = MetricTracker.global_means

    def terminated(tracker: MetricTracker) -> dict[str, float]:  # after the last step of an epoch
        os.kill(os.getpid(), signal.SIGTERM)
        return count(tracker)

    with monkeypatch.context() as patched:
        patched.setattr(MetricTracker, "global_means", terminated)
        with pytest.raises(StoppedError, match=r"stopped by SIGTERM at step (\d+) of \1, all of it saved"):
            fit(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "recognizer").exists()
    for name in ("run", "whole"):
        fit(config, tmp_path / name, quiet=True, resume=True)
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_one_process_at_a_time_trains_in_a_folder(tiny: Config, tmp_path: Path) -> None:
    config, out = tiny.replace(method="la", epochs=1), tmp_path / "run"
    resolved = fit(config, out, quiet=True).config
    before = weights(out)
    with run_folder(out, resolved, resume=True, overwrite=False):
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(LongtailError, match="another process trains in it"):
                fit(config, out, quiet=True, **options)  # type: ignore[arg-type]
    assert equal(weights(out), before)
    fit(config, out, quiet=True, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_in_one_that_cannot_be_written(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    made.mkdir()
    temporary = tempfile.TemporaryFile

    def denied(dir: Path) -> object:
        if dir == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return temporary(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    config = tiny.replace(method="la", epochs=1)
    fit(config, made, quiet=True)
    with pytest.raises(LongtailError, match="new: cannot be written: Permission denied"):
        fit(config, tmp_path / "new", quiet=True)


def test_what_a_killed_process_left_is_replaced(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = tiny.replace(method="la", epochs=1), tmp_path / "run"
    out.mkdir()
    (out / ".config.yaml.partial").touch()
    fit(config, out, quiet=True)
    removed: list[Path] = []
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        removed.append(path)
        if path.name == "last.ckpt":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(config, out, overwrite=True, quiet=True)
    monkeypatch.undo()
    assert removed
    fit(config, out, overwrite=True, quiet=True)


def test_an_existing_run_is_not_touched(tiny: Config, tmp_path: Path) -> None:
    config, out = tiny.replace(method="la", epochs=1), tmp_path / "run"
    fit(config, out, quiet=True)
    before = weights(out)
    with pytest.raises(LongtailError, match="contains a run already; use --resume, --overwrite"):
        fit(config, out, quiet=True)
    with pytest.raises(LongtailError, match="was started with epochs 1, not 2"):
        fit(config.replace(epochs=2), out, resume=True, quiet=True)
    assert equal(weights(out), before)
    fit(config.replace(epochs=2), out, overwrite=True, quiet=True)
    assert not equal(weights(out), before)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(LongtailError, match="is not empty and not a run of longtail"):
        fit(config, other, overwrite=True, quiet=True)
    assert (other / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "settings",
    ["model: resnet\n", "- 1\n", "a: b: c\n", "", "started: 2024-99-99\n", "recipe"],
    ids=["foreign", "list", "broken", "empty", "date", "recipe"],
)
def test_another_programs_settings_are_no_run(tiny: Config, tmp_path: Path, settings: str) -> None:
    config, out = tiny.replace(method="la", epochs=1), tmp_path / "project"
    (out / "src").mkdir(parents=True)
    (out / "src" / "model.py").write_text("years of work")
    # a recipe among other files is no run either
    (out / "config.yaml").write_text(config.to_yaml() if settings == "recipe" else settings)
    if settings != "recipe":
        (out / "last.ckpt").write_text("of another program")
    for overwrite in (False, True):
        with pytest.raises(LongtailError, match="is not empty and not a run of longtail; choose another --out"):
            fit(config, out, overwrite=overwrite, quiet=True)
    assert (out / "src" / "model.py").read_text() == "years of work"


def test_runs_of_other_versions_and_stopped_ones_can_be_replaced(tiny: Config, tmp_path: Path) -> None:
    config, out = tiny.replace(method="la", epochs=1), tmp_path / "run"
    older = {name: value for name, value in config.to_dict().items() if name not in {"accelerator", "mixing", "tune"}}
    settings = yaml.safe_dump({**older, "removed": 3})
    for names in ([], ["unreadable.csv", ".metrics.jsonl.partial"], ["metrics.jsonl", "notes.txt"]):
        out.mkdir(exist_ok=True)
        (out / "config.yaml").write_text(settings)
        for name in names:
            (out / name).touch()
        with pytest.raises(LongtailError, match="contains a run already"):
            fit(config, out, quiet=True)
        with pytest.raises(LongtailError, match=r"no field 'removed'.*--plugin; .*train it again with --overwrite"):
            fit(config, out, resume=True, quiet=True)
        fit(config, out, overwrite=True, quiet=True)
        assert read_config(out / "config.yaml").method == "la"


def test_what_a_run_reads_is_not_overwritten(tiny: Config, tmp_path: Path) -> None:
    config, out = tiny.replace(method="la", epochs=1), tmp_path / "run"
    fit(config, out, quiet=True)
    before = weights(out)
    distilled = config.replace(classifier={"distillation_weight": 1.0})
    (tmp_path / "link").symlink_to(out)
    for source in (str(out), str(tmp_path / "link"), (str(out), str(out))):
        with pytest.raises(LongtailError, match=r"teacher\.source .*: is in --out .*not overwritten.*choose another"):
            fit(distilled.replace(teacher={"source": source}), out, overwrite=True, quiet=True)
    save_image(out / "photos" / "cat" / "0.png")
    for name in ("cat", "dog"):
        for number in range(4):
            save_image(out / "photos" / name / f"{number}.png", seed=number)
    own = config.replace(data={"source": "folder", "root": str(out / "photos")})
    with pytest.raises(LongtailError, match=r"data\.root .*photos: is in --out"):
        fit(own, out, overwrite=True, quiet=True)
    assert equal(weights(out), before)


def test_a_run_is_not_evaluated_on_its_training_images(tiny: Config, photos: Path, tmp_path: Path) -> None:
    config = tiny.replace(method="la", epochs=1, data={"source": "folder", "root": str(photos)})
    fit(config, tmp_path / "run", quiet=True)
    evaluate(tmp_path / "run")
    save_image(photos / "cat" / "new.png", seed=5)  # the split is another one now
    with pytest.raises(LongtailError, match=r"was trained on other images than .* has for training now"):
        evaluate(tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(LongtailError, match="was trained on other images than there are now"):
        fit(config, tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_loss_that_is_not_finite_ends_the_run(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LogitAdjustment.training_step
    monkeypatch.setattr(
        LogitAdjustment, "training_step", lambda self, batch: {"classifier": original(self, batch)["classifier"] / 0.0}
    )
    with pytest.raises(LongtailError, match=r"'classifier' is (inf|nan) at step 1; .*no earlier checkpoint"):
        fit(tiny.replace(method="la"), tmp_path / "run", quiet=True)


def test_a_folder_that_cannot_be_used_is_refused_before_an_image_is_decoded(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny.replace(method="ce", epochs=1), tmp_path / "run", quiet=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")

    def loads(*_: object) -> None:
        raise AssertionError("images were decoded")

    monkeypatch.setattr("longtail.training.trainer.load_data", loads)
    monkeypatch.setattr("longtail.training.trainer.choose_settings", loads)
    with pytest.raises(LongtailError, match="run: contains a run already; use --resume, --overwrite or another --out"):
        fit(tiny, tmp_path / "run", quiet=True)
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        with pytest.raises(LongtailError, match="other: is not empty and not a run of longtail; choose another --out"):
            fit(tiny, tmp_path / "other", resume=resume, overwrite=overwrite, quiet=True)
