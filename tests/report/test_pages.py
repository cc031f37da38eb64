from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from jinja2 import Environment, PackageLoader

from longtail.config import Config
from longtail.errors import LongtailError
from longtail.experiments.records import recommendation
from longtail.methods.base import Finding
from longtail.report import run_report, runs_report
from longtail.tasks.classification import report
from longtail.training.metric_log import read_metrics
from longtail.training.trainer import fit
from tests.conftest import save_image


def test_a_runs_page(tiny: Config, tmp_path: Path) -> None:
    fit(tiny, tmp_path / "run", quiet=True)
    text = run_report(tmp_path / "run").read_text(encoding="utf-8")
    for part in (
        "Class distribution",
        "Accuracy by class",
        "Loss terms",
        "Reliability",
        "95 % interval",
        "Temperature",
        "Effect of the prior",
        "balanced accuracy",
    ):
        assert part in text
    assert text.count("<svg") == 7
    # every error that is listed has its picture, and the page needs no test image
    test = next(line for line in reversed(read_metrics(tmp_path / "run" / "metrics.jsonl")) if line["kind"] == "test")
    shown = [entry for entries in test["uniform"]["errors"].values() for entry in entries]
    assert shown
    assert text.count("<figcaption>") == len(shown)
    assert text.count("data:image/png;base64,") == len(shown)
    # self-contained: nothing is fetched
    assert not re.search(r"""(src|href)=["']https?:""", text)


def test_what_to_try_is_shown_where_there_is_advice(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny.replace(method="la", epochs=1), tmp_path / "run", quiet=True)
    for advice, shown in (("More epochs.", 1), ("", 0)):
        finding = Finding("The tail is hardly recognised.", "Accuracy in few is 5.0 %.", advice)
        monkeypatch.setattr(report, "diagnose", lambda *_, finding=finding: [finding])
        text = run_report(tmp_path / "run").read_text(encoding="utf-8")
        assert "Accuracy in few is 5.0 %." in text
        assert text.count("To try: More epochs.") == text.count("To try") == shown


def test_class_names_are_text(tiny: Config, tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>".replace("/", "∕"), 'naïve ‘quotes’ & "marks"', "שלום 🐘"]
    for index, name in enumerate(names):
        for number in range(4):
            save_image(tmp_path / "photos" / name / f"{number}.png", seed=10 * index + number)
    config = tiny.replace(
        method="la", network="conv8-tiny", data={"source": "folder", "root": str(tmp_path / "photos")}
    )
    fit(config, tmp_path / "run", quiet=True)
    # a confusion, whatever the network has learned
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    lines[-1]["uniform"]["confusions"] = [{"class": 0, "predicted": 1, "share": 50.0, "images": 1}]
    assert lines[-1]["kind"] == "test"
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    text = run_report(tmp_path / "run").read_text(encoding="utf-8")
    assert text.count("<script") == 1  # the page's own, which sorts
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text
    assert "שלום 🐘" in text
    # a direction mark in a name turns nothing around that follows it
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    confused = re.findall(r"<td>(.*?)</td>", text[text.index("Confused classes") :].partition("</table>")[0])
    assert captions
    assert len(confused) == 3
    for caption in captions:
        assert re.match(r"<bdi>[^<]+</bdi><br>.*predicted</span> <bdi>[^<]+</bdi>, \d+\s%", caption)
    for name in confused[:2]:
        assert re.fullmatch(r"<bdi>[^<]+</bdi> \(\d+\)", name)


def test_a_run_that_has_not_ended(tmp_path: Path) -> None:
    with pytest.raises(LongtailError, match="contains no model"):
        run_report(tmp_path)


@pytest.mark.slow
def test_any_runs_side_by_side(tiny: Config, tmp_path: Path) -> None:
    changes: dict[str, dict[str, object]] = {
        "la": {"method": "la"},
        "la-again": {"method": "la", "seed": 1},
        "warm": {"method": "ce", "schedule": {"name": "cosine", "warmup": 0.1}},
        "ce": {"method": "ce"},
    }
    for name, change in changes.items():
        fit(tiny.replace(**change), tmp_path / name, quiet=True)
    run_report(tmp_path / "la")
    page = tmp_path / "pages" / "side.html"
    records = runs_report([tmp_path / name for name in changes], page)
    # seeds of one setting are one row; a setting beyond the method names it
    assert [record.method for record in records] == ["la", "la", "ce, name cosine, warmup 0.1", "ce"]
    text = page.read_text(encoding="utf-8")
    for part in (
        "Different settings",
        "schedule.warmup",
        "ce − la",
        "Accuracy along the tail",
        'href="../la/report.html"',
    ):
        assert part in text
    assert "uniform prior, those of ce, name cosine, warmup 0.1; ce the training prior, as they were trained." in text
    assert text.count("<a href=") == 1  # the others have no page to go to
    # seed 1 has other digits in its head, so places in the tail stand for them
    assert "place in the tail" in text
    assert len(re.findall(r"<tr><td>\d+</td>", text)) == 10
    runs_report([tmp_path / "la", tmp_path / "ce"], page)
    text = page.read_text(encoding="utf-8")
    assert "uniform prior, those of ce the training prior" in text
    assert "second − first" in text
    assert "place in the tail" not in text


def test_runs_that_do_not_go_together(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(method="la")
    fit(config, tmp_path / "one", quiet=True)
    for index, name in enumerate("abc"):
        for number in range(4):
            save_image(tmp_path / "photos" / name / f"{number}.png", seed=10 * index + number)
    fit(config.replace(data={"source": "folder", "root": str(tmp_path / "photos")}), tmp_path / "two", quiet=True)
    with pytest.raises(LongtailError, match=r"two: has other classes or another task than .*one"):
        runs_report([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html")
    (tmp_path / "two" / "metrics.jsonl").unlink()
    with pytest.raises(LongtailError, match=r"metrics.jsonl: has no test metrics; use --resume to finish the run"):
        runs_report([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html")
    with pytest.raises(LongtailError, match=r"photos: has no config.yaml: expected the folder of a run"):
        runs_report([tmp_path / "one", tmp_path / "photos"], tmp_path / "page.html")
    # the same run twice is labelled by its folder
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    records = runs_report([tmp_path / "one", tmp_path / "copy"], tmp_path / "page.html")
    advice = recommendation(records, "train further seeds")
    assert advice.startswith("equal: ")  # not the first of them the best
    assert advice.endswith("train further seeds")
    assert f"<b>{advice[0].upper()}{advice[1:]}.</b>" in html.unescape((tmp_path / "page.html").read_text())
    assert [Path(record.method).name for record in records] == ["one", "copy"]


def test_runs_on_other_images_say_so(tiny: Config, photos: Path, tmp_path: Path) -> None:
    config = tiny.replace(method="la", epochs=1, data={"source": "folder", "root": str(photos)})
    folders = [tmp_path / name for name in ("la0", "la1", "ce0", "ce1")]
    for folder, method, seed in zip(folders, ("la", "la", "ce", "ce"), (0, 1, 0, 1), strict=True):
        if folder.name == "ce0":
            save_image(photos / "emu" / "new.png", seed=77)
        fit(config.replace(method=method, seed=seed), folder, quiet=True)
    records = runs_report(folders, tmp_path / "page.html")
    # another seed has another split, which is no difference
    other = "ce, training images set 2, test images set 2"
    assert [record.method for record in records] == ["la", "la", other, other]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<th>training images</th>" in text
    assert "<td>set 2</td>" in text
    assert {record.method for record in runs_report(folders[:2], tmp_path / "page.html")} == {"la"}


def test_the_same_test_images_with_every_seed(tiny: Config, photos: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(photos, tmp_path / "split" / split)
    config = tiny.replace(epochs=1, data={"source": "folder", "root": str(tmp_path / "split")})
    folders = [tmp_path / f"{method}{seed}" for seed in (0, 1) for method in ("la", "ce")]
    for folder in folders:
        fit(config.replace(method=folder.name[:2], seed=int(folder.name[2])), folder, quiet=True)
    records = runs_report(folders, tmp_path / "page.html")
    assert {record.num_test_images for record in records} == {21}
    assert 0 < records[0].half_widths["balanced_accuracy"] < 60
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "over 2 seeds on the same 21 test images, over other test images too " in text
    assert "an interval over seeds is of other seeds on these images" in text
    for record, folder in zip(records, folders, strict=True):
        assert record.image_results is not None
        labels, predicted = (record.image_results[name] for name in ("labels", "predicted"))
        right = [float((predicted == labels)[labels == c].mean()) for c in range(int(labels.max()) + 1)]
        assert 100 * sum(right) / len(right) == pytest.approx(record.metrics["balanced_accuracy"])
        with np.load(folder / "test_predictions.npz") as kept:
            assert sorted(kept.files) == ["labels", "train", "uniform"]
    # runs of earlier versions kept none
    for folder in folders:
        (folder / "test_predictions.npz").unlink()
    runs_report(folders, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "over 2 seeds on the same 21 test images (other images: up to ±" in text
    (folders[0] / "test_predictions.npz").write_bytes(b"PK")
    with pytest.raises(LongtailError, match=r"test_predictions\.npz: cannot be read; remove it, which costs"):
        runs_report(folders, tmp_path / "page.html")


def test_a_run_without_metrics(tiny: Config, tmp_path: Path) -> None:
    fit(tiny.replace(method="la"), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(LongtailError, match=r"metrics.jsonl: has no test metrics; use --resume to finish the run"):
        run_report(tmp_path / "run")


@pytest.fixture
def in_a_browser(tmp_path: Path) -> Callable[..., str]:
    """Return the document of a page after a script has run on it."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs Debian's chromium")

    def run(body: str, script: str, *flags: str) -> str:
        pages = Environment(loader=PackageLoader("longtail.report", "."), autoescape=True)
        text = pages.get_template("page.html.j2").render(title="a page").replace("<script>", f"{body}<script>", 1)
        page = tmp_path / "page.html"
        page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *flags, "--dump-dom", page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return run


def class_table(rows: Sequence[tuple[str, str]]) -> str:
    heads = "".join(f"<th aria-sort=none><button>{name}</button></th>" for name in ("class", "accuracy, %"))
    cells = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    table = f"<table class=sortable><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table>"
    return f"<div class=scroll>{table}</div>"


@pytest.mark.parametrize(
    ("column", "clicks", "expected"),
    [
        (0, 1, ["2", "10", "cat", "dog"]),
        (0, 2, ["dog", "cat", "10", "2"]),
        (1, 1, ["dog", "2", "cat", "10"]),
        (1, 2, ["2", "dog", "cat", "10"]),  # without a value: last, whatever the direction
    ],
)
def test_the_table_of_classes_sorts(
    in_a_browser: Callable[..., str], column: int, clicks: int, expected: list[str]
) -> None:
    table = class_table([("cat", "n/a"), ("10", ""), ("dog", "9.5"), ("2", "1,000.0")])
    shown = in_a_browser(table, f"const b = document.querySelectorAll('th button')[{column}];" + "b.click();" * clicks)
    names = re.findall(r"<tr><td>(\w+)</td>", shown[shown.index('class="sortable"') :])
    assert names == expected


def test_a_long_name_hides_no_number(in_a_browser: Callable[..., str]) -> None:
    table = class_table([("x" * 150, "50.0"), ("cat", "9.5")])
    measure = "const s = document.querySelector('.scroll'); document.title = s.scrollWidth - s.clientWidth;"
    assert "<title>0</title>" in in_a_browser(table, measure, "--window-size=600,800")
