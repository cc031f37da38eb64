"""The README and the documentation agree with the code: tables, examples, commands, flags and links."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from longtail import CosineClassifier, ProjectionMLP, Recognizer, losses
from longtail.cli import options
from longtail.cli.app import COMMANDS
from longtail.config import field_names
from longtail.experiments.records import Record, markdown
from longtail.inference.export import export_onnx
from longtail.inference.onnx_model import ONNXModel
from longtail.nn import Encoder
from tests.conftest import TINY, Command, small_card
from tests.test_architecture import LAYERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    str(path.relative_to(ROOT / "docs")): path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")
}
DOCS = sorted(name for name in PAGES if name != "README.md")
OTHER_PROGRAMS = {
    *("nproc_per_node", "nnodes", "rdzv_id", "rdzv_backend", "rdzv_endpoint", "shutdown_timeout"),  # torchrun
    *("nodes", "ntasks-per-node", "gpus-per-node", "time", "requeue", "signal", "kill-on-bad-exit"),  # SLURM
    *("ntasks", "gpus", "cpus-per-task", "array"),  # SLURM
    "no-deps",  # pip
    *("weights", "only", "fashion", "rehearse", "phases", "plan", "prepare", "pack"),  # studies and benchmarks
    "doubt.strength",  # the method that docs/extending.md adds
}
"""Flags on the pages that are not longtail's."""


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in a language; "" for those without one."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    return [code for name, code in fences if name == language]


RECOGNIZER, LOSS_LOOP, LOOP, EMBEDDINGS = blocks("README.md", "python")
_, PREPARATION = blocks("using.md", "python")
TABLES = [
    (page, name, shown)
    for page, text in PAGES.items()
    for name, shown in re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
]


@pytest.mark.parametrize(("page", "name", "shown"), TABLES, ids=[f"{page}: {name}" for page, name, _ in TABLES])
def test_tables_show_the_results(page: str, name: str, shown: str) -> None:
    results = json.loads((ROOT / name).read_text())
    records = [Record.from_dict(record) for record in results["records"]]
    assert len({record.seed for record in records}) >= 3
    assert shown.strip() == "\n".join(markdown(records, results.get("baseline")))
    assert results["command"] in PAGES[page]
    # the budget is on the page, whatever its line breaks
    assert " ".join(results.get("budget", "").split()) in " ".join(PAGES[page].split())


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_up_to_date(page: str) -> None:
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "benchmarks" / "refresh.py")
    assert spec is not None
    assert spec.loader is not None
    refresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(refresh)
    assert refresh.refreshed(PAGES[page]) == PAGES[page]
    for figure in re.findall(r"\]\((?:\.\./)?(figures/\S+)\)", PAGES[page]):
        assert (ROOT / "docs" / figure).is_file(), figure


def test_the_demo_is_among_the_tables() -> None:
    assert "benchmarks/results/digits-lt.json" in {name for _, name, _ in TABLES}


def test_the_figures_of_the_readme_are_on_the_pages_that_it_names() -> None:
    rows = re.findall(r"^\|.*\(\[page\]\((docs/\S+)\)\) \|(.*)\|$", README, re.MULTILINE)
    assert len(rows) >= 3
    for page, cells in rows:
        shown = (ROOT / page).read_text(encoding="utf-8")
        for balanced, few in re.findall(r"([\d.]+) \(([\d.]+)\)", cells):
            # of one row of the page's table
            assert re.search(rf"^\|.*\| {balanced} ±.*\| {few} ±.*\|$", shown, re.MULTILINE), (page, balanced, few)


def test_the_loop_with_a_loss_runs_and_learns() -> None:
    torch.manual_seed(0)
    counts = [40, 8, 4]
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    images = torch.randn(3, 12)[labels] + 0.3 * torch.randn(52, 12)
    network = nn.Linear(12, 3)
    losses: list[float] = []
    space = {"class_counts": counts, "network": network, "losses": losses}
    space["optimizer"] = torch.optim.SGD(network.parameters(), lr=0.1)
    space["loader"] = [(images[p], labels[p]) for p in torch.randperm(52).split(26)] * 20
    exec(compile(LOSS_LOOP + "    losses.append(loss.item())\n", "README.md", "exec"), space)
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]


def test_the_loop_runs_and_learns() -> None:
    torch.manual_seed(0)
    counts = [40, 8, 4]
    centres = torch.randn(3, 12)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    images = centres[labels] + 0.3 * torch.randn(52, 12)
    ids = torch.arange(52)
    student, teacher = nn.Linear(12, 16), nn.Linear(12, 64).requires_grad_(False)
    space = {
        "classifier": CosineClassifier(16, 3),
        "class_counts": counts,
        "student": student,
        "teacher": teacher,
        "query_mlp": ProjectionMLP(16, 8),
        "key_mlp": ProjectionMLP(64, 8),
    }
    space["optimizer"] = torch.optim.SGD(
        [p for part in ("student", "classifier", "query_mlp", "key_mlp") for p in space[part].parameters()],  # type: ignore[attr-defined]
        lr=0.1,
    )
    losses: list[float] = []
    space["loader"] = [(images[p], labels[p], ids[p]) for p in torch.randperm(52).split(26)] * 20
    code = compile(LOOP + "    losses.append(loss.item())\n", "README.md", "exec")
    exec(code, space | {"losses": losses})
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]


def test_the_recognizer_snippet(
    command: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("train", "--data", photos, *TINY, "--pretrained", "none")[0] == 0
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "1.jpg").write_bytes((photos / "cat" / "1.png").read_bytes())
    space: dict[str, object] = {}
    exec(compile(RECOGNIZER, "README.md", "exec"), space)
    assert isinstance(space["recognizer"], Recognizer)


def test_the_embeddings_snippet() -> None:
    digits = load_digits()
    space: dict[str, Any] = {"embeddings": digits.data[:300], "labels": digits.target[:300]}
    exec(compile(EMBEDDINGS, "README.md", "exec"), space)
    assert space["model"].score(digits.data[300:600], digits.target[300:600]) > 0.8


# warnings of Lightning about its own use of torch, and about a loader for a few images
@pytest.mark.filterwarnings("ignore:::pytorch_lightning", "ignore:.*num_workers", "ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:.*number of training batches")
@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page, "python") and page != "extending.md"])
def test_the_examples_of_the_docs_run(page: str) -> None:
    if page == "own-trainer.md":
        pytest.importorskip("transformers")
    code = "".join(block for block in blocks(page, "python") if block != PREPARATION)  # which needs a file
    assert "assert" in code
    exec(compile(code, page, "exec"), {})


@pytest.mark.slow
def test_the_preparation_of_an_image_is_the_one_of_longtail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = small_card(("a", "b", "c"), (9, 3, 1), stored_size=12, mean=(0.5,) * 3, std=(0.5,) * 3)
    encoder = Encoder("conv8-tiny", config.mean, config.std)
    recognizer = Recognizer(encoder, CosineClassifier(encoder.num_features, 3), config)
    (tmp_path / "RUN").mkdir()
    export_onnx(recognizer, tmp_path / "RUN" / "model.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=rotated)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(compile(PREPARATION, "using.md", "exec"), space)
    expected = ONNXModel("RUN/model.onnx").predict("photo.png")
    np.testing.assert_allclose(space["probabilities"], expected, atol=1e-6)
    # the steps of the preparation matter here
    others = [pixels[:, :, :3], np.rot90(pixels[:, :, :3], -1)]
    differences = [abs(ONNXModel("RUN/model.onnx").predict(other) - expected).max() for other in others]
    assert min(differences) > 1e-4, differences


@pytest.mark.slow
def test_the_examples_of_plugins_run(tmp_path: Path) -> None:
    """A block that starts with the name of a file is that file; the commands of the page run, for one epoch each."""
    scripts = []
    for block in (*blocks("extending.md", "python"), *blocks("extending.md", "yaml")):
        name = re.match(r"# (\S+\.(?:py|yaml))\n", block)
        if name is None:
            scripts.append(block)
        else:
            (tmp_path / name[1]).write_text(block, encoding="utf-8")
    commands = [line.split()[1:] for block in blocks("extending.md", "") for line in block.splitlines()]
    assert len(commands) == 6
    scripts.append("from longtail.cli import main")
    for number, arguments in enumerate(commands):
        network = [] if "--network" in arguments else ["--network", "conv8-tiny"]
        short = [*network, "--epochs", "1", "--quiet"]
        command = [*arguments, *short, "--out", f"run{number}", "--json", f"{number}.json"]
        scripts.append(f"main({command!r})")
    # in a process of its own: what is registered stays registered
    completed = subprocess.run(
        [sys.executable, "-c", "\n".join(scripts)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    metrics = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(len(commands))]
    assert all((tmp_path / f"run{number}" / "report.html").is_file() for number in range(len(commands)))
    assert metrics[2]["class_names"] == ["vertical", "horizontal"]
    assert 0 <= metrics[4]["mean_absolute_error"] < 9
    assert "strength: 0.3" in (tmp_path / "run0" / "config.yaml").read_text()
    assert "network: my_net" in (tmp_path / "run1" / "config.yaml").read_text()
    assert "augment: brightness" in (tmp_path / "run3" / "config.yaml").read_text()


def command_flags() -> dict[str, set[str]]:
    """Return the flags of every command, without hyphens."""
    settings = {*field_names(), "data", "doubt.strength"}
    settings |= {re.sub(r"(\w+)$", r"no_\1", name) for name in settings}
    of_data = {name for name in settings if name.startswith("data.")}
    further = {
        "train": settings,
        "compare": settings - {"method", "minutes"},
        "inspect": of_data | {name for name in settings if name.startswith("shots.")},
        "split": of_data,
        "embed": of_data,
    }
    flags = {}
    for name in COMMANDS:
        kind = getattr(options, name.title().replace("-", ""), None)  # None: completion has no flags
        own = set() if kind is None else {field.name for field in dataclasses.fields(kind)}
        flags[name] = (own - {"config", "data", "shots"}) | further.get(name, set()) | {"plugin", "help"}
    return flags


def command_lines(text: str) -> list[tuple[str, str]]:
    """Return the command lines of a page, in code blocks and in spans of code, as (command, arguments)."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [re.sub(r"\s#.*", "", line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    lines += [" ".join(span.split()) for span in spans]
    names = "|".join(COMMANDS)
    found = []
    for line in lines:
        # in a span the name of a command may stand alone: `evaluate --tta auto`
        starts = [*re.finditer(rf"\blongtail ({names})\b|^({names})(?= --)", line)]
        ends = [*(start.start() for start in starts), len(line)][1:]
        found += [(start[1] or start[2], line[start.end() : end]) for start, end in zip(starts, ends, strict=True)]
    return found


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_commands_have_the_flags_on_the_pages(page: str) -> None:
    flags = command_flags()
    text = PAGES.get(page) or (ROOT / page).read_text(encoding="utf-8")
    for name, arguments in command_lines(text):
        for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", arguments):
            assert flag.rstrip(".") in flags[name], f"longtail {name}{arguments}: there is no --{flag}"


def test_command_lines_are_found() -> None:
    text = (
        "```\nlongtail train a \\\n    --seed 1  # --top\n```\nas `longtail\nserve RUN --port 1` and `predict --top 2`"
    )
    assert [(name, arguments.split()) for name, arguments in command_lines(text)] == [
        ("train", ["a", "--seed", "1"]),
        ("serve", ["RUN", "--port", "1"]),
        ("predict", ["--top", "2"]),
    ]
    assert "prior" not in command_flags()["serve"]
    assert sum(len(command_lines(text)) for text in PAGES.values()) > 150


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_flags_and_settings_on_the_pages_exist(page: str) -> None:
    text = PAGES.get(page) or (ROOT / page).read_text(encoding="utf-8")
    settings = field_names()
    flags = {"data", "plugin", "help", "version", *settings, *OTHER_PROGRAMS}
    flags |= {re.sub(r"(\w+)$", r"no_\1", name) for name in settings}
    for command in vars(options).values():
        if dataclasses.is_dataclass(command):
            flags |= {field.name for field in dataclasses.fields(command)}
    sections = "|".join({name.partition(".")[0] for name in settings if "." in name})
    for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", text):
        assert flag.rstrip(".") in flags, flag
    # a boolean setting is one flag for each value, and takes none
    assert not re.search(r"--[\w.]+ (true|false)\b", text)
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        for setting in re.findall(rf"(?<![\w.-])((?:{sections})\.(?!(?:py|csv|yaml)\b)[a-z_]+)\b(?!\()", span):
            assert setting in settings, setting


@pytest.mark.parametrize("name", re.findall(r"^::: (\S+)", PAGES["api.md"], re.MULTILINE))
def test_names_of_the_api_page_exist(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert getattr(importlib.import_module(module), attribute).__doc__


def test_every_loss_is_on_the_api_page() -> None:
    shown = re.findall(r"^::: longtail(?:\.losses)?\.(\w+)$", PAGES["api.md"], re.MULTILINE)
    assert set(losses.__all__) - set(shown) == set()


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    zensical = Path(sys.executable).with_name("zensical")
    if not zensical.exists():
        pytest.skip("needs the extra docs")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    completed = subprocess.run(
        [zensical, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "No issues found" in completed.stdout + completed.stderr
    for name in ("index.html", "api/index.html", "evidence/index.html", "figures/methods.svg"):
        assert (tmp_path / "site" / name).is_file()
    assert "gml_loss" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if not target.startswith("https://"):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


def test_every_command_is_on_its_page() -> None:
    page = PAGES["commands.md"]
    headings = re.findall(r"^## longtail ([\w-]+)$", page, re.MULTILINE)
    assert headings == list(COMMANDS)
    for name in COMMANDS:  # each with an example
        section = page.partition(f"## longtail {name}\n")[2].partition("\n## ")[0]
        assert name in {command for command, _ in command_lines(section)}, name


def test_the_layers_are_those_of_the_guide() -> None:
    """CONTRIBUTING.md shows the layers that the imports are checked against, and what each module is for."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"^[a-z]\w+(?:, \w+)*$", guide.partition("Imports go one way")[2], re.MULTILINE)
    assert [set(line.split(", ")) for line in shown] == [set(layer) for layer in LAYERS if layer != ("__main__",)]
    for name in (name for layer in LAYERS for name in layer if name != "__main__"):
        assert re.search(rf"^\|.*`{name}(?:/|\.py)`.*\|.*\|$", guide, re.MULTILINE), name


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == set(DOCS)


def test_every_command_is_in_the_readme(command: Command) -> None:
    assert set(re.findall(r"`longtail ([\w-]+)", README)) == set(COMMANDS)
    for name in COMMANDS:
        assert command(name, "--help")[0] == 0
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        if target in {"demo", "test", "docs"}:
            assert f"\n{target}:" in makefile
    assert json.loads((ROOT / "benchmarks" / "results" / "digits-lt.json").read_text())["command"] in makefile
