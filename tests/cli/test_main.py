"""The command line as a user meets it: what it says, and that bad input gets one line and exit code 2."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longtail.cli.parsing import parse, recipe_with_data
from longtail.config import Config, read_config
from longtail.data.source_spec import named_sets
from longtail.training.run_io import flatten
from tests.conftest import TINY, Command, save_image


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["recipes"],
        ["evaluate", "--help"],
        ["predict", "--help"],
        ["inspect", "--help"],
    ],
    ids=" ".join,
)
def test_nothing_waits_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom longtail.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_shows_every_field_with_the_recipes_values(command: Command) -> None:
    from longtail.config import field_names

    code, out, _ = command("train", "cifar100-lt", "--help")
    assert code == 0
    for name in set(field_names()) - {"recipe"}:
        assert f"--{name} " in out or f"--{name}, --" in out
    assert "resnet56" in out


def test_train_evaluate_predict(command: Command, tmp_path: Path) -> None:
    run, table = tmp_path / "run", tmp_path / "deep" / "test.json"
    code, out, err = command("train", "digits-lt", *TINY, "--out", run, "--json", table)
    assert code == 0, err
    assert str(run / "report.html") in out
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "last.ckpt",
        "errors",
        "recognizer",
        "report.html",
        "test_predictions.npz",
    }
    trained = json.loads(table.read_text())
    (run / "report.html").unlink()
    code, out, _ = command("report", run, "--json", tmp_path / "records.json")
    assert code == 0
    assert (run / "report.html").is_file()
    assert json.loads((tmp_path / "records.json").read_text())[0]["method"] == "gml"
    for arguments, message in (
        ([], "expected the folder of a run"),
        ([tmp_path / "none"], "there is no such run folder"),
        ([run, "--out", tmp_path / "page.html"], "is for several runs"),
        ([run, run, "--out", tmp_path], "is a folder, expected a file"),
    ):
        code, _, err = command("report", *arguments)
        assert code == 2
        assert message in err
    code, out, _ = command("evaluate", run, "--json", tmp_path / "metrics.json", "--prior", "train")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert code == 0
    assert "uniform" in out
    assert "training" in out
    assert metrics["priors"] == trained["priors"]
    assert metrics["balanced_accuracy"] == trained["priors"]["train"]["balanced_accuracy"]
    assert len(metrics["per_class"]) == 10
    images = [save_image(tmp_path / "images" / f"{n}.png", (20, 30), seed=n) for n in range(3)]
    code, out, _ = command("predict", run, tmp_path / "images", images[0], "--top", "2", "--json", tmp_path / "p.json")
    assert code == 0
    rows = json.loads((tmp_path / "p.json").read_text())
    assert [row["path"] for row in rows] == [*map(str, images), str(images[0])]
    assert rows[0]["class"] in metrics["class_names"]
    assert len(rows[0]["top"]) == 2
    assert rows[0]["top"] == rows[3]["top"]
    assert len(out.splitlines()) == 6


def test_unreadable_images_are_left_out_listed_and_counted(command: Command, photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "0.png").write_bytes(b"none")
    (photos / "dog" / "bad\nname.png").write_bytes(b"")
    settings = ("--network", "resnet8", "--pretrained", "none", "--epochs", "1", "--data.image_size", "16")
    arguments = ("train", photos, *settings, "--out", tmp_path / "run")
    code, _, err = command(*arguments)
    assert code == 2
    assert "2 of 22 images cannot be read, more than data.max_unreadable_fraction 0.01 accepts" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    code, _, err = command(*arguments, "--data.max_unreadable_fraction", "0.2")
    assert code == 0, err
    assert "2 of 22 images cannot be read, and are left out (unreadable.csv in the run's folder lists them)" in err
    with (tmp_path / "run" / "unreadable.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["path"] for row in rows} == {"cat/0.png", "dog/bad\nname.png"}
    assert "is not an image that Pillow can read" in next(row["reason"] for row in rows if row["path"] == "cat/0.png")
    assert "2 images could not be read" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_folder_in_place_of_a_recipe(command: Command, photos: Path, tmp_path: Path) -> None:
    settings = ("--network", "resnet8", "--pretrained", "none", "--epochs", "1", "--quiet", "--data.image_size", "16")
    code, _, err = command("train", photos, *settings, "--out", tmp_path / "run")
    assert code == 0, err
    assert "source: folder" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    code, _, err = command("train", tmp_path / "missing", *settings)
    assert code == 2
    assert "missing': there is no such folder or set" in err


def test_a_folder_of_images(command: Command, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = command("train", "folder", "--data.root", photos, *TINY, "--pretrained", "none", "--out", run)
    assert code == 0, err
    assert "n/a" in out  # no class has more than a hundred images
    code, out, _ = command("predict", run, photos / "emu")
    assert code == 0
    assert any(name in out for name in ("cat", "dog", "emu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "perhaps you meant train"),
        (["train", "digits"], "recipe 'digits' is not known; perhaps you meant digits-lt"),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["train", "--method", "gmll"], "method 'gmll' is not known; perhaps you meant gml"),
        (["train", "--data.imblance", "3"], "perhaps you meant --data.imbalance"),
        (["train", "--epoch", "3"], "perhaps you meant --epochs"),
        (["train", "--overw"], "perhaps you meant --overwrite"),
        (["train", "--epochs", "-3"], "--epochs -3: expected a value greater than or equal to 1"),
        (
            ["train", "--epochs", "ten"],
            "--epochs ten: expected a whole number or auto (longtail train --help lists all)",
        ),
        (["train", "--seed", "a"], "--seed a: expected a whole number"),
        (["train", "--optimizer.learning_rate", "fast"], "--optimizer.learning_rate fast: expected a number"),
        (["train", "--optimizer.name", "lion"], "--optimizer.name lion: expected sgd or adamw"),
        (["train", "--data.imbalance"], "--data.imbalance: expected a value"),
        (
            ["train", "--experts.strengths", "a", "b"],
            "--experts.strengths a b: expected numbers (longtail train --help",
        ),
        (["train", "--segmentation.crop", "4"], "--segmentation.crop 4: expected None or 2 whole numbers"),
        (["train", "--nonsense", "3"], "--nonsense: there is no such flag"),
        (["train", "digits-lt", "extra"], "extra: not expected here"),
        (["evaluate"], "RUN is missing: Folder of the run"),
        (["predict", "run", "a.png", "--top", "two"], "--top two: expected None or a whole number"),
        (["train", "--epochs"], "--epochs"),
        (["train", "--shots.few_below", "300"], "shots.few_below 300"),
        (["train", "--network", "resnet33"], "network 'resnet33' is not known"),
        (["train", "--teacher.source", "nowhere"], "teacher.source 'nowhere'"),
        (["train", "--gml.queue_size", "5"], "gml.queue_size 5"),
        (["train", "--resume", "--overwrite"], "contradict each other"),
        (["train", "folder", "--pretrained", "none"], "data.root is missing"),
        (["train", "folder", "--data.root", "nowhere"], "there is no such folder"),
        (["train", "--json", "."], "is a folder, expected a file"),
        (["compare", "--methods", "ce,lb"], "'lb' is not known"),
        (["compare", "--seeds", "0"], "--seeds 0"),
        (["evaluate", "nowhere"], "nowhere: there is no such run folder"),
        (["evaluate", "."], "contains no model"),
        (["predict", "."], "IMAGES"),
        (["predict", "nowhere", "x.png"], "nowhere: there is no such run folder"),
        (["recipes", "--jso", "x"], "perhaps you meant --json"),
    ],
)
def test_bad_input(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert code == 2
    assert message in err
    assert err.startswith("longtail: error: ")
    assert len(err.splitlines()) == 1
    assert not out
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_a_recipe_file_with_a_mistake(command: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    for text, message in [
        ("base: digits-lt\nepoch: 3", "mine.yaml: there is no field 'epoch'; perhaps you meant epochs"),
        ("base: digits-lt\ndata:\n  imblance: 3", "'data.imblance'; perhaps you meant data.imbalance"),
        ("epochs: many", "mine.yaml: epochs: expected a valid integer, got 'many'"),
        ("epochs: yes", "mine.yaml: epochs: expected a number, got True"),
        ("gml:\n  queue_size: on", "mine.yaml: gml.queue_size: expected a number, got True"),
        ("optimizer:\n  weight_decay: no", "mine.yaml: optimizer.weight_decay: expected a number, got False"),
        ("method: gmll", "perhaps you meant gml"),
        ("base: nope", "base 'nope' is not known"),
        ("- 1", "expected fields with values, got list"),
        ("gml: null", "mine.yaml: gml: expected fields with values, got nothing"),
        ("data:", "mine.yaml: data: expected fields with values, got nothing"),
        ("log: csv", "mine.yaml: log: expected a list, such as [csv], got 'csv'"),
        ("schedule: {milestones: 0.5}", "mine.yaml: schedule.milestones: expected a list, such as [0.5], got 0.5"),
        ("a: b: c", "not YAML"),
        ("epochs: 1\nepochs: 2", "'epochs' is given twice"),
    ]:
        recipe.write_text(text)
        code, _, err = command("train", recipe, "--out", tmp_path / "run")
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_predict_names_a_bad_file(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("train", "digits-lt", "--method", "la", *TINY, "--out", run)[0] == 0
    (tmp_path / "bad.png").write_bytes(b"not an image")
    for path, message in [("bad.png", "is not an image"), ("none.png", "there is no such file")]:
        code, _, err = command("predict", run, tmp_path / path)
        assert code == 2
        assert f"{path}: {message}" in err
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "b.png").write_bytes(b"not an image")
    for name in ("a.png", "c.png"):
        save_image(folder / name, (8, 8), mode="L")
    code, out, err = command("predict", run, folder, "--json", tmp_path / "p.json")
    assert code == 1
    assert "a.png" in out
    assert "c.png" in out
    assert "b.png" not in out
    assert "b.png: is not an image" in err
    assert "1 of 3 images cannot be read" in err
    records = json.loads((tmp_path / "p.json").read_text())
    assert [Path(record["path"]).name for record in records] == ["a.png", "c.png", "b.png"]
    assert "is not an image" in records[-1]["error"]
    code, _, err = command("predict", run, tmp_path / "bad.png", folder / "b.png")
    assert code == 2
    assert "none of 2 images can be read" in err
    code, _, err = command("predict", run, tmp_path / "bad.png", "--prior", "estimate")
    assert (code, "bad.png: is not an image" in err) == (2, True)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no images" in command("predict", run, empty)[2]
    (run / "recognizer" / "model.safetensors").write_bytes(b"broken")
    code, _, err = command("evaluate", run)
    assert code == 2
    assert "does not fit config.json" in err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(command: Command, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    code, _, err = command("train", "--out", tmp_path / "run")
    assert code == 2
    assert "cannot be written" in err


@pytest.mark.parametrize("out", ["/proc/run", "/dev/null/run"])
def test_a_place_where_no_folder_can_be(command: Command, out: str) -> None:
    code, _, err = command("train", "--method", "la", *TINY, "--out", out)
    assert code == 2
    assert "cannot be" in err
    assert len(err.splitlines()) == 1


def test_every_recipe_reads_and_round_trips(tmp_path: Path) -> None:
    from longtail.config import load_recipe, recipe_names

    assert set(recipe_names()) == {*named_sets(), "boxes", "folder", "masks", "cifar100-lt-best"}
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.about.summary
        assert recipe.about.command.split()[2] == name
        (tmp_path / "config.yaml").write_text(recipe.config.to_yaml())
        assert read_config(tmp_path / "config.yaml") == recipe.config
    cifar = flatten(load_recipe("cifar10-lt").config.to_dict())
    base = flatten(load_recipe("cifar100-lt").config.to_dict())
    assert {key for key in cifar if cifar[key] != base[key]} == {"recipe", "data.source"}


def test_a_shell_completes(command: Command) -> None:
    code, script, _ = command("completion", "bash")
    assert code == 0

    def completed(*words: str) -> set[str]:
        line = " ".join(map(repr, words))
        asked = f'{script}\nCOMP_WORDS=({line}) COMP_CWORD={len(words) - 1}\n_longtail\necho "${{COMPREPLY[@]}}"'
        return set(subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout.split())

    assert completed("longtail", "re") == {"rebalance", "recipes", "report"}
    assert completed("longtail", "train", "cifar") == {"cifar10-lt", "cifar100-lt", "cifar100-lt-best"}
    assert "--data.imbalance" in completed("longtail", "train", "cifar100-lt", "--data.")
    assert completed("longtail", "serve", "run", "--p") == {"--port"}
    assert completed("longtail", "cal") == {"calibrate-detector"}
    assert {"--power", "--class_order"} <= completed("longtail", "calibrate-detector", "run", "--")
    for shell, part in (("zsh", "bashcompinit"), ("fish", "-l imbalances")):
        code, script, _ = command("completion", shell)
        assert code == 0
        assert part in script
    for arguments in ((), ("tcsh",)):
        code, _, err = command("completion", *arguments)
        assert code == 2
        assert "bash, zsh, fish" in err


def test_help_fills_its_lines(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, shown, _ = command("inspect", "--help")
    assert code == 0
    text = " ".join(shown.replace("│", " ").split())
    assert "or a kind of your own data: folder (one sub-folder per class)" in text
    # no line of the help of a field ends where that of the source does
    ragged = [line for line in shown.splitlines() if line.strip("│ ") == "bccd; or a kind"]
    assert not ragged


def test_help_shows_no_default_where_there_is_none(command: Command) -> None:
    for name in ("train", "compare", "evaluate", "predict", "inspect", "rebalance", "calibrate-detector"):
        code, shown, _ = command(name, "--help")
        assert code == 0
        text = " ".join(shown.replace("│", " ").split())
        assert "None" not in text, name
        assert "--json PATH " in text
        assert "(default: )" not in text
    for stays in ("--optimizer.nesterov, --optimizer.no_nesterov", "(default: False)", "--epochs INT|{auto}"):
        assert stays in " ".join(command("train", "--help")[1].replace("│", " ").split())
    # and None can still be given
    code, _, err = command("train", "digits-lt", "--minutes", "None", "--epochs", "0")
    assert code == 2
    assert "epochs 0: " in err


@dataclasses.dataclass(frozen=True)
class Undocumented:
    strength: float | None = None


@dataclasses.dataclass(frozen=True)
class WithSection:
    """Options."""

    section: Undocumented = dataclasses.field(default_factory=Undocumented)
    quiet: bool = False


def test_options_keep_their_types_and_the_help_shows_no_signature(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(WithSection, "train", ["--section.strength", "2"])
    assert options == WithSection(Undocumented(2.0))
    assert type(options.section) is Undocumented
    with pytest.raises(SystemExit):
        parse(WithSection, "train", ["--help"])
    shown = capsys.readouterr().out
    assert "--section.strength FLOAT" in shown
    assert "Undocumented(" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "phtos/"), "data 'phtos/': there is no such folder or set"),
        (("compare", "digits-lt", "--method", "la"), "--method: is for longtail train; a comparison takes --methods"),
        (("inspect", "digits-lt", "--json", "table.csv"), "--json table.csv: expected a name that ends in .json"),
        (("recipes", "--json", "table.jsonl"), "--json table.jsonl: expected a name that ends in .json"),
    ],
)
def test_what_a_new_user_may_mistake(command: Command, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = command(*arguments)
    assert (code, message in err, len(err.splitlines())) == (2, True, 1), err


@pytest.mark.parametrize(("subcommand", "flag"), [("split", "--out"), ("inspect", "--fix")])
def test_a_table_of_data_is_not_overwritten(command: Command, photos: Path, subcommand: str, flag: str) -> None:
    table = photos / "a.csv"
    table.write_text("path,label\ncat/0.png,x\ncat/1.png,x\ndog/0.png,y\ndog/1.png,y\n")
    before = table.read_text()
    code, _, err = command(subcommand, table, "--data.root", photos, flag, photos / "cat" / ".." / "a.csv")
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "is the table that the data is read from, and would be overwritten; choose another name" in err
    assert table.read_text() == before


def test_a_split_is_not_replaced_by_mistake(command: Command, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "split.csv"
    assert command("split", photos, "--out", out)[0] == 0
    before = out.read_text()
    code, _, err = command("split", photos, "--out", out, "--seed", "1")
    assert (code, "split.csv: exists already; use --overwrite, or another --out" in err) == (2, True)
    assert out.read_text() == before
    assert command("split", photos, "--out", out, "--seed", "1", "--overwrite")[0] == 0
    assert out.read_text() != before


@pytest.mark.parametrize("subcommand", ["inspect", "split", "train", "compare"])
def test_annotations_are_not_overwritten(command: Command, tmp_path: Path, subcommand: str) -> None:
    annotations = tmp_path / "a.json"
    annotations.write_text("{}")
    arguments = (annotations,) if subcommand in {"inspect", "split"} else ("--data", annotations)
    code, _, err = command(subcommand, *arguments, "--json", annotations)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "a.json: is the table that the data is read from" in err
    assert annotations.read_text() == "{}"


@pytest.mark.parametrize("name", ["comparison.json", "ce-seed0/metrics.jsonl", "ce-seed0/recognizer/config.json"])
def test_files_of_runs_are_not_overwritten(command: Command, tmp_path: Path, name: str) -> None:
    run = tmp_path / "ce-seed0"
    (run / "recognizer").mkdir(parents=True)
    (run / "config.yaml").write_text(Config().to_yaml())
    (tmp_path / "comparison.json").write_text('{"format": 1, "recipe": "digits-lt"}')
    subcommand = ("compare", "digits-lt") if name.endswith(".jsonl") else ("recipes",)
    code, _, err = command(*subcommand, "--json", tmp_path / name)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "is a file of a run or a comparison, expected another name" in err
    assert command("recipes", "--quiet", "--json", run / "recipes.json") == (0, "", "")


def test_a_null_byte_is_one_line(command: Command) -> None:
    for arguments in (("train", "--out", "a\0"), ("inspect", "\0"), ("--plugin", "\0")):
        code, _, err = command(*arguments)
        assert (code, len(err.splitlines()), "contain a null byte" in err) == (2, 1, True), err


def test_rebalance_of_the_folder_one_is_in(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("train", "digits-lt", "--method", "la", *TINY, "--out", tmp_path / "run")[0] == 0
    monkeypatch.chdir(tmp_path / "run")
    code, _, err = command("rebalance", ".", "--method", "tau")
    assert code == 0, err
    assert (tmp_path / "run-tau" / "recognizer").is_dir()
    monkeypatch.chdir(tmp_path / "run" / "recognizer")
    code, _, err = command("rebalance", "..", "--method", "tau")
    assert (code, f"{tmp_path / 'run-tau'}: is not empty" in err) == (2, True), err


@pytest.mark.slow
def test_runs_in_the_folder_of_the_images_are_no_classes(
    command: Command, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    settings = (*TINY, "--pretrained", "none", "--data.image_size", "16")
    # with a teacher, whose folder is beside the run's
    code, _, err = command("train", ".", *settings, "--method", "gml", "--teacher.epochs", "1")
    assert code == 0, err
    assert list((photos / "runs" / "photos-gml-seed0" / "errors").iterdir())
    assert list((photos / "runs" / "teachers").glob("*/recognizer"))
    code, _, err = command("compare", ".", *settings, "--methods", "ce,la", "--seeds", "1")
    assert code == 0, err
    code, shown, _ = command("inspect", ".")
    assert code == 0
    assert "3 folders of runs are no classes, and are left out (runs/compare-photos, runs/photos-gml-seed0" in shown
    assert "all 21" in shown
    code, _, err = command("train", ".", *settings, "--method", "gml", "--teacher.epochs", "1", "--resume")
    assert code == 0, err


def test_a_run_among_parquet_files_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for subcommand in ("train", "compare"):
        code, _, err = command(subcommand, ".")
        assert (code, len(err.splitlines())) == (2, 1), err
        assert f"is in the data folder {tmp_path}, whose files would then all be read as data; choose an --out" in err
    assert [path.name for path in tmp_path.iterdir()] == ["data.parquet"]


def test_runs_are_named_after_the_whole_name_of_a_folder(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    for name in ("photos.v1", "photos.v2", "photos.csv"):
        photos.rename(name)
        assert recipe_with_data([name], "digits-lt")[0].name == name
        Path(name).rename(photos)
    Path("split.v1.csv").write_text("path,label\n")
    assert recipe_with_data(["split.v1.csv"], "digits-lt")[0].name == "split.v1"
    assert recipe_with_data(["hub:user/set.v2"], "digits-lt")[0].name == "set.v2"
