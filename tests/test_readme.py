"""What the README says is what happens."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from longtail import ClassQueues, GMLLoss, Recognizer
from longtail.evaluation.comparison import Record, markdown
from longtail.nn import ProjectionMLP
from tests.conftest import TINY, Command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    "inspect",
    "split",
    "train",
    "evaluate",
    "rebalance",
    "predict",
    "export",
    "serve",
    "embed",
    "compare",
    "recipes",
}
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


PAGES = {"README.md": README} | {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
TABLES = [
    (page, name, shown)
    for page, text in PAGES.items()
    for name, shown in re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
]


@pytest.mark.parametrize(("page", "name", "shown"), TABLES, ids=[f"{page}: {name}" for page, name, _ in TABLES])
def test_tables_are_those_that_were_printed(page: str, name: str, shown: str) -> None:
    results = json.loads((ROOT / name).read_text())
    records = [Record(**record) for record in results["records"]]
    assert len({record.seed for record in records}) >= 3
    assert shown.strip() == "\n".join(markdown(records, results.get("baseline")))
    assert results["command"] in PAGES[page]
    # what every run was given stands on the page, however its lines are broken
    assert " ".join(results.get("budget", "").split()) in " ".join(PAGES[page].split())


@pytest.mark.parametrize("page", PAGES)
def test_writing_the_tables_anew_changes_nothing(page: str) -> None:
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "benchmarks" / "refresh.py")
    assert spec is not None
    assert spec.loader is not None
    refresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(refresh)
    assert refresh.refreshed(PAGES[page]) == PAGES[page]
    for figure in re.findall(r"\]\((figures/\S+)\)", PAGES[page]):
        assert (ROOT / "docs" / figure).is_file(), figure


def test_the_demo_is_in_the_readme() -> None:
    assert ("README.md", "benchmarks/results/digits-lt.json") in {(page, name) for page, name, _ in TABLES}


def test_the_loop_runs_and_learns() -> None:
    torch.manual_seed(0)
    counts = [40, 8, 4]
    centres = torch.randn(3, 12)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    images = centres[labels] + 0.3 * torch.randn(52, 12)
    ids = torch.arange(52)
    student, teacher = nn.Linear(12, 16), nn.Linear(12, 64).requires_grad_(False)
    space = {
        "GMLLoss": GMLLoss,
        "ClassQueues": ClassQueues,
        "class_counts": counts,
        "student": student,
        "teacher": teacher,
        "query_mlp": ProjectionMLP(16, 8),
        "key_mlp": ProjectionMLP(64, 8),
    }
    space["optimizer"] = torch.optim.SGD(
        [p for part in ("student", "query_mlp", "key_mlp") for p in space[part].parameters()],  # type: ignore[attr-defined]
        lr=0.1,
    )
    losses: list[float] = []
    space["loader"] = [(images[p], labels[p], ids[p]) for p in torch.randperm(52).split(26)] * 20
    code = compile(SNIPPETS[0] + "    losses.append(loss.item())\n", "README.md", "exec")
    exec(code, space | {"losses": losses})
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]


def test_the_recognizer_snippet(
    command: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("train", "--data", photos, *TINY)[0] == 0
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "1.jpg").write_bytes((photos / "cat" / "1.png").read_bytes())
    space: dict[str, object] = {}
    exec(compile(SNIPPETS[2], "README.md", "exec"), space)
    assert isinstance(space["recognizer"], Recognizer)


def test_the_embeddings_snippet() -> None:
    digits = load_digits()
    space: dict[str, Any] = {"embeddings": digits.data[:300], "labels": digits.target[:300]}
    exec(compile(SNIPPETS[1], "README.md", "exec"), space)
    assert space["model"].score(digits.data[300:600], digits.target[300:600]) > 0.8


# what Lightning says about its own use of torch, and about a loader for a few images
@pytest.mark.filterwarnings("ignore:::pytorch_lightning", "ignore:.*num_workers", "ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:.*number of training batches")
@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_the_examples_of_the_docs_run(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert not code or "assert" in code
    exec(compile(code, page, "exec"), {})


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    zensical = Path(sys.executable).with_name("zensical")
    if not zensical.exists():
        pytest.skip("needs the extra docs")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run(
        [zensical, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    for name in ("index.html", "api/index.html", "evidence/index.html", "figures/methods.svg"):
        assert (tmp_path / "site" / name).is_file()
    assert "gml_loss" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if not target.startswith("https://"):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


def test_every_command_that_is_named_exists(command: Command) -> None:
    named = set(re.findall(r"longtail (\w+)", README)) & COMMANDS
    assert named == COMMANDS
    for name in sorted(named):
        assert command(name, "--help")[0] == 0
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        if target in {"demo", "test", "docs"}:
            assert f"\n{target}:" in makefile
    assert json.loads((ROOT / "benchmarks" / "results" / "digits-lt.json").read_text())["command"] in makefile
