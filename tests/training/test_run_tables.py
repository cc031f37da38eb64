"""A run that was trained from a table is used from another folder, after the table has changed or is gone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from longtail.config import Config, Data
from longtail.data.run_tables import with_tables, write_tables
from longtail.errors import LongtailError
from longtail.run_folder import is_run
from tests.conftest import Command

SETTINGS = ["--network", "conv8-tiny", "--pretrained", "none", "--tune", "full", "--epochs", "1", "--method", "la"]


def test_a_run_of_a_table_moves(
    photos: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("split", photos, "--out", "split.csv")[0] == 0
    arguments = ("train", "split.csv", "--data.root", "photos", "--data.image_size", "16", *SETTINGS, "--out", "run")
    code, _, err = command(*arguments)
    assert code == 0, err
    assert (tmp_path / "run" / "tables" / "train.csv").read_bytes() == (tmp_path / "split.csv").read_bytes()
    code, expected, err = command("evaluate", "run")
    assert (code, err) == (0, "")
    # another split: the run is still evaluated on the images that it was not trained on
    split = Path("split.csv").read_text()
    Path("split.csv").write_text(split.replace(",test", ",val").replace(",train", ",test").replace(",val", ",train"))
    code, out, err = command("evaluate", "run")
    assert (code, out) == (0, expected)
    assert "split.csv has changed since the training: its copy run/tables/train.csv is used" in err
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "run").rename(elsewhere / "moved")
    Path("split.csv").unlink()
    monkeypatch.chdir(elsewhere)
    code, _, err = command("evaluate", "moved")
    assert code == 2
    assert "photos: there is no such folder, where the images were; say where they are: --root FOLDER" in err
    code, out, err = command("evaluate", "moved", "--root", photos)
    assert (code, out) == (0, expected)
    assert "split.csv is not there: its copy moved/tables/train.csv is used" in err
    code, _, err = command("rebalance", "moved", "--method", "tau", "--tau", "1", "--root", photos)
    assert code == 0, err
    # which has a copy of its own
    (elsewhere / "moved").rename(elsewhere / "gone")
    assert command("evaluate", "moved-tau", "--root", photos)[0] == 0


def test_where_the_images_are_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "longtail")
    run, table = tmp_path / "run", tmp_path / "data" / "t.csv"
    table.parent.mkdir()
    table.write_text("path,label\n")
    run.mkdir()
    data = Data(source="list", train=str(table))
    write_tables(run, data)
    assert with_tables(run, data) is data
    table.write_text("path,label\na.png,cat\n")
    changed = with_tables(run, data)
    assert (changed.train, changed.root) == (str(run / "tables" / "train.csv"), str(table.parent))
    table.unlink()
    with pytest.raises(LongtailError, match=r"t\.csv: there is no such file, in whose folder the images were; say"):
        with_tables(run, data)
    (run / "tables" / "train.csv").unlink()
    with pytest.raises(LongtailError, match=r"which names the images of .*run \(data\.train\); restore it"):
        with_tables(run, data)


def test_a_stopped_run_with_copies_is_a_run(tmp_path: Path, tiny: Config) -> None:
    (tmp_path / "config.yaml").write_text(tiny.to_yaml())
    (tmp_path / "tables").mkdir()
    assert is_run(tmp_path)
