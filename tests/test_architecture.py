"""The shape of the package: imports go one way, no task is imported by others, files are short, tests use public names.

Everything is read from the syntax trees; nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "longtail"

LAYERS = (
    ("errors",),
    (
        "files",
        "randomness",
        "registry",
        "distributed",
        "devices",
        "allocator",
        "run_folder",
        "class_counts",
        "box_labels",
        "rollback",
    ),
    ("config", "losses", "memory"),
    ("nn", "data"),
    ("evaluation", "plots"),
    ("estimator", "inference", "methods", "prior_correction", "splitters"),
    ("tasks",),
    ("training",),
    ("experiments", "detector_calibration"),
    ("report", "serve"),
    ("cli", "integrations"),
    ("__main__",),
)
"""Modules and packages of longtail; each may import those of the lines above its own, and none of its own line.

The package's root is the exception: all may import it for its version, and its own imports happen when a name is used.
"""

FEW_IMPORTS = {
    "errors": set[str](),
    "plots": {"data", "files"},  # for printable names, and written atomically
    "randomness": set[str](),
    "distributed": {"errors"},
    "class_counts": set[str](),
    "rollback": set[str](),
    "box_labels": set[str](),
    "losses": {"class_counts", "distributed"},
    "memory": {"class_counts", "distributed"},
    "nn": {"box_labels", "errors", "losses"},
    "config": {"errors", "registry"},
    "data": {"box_labels", "config", "errors", "files", "randomness", "registry", "run_folder"},
}
"""What may import even less than its layer allows: a loss, a network or a data set can be used without the rest."""

OF_SEGMENTATION = re.compile(
    r"(tasks|nn|data/sources|evaluation|recipes)/segmentation|recipes/|__init__\.py$"
    r"|data/detection/(coco|annotations|run_lengths)\.py|evaluation/detection"  # COCO's own field of that name
)
OF_DETECTION = re.compile(
    r"(tasks|nn|data|evaluation)/detection|evaluation/detector_scores\.py|detector_calibration/|recipes/|__init__\.py$"
    r"|cli/(detectors|options|app)\.py"  # the command calibrate-detector, its options and its name
)
MAX_LINES = {"cli": 400, "": 500}


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the modules of longtail that a file imports, at any place but in ``if TYPE_CHECKING:``."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports by its place instead of its name"
            assert node.module is not None
            names = [node.module]
            if node.module == "longtail" or (SOURCE.parent / node.module.replace(".", "/")).is_dir():
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        yield from (name for name in names if name.split(".")[0] == "longtail")
        pending += ast.iter_child_nodes(node)


def part(module: str) -> str:
    """Return the module or package right below longtail; empty for the root itself."""
    name = [*module.split("."), ""][1]
    return name if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file() else ""


def imports() -> set[tuple[str, str]]:
    """Return the imports between modules as pairs (who, whom)."""
    return {(module_name(path), other) for path in sources() for other in imported_modules(path)}


def test_imports_go_one_way() -> None:
    layer_of = {name: layer for layer, names in enumerate(LAYERS) for name in names}
    assert {part(module_name(path)) for path in sources()} - {""} == set(layer_of), "a part without a place"
    wrong = []
    for who, whom in sorted(imports()):
        mine, theirs = part(who), part(whom)
        if not theirs or mine == theirs:
            continue
        assert mine, f"{who}: the root imports {whom} when it is imported"
        allowed = FEW_IMPORTS.get(mine)
        if layer_of[theirs] >= layer_of[mine] or (allowed is not None and theirs not in allowed):
            wrong.append(f"{who} imports {whom}")
    assert not wrong


def test_the_layers_are_read_from_the_code() -> None:
    """The test above would pass if it saw no imports."""
    seen = {(part(who), part(whom)) for who, whom in imports()}
    assert {("methods", "losses"), ("methods", "data"), ("tasks", "methods"), ("cli", "training")} <= seen
    assert ("registry", "methods") not in seen  # for type checkers only


def test_a_task_is_imported_by_nobody() -> None:
    """The parts that every task shares, from the trainer to the command line, get a task from the registry."""
    tasks = {path.parent.name for path in SOURCE.glob("tasks/*/__init__.py")}
    assert tasks == {"classification", "detection", "segmentation"}
    for who, whom in imports():
        for task in tasks:
            package = f"longtail.tasks.{task}"
            assert f"{whom}.".startswith(f"{package}.") <= f"{who}.".startswith(f"{package}."), f"{who} imports {whom}"


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (OF_SEGMENTATION, r"Segmenter|\bdense\b|segmentation"),
        (OF_DETECTION, r"(?<!Dense Object )[Dd]etect(or|ion)"),  # the paper of the focal loss
    ],
    ids=["segmentation", "detection"],
)
def test_a_task_is_known_in_its_own_folders_alone(own: re.Pattern[str], words: str) -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in sorted(SOURCE.rglob("*"))
        if path.suffix in {".py", ".yaml", ".j2", ".html"} and not own.match(path.relative_to(SOURCE).as_posix())
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(words, line)
    ]
    assert not wrong


@pytest.mark.parametrize("folder", MAX_LINES)
def test_no_file_is_long(folder: str) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (SOURCE / folder).rglob("*.py")}
    assert lengths
    assert {str(path): length for path, length in lengths.items() if length > MAX_LINES[folder]} == {}


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_uses(tree: ast.AST) -> Iterator[str]:
    """Yield how a test uses underscored names of longtail."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names if "longtail" in alias.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "longtail":
            imported |= {alias.asname or alias.name for alias in node.names}
            yield from (f"{node.module}.{alias.name}" for alias in node.names if private(alias.name))
            yield from (node.module or "" for name in (node.module or "").split(".") if private(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            root: ast.AST = node.value
            while isinstance(root, ast.Attribute | ast.Call | ast.Subscript):
                root = root.func if isinstance(root, ast.Call) else root.value
            if isinstance(root, ast.Name) and root.id in imported:
                yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"longtail(\.\w+)*\._(?!_)\w+(\.\w+)*", node.value):  # as monkeypatch takes it
                yield node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"setattr", "getattr"}:
            names = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
            yield from (ast.unparse(node) for name in names if isinstance(name, str) and private(name))


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_tests_use_what_is_public(path: Path) -> None:
    assert list(private_uses(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "from longtail.files import _write",
        "from longtail._files import write",
        "import longtail.files\nlongtail.files._write()",
        "from longtail import files\nfiles._write()",
        "from longtail.nn import Encoder\nEncoder('conv8').backbone._stem",
        "monkeypatch.setattr('longtail.files._write', None)",
        "monkeypatch.setattr(files, '_write', None)",
    ],
)
def test_private_uses_are_seen(code: str) -> None:
    assert len(list(private_uses(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "from longtail.files import write_text as _write",
        "import longtail\nlongtail.__version__",
        "class Double:\n  def size(self): return self._size",
        "monkeypatch.setattr('longtail.files.write_text', None)",
    ],
)
def test_other_names_are_not_taken_for_private(code: str) -> None:
    assert list(private_uses(ast.parse(code))) == []


def test_python_3_10_has_no_await_in_nested_comprehensions() -> None:
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp)
    for path in (*sources(), *sorted(TESTS.rglob("*.py")), *sorted((TESTS.parent / "benchmarks").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, comprehensions):
                inner = (each for each in ast.walk(node) if each is not node and isinstance(each, comprehensions))
                assert not any(isinstance(part, ast.Await) for each in inner for part in ast.walk(each)), path
