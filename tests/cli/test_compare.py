"""longtail compare as a user meets it: what it prints and writes, its help, and its default methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from longtail.config import Config, read_config
from longtail.errors import LongtailError
from tests.conftest import TINY, Command


def test_compare(command: Command, tmp_path: Path) -> None:
    out, table = tmp_path / "comparison", tmp_path / "runs.json"
    arguments = ("compare", "digits-lt", *TINY, "--methods", "ce,la,gml", "--seeds", "2", "--out", out, "--json", table)
    code, printed, err = command(*arguments)
    assert code == 0, err
    assert "gml − la" in printed
    assert "; chosen by the test images, without correction for 3 comparisons\n" in printed
    records = json.loads(table.read_text())
    # ce alone predicts under the training prior; the table would compare it with others under the uniform one
    tested = [json.loads((out / f"ce-seed{seed}" / "metrics.jsonl").read_text().splitlines()[-1]) for seed in (0, 1)]
    uniform = f"{sum(line['uniform']['balanced_accuracy'] for line in tested) / 2:.1f} ± "
    said = "ce: under the training prior, as it was trained; under the uniform prior, which longtail predict assumes, "
    assert printed.count("under the training prior") == printed.count(f"{said}balanced accuracy {uniform}") == 1
    code, again, _ = command("report", *(out / f"{name}-seed0" for name in ("la", "ce")), "--out", tmp_path / "c.html")
    assert (code, again.count("ce: under the training prior, as it was trained; ")) == (0, 1)
    assert len(records) == 6
    wanted = {"method", "seed", "balanced_accuracy", "many", "medium", "few", "seconds", "student_passes"}
    assert all(wanted <= record.keys() for record in records)
    assert len({record["student_passes"] for record in records if record["seed"] == 0}) == 1
    assert (out / "comparison.png").stat().st_size > 10_000
    assert "gml − la" in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "gml-seed1" / "report.html").is_file()


def test_the_methods_of_a_comparison(command: Command, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default those of little cost for a folder, whose recipe has no method of its own."""

    def stop(_config: Config, methods: list[str], *_: object, **__: object) -> None:
        raise LongtailError(",".join(methods))

    monkeypatch.setattr("longtail.experiments.compare.compare", stop)
    for arguments, methods in (
        ((photos,), "ce,la"),
        (("digits-lt",), "ce,la,gml"),
        (("digits-lt", "--methods", "bcl, ldam"), "bcl,ldam"),
    ):
        code, _, err = command("compare", *arguments)
        assert (code, err) == (2, f"longtail: error: {methods}\n")


def test_the_help_of_a_comparison_has_no_flag_that_it_refuses(command: Command) -> None:
    code, shown, _ = command("compare", "--help")
    assert code == 0
    flags = {word for line in shown.splitlines() for word in line.split() if word.startswith("--")}
    assert {"--methods", "--epochs"} <= flags
    assert not {"--method", "--minutes"} & flags
    assert "so that the passes are equal" in " ".join(shown.replace("│", " ").split())


@pytest.mark.slow
def test_a_folder_in_place_of_a_recipe_is_compared(command: Command, photos: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    # the method and the epochs of the recipe are auto
    settings = ("--network", "test_resnet", "--pretrained", tmp_path / "w.pth", "--tune", "head", "--quiet")
    compared = ("--methods", "ce,la", "--seeds", "2", "--data.image_size", "16", "--out", tmp_path / "comparison")
    code, printed, err = command("compare", photos, *settings, *compared)
    assert code == 0, err
    assert "\ntake " in printed
    assert read_config(tmp_path / "comparison" / "la-seed1" / "config.yaml").epochs == 30


@pytest.mark.slow
def test_a_comparison_over_imbalances(command: Command, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", tmp_path / "records.jsonl"
    code, shown, err = command(
        *("compare", "digits-lt", *TINY, "--methods", "ce,la", "--seeds", "1"),
        *("--imbalances", "5,20", "--out", out, "--json", lines),
    )
    assert code == 0, err
    assert "imbalance 20, la − ce" in shown
    assert [line.partition(":")[0] for line in shown.splitlines() if "under the training prior" in line] == [
        "imbalance 5, ce",
        "imbalance 20, ce",
    ]
    assert [json.loads(line)["imbalance"] for line in lines.read_text().splitlines()] == [5, 5, 20, 20]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "ce-imbalance5-seed0/report.html" in page
    assert (out / "ce-imbalance5-seed0" / "report.html").is_file()
    for wrong, message in (
        (("--imbalances", "ten"), "--imbalances 'ten': expected numbers"),
        (("--imbalances", "0.5"), "--imbalances: expected factors of at least 1"),
        (("--jobs", "0"), "--jobs 0: expected at least 1"),
        (("--methods", "ce,pacco"), "perhaps you meant paco"),
    ):
        code, _, err = command("compare", "digits-lt", *TINY, *wrong, "--out", tmp_path / "other")
        assert code == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "other").exists()
