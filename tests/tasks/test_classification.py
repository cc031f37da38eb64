"""What a run says of its own probabilities, and of class frequencies elsewhere; on real digits."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longtail import Recognizer
from longtail.config import Config, load_recipe, read_config
from longtail.data.dataset import ImageSet
from longtail.data.sources import load_data
from longtail.errors import LongtailError
from longtail.experiments.evaluate import evaluate
from longtail.experiments.rebalance import RebalanceSettings, rebalance
from longtail.inference.export import export_onnx
from longtail.report import run_report
from longtail.tasks.classification.calibration import calibrate
from longtail.tasks.classification.console import trust_lines
from longtail.tasks.classification.evaluator import ClassificationEvaluator
from longtail.tasks.evaluate import evaluate_split
from longtail.tasks.loading import load_model
from longtail.training.trainer import fit
from tests.conftest import Command, save_image


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_recipe("digits-lt").config.replace(method="la", epochs=30, data={"val_fraction": 0.2})
    folder = tmp_path_factory.mktemp("trust") / "run"
    fit(config, folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    export_onnx(load_model(run), path)
    return path


def test_validation_images_are_held_out_before_the_tail_is_made(tiny: Config) -> None:
    data = load_data(tiny.replace(data={"val_fraction": 0.2}).data, 0)
    assert data.val is not None
    counts = torch.bincount(data.val.labels)
    assert len(set(counts.tolist())) == 1
    ids = [set(split.ids.tolist()) for split in (data.train, data.val, data.test)]
    assert sum(map(len, ids)) == len(ids[0] | ids[1] | ids[2])


def test_an_image_whose_scores_are_nan_has_no_predicted_class(run: Path) -> None:
    model, config = Recognizer.load(run), read_config(run / "config.yaml")
    test = load_data(config.data, 0).test
    evaluator = ClassificationEvaluator(model, test, config, {"uniform": None}, accuracy_only=False)
    scores = torch.nn.functional.one_hot(test.labels, 10).float()
    scores[:2] = torch.nan
    evaluator.update(torch.arange(len(test)), scores, test.labels)
    results = evaluator.image_results()
    assert results["uniform"][:3].tolist() == [-1, -1, int(test.labels[2])]
    right = 100 * (1 - 2 / len(test))
    assert evaluator.compute()["uniform"]["top1"] == pytest.approx(right)
    assert 100 * float((results["uniform"] == results["labels"]).mean()) == pytest.approx(right)


def test_probabilities_are_calibrated_on_the_validation_images(run: Path) -> None:
    recognizer = Recognizer.load(run)
    assert recognizer.config.temperature != 1
    assert recognizer.calibration_stats is not None
    assert len(recognizer.calibration_stats.labels) % 10 == 0
    metrics = evaluate(run)
    plain = Recognizer.load(run)
    plain.config = dataclasses.replace(plain.config, temperature=1.0)
    config = read_config(run / "config.yaml")
    uncalibrated = evaluate_split(plain, load_data(config.data, 0).test, config)["uniform"]
    assert metrics["calibration"]["nll"] < uncalibrated["calibration"]["nll"]
    assert metrics["per_class"] == uncalibrated["per_class"]  # under the uniform prior nothing else changes
    curve = metrics["calibration"]["rejection"]
    assert curve[0]["accuracy"] == pytest.approx(metrics["top1"])
    assert curve[-1]["accuracy"] > metrics["top1"]
    low, high = metrics["intervals"]["few"]
    assert low < metrics["few"] < high
    assert all(
        a <= value <= b for value, (a, b) in zip(metrics["per_class"], metrics["per_class_interval"], strict=True)
    )


def test_a_target_that_is_the_reverse_of_the_training_set(run: Path) -> None:
    metrics = evaluate(run, "estimate", test_prior="backward", imbalance=100, coverage=0.9)
    under = {name: values["target_accuracy"] for name, values in metrics["priors"].items()}
    assert under["target"] > under["uniform"] > under["train"]
    assert under["estimate"] > under["target"] - 1
    assert under["estimate"] > under["target, corrected"] - 1
    assert metrics["prior"] == "estimate"
    for method in ("map", "em", "bbse"):
        frequencies = metrics["estimates"][method]["frequencies"]
        assert sum(frequencies) == pytest.approx(1)
        # the most frequent class of the target is the rarest in training
        assert int(np.argmax(frequencies)) == int(np.argmin(metrics["class_counts"]))
    sets = metrics["conformal"]
    stats = Recognizer.load(run).calibration_stats
    assert stats is not None
    assert metrics["temperature_fits"]["all"]["images"] == len(stats.labels)
    assert sets["validation_images"] == metrics["estimates"]["map"]["validation_images"] == len(stats.labels)
    assert sets["coverage_interval"][0] < 90 < sets["coverage_interval"][1]
    assert sets["few"]["covered"] > 80
    assert sets["all"]["size"] < 4


def test_with_many_classes_there_is_no_black_box_estimate(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtail.tasks.classification.evaluate.MAX_BBSE_CLASSES", 9)
    monkeypatch.setattr("longtail.tasks.classification.console.MAX_BBSE_CLASSES", 9)
    metrics = evaluate(run, "estimate")
    assert list(metrics["estimates"]) == ["map", "em"]
    assert "no estimate by bbse: with more than 9 classes it would take too long" in trust_lines(metrics)


def test_calibration_and_sets_at_a_target_are_those_of_the_weighted_test_set(run: Path, tmp_path: Path) -> None:
    model, data = Recognizer.load(run), load_data(read_config(run / "config.yaml").data, 0)
    frequencies = np.arange(1.0, 11) ** 2
    (tmp_path / "p.csv").write_text(
        "".join(f"{name},{q}\n" for name, q in zip(model.config.class_names, frequencies, strict=True))
    )
    metrics = evaluate(run, str(tmp_path / "p.csv"), test_prior=str(tmp_path / "p.csv"), coverage=0.9)
    labels = data.test.labels.numpy()
    weights = (frequencies / np.bincount(labels))[labels]
    predictions = model.predict(data.test.images.take(torch.arange(len(labels))), frequencies.tolist(), coverage=0.9)
    own = predictions.probabilities.numpy()[np.arange(len(labels)), labels]
    assert metrics["calibration"]["nll"] == pytest.approx(-np.log(own).mean(), rel=1e-4)
    assert metrics["target_calibration"]["nll"] == pytest.approx(np.average(-np.log(own), weights=weights), rel=1e-4)
    assert predictions.in_set is not None
    covered = predictions.in_set.numpy()[np.arange(len(labels)), labels]
    assert metrics["conformal"]["all"]["covered"] == pytest.approx(100 * np.average(covered, weights=weights))
    uniform = evaluate(run, test_prior="uniform")
    for name in ("ece", "nll", "brier"):
        assert uniform["target_calibration"][name] == pytest.approx(uniform["calibration"][name])


def test_a_target_of_its_own(run: Path, tmp_path: Path) -> None:
    names = Recognizer.load(run).config.class_names
    (tmp_path / "p.json").write_text(json.dumps({name: 1 + 9 * (name == "3") for name in names}))
    metrics = evaluate(run, str(tmp_path / "p.json"), test_prior=str(tmp_path / "p.json"))
    expected = sum(
        (10 if name == "3" else 1) / 19 * value for name, value in zip(names, metrics["per_class"], strict=True)
    )
    assert metrics["target_accuracy"] == pytest.approx(expected)
    with_sets = evaluate(run, str(tmp_path / "p.json"), coverage=0.9)
    assert with_sets["prior"] == "given"
    assert with_sets["top1"] == metrics["top1"]
    uniform = evaluate(run, test_prior="uniform")
    assert uniform["target_accuracy"] == pytest.approx(uniform["balanced_accuracy"])


def test_predictions_with_sets_and_an_estimate(run: Path) -> None:
    recognizer = Recognizer.load(run)
    data = load_data(read_config(run / "config.yaml").data, 0)
    images = data.test.images.take(torch.arange(len(data.test)))
    predictions = recognizer.predict(images, "estimate", coverage=0.9)
    assert predictions.prior is not None
    assert predictions.in_set is not None
    assert predictions.sets is not None
    assert len(predictions.sets) == len(images)
    covered = predictions.in_set.gather(1, data.test.labels[:, None]).float().mean()
    assert covered > 0.8
    with pytest.raises(LongtailError, match="there are no images to estimate it from"):
        recognizer.predict([], "estimate")
    for coverage in (0.0, 1.0):
        with pytest.raises(LongtailError, match="expected a fraction between 0 and 1"):
            recognizer.predict(images[:2], coverage=coverage)


def test_without_validation_images(tiny: Config, tmp_path: Path) -> None:
    fit(tiny.replace(method="la"), tmp_path / "run", quiet=True)
    recognizer = Recognizer.load(tmp_path / "run")
    assert recognizer.config.temperature == 1
    assert recognizer.config.calibrated_on == ""
    assert not (tmp_path / "run" / "recognizer" / "validation.safetensors").exists()
    with pytest.raises(
        LongtailError, match=r"conformal sets need validation images, and the run had none; train with some"
    ):
        recognizer.conformal_thresholds(0.9)
    assert set(evaluate(tmp_path / "run", "estimate")["estimates"]) == {"map", "em"}  # bbse needs them


def test_a_saved_model_says_what_its_calibration_rests_on(run: Path, tmp_path: Path) -> None:
    recognizer = Recognizer.load(run)
    assert recognizer.calibration_stats is not None
    sentence = recognizer.config.calibrated_on
    fit = recognizer.config.temperature_fits["all"]
    assert sentence.startswith(f"calibrated on {fit.images} validation images: temperature {fit.temperature:.2f} (95 %")
    assert fit.images == len(recognizer.calibration_stats.labels)
    assert fit.temperature == recognizer.config.temperature
    assert f"Probabilities were {sentence}." in (run / "recognizer" / "README.md").read_text()
    assert f"Probabilities were {sentence}." in run_report(run).read_text()
    # a model of an earlier version has no such record
    shutil.copytree(run / "recognizer", tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["temperature_fits"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    old = Recognizer.load(tmp_path / "old")
    assert (old.config.temperature, old.config.calibrated_on) == (fit.temperature, "")


def test_on_ten_validation_images_the_model_stays_as_it_is(run: Path) -> None:
    recognizer, config = Recognizer.load(run), read_config(run / "config.yaml")
    val = load_data(config.data, 0).val
    assert val is not None
    few = ImageSet(val.images, val.labels[:10], val.ids[:10])
    calibrated = calibrate(recognizer, few, config)
    assert calibrated.config.temperature == 1
    assert calibrated.config.temperature_fits["all"].images == 10
    assert "10 validation images" in calibrated.config.calibrated_on
    assert "do not show that another one is better than 1" in calibrated.config.calibrated_on


def test_a_new_head_is_calibrated_anew(run: Path, tmp_path: Path) -> None:
    rebalance(run, tmp_path / "crt", RebalanceSettings("crt", epochs=2, views=1))
    old, new = Recognizer.load(run), Recognizer.load(tmp_path / "crt")
    assert new.calibration_stats is not None
    assert new.config.temperature != old.config.temperature


@pytest.mark.slow
def test_a_temperature_for_each_shot_group(tmp_path: Path) -> None:
    config = load_recipe("digits-lt").config.replace(method="ce", epochs=20, calibration="group")
    config = config.replace(data={"val_fraction": 0.3}, shots={"many_above": 60, "few_below": 10})
    run = fit(config, tmp_path / "run", quiet=True)
    recognizer = Recognizer.load(tmp_path / "run")
    groups, temperatures = config.shots.groups(run.model_config.class_counts), recognizer.config.class_temperatures
    assert len(temperatures) == 10
    fits = recognizer.config.temperature_fits
    assert set(fits) == {"all", *groups}
    assert list(temperatures) == [fits[group].temperature for group in groups]
    assert sum(fits[group].images for group in set(groups)) == fits["all"].images
    assert all(fit.interval[0] <= fit.temperature <= fit.interval[1] for fit in fits.values())
    # this network needs no other temperature than 1: give the groups some
    temperatures = tuple({"many": 1.5, "medium": 0.8, "few": 0.6}[group] for group in groups)
    assert len(set(temperatures)) > 1
    recognizer.config = dataclasses.replace(recognizer.config, class_temperatures=temperatures)
    assert export_onnx(recognizer, tmp_path / "m.onnx", "train").difference < 1e-4
    # the scores of an image are divided by the temperature of its predicted class
    images = torch.rand(6, 1, 8, 8)
    scores = recognizer.scores(images)
    recognizer.config = dataclasses.replace(recognizer.config, temperature=1.0, class_temperatures=())
    plain = recognizer.scores(images)
    expected = plain / torch.tensor(temperatures)[plain.argmax(dim=1)][:, None]
    assert torch.allclose(scores, expected, atol=1e-5)


def test_what_was_held_out_must_fit(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "recognizer" / "validation.safetensors"
    path.write_bytes(b"none")
    with pytest.raises(LongtailError, match=r"validation.safetensors: cannot be read"):
        Recognizer.load(tmp_path / "run")
    from safetensors.torch import save_file

    kept = {name: torch.zeros(3, dtype=torch.int64) for name in ("labels", "predicted", "true_probability", "bias")}
    save_file(kept, path)
    with pytest.raises(LongtailError, match=r"validation.safetensors: holds .* expected .*halves"):
        Recognizer.load(tmp_path / "run")
    save_file({**kept, "halves": torch.zeros(2, 3)}, path)
    with pytest.raises(LongtailError, match=r"does not fit the 10 classes"):
        Recognizer.load(tmp_path / "run")


def test_on_the_command_line(run: Path, tmp_path: Path, command: Command) -> None:
    code, out, _ = command("evaluate", run, "--test_prior", "backward", "--prior", "estimate", "--coverage", "0.9")
    assert code == 0
    for part in (
        "calibrated on ",
        " validation images: temperature ",
        " (95 % interval ",
        "conformal thresholds rest on ",
        "  rests on ",
        "accuracy at target",
        "estimate",
        "bbse",
        "calibration under the estimate prior on the test set weighted to the target",
        "conformal sets at coverage 90 % on the test set weighted to the target, few",
        "classes on average",
    ):
        assert part in out
    images = [save_image(tmp_path / f"{index}.png", (8, 8), index, "L") for index in range(5)]
    code, out, _ = command(
        "predict", run, *images, "--prior", "estimate", "--coverage", "0.8", "--json", tmp_path / "p"
    )
    assert code == 0
    assert "class frequencies estimated by map" in out
    assert "conformal thresholds rest on " in out
    assert "  rests on " in out
    assert "set" in json.loads((tmp_path / "p").read_text())[0]
    (tmp_path / "prior.csv").write_text("".join(f"{digit},{1 + digit}\n" for digit in range(10)))
    assert command("predict", run, *images, "--prior", tmp_path / "prior.csv")[0] == 0
    for prior, message in (
        (
            "unifrom",
            "prior 'unifrom': expected uniform, train, or a file of class frequencies (a test set also takes forward "
            "and backward); there is no such file",
        ),
        (tmp_path / "0.png", "cannot be read"),
    ):
        code, _, err = command("predict", run, *images, "--prior", prior)
        assert (code, message in err, len(err.splitlines())) == (2, True, 1)
    code, _, err = command("evaluate", run, "--test_prior", "backward", "--imbalance", "0.5")
    assert (code, "imbalance 0.5: expected at least 1" in err) == (2, True)


def test_an_exported_file_predicts_the_same_without_torch(run: Path, tmp_path: Path, command: Command) -> None:
    images = [save_image(tmp_path / "new" / f"{i}.png", (8 + i, 9), i, "L") for i in range(6)]
    frequencies = tmp_path / "frequencies.csv"
    names = load_model(run).config.class_names
    frequencies.write_text("".join(f"{name},{1 + place}\n" for place, name in enumerate(names)), encoding="utf-8")
    priors = ("uniform", "train", str(frequencies))
    for prior in priors:
        export_onnx(load_model(run), tmp_path / "m.onnx", prior)
        for wanted in priors:
            shown = []
            for model in (run, tmp_path / "m.onnx"):
                code, _, err = command("predict", model, *images, "--prior", wanted, "--json", tmp_path / "p.json")
                assert code == 0, err
                shown.append(json.loads((tmp_path / "p.json").read_text()))
            for a, b in zip(*shown, strict=True):
                assert a["class"] == b["class"]
                assert a["probability"] == pytest.approx(b["probability"], abs=1e-4)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from longtail.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules",
            *("predict", str(tmp_path / "m.onnx"), str(tmp_path / "new")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9
    assert "probabilities under given frequencies, as the file was exported" in done.stdout
    (tmp_path / "new" / "2.png").write_bytes(b"not an image")
    code, shown_table, err = command("predict", tmp_path / "m.onnx", tmp_path / "new")
    assert (code, len(shown_table.splitlines()), "2.png: is not an image" in err) == (1, 8, True)


@pytest.mark.parametrize("flags", [["--sliding_window", "64"], ["--tta_scales", "1", "1.5"], ["--out", "out"]])
def test_options_of_models_that_label_pixels(
    run: Path, exported: Path, tmp_path: Path, command: Command, flags: list[str]
) -> None:
    image = save_image(tmp_path / "a.png", (8, 8), mode="L")
    commands: list[tuple[tuple[str | Path, ...], str]] = [
        (("predict", exported, image), f"{flags[0]} needs the run, not its ONNX file"),
        (("predict", run, image), "is for models that label pixels"),
    ]
    if flags[0] != "--out":
        commands.append((("evaluate", run), f"evaluate: {flags[0]} is for models that label pixels"))
    for arguments, message in commands:
        code, out, err = command(*arguments, *flags)
        assert (code, out, message in err, len(err.splitlines())) == (2, "", True, 1), err


@pytest.mark.parametrize("flags", [["--coverage", "0.9"], ["--prior", "estimate"]])
def test_an_exported_file_has_no_calibration(
    exported: Path, tmp_path: Path, command: Command, flags: list[str]
) -> None:
    code, out, err = command("predict", exported, save_image(tmp_path / "a.png", (8, 8), mode="L"), *flags)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"{flags[0]}" in err
    assert "needs the run, not its ONNX file" in err


def test_files_that_are_no_exported_model(tmp_path: Path, command: Command) -> None:
    import onnx
    from onnx import TensorProto, helper

    image = save_image(tmp_path / "a.png", (8, 8))
    node = helper.make_node("Identity", ["x"], ["y"])
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "other.onnx"
    )
    (tmp_path / "text.onnx").write_text("none")
    for name, message in (
        ("other.onnx", "is another program's model"),
        ("text.onnx", "is no ONNX model"),
        ("missing.onnx", "there is no such file"),
    ):
        code, _, err = command("predict", tmp_path / name, image)
        assert (code, message in err, len(err.splitlines())) == (2, True, 1), err
