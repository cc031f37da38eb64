"""A part of every kind from a file of its own, from training to the report, and what is said of names that do not fit.

Every command runs in a process of its own, as a user's does: what a plugin registers in one is unknown to the next,
unless it is given again, and to the other tests.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import TINY, save_image
from tests.processes import run_longtail

METHOD = '''
from dataclasses import dataclass
from typing import ClassVar

from longtail.config import Settings, Weight
from longtail.losses import posterior_cross_entropy
from longtail.methods.base import Method
from longtail.registry import METHODS


@dataclass(frozen=True, kw_only=True)
class TemperedSettings(Settings):
    """Logit adjustment with a part of the log prior."""

    section: ClassVar[str] = "tempered"

    strength: Weight = 0.5
    """Factor of the log prior."""


@METHODS.register("tempered")
class Tempered(Method):
    settings_class = TemperedSettings
    plotted_metrics: ClassVar = {"strength": "factor"}

    def loss(self, scores, labels, batch):
        strength = self.config.section(TemperedSettings).strength
        return posterior_cross_entropy(scores, labels, self.log_prior(), strength)

    def metrics_to_log(self):
        return {"strength": self.prior.log_prior.new_tensor(self.config.section(TemperedSettings).strength)}
'''

DATA = """
import torch

from longtail.data.dataset import from_arrays
from longtail.data.sources import Source
from longtail.registry import SOURCES


def load(config, seed):
    generator = torch.Generator().manual_seed(seed)

    def split(vertical, horizontal):
        labels = torch.tensor([0] * vertical + [1] * horizontal)
        images = torch.randint(0, 120, (len(labels), 8, 8), generator=generator).to(torch.uint8)
        images[:vertical, :, ::2] += 120
        images[vertical:, ::2] += 120
        return images, labels

    return from_arrays(split(120, 12), split(25, 25), class_names=["vertical", "horizontal"])


SOURCES.register("stripes-lt")(Source(load=load))
"""

LISTED = """
from pathlib import Path

from longtail.data.listing import read_folder
from longtail.data.sources import Source
from longtail.registry import SOURCES

SOURCES.register("pets-lt")(Source(listing=lambda config: read_folder(Path(config.root))))
"""

AUGMENTATION = """
from longtail.data.transforms import Transform
from longtail.data.transforms.batched import center, to_float
from longtail.randomness import uniform
from longtail.registry import TRANSFORMS


def build(size):
    def brightness(images, ids, keys):
        factor = FACTOR + 0.6 * uniform(ids, 1, *keys)
        return (to_float(center(images, size)) * factor[:, :, None, None]).clamp(0, 1)

    return brightness


FACTOR = 0.7
TRANSFORMS.register("brighter")(Transform(build, needs_color=False))
"""

SAMPLER = """
import torch

from longtail.registry import SAMPLERS


@SAMPLERS.register("last-class")
def last_class_shares(class_counts, epoch, epochs, deferred_from):
    return torch.nn.functional.one_hot(torch.tensor(len(class_counts) - 1), len(class_counts)).double()
"""

TASK = """
from dataclasses import dataclass, fields
from typing import ClassVar

from longtail.data.dataset import LongTailedData
from longtail.data.sources import Source
from longtail.data.sources.digits import load_digits_lt
from longtail.registry import SOURCES, TASKS
from longtail.tasks.classification.evaluator import ClassificationEvaluator
from longtail.tasks.classification.task import Classification


@dataclass(frozen=True)
class WorstClassData(LongTailedData):
    task: ClassVar[str] = "worst-class"


class WorstClassEvaluator(ClassificationEvaluator):
    def compute(self):
        metrics = super().compute()
        for values in metrics.values():
            values["worst"] = min(value for value in values["per_class"] if value is not None)
        return metrics


class WorstClass(Classification):
    name = "worst-class"
    columns = (*Classification.columns, ("worst", "worst class"))
    printed_metrics = {**Classification.printed_metrics, "worst": "worst class"}
    validation_metrics = ("worst", "balanced_accuracy")

    def evaluator(self, model, images, config, priors, accuracy_only):
        return WorstClassEvaluator(model, images, config, priors, accuracy_only)


def load(config, seed):
    data = load_digits_lt(config, seed)
    return WorstClassData(**{field.name: getattr(data, field.name) for field in fields(data)})


TASKS.register("worst-class")(WorstClass())
SOURCES.register("worst-class-digits")(Source(load=load, balanced=True))
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Any:
    """Return a function that writes a plugin and returns its path."""

    def write(code: str, name: str = "plugin") -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(code, encoding="utf-8")
        return path

    return write


def ran(*arguments: str | Path) -> str:
    """Run a command that must succeed, and return what it prints."""
    done = run_longtail(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments: str | Path) -> str:
    """Run a command that must be refused, and return the one line that it prints."""
    done = run_longtail(*arguments)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert done.stderr.startswith("longtail: error: ")
    return done.stderr


def settings_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return values


def evaluated_and_reported(run: Path, *plugins: str | Path) -> tuple[dict[str, Any], str]:
    """Evaluate a run and write its report anew; return the metrics, which are those of the training, and the page."""
    table = run.with_suffix(".json")
    ran(*plugins, "evaluate", run, "--json", table)
    metrics: dict[str, Any] = json.loads(table.read_text())
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {prior: line[prior] for prior in ("uniform", "train")} == metrics["priors"]
    (run / "report.html").unlink()
    assert str(run / "report.html") in ran("report", run, *plugins)
    return metrics, (run / "report.html").read_text(encoding="utf-8")


def weights(run: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(run / "recognizer" / "model.safetensors")
    return loaded


def test_a_method(plugin: Any, tmp_path: Path) -> None:
    with_plugin, run = ("--plugin", plugin(METHOD)), tmp_path / "run"
    ran("train", "digits-lt", *with_plugin, "--method", "tempered", "--tempered.strength", "0.25", *TINY, "--out", run)
    assert settings_of(run)["method"] == "tempered"
    assert settings_of(run)["tempered"] == {"strength": 0.25}
    _, page = evaluated_and_reported(run, *with_plugin)
    assert "tempered" in page
    assert "Strength" in page  # its own plot
    # resumed it is finished already, with another setting it is another run
    ran(*with_plugin, "train", "--method", "tempered", "--tempered.strength", "0.25", *TINY, "--out", run, "--resume")
    err = refused("train", *with_plugin, "--method", "tempered", *TINY, "--out", run, "--resume")
    assert "was started with tempered.strength 0.25, not 0.5" in err
    # without the plugin nobody knows what the run was trained with
    assert "method 'tempered' is not known" in refused("train", "--method", "tempered", "--out", tmp_path / "other")
    assert "there is no field 'tempered'" in refused("evaluate", run)
    # what it does is not in the settings: with another file of that name the run would be another one
    plugin(METHOD.replace("prior(), strength", "prior(), 2 * strength"))
    again = (*with_plugin, "--method", "tempered", "--tempered.strength", "0.25", *TINY)
    err = refused("train", *again, "--out", run, "--resume")
    assert f"{run}: plugin plugin.py has changed since this run; use --overwrite or another --out" in err
    ran("train", *again, "--out", run, "--overwrite")


@pytest.mark.slow
def test_a_comparison_after_a_plugin_has_changed(plugin: Any, tmp_path: Path) -> None:
    compare: list[str | Path] = ["compare", "--seeds", "1", *TINY, "--out", tmp_path / "c"]
    compare += ["--plugin", plugin(METHOD), "--methods"]
    ran(*compare, "la,tempered")
    plugin(METHOD.replace("prior(), strength", "prior(), 2 * strength"))
    assert "tempered-seed0: plugin plugin.py has changed since this run" in refused(*compare, "la,tempered")
    ran(*compare, "la")  # which is not the plugin's


@pytest.mark.slow
def test_a_teacher_is_found_again_unless_a_plugin_of_its_own_has_changed(plugin: Any, tmp_path: Path) -> None:
    def teachers(code: str, out: str, *arguments: str) -> set[str]:
        with_plugin = ("--plugin", plugin(code))
        ran("train", "--method", "gml", *with_plugin, *TINY, *arguments, "--out", tmp_path / out)
        return {path.name for path in (tmp_path / "teachers").iterdir() if not path.name.startswith(".")}

    first = teachers(AUGMENTATION, "a", "--data.augment", "brighter")
    assert teachers(AUGMENTATION, "b", "--data.augment", "brighter") == first
    assert len(teachers(AUGMENTATION.replace("0.7", "0.1"), "c", "--data.augment", "brighter")) == 2
    plain = teachers(METHOD, "d")  # registers nothing that the teacher has
    assert teachers(METHOD.replace("prior(), strength", "prior(), 2 * strength"), "e") == plain


WHOSE = """
import sys
from longtail.registry import load_plugin, plugins_of

load_plugin(sys.argv[1])
kinds = {"method": "la", "data.source": "digits-lt", "augmentation": "none", "data.sampler": "class"}
used = set(kinds.items())
print(*(len(plugins_of(parts)) for parts in (used, used | {("data.sampler", "own")}, {("augmentation", "none")})))
"""


def test_a_plugin_counts_for_what_has_its_parts_alone(plugin: Any) -> None:
    """In a new process, where the parts of the package's tasks are not registered before it runs."""
    of_a_sampler = "from longtail.registry import METHODS, SAMPLERS\nlist(METHODS)\nSAMPLERS.register('own')(print)"
    of_a_task = "from longtail.registry import TASKS\nTASKS.add('own', 'nowhere:OWN')"
    for code, shown in ((of_a_sampler, "0 1 0"), (of_a_task, "1 1 1"), ("", "1 1 1")):
        done = subprocess.run(
            [sys.executable, "-c", WHOSE, plugin(code)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout == f"{shown}\n", done.stderr


NETWORK = """
from timm.models import register_model
from torch import nn


class Tiny(nn.Module):
    num_features = 8

    def __init__(self, in_chans):
        super().__init__()
        self.convolution = nn.Conv2d(in_chans, 8, 3, padding=1)

    def forward(self, images):
        return self.convolution(images).relu().mean((2, 3))


@register_model
def own_network(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, in_chans=3, **options):
    return Tiny(in_chans)
"""


def test_a_network(plugin: Any, tmp_path: Path) -> None:
    with_plugin, run = ("--plugin", plugin(NETWORK)), tmp_path / "run"
    arguments: list[str | Path] = ["--method", "la", *TINY, "--network", "own_network", "--out", run]
    ran("train", *with_plugin, *arguments)
    evaluated_and_reported(run, *with_plugin)
    image = save_image(tmp_path / "x.png", (8, 8), mode="L")
    err = refused("predict", run, image)
    assert "config.json: network 'own_network' is not known" in err
    assert "(of a plugin? name its file with --plugin)" in err
    plugin(NETWORK.replace("8, 3, padding=1", "8, 5, padding=2"))
    assert "plugin plugin.py has changed" in refused("train", *with_plugin, *arguments, "--resume")


@pytest.mark.slow
def test_the_setting_of_a_method_has_its_effect(plugin: Any, tmp_path: Path) -> None:
    with_plugin = ("--plugin", plugin(METHOD))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: digits-lt\nmethod: tempered\ntempered:\n  strength: 1.0\n")
    ran("train", recipe, *with_plugin, *TINY, "--out", tmp_path / "all")
    ran("train", "--method", "la", *TINY, "--out", tmp_path / "la")
    ran("train", *with_plugin, "--method", "tempered", *TINY, "--out", tmp_path / "half")
    whole, la, half = (weights(tmp_path / name) for name in ("all", "la", "half"))
    assert all(torch.equal(whole[name], la[name]) for name in la)  # all of the prior: logit adjustment
    assert not torch.equal(whole["classifier.weight"], half["classifier.weight"])
    table = ran(
        "compare", *with_plugin, "--methods", "la,tempered", "--seeds", "1", *TINY, "--out", tmp_path / "compared"
    )
    assert "tempered − la" in table
    for wrong, message in (
        (("--tempered.strenght", "1"), "--tempered.strength"),
        (("--tempered.strength", "-1"), "--tempered.strength -1.0: expected a value greater than or equal to 0"),
        (("--tempered.strength", "much"), "--tempered.strength"),
    ):
        assert message in refused("train", *with_plugin, "--method", "tempered", *wrong, "--out", tmp_path / "other")
    recipe.write_text("base: digits-lt\ntempered:\n  strenght: 1.0\n")
    assert "'tempered.strenght'; perhaps you meant tempered.strength" in refused("train", recipe, *with_plugin)


def test_a_data_set(plugin: Any, tmp_path: Path) -> None:
    with_plugin, run = ("--plugin", plugin(DATA)), tmp_path / "run"
    ran("inspect", "stripes-lt", *with_plugin, "--json", tmp_path / "i.json")
    inspection = json.loads((tmp_path / "i.json").read_text())
    assert inspection["class_counts"] == [120, 12]
    assert inspection["imbalance_factor"] == 10
    ran("train", *with_plugin, "--data", "stripes-lt", "--pretrained", "none", "--method", "la", *TINY, "--out", run)
    assert settings_of(run)["data"]["source"] == "stripes-lt"
    metrics, page = evaluated_and_reported(run, *with_plugin)
    assert metrics["class_names"] == ["vertical", "horizontal"]
    assert "horizontal" in page
    assert "'stripe-lt'" in (err := refused("inspect", *with_plugin, "stripe-lt"))
    assert "perhaps you meant stripes-lt?" in err
    assert "data.source 'stripes-lt' is not known" in refused("evaluate", run)
    err = refused("inspect", "stripes-lt", *with_plugin, "--data.profile", "step")
    assert "data.profile step: source stripes-lt makes no tail of its images; leave it out" in err
    makes_tail = ("--plugin", plugin(DATA.replace("Source(load=load)", "Source(load=load, makes_tail=True)"), "tail"))
    ran("inspect", "stripes-lt", *makes_tail, "--data.profile", "step")


@pytest.mark.slow
def test_a_data_set_of_image_files(plugin: Any, photos: Path, tmp_path: Path) -> None:
    with_plugin, run = ("--plugin", plugin(LISTED), "--data.root", photos), tmp_path / "run"
    shown = ran("inspect", "pets-lt", *with_plugin)
    assert re.search(r"classes +3\n", shown)
    (photos / "cat" / "0.png").write_bytes(b"none")
    assert "unreadable" in run_longtail("inspect", "pets-lt", *with_plugin).stdout
    (photos / "cat" / "0.png").unlink()
    ran("train", "--data", "pets-lt", *with_plugin, "--pretrained", "none", "--method", "la", *TINY, "--out", run)
    metrics, _ = evaluated_and_reported(run, *with_plugin[:2])
    assert metrics["class_names"] == ["cat", "dog", "emu"]


@pytest.mark.slow
def test_an_augmentation(plugin: Any, tmp_path: Path) -> None:
    with_plugin = ("--plugin", plugin(AUGMENTATION))
    arguments = ("train", "digits-lt", "--method", "la", *TINY, "--out")
    ran(*with_plugin, *arguments, tmp_path / "run", "--data.augment", "brighter")
    assert settings_of(tmp_path / "run")["data"]["augment"] == "brighter"
    # the query and key views follow the classification view
    assert settings_of(tmp_path / "run")["data"]["contrast_augment"] == "brighter"
    evaluated_and_reported(tmp_path / "run", *with_plugin)
    other = ("--plugin", plugin(AUGMENTATION.replace("FACTOR = 0.7", "FACTOR = 0.1"), "other"))
    ran(*other, *arguments, tmp_path / "other", "--data.augment", "brighter")
    a, b = weights(tmp_path / "run"), weights(tmp_path / "other")
    assert not torch.equal(a["classifier.weight"], b["classifier.weight"])
    for name in ("brigther", "photos"):
        for field in ("augment", "contrast_augment"):
            err = refused(*with_plugin, *arguments, tmp_path / "none", f"--data.{field}", name)
            assert f"data.{field} '{name}' is not known; perhaps you meant" in err
    assert "perhaps you meant brighter?" in refused(*with_plugin, "train", "--data.augment", "brigther")


@pytest.mark.slow
def test_a_sampler(plugin: Any, tmp_path: Path) -> None:
    with_plugin, run = ("--plugin", plugin(SAMPLER)), tmp_path / "run"
    ran(
        "train",
        *with_plugin,
        "--method",
        "ce",
        "--data.sampler",
        "last-class",
        "--epochs",
        "20",
        *TINY[:2],
        "--out",
        run,
    )
    assert settings_of(run)["data"]["sampler"] == "last-class"
    metrics, _ = evaluated_and_reported(run, *with_plugin)
    # whoever sees nothing else takes everything for it
    assert metrics["priors"]["train"]["per_class"] == [0.0] * 9 + [100.0]
    err = refused("train", *with_plugin, "--data.sampler", "last-clas")
    assert "data.sampler 'last-clas' is not known; perhaps you meant last-class" in err


@pytest.mark.slow
def test_a_task(plugin: Any, tmp_path: Path) -> None:
    with_plugin, run = ("--plugin", plugin(TASK)), tmp_path / "run"
    shown = ran(
        *("train", *with_plugin, "digits-lt", "--data", "worst-class-digits", "--data.val_fraction", "0.2"),
        *("--method", "la", "--epochs", "10", *TINY[:2], "--out", str(run)),
    )
    assert "worst class" in shown
    assert json.loads((run / "recognizer" / "config.json").read_text())["task"] == "worst-class"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("worst" in line for line in lines if line["kind"] == "validation")
    metrics, page = evaluated_and_reported(run, *with_plugin)
    assert metrics["worst"] == min(metrics["per_class"])
    assert "calibration under the uniform prior" in ran("evaluate", run, *with_plugin)  # what it inherits
    assert "Accuracy by class" in page
    assert "worst class" in ran("report", run, *with_plugin)
    shutil.copytree(run, run.with_name("other"))
    ran("report", run, run.with_name("other"), *with_plugin, "--out", tmp_path / "page.html")
    assert "worst class" in (tmp_path / "page.html").read_text()
    assert "worst-class-digits" in ran("inspect", "worst-class-digits", *with_plugin)
    # its models are those of classification
    image = save_image(tmp_path / "x.png", (8, 8), mode="L")
    commands: list[tuple[str | Path, ...]] = [
        ("predict", run, image),
        ("export", run),
        ("rebalance", run, "--epochs", "1"),
    ]
    for command in commands:
        ran(*command, *with_plugin)
    assert json.loads((tmp_path / "run-crt" / "recognizer" / "config.json").read_text())["metrics"]["worst"] >= 0
    err = refused("predict", run, image)
    assert "config.json: task 'worst-class' is not known" in err
    assert "(of a plugin? name its file with --plugin)" in err


DOUBLED = [
    ("from longtail.registry import METHODS\nMETHODS.register('gml')(int)", "method 'gml'"),
    ("from longtail.registry import SOURCES\nSOURCES.register('digits-lt')(int)", "data.source 'digits-lt'"),
    ("from longtail.registry import TRANSFORMS\nTRANSFORMS.register('none')(int)", "augmentation 'none'"),
    ("from longtail.registry import SAMPLERS\nSAMPLERS.register('sqrt')(int)", "data.sampler 'sqrt'"),
    ("from longtail.registry import TASKS\nTASKS.register('segmentation')(int)", "task 'segmentation'"),
    ("from longtail.registry import METHODS\nMETHODS.add('dice', 'mine:Dice')", "method 'dice'"),
]


@pytest.mark.parametrize(("code", "name"), DOUBLED, ids=[name for _, name in DOUBLED])
def test_a_name_that_the_package_has(plugin: Any, code: str, name: str) -> None:
    assert f"{name}: is registered already; choose another name" in refused("recipes", "--plugin", plugin(code))


@pytest.mark.parametrize("code", [METHOD, DATA, AUGMENTATION, SAMPLER, TASK])
def test_a_name_that_two_plugins_have(plugin: Any, code: str) -> None:
    one, two = plugin(code, "one"), plugin(code, "two")
    err = refused("recipes", "--plugin", one, "--plugin", two)
    assert "is registered already; choose another name" in err
    ran("recipes", "--plugin", one, f"--plugin={one}")  # the same file twice is that file


def test_two_files_of_one_name(plugin: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, two = plugin(METHOD), plugin(AUGMENTATION, "other/plugin")
    ran("recipes", "--plugin", one, "--plugin", two, "--plugin", one)
    both = ("--plugin", one, "--plugin", two, "--method", "tempered", "--data.augment", "brighter")
    ran("train", "digits-lt", *both, *TINY, "--out", tmp_path / "run")  # the parts of both are there


SETTINGS = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from longtail.config import Settings
from longtail.methods.base import Method
from longtail.registry import METHODS

@dataclass(frozen=True, kw_only=True)
class Mine(Settings):
    section: ClassVar[str] = "mine"
    a: float = 1.0

METHODS.register("mine")(type("Own", (Method,), {"settings_class": Mine}))
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('    section: ClassVar[str] = "mine"\n', "", "Mine: has no section; expected section"),
        ('"mine"\n', '"other"\n', "Mine.section is 'other', expected 'mine'"),
        ("a: float = 1.0", "a: float", "Mine.a: has no default"),
        ("a: float = 1.0", "a: torch.Tensor = None", "Mine: Unable to generate pydantic-core schema for"),
        ("a: float = 1.0", "a: list[float] | None = None", "Mine.a: settings never change; use tuple"),
        ("@dataclass(frozen=True, kw_only=True)", "", "Mine: is no dataclass; expected @dataclass"),
        ('{"settings_class": Mine}', '{"settings_class": dict}', "settings_class: expected a class derived from"),
        ('register("mine")', 'register("mixing")', "is the name of a setting"),
        ('register("mine")', 'register("segmentation")', "a task has the name already"),
        ('type("Own", (Method,), {"settings_class": Mine})', "print", "expected a class derived from Method, got"),
    ],
)
def test_a_method_that_cannot_be_one(plugin: Any, old: str, new: str, message: str) -> None:
    assert SETTINGS.count(old) == 1
    err = refused("recipes", "--plugin", plugin(SETTINGS.replace(old, new), "broken"))
    assert re.search(r"--plugin \S+broken.py: method '(mine|mixing|segmentation)': ", err)
    assert message in err
    assert re.search(r"\(line 1[34]\)$", err.strip())


@pytest.mark.parametrize(
    ("registry", "message"),
    [
        ("SOURCES", "data.source 'mine': expected an object of Source, got <built-in function print>"),
        ("TRANSFORMS", "augmentation 'mine': expected an object of Transform"),
        ("TASKS", "task 'mine': expected an object of Task"),
    ],
)
def test_an_object_that_is_no_part(plugin: Any, registry: str, message: str) -> None:
    code = f"from longtail.registry import {registry}\n{registry}.register('mine')(print)"
    assert message in refused("recipes", "--plugin", plugin(code))


PER_IMAGE = """
import torch

from longtail.data.transforms import PerImageTransform, Transform
from longtail.registry import TRANSFORMS


class Grey(PerImageTransform):
    def __init__(self, size):
        self.size = size

    def __call__(self, sample, image_id, keys):
        return torch.full((3, self.size, self.size), 128, dtype=torch.uint8), None


TRANSFORMS.register("grey")(Transform(Grey, per_image=True))
"""
SPAWNED = """
import multiprocessing
import sys

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    import torch

    from longtail.data.dataset import from_arrays
    from longtail.data.loader import TrainLoader
    from longtail.data.transforms import build_transform
    from longtail.registry import load_plugin

    load_plugin(sys.argv[1])
    part = torch.zeros(8, 8, 8, 3, dtype=torch.uint8), torch.arange(8) % 2
    images = from_arrays(part, part).train
    loader = TrainLoader(images, 4, [build_transform("grey", 8)], seed=0, workers=1)
    print(*(tuple(batch.views[0].shape) for batch in loader.epoch(0)))
"""


@pytest.mark.slow
def test_workers_that_are_no_copies_of_this_process_know_the_plugins(plugin: Any) -> None:
    script = plugin(SPAWNED, "script")
    done = subprocess.run(
        [sys.executable, script, plugin(PER_IMAGE)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "(4, 3, 8, 8) (4, 3, 8, 8)\n", done.stderr


def test_files_that_are_no_plugin(plugin: Any, tmp_path: Path) -> None:
    (tmp_path / "plugin.txt").write_text("")
    for path, message in (
        (tmp_path / "none.py", "none.py: there is no such file; expected a Python file that registers parts"),
        (tmp_path / "plugin.txt", "plugin.txt: expected a Python file, its name ending in .py"),
        (plugin("\n1 / 0", "broken"), "broken.py: ZeroDivisionError: division by zero (line 2)"),
        (plugin("def f():\n  int('a')\n\nf()", "deep"), "base 10: 'a' (line 2)"),
        (plugin("import sys\nsys.exit('no licence')", "ends"), "ends.py: SystemExit: no licence (line 2)"),
        (plugin("def", "cut"), "cut.py: SyntaxError: "),
        (plugin("import nowhere_to_be_found", "lost"), "lost.py: ModuleNotFoundError: "),
    ):
        assert message in refused("recipes", "--plugin", path)
    assert "--plugin: expected a Python file" in refused("recipes", "--plugin")
