from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import signal
import time
from pathlib import Path

import pytest

from longtail.config import Config, first_stage_epochs, read_config
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.experiments.compare import compare, describe, plan
from longtail.experiments.records import Record, differences, table
from longtail.training import second_stage
from longtail.training.run_io import alone_in
from longtail.training.sharpness import passes_per_step
from longtail.training.trainer import fit
from tests.conftest import save_image
from tests.processes import run_longtail, start_longtail


def test_equal_passes(tiny: Config) -> None:
    runs = [run.config for run in plan(tiny.replace(epochs=10), ["ce", "la", "gml"], range(2), "passes")]
    assert [(run.method, run.seed, run.epochs) for run in runs] == [
        ("ce", 0, 20),
        ("la", 0, 20),
        ("gml", 0, 10),
        ("ce", 1, 20),
        ("la", 1, 20),
        ("gml", 1, 10),
    ]
    assert {run.config.epochs for run in plan(tiny, ["la", "gml"], [0], "epochs")} == {2}
    two_views = tiny.replace(classifier={"views": 2})
    assert {run.config.epochs for run in plan(two_views, ["la", "gml"], [0], "passes")} == {2}


def test_a_comparison_says_of_how_many_epochs_its_runs_are(tiny: Config) -> None:
    config, methods = tiny.replace(epochs=200), ["ce", "la", "ldam", "bcl", "gml"]
    shown = describe(plan(config, methods, range(3), "passes"), 200)
    assert shown == ("15 runs: ce, la, ldam, bcl 400 epochs, gml 200: equal student passes (--budget epochs: 200 each)")
    assert describe(plan(config, methods, range(3), "epochs"), 200) == "15 runs: 200 epochs each"
    assert describe(plan(config.replace(epochs=1), ["la"], [0], "passes"), 1) == "1 run: 1 epoch each"


@pytest.mark.parametrize("way", ["in turn", "in threads", pytest.param("in processes", marks=pytest.mark.slow)])
def test_what_there_is_to_say_of_the_data_is_said_once(
    tiny: Config, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """A worker process shows no messages, and the remarks of its runs are told by the main process."""
    caplog.set_level(logging.INFO, logger="longtail")
    data = {"source": "folder", "root": str(photos), "profile": "exponential", "imbalance": 2, "class_order": "name"}
    config = tiny.replace(data=data, epochs=1, accelerator={"batches": "device" if way == "in threads" else "auto"})
    jobs = 2 if way == "in processes" else None
    compare(config, ["ce", "la"], [0, 1], tmp_path / "out", jobs=jobs, quiet=True)
    lines = [entry.getMessage() for entry in caplog.records]
    for part in ("data.imbalance 2: is ", "resized copies", "4 runs: 1 epoch each"):
        assert sum(part in line for line in lines) == 1, lines
    first = next(number for number, line in enumerate(lines) if line.startswith("1/4 "))
    assert "data.imbalance 2" in "".join(lines[:first])

    # what is to be said of another factor or seed is said as well
    config = config.replace(data={"class_order": "random"})
    for seeds, factors in (([0], [1.5, 3.0]), ([0, 1, 2], [None])):
        caplog.clear()
        compare(config, ["ce"], seeds, tmp_path / f"{len(seeds)}", imbalances=factors, jobs=jobs, quiet=True)
        wanted = {
            line
            for seed in seeds
            for factor in factors
            for line in load_data(config.replace(data={"imbalance": factor or 2}).data, seed).remarks
        }
        assert len(wanted) > 1
        assert wanted <= {entry.getMessage() for entry in caplog.records}


@pytest.mark.parametrize("sharpness", ["none", "sam"])
@pytest.mark.parametrize(("epochs", "fraction"), [(2, 0.1), (20, 0.1), (200, 0.25), (7, 0.9)])
def test_equal_passes_of_both_stages(tiny: Config, epochs: int, fraction: float, sharpness: str) -> None:
    """An epoch of the second stage is one pass of each image, whatever the method."""
    config = tiny.replace(epochs=epochs, second_stage="crt", second_stage_fraction=fraction)
    config = config.replace(optimizer={"sharpness": sharpness})
    steps = passes_per_step(config)

    def passes(run: Config, views: int) -> int:
        first = first_stage_epochs(run)
        assert isinstance(run.epochs, int)
        return views * steps * first + run.epochs - first

    la, gml = (run.config for run in plan(config, ["la", "gml"], [0], "passes"))
    assert gml.epochs == epochs  # the most expensive one has the recipe's
    wanted = passes(gml, 2)
    assert isinstance(la.epochs, int)
    assert abs(passes(la, 1) - wanted) <= steps / 2
    assert abs(passes(la, 1) - wanted) == min(
        abs(passes(la.replace(epochs=other), 1) - wanted) for other in range(2, 5 * epochs)
    )


def test_a_second_stage_has_equal_passes(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_stage, "MIN_STEPS", 1)
    config = tiny.replace(epochs=10, second_stage="crt", second_stage_fraction=0.2, teacher={"epochs": 1})
    records = compare(config, ["la", "gml"], [0], tmp_path / "out", quiet=True)
    assert records[0].student_passes == records[1].student_passes


@pytest.mark.parametrize(
    ("methods", "message"), [(["ce", "lb"], "'lb' is not known"), (["la", "la"], "different names")]
)
def test_methods_are_checked(tiny: Config, methods: list[str], message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        plan(tiny, methods, [0], "passes")


def test_what_is_done_is_not_done_again(tiny: Config, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    first = compare(tiny, ["la", "gml"], [0], out, quiet=True)
    assert len({record.student_passes for record in first}) == 1
    stamp = (out / "la-seed0" / "last.ckpt").stat().st_mtime_ns
    more = compare(tiny, ["la", "gml"], [0, 1], out, quiet=True)
    assert more[:2] == first
    assert [record.seed for record in more] == [0, 0, 1, 1]
    assert (out / "la-seed0" / "last.ckpt").stat().st_mtime_ns == stamp
    with pytest.raises(LongtailError, match="was started with epochs"):
        compare(tiny.replace(epochs=1), ["la", "gml"], [0], out, quiet=True)
    compare(tiny.replace(epochs=1), ["la"], [0], out, overwrite=True, quiet=True)
    assert not (out / "gml-seed0").exists()


def test_runs_that_start_from_another_one_are_those_of_train(tiny: Config, tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "comparison"
    fit(tiny.replace(method="la", epochs=1), first, quiet=True)
    # gml, the recipe's own method, could not be trained with that: its teacher would have another encoder
    frozen = tiny.replace(method="gml", init=str(first), tune="head", epochs=1)
    assert len(compare(frozen, ["la"], [0], tmp_path / "frozen", quiet=True)) == 1

    config = tiny.replace(method="la", init=str(first), batch_size=512)
    config = config.replace(**dict.fromkeys(("network", "pretrained", "tune", "epochs"), "auto"))
    records = compare(config, ["la", "ce"], [0], out, quiet=True)
    ended = (out / "la-seed0" / "metrics.jsonl").stat().st_mtime_ns
    alone = fit(config, tmp_path / "alone", quiet=True)
    assert (alone.config.network, alone.config.tune) == ("conv8-tiny", "full")
    there = read_config(out / "la-seed0" / "config.yaml")
    assert there.replace(teacher={"epochs": None}) == alone.config
    assert records[0].metrics.items() <= alone.metrics.items()
    # what is done is found again
    assert compare(config, ["la", "ce"], [0], out, quiet=True) == records
    assert (out / "la-seed0" / "metrics.jsonl").stat().st_mtime_ns == ended


def test_what_is_impossible_is_said_before_the_first_training(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match=r"--imbalances 1000: data\.imbalance 1000 leaves the smallest class"):
        compare(tiny, ["ce"], [0], tmp_path / "out", imbalances=[10.0, 1000.0], quiet=True)
    with pytest.raises(LongtailError, match="--seeds 2: the last seed would be 2147483648, expected at most 214748364"):
        compare(tiny, ["ce"], range(2**31 - 1, 2**31 + 1), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_imbalances_are_an_axis(tiny: Config, tmp_path: Path) -> None:
    runs = plan(tiny, ["ce", "la"], [0, 1], "passes", [10.0, 50.0])
    assert [(run.imbalance, run.config.seed, run.config.method) for run in runs[:5]] == [
        (10, 0, "ce"),
        (10, 0, "la"),
        (10, 1, "ce"),
        (10, 1, "la"),
        (50, 0, "ce"),
    ]
    assert {run.config.data.imbalance for run in runs[4:]} == {50}
    records = compare(tiny, ["ce", "la"], [0], tmp_path / "out", imbalances=[5.0, 20.0], quiet=True)
    assert [(record.imbalance, record.method) for record in records] == [(5, "ce"), (5, "la"), (20, "ce"), (20, "la")]
    # more images in all where the tail is thicker
    assert records[0].student_passes > records[2].student_passes
    assert (tmp_path / "out" / "la-imbalance20-seed0" / "recognizer").is_dir()
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    assert [Record.from_dict(json.loads(line)) for line in lines] == records
    header, rows = table(records)
    assert header[:2] == ["imbalance", "method"]
    assert [row[:2] for row in rows] == [["5", "ce"], ["5", "la"], ["20", "ce"], ["20", "la"]]
    assert [str(difference).partition(":")[0] for difference in differences(records)] == [
        "imbalance 5, la − ce",
        "imbalance 20, la − ce",
    ]


@pytest.mark.parametrize("factors", [[0.5], [math.nan], [math.inf], [10.0, 10.0], []])
def test_factors_are_checked(tiny: Config, factors: list[float]) -> None:
    with pytest.raises(LongtailError, match="--imbalances: expected"):
        plan(tiny, ["ce"], [0], "passes", factors)


def test_a_set_with_a_tail_of_its_own_has_no_other(tiny: Config) -> None:
    own = tiny.replace(data={"source": "folder", "root": "photos"})
    with pytest.raises(LongtailError, match=r"photos keeps the tail that it has; set --data\.profile"):
        plan(own, ["ce"], [0], "passes", [10.0])
    assert len(plan(own.replace(data={"profile": "step"}), ["ce"], [0], "passes", [10.0])) == 1


@pytest.mark.slow
def test_two_at_a_time_give_what_one_after_the_other_gives(tiny: Config, tmp_path: Path) -> None:
    def compared(out: str, jobs: int) -> list[Record]:
        # the methods of a seed share a teacher, which is trained once
        records = compare(tiny, ["la", "gml", "paco"], [0, 1], tmp_path / out, jobs=jobs, quiet=True)
        return [dataclasses.replace(record, seconds=0.0, teacher_seconds=0.0) for record in records]

    assert compared("one", 1) == compared("two", 2)
    assert len(list((tmp_path / "two" / "teachers").glob("*/recognizer"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_comparison_that_is_stopped_goes_on(tmp_path: Path, jobs: str) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "digits-lt", "--network", "conv8-tiny", "--epochs", "10", "--methods", "la,bcl"]
    arguments += ["--seeds", "2", "--checkpoint_seconds", "0.2", "--out", str(out), "--jobs", jobs]
    with start_longtail(*arguments, "--quiet") as stopped:
        deadline = time.monotonic() + 90
        while not list(out.glob("*/last.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.01)
        stopped.send_signal(signal.SIGTERM)
        _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + signal.SIGTERM, err
    assert len(err.strip().splitlines()) == 1
    assert "repeat the command without --overwrite to continue" in err
    ended = run_longtail(*arguments, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "1/4" in ended.stderr
    assert len((out / "records.jsonl").read_text().splitlines()) == 4


def test_a_foreign_folder_is_left_alone(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for text in (None, '{"before": 1, "after": 2}', "none"):  # another program's comparison.json
        if text is not None:
            (tmp_path / "comparison.json").write_text(text)
        for overwrite in (False, True):
            with pytest.raises(LongtailError, match="not a comparison of longtail"):
                compare(tiny, ["la"], [0], tmp_path, overwrite=overwrite, quiet=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_teacher_in_it_is_not_overwritten(tiny: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(tiny.replace(epochs=1), ["la"], [0], out, quiet=True)
    config = tiny.replace(epochs=1, teacher={"source": str(out / "la-seed0")})
    with pytest.raises(LongtailError, match=r"teacher\.source .*la-seed0: is in --out .*choose another --out"):
        compare(config, ["gml"], [0], out, overwrite=True, quiet=True)
    assert (out / "la-seed0" / "recognizer").is_dir()
    # beside it another run can be trained
    assert len(compare(config, ["gml"], [0], out, quiet=True)) == 1


@pytest.mark.parametrize("in_threads", [False, True])
def test_runs_on_other_images_are_not_compared(
    tiny: Config, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, in_threads: bool
) -> None:
    caplog.set_level(logging.INFO, logger="longtail")
    changed = tiny.replace(data={"source": "folder", "root": str(photos)}, epochs=1)
    changed = changed.replace(accelerator={"batches": "device" if in_threads else "auto"})
    out = tmp_path / "out"
    compare(changed, ["la"], [0], out, quiet=True)
    compare(changed, ["la", "ce"], [0], out, quiet=True)
    save_image(photos / "emu" / "new.png", seed=77)
    with pytest.raises(LongtailError, match=r"la-seed0: was trained on other images than there are now.*--overwrite"):
        compare(changed, ["la", "focal"], [0], out, quiet=True)
    assert not (out / "focal-seed0").exists()
    assert "cannot share one process" not in caplog.text
    assert len(compare(changed, ["la", "focal"], [0], out, overwrite=True, quiet=True)) == 2


def test_runs_on_other_test_images_are_not_compared(tiny: Config, photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    for split in ("train", "test"):
        shutil.copytree(photos, root / split)
    config, out = tiny.replace(data={"source": "folder", "root": str(root)}, epochs=1), tmp_path / "out"
    compare(config, ["la"], [0], out, quiet=True)
    (root / "test" / "cat" / "0.png").unlink()
    with pytest.raises(LongtailError, match=r"la-seed0: was tested on other images than there are now.*--overwrite"):
        compare(config, ["la", "ce"], [0], out, quiet=True)
    # a run of an earlier version does not say which they were
    card = out / "la-seed0" / "recognizer" / "config.json"
    values = json.loads(card.read_text())
    del values["training_info"]["test_images"]
    card.write_text(json.dumps(values))
    assert len(compare(config, ["la"], [0], out, quiet=True)) == 1


def test_a_method_that_does_not_fit_is_refused_before_another_is_trained(tiny: Config, tmp_path: Path) -> None:
    for changes, message in (
        ({"mixing": {"kind": "remix"}}, "method ldam has a margin"),
        ({"optimizer": {"sharpness": "imbsam"}}, "method bcl"),
    ):
        config: Config = tiny.replace(**changes)
        methods = ["la", "ldam" if "mixing" in changes else "bcl"]
        with pytest.raises(LongtailError, match=message):
            compare(config, methods, [0], tmp_path / "out", quiet=True)
        assert not (tmp_path / "out").exists()


def test_a_run_with_other_settings_is_found_before_another_is_trained(tiny: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(tiny.replace(epochs=1), ["ce"], [0], out, quiet=True)
    with pytest.raises(LongtailError, match="ce-seed0: was started with epochs 1, not 2"):
        compare(tiny.replace(epochs=2), ["la", "ce"], [0], out, quiet=True)
    assert not (out / "la-seed0").exists()


def test_a_comparison_in_which_a_process_trains_is_left_alone(tiny: Config, tmp_path: Path) -> None:
    config, out = tiny.replace(epochs=1), tmp_path / "out"
    compare(config, ["la"], [0], out, quiet=True)
    for folder in (out, out / "ce-seed0", out / "teachers" / "la"):
        with alone_in(folder), pytest.raises(LongtailError, match=f"{folder}: another process trains in it"):
            compare(config, ["la"], [0], out, overwrite=True, quiet=True)
    assert (out / "la-seed0" / "recognizer").exists()


def test_runs_of_an_earlier_call_are_named(tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="longtail"):
        compare(tiny.replace(epochs=1), ["la"], [0], tmp_path / "out", quiet=True)
        assert "earlier call" not in caplog.text
        compare(tiny.replace(epochs=1), ["ce"], [0], tmp_path / "out", quiet=True)
    assert "has 1 runs of an earlier call (la-seed0), which are not in this table; longtail report" in caplog.text


def test_a_refused_comparison_leaves_the_record_of_the_first(tiny: Config, tmp_path: Path) -> None:
    compare(tiny.replace(epochs=1), ["la"], [0], tmp_path / "out", quiet=True)
    before = (tmp_path / "out" / "comparison.json").read_text()
    with pytest.raises(LongtailError, match="was started with epochs"):
        compare(tiny.replace(epochs=2), ["la"], [0], tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "comparison.json").read_text() == before
    compare(tiny.replace(epochs=1), ["la"], [0, 1], tmp_path / "out", quiet=True)
    with pytest.raises(LongtailError, match="--methods: auto is for train"):
        compare(tiny, ["la", "auto"], [0], tmp_path / "other", quiet=True)
