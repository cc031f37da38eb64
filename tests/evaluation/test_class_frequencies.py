"""Every way to specify class frequencies, and what is rejected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longtail.errors import LongtailError
from longtail.evaluation.class_frequencies import ClassFrequencies, resolve_class_frequencies

NAMES = ("cat", "dog", "emu")
COUNTS = (50, 500, 5)


def resolve(spec: ClassFrequencies, **options: Any) -> list[float]:
    return resolve_class_frequencies(spec, NAMES, COUNTS, **options)


def test_names() -> None:
    assert resolve("uniform") == pytest.approx([1 / 3] * 3)
    assert resolve("train") == pytest.approx([50 / 555, 500 / 555, 5 / 555])
    forward, backward = (resolve(name, imbalance=100) for name in ("forward", "backward"))
    assert forward[1] / forward[2] == pytest.approx(100)
    assert backward[2] / backward[1] == pytest.approx(100)
    assert forward[0] / forward[2] == pytest.approx(10)
    assert sum(forward) == pytest.approx(1)
    with pytest.raises(LongtailError, match=r"^imbalance 0\.5: expected at least 1$"):
        resolve("forward", imbalance=0.5)
    with pytest.raises(LongtailError, match=r"^--test_prior 'unifrom': expected uniform, train, or"):
        resolve("unifrom", where="--test_prior")


@pytest.mark.parametrize(
    "values",
    [
        [6, 3, 1],
        (0.6, 0.3, 0.1),
        np.array([6, 3, 1]),
        torch.tensor([6.0, 3.0, 1.0]),
        {"emu": 1, "cat": 6, "dog": 3},
    ],
)
def test_values(values: Any) -> None:
    assert resolve(values) == pytest.approx([0.6, 0.3, 0.1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], r"^prior: expected 3 frequencies above 0, got 2: \[1, 2\]; a mapping from class name to"),
        ([1, 2, 0], r"^prior: expected 3 frequencies above 0, got 0 for class 'emu'$"),
        ([1, -0.5, 0], r"^prior: expected 3 frequencies above 0, got -0\.5 for class 'dog'$"),
        ([1, 2, float("nan")], "expected 3 frequencies above 0, got nan for class 'emu'"),
        ([1, 2, float("inf")], "expected 3 frequencies above 0, got inf for class 'emu'"),
        ([1, "many", 2], "expected 3 frequencies above 0, got 'many' for class 'dog'"),
        (np.eye(3), r"expected 3 frequencies above 0, got \[1\.0, 0\.0, 0\.0\] for class 'cat'"),
        (5, "expected 3 frequencies above 0, got 5;"),
        ([1] * 1000, r"got 1000: \[1, 1, .*\.\.\.; a mapping"),
        ({"cat": 1, "dog": 1}, "^prior: class 'emu' is missing"),
        ({"cat": 1, "dog": 1, "emu": 1, "fox": 1}, "^prior: there is no class 'fox'"),
    ],
)
def test_values_that_do_not_fit(values: Sequence[float], message: str) -> None:
    with pytest.raises(LongtailError, match=message):
        resolve(values)


def test_labels_that_are_not_text() -> None:
    assert resolve_class_frequencies({0: 1, 1: 3}, [0, 1], [5, 5]) == [0.25, 0.75]
    for keys in ([0, 1], ["0.0", "1.0"], list(np.arange(2)), [False, True]):
        assert resolve_class_frequencies(dict(zip(keys, (1, 3), strict=True)), [0.0, 1.0], [5, 5]) == [0.25, 0.75]
    pandas = pytest.importorskip("pandas")
    assert resolve_class_frequencies(pandas.Series([3, 1], index=["b", "a"]), ["a", "b"], [5, 5]) == [0.25, 0.75]


def test_names_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    table = tmp_path / "p.csv"
    table.write_text(f"{decomposed},1\ntea,3\n", encoding="utf-8")
    for spec in ({decomposed: 1, "tea": 3}, table):
        assert resolve_class_frequencies(spec, [composed, "tea"], [5, 5]) == [0.25, 0.75]
    assert resolve_class_frequencies({composed: 1, "tea": 3}, [decomposed, "tea"], [5, 5]) == [0.25, 0.75]
    # a file is opened under the name that the disk has
    (tmp_path / f"{decomposed}.json").write_text(json.dumps({"tea": 3, decomposed: 1}))
    for path in (tmp_path / f"{composed}.json", str(tmp_path / f"{composed}.json")):
        assert resolve_class_frequencies(path, [composed, "tea"], [5, 5]) == [0.25, 0.75]
    with pytest.raises(LongtailError, match="is listed twice"):
        resolve_class_frequencies({composed: 1, decomposed: 1, "tea": 3}, [composed, "tea"], [5, 5])


def test_classes_that_are_not_there_can_be_left_out(tmp_path: Path) -> None:
    everything = {"cat": 6, "dog": 3, "emu": 1, "fox": 90, "gnu": "any"}
    file = tmp_path / "p.json"
    file.write_text(json.dumps(everything))
    specs: list[Any] = [everything, file, str(file)]
    for spec in specs:
        assert resolve(spec, ignore_unknown=True) == pytest.approx([0.6, 0.3, 0.1])
        with pytest.raises(LongtailError, match="there is no class 'fox'"):
            resolve(spec)
    with pytest.raises(LongtailError, match=r"class 'dog' is missing, .*; is it 'dgo', which is no class\?$"):
        resolve({"cat": 1, "dgo": 1, "emu": 1}, ignore_unknown=True)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("a, b", "c"), '"a, b";0.5\nc;0.5\n'),
        (("a, b", "c"), '"a, b";0,5\nc;0,5\n'),
        (("a, b", "c"), "a, b;0.5\nc;0.5\n"),
        (("a;b", "a"), "a;b,0.5\na,0.5\n"),
        (("a;b", "c;d"), "name,frequency\na;b,0.5\nc;d,0.5\n"),
    ],
)
def test_the_separator_gives_two_columns(tmp_path: Path, names: tuple[str, ...], text: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    assert resolve_class_frequencies(tmp_path / "p.csv", names, [5, 5]) == [0.5, 0.5]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8-sig", "utf-16"])
def test_tables_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "p.csv").write_bytes("caf\xe9;0,25\nthé;0,75\n".encode(encoding))
    assert resolve_class_frequencies(tmp_path / "p.csv", ["caf\xe9", "thé"], [5, 5]) == [0.25, 0.75]


def test_large_frequencies_do_not_overflow() -> None:
    assert resolve([1e308, 1e308, 1e308]) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '{"emu": 1, "cat": 6, "dog": 3}'),
        ("p.csv", "class,frequency\ncat,0.6\ndog,0.3\nemu,0.1\n"),
        ("p.csv", "cat,6\ndog,3\nemu,1\n"),
        ("p.tsv", "emu\t10\ncat\t60\ndog\t30\n"),
    ],
)
def test_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    for spec in (tmp_path / name, str(tmp_path / name)):
        assert resolve(spec) == pytest.approx([0.6, 0.3, 0.1])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", '{"cat": 1, "dog": 1}', "class 'emu' is missing"),
        ("p.json", '{"cat": 1, "dog": 1, "emu": -1}', "class 'emu' has -1, expected a frequency above 0"),
        ("p.json", '{"cat": 1, "dog": 1, "emu": 0}', "class 'emu' has 0"),
        ("p.json", '{"cat": 1, "dog": 1, "emu": "many"}', "class 'emu' has 'many'"),
        ("p.json", '{"cat": 1, "dog": 1, "emu": true}', "class 'emu' has True"),
        ("p.json", '{"cat": 1, "dog": 1, "emu": NaN}', "class 'emu' has nan"),
        ("p.json", '{"cat": 1, "dgo": 1, "emu": 1}', r"there is no class 'dgo'; perhaps you meant dog\?"),
        ("p.json", '{"cat": 1, "cat": 1, "emu": 1}', "class 'cat' is listed twice"),
        ("p.json", "[1, 2, 3]", "expected an object of class names and frequencies"),
        ("p.json", "{", "is neither JSON nor"),
        ("p.csv", "cat,1,2\n", "expected two columns"),
        ("p.csv", "", "class 'cat' is missing"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(LongtailError, match=message):
        resolve(tmp_path / name)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match=r"none\.json: cannot be read: No such file"):
        resolve(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(json.dumps({"caf\xe9": 1}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(LongtailError, match="cannot be read: is no text in UTF-8"):
        resolve(tmp_path / "latin.json")


def test_a_table_as_spreadsheets_write_it_beside_decimal_commas(tmp_path: Path) -> None:
    (tmp_path / "prior.csv").write_text("class;frequency\ncat;0,5\ndog;0,25\nemu;0.25\n")
    assert resolve(tmp_path / "prior.csv") == pytest.approx([0.5, 0.25, 0.25])
    (tmp_path / "prior.csv").write_text('cat,0.5\n"dog,0.25\nemu,0.25\n')
    with pytest.raises(LongtailError, match=r"prior '.*prior\.csv': cannot be read as a table: "):
        resolve(tmp_path / "prior.csv")
