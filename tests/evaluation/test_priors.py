"""Class frequencies that are given and made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longtail.errors import LongtailError
from longtail.evaluation.priors import long_tailed_prior, read_prior

NAMES = ("cat", "dog", "emu")


def test_tails_forward_and_backward() -> None:
    forward, backward = (long_tailed_prior([50, 500, 5], way, 100) for way in ("forward", "backward"))
    assert forward[1] / forward[2] == pytest.approx(100)
    assert backward[2] / backward[1] == pytest.approx(100)
    assert forward[0] / forward[2] == pytest.approx(10)
    assert sum(forward) == pytest.approx(1)


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
    assert read_prior(tmp_path / name, NAMES) == pytest.approx([0.6, 0.3, 0.1])


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
        ("p.json", '{"cat": 1, "cat": 1, "emu": 1}', "class 'cat' stands there twice"),
        ("p.json", "[1, 2, 3]", "expected an object of class names and frequencies"),
        ("p.json", "{", "is neither JSON nor"),
        ("p.csv", "cat,1,2\n", "expected two columns"),
        ("p.csv", "", "class 'cat' is missing"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(LongtailError, match=message):
        read_prior(tmp_path / name, NAMES)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match="cannot be read: No such file"):
        read_prior(tmp_path / "none.json", NAMES)
    (tmp_path / "latin.json").write_bytes(json.dumps({"caf\xe9": 1}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(LongtailError, match="cannot be read"):
        read_prior(tmp_path / "latin.json", NAMES)
