from __future__ import annotations

from pathlib import Path

import pytest

from longtail.config import Config
from longtail.engine.compare import compare, plan
from longtail.errors import LongtailError


def test_equal_passes(tiny: Config) -> None:
    runs = plan(tiny.replace(epochs=10), ["ce", "la", "gml"], range(2), "passes")
    assert [(run.method, run.seed, run.epochs) for run in runs] == [
        ("ce", 0, 20),
        ("la", 0, 20),
        ("gml", 0, 10),
        ("ce", 1, 20),
        ("la", 1, 20),
        ("gml", 1, 10),
    ]
    assert {run.epochs for run in plan(tiny, ["la", "gml"], [0], "epochs")} == {2}
    two_views = tiny.replace(classifier={"views": 2})
    assert {run.epochs for run in plan(two_views, ["la", "gml"], [0], "passes")} == {2}


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


def test_a_foreign_folder_is_left_alone(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(LongtailError, match="no comparison of longtail"):
            compare(tiny, ["la"], [0], tmp_path, overwrite=overwrite, quiet=True)
    assert (tmp_path / "thesis.txt").exists()
