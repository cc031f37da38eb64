"""Predictions as a table for spreadsheets: its content, its quoting, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longtail.cli.predict import LONGEST_CELL, csv_text
from longtail.inference.output import prediction_table
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


@pytest.mark.slow
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


def test_conformal_sets_have_columns() -> None:
    """A cell holds a set as a whole or not at all: what is longer than a cell may be would lose its end there."""
    names = [f"{number:05d} Genus species" for number in range(8142)]
    fitting = names[:1560]
    assert len(", ".join(fitting)) <= LONGEST_CELL < len(", ".join(names[:1561]))
    sets = [["owl", "bat"], [], fitting, names[:1561], names]
    records = [{"path": "a.png", "top": [{"class": "owl", "probability": 0.5}], "set": each} for each in sets]
    rows = list(csv.DictReader(io.StringIO(csv_text(records, []).removeprefix("\ufeff"), newline="")))
    assert [(row["set_size"], row["set"]) for row in rows] == [
        ("2", "owl, bat"),
        ("0", ""),
        ("1560", ", ".join(fitting)),
        ("1561", ""),
        ("8142", ""),
    ]


def test_the_console_shows_the_size_of_a_set_and_ten_names() -> None:
    names = [str(number) for number in range(1234)]
    sets = [["owl", "bat"], [], names[:10], names]
    output = prediction_table([Path("a.png")] * 4, [[("owl", 0.5)]] * 4, sets)
    ten = "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert [row[-1] for row in output.rows] == ["2: owl, bat", "none", f"10: {ten}", f"1,234: {ten} and 1,224 more"]
    assert [record["set"] for record in output.records] == sets  # --json has every name


def test_the_test_images_are_listed_the_most_confident_errors_first(
    command: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, table, values = tmp_path / "run", tmp_path / "new" / "t.csv", tmp_path / "t.json"
    settings = ("--network", "conv8-tiny", "--pretrained", "none", "--method", "la", "--data.image_size", "16")
    assert command("train", photos, *settings, "--epochs", "1", "--quiet", "--out", folder)[0] == 0
    assert command("evaluate", folder, "--csv", table, "--json", values)[0] == 0
    rows, metrics = rows_of(table), json.loads(values.read_text())
    assert "predictions" not in metrics
    assert list(rows[0]) == ["path", "label", "class", "probability", "label_probability"]
    assert len(rows) == metrics["images"]
    for row in rows:
        assert row["path"].partition("/")[0] == row["label"]
        assert (photos / row["path"]).is_file()
        assert (row["class"] == row["label"]) == (row["probability"] == row["label_probability"])
        assert 0 <= float(row["label_probability"]) <= float(row["probability"]) <= 1
    right = [row["class"] == row["label"] for row in rows]
    assert 100 * sum(right) / len(rows) == pytest.approx(metrics["top1"])
    order = [float(row["probability"]) * (1 if hit else -1) for row, hit in zip(rows, right, strict=True)]
    assert order == sorted(order)
    assert min(order) < 0, "expected an error to look at"
    # the page names the files of its errors too
    assert f"<bdi class=soft>{rows[0]['path']}</bdi>" in (folder / "report.html").read_text(encoding="utf-8")
    code, _, err = command("evaluate", folder, "--csv", tmp_path / "t.txt")
    assert (code, "expected a name that ends in .csv" in err) == (2, True)
    segmenter = SimpleNamespace(task="segmentation")
    monkeypatch.setattr("longtail.inference.model_config.read_model_config", lambda _: segmenter)
    code, _, err = command("evaluate", folder, "--csv", table)
    assert (code, len(err.splitlines()), "is for models that classify whole images" in err) == (2, 1, True)


def test_images_in_memory_are_listed_by_their_numbers(run: Path, command: Command, tmp_path: Path) -> None:
    shares = []
    for prior in ("uniform", "train"):
        assert command("evaluate", run, "--prior", prior, "--csv", tmp_path / "t.csv", "--quiet")[0] == 0
        rows = rows_of(tmp_path / "t.csv")
        assert sorted(int(row["path"]) for row in rows) == list(range(len(rows)))
        shares.append(sum(row["class"] == row["label"] for row in rows) / len(rows))
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert shares == [pytest.approx(metrics[prior]["top1"] / 100) for prior in ("uniform", "train")]


def test_labels_of_pixels_make_no_table(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = SimpleNamespace(config=SimpleNamespace(task="segmentation"))
    monkeypatch.setattr("longtail.tasks.loading.load_model", lambda _: segmenter)
    code, _, err = command("predict", tmp_path, save_image(tmp_path / "0.png"), "--csv", tmp_path / "p.csv")
    assert code == 2
    assert "labels pixels; use --json FILE for the area of each class" in err
    assert len(err.splitlines()) == 1
