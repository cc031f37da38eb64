"""Predictions as a table for spreadsheets: its content, its quoting, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longtail.cli.predict import csv_text
from tests.conftest import TINY, Command, save_image


@pytest.fixture
def run(command: Command, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    code, _, err = command("train", "digits-lt", *TINY, "--method", "ce", "--epochs", "1", "--out", folder)
    assert code == 0, err
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    content = path.read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")  # by which spreadsheets recognise UTF-8
    return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))


def test_the_table_has_a_row_for_each_image(run: Path, command: Command, tmp_path: Path) -> None:
    images = tmp_path / "Bilder"
    names = ['a, "b".png', "zwei\nZeilen.png", "Äpfel.png"]
    for seed, name in enumerate(names):
        save_image(images / name, seed=seed)
    (images / "bad.png").write_bytes(b"none")
    table, values = tmp_path / "new" / "p.csv", tmp_path / "p.json"
    code, _, err = command("predict", run, images, "--csv", table, "--json", values, "--top", "3")
    assert code == 1  # as without the table, since an image cannot be read
    assert "1 of 4 images cannot be read" in err
    rows, records = rows_of(table), json.loads(values.read_text())
    assert list(rows[0]) == [
        "path",
        "class",
        "probability",
        "class_2",
        "probability_2",
        "class_3",
        "probability_3",
        "error",
    ]
    assert [row["path"] for row in rows] == [*(str(images / name) for name in names), str(images / "bad.png")]
    for row, record in zip(rows[:3], records, strict=False):
        assert (row["class"], float(row["probability"])) == (record["class"], record["probability"])
        top = [(row[f"class{n}"], float(row[f"probability{n}"])) for n in ("", "_2", "_3")]
        assert top == [(each["class"], each["probability"]) for each in record["top"]]
        assert row["error"] == ""
    assert (rows[3]["class"], rows[3]["probability"]) == ("", "")
    assert rows[3]["error"] == records[3]["error"]
    assert list(table.parent.iterdir()) == [table]
    # the file is replaced, or stays as it was
    before = table.read_bytes()
    assert command("predict", run, images / "bad.png", "--csv", table)[0] == 2
    assert table.read_bytes() == before
    assert command("predict", run, images / names[2], "--csv", table, "--top", "1")[0] == 0
    assert [list(row) for row in rows_of(table)] == [["path", "class", "probability", "error"]]
    code, _, err = command("predict", run, images, "--csv", tmp_path / "p.txt")
    assert (code, "expected a name that ends in .csv" in err) == (2, True)


def test_the_table_of_an_exported_file_is_the_same(run: Path, command: Command, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    image = save_image(tmp_path / "new" / "0.png")
    assert command("export", run)[0] == 0
    assert command("predict", run, image, "--csv", tmp_path / "a.csv")[0] == 0
    assert command("predict", run / "model.onnx", image, "--csv", tmp_path / "b.csv")[0] == 0
    ours, theirs = rows_of(tmp_path / "a.csv"), rows_of(tmp_path / "b.csv")
    assert [(row["path"], row["class"], row["class_2"]) for row in ours] == [
        (row["path"], row["class"], row["class_2"]) for row in theirs
    ]


def test_objects_have_a_row_each() -> None:
    records: list[dict[str, Any]] = [
        {"path": "a.png", "objects": [{"class": "owl, red", "score": 0.5, "box": [1.0, 2.0, 3.5, 4.0]}] * 2},
        {"path": "b.png", "objects": []},
    ]
    assert csv_text(records, [(Path("c.png"), "c.png: is empty")]).removeprefix("\ufeff").splitlines() == [
        "path,class,score,x1,y1,x2,y2,error",
        'a.png,"owl, red",0.5,1.0,2.0,3.5,4.0,',
        'a.png,"owl, red",0.5,1.0,2.0,3.5,4.0,',
        "b.png,,,,,,,",
        "c.png,,,,,,,c.png: is empty",
    ]


def test_conformal_sets_have_a_column() -> None:
    records = [{"path": "a.png", "top": [{"class": "owl", "probability": 0.5}], "set": ["owl", "bat"]}]
    assert csv_text(records, []).splitlines()[1] == 'a.png,owl,0.5,"owl, bat",'


def test_labels_of_pixels_make_no_table(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = SimpleNamespace(config=SimpleNamespace(task="segmentation"))
    monkeypatch.setattr("longtail.tasks.loading.load_model", lambda _: segmenter)
    code, _, err = command("predict", tmp_path, save_image(tmp_path / "0.png"), "--csv", tmp_path / "p.csv")
    assert code == 2
    assert "labels pixels; use --json FILE for the area of each class" in err
    assert len(err.splitlines()) == 1
