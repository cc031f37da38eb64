from __future__ import annotations

import re
from pathlib import Path

import pytest

from longtail.config import Config
from longtail.engine.fit import fit
from longtail.errors import LongtailError
from longtail.report import run_report
from tests.conftest import save_image


def test_a_runs_page(tiny: Config, tmp_path: Path) -> None:
    fit(tiny, tmp_path / "run", quiet=True)
    text = run_report(tmp_path / "run").read_text(encoding="utf-8")
    for part in (
        "The tail",
        "Accuracy by class",
        "Loss terms",
        "Reliability",
        "95 % interval",
        "Temperature",
        "The prior",
        "balanced accuracy",
    ):
        assert part in text
    assert text.count("<svg") == 7
    # self-contained: nothing is fetched
    assert not re.search(r"""(src|href)=["']https?:""", text)


def test_class_names_are_text(tiny: Config, tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>".replace("/", "∕"), 'naïve ‘quotes’ & "marks"', "שלום 🐘"]
    for index, name in enumerate(names):
        for number in range(4):
            save_image(tmp_path / "photos" / name / f"{number}.png", seed=10 * index + number)
    config = tiny.replace(
        method="la", network="conv8-tiny", data={"source": "folder", "root": str(tmp_path / "photos")}
    )
    fit(config, tmp_path / "run", quiet=True)
    text = run_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "שלום 🐘" in text


def test_a_run_that_has_not_ended(tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match="holds no recogniser"):
        run_report(tmp_path)
