"""The command line: parse, call, print. What it does is in the functions that it calls.

Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from longtail.errors import LongtailError, StoppedError, nearest
from longtail.printing import print_table, show_metrics, show_predictions, show_trust

if TYPE_CHECKING:
    from longtail.config import Data, Recipe
    from longtail.options import Looking, Predict
    from longtail.recognizer import Recognizer
    from longtail.segmenter import Looks, Segmenter

Parsed = TypeVar("Parsed")

DESCRIPTION = """usage: longtail COMMAND [OPTIONS]

Long-tailed recognition and segmentation: train on images whose classes differ widely in number, and use what comes out.

commands:
  inspect SOURCE         what a set's tail looks like, and what is wrong with the set
  split SOURCE           share a set without splits out over train, val and test
  embed SOURCE           embeddings of a set's images by any network, for heads of one's own
  train [RECIPE]         train, evaluate and keep a recogniser; any field of the recipe is a flag
  evaluate RUN           metrics of a run on its test set
  rebalance RUN          a new head on a run's encoder: cRT, learnable weight scaling, τ-normalisation
  predict RUN IMAGES…    classes and probabilities of image files, or of all images in folders; labels of their pixels
  export RUN             one ONNX file with preprocessing, labels and prior inside
  serve RUN              a local page to drop images on
  compare [RECIPE]       several methods × seeds under one recipe: table, differences, plot
  report RUN…            a run's page written anew; of several runs a page that sets them side by side
  recipes                what there is to train
  completion SHELL       a script that lets bash, zsh or fish complete all this

`longtail COMMAND --help` lists a command's options. First steps: longtail train digits-lt
Your own images (a folder with one sub-folder a class, a list, a table): longtail train --data photos/
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 when done, 2 on an input that cannot be used, 128 + n stopped by signal n."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    commands = _commands()
    try:
        if not given or given[0] in {"-h", "--help"}:
            print(DESCRIPTION, end="")
        elif given[0] == "--version":
            import longtail

            print(longtail.__version__)
        elif given[0] not in commands:
            raise LongtailError(f"'{given[0]}' is no command{nearest(given[0], commands)}")
        else:
            commands[given[0]](given[1:])
        sys.stdout.flush()
    except LongtailError as error:
        process = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
        who = "" if process is None else f"process {process}: "
        print(f"longtail: error: {who}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except StoppedError as stop:
        goes_on = "--resume" if given[0] == "train" else "the same command without --overwrite"
        print(f"longtail: {stop}; {goes_on} goes on from there", file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print("longtail: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output (head, for one) has left: not an error, and nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _commands() -> dict[str, Callable[[list[str]], None]]:
    return {
        "inspect": _inspect,
        "split": _split,
        "embed": _embed,
        "train": _train,
        "evaluate": _evaluate,
        "rebalance": _rebalance,
        "predict": _predict,
        "export": _export,
        "serve": _serve,
        "compare": _compare,
        "report": _report,
        "recipes": _recipes,
        "completion": _completion,
    }


def _parse(kind: type[Parsed], command: str, arguments: list[str], default: Parsed | None = None) -> Parsed:
    """Parse with tyro; its boxed messages become one line."""
    import tyro

    options: dict[str, Any] = {"prog": f"longtail {command}", "args": arguments, "use_underscores": True}
    if default is not None:
        options["default"] = default
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            parsed: Parsed = tyro.cli(kind, **options)
    except SystemExit as stop:
        if stop.code in {0, None}:
            raise
        raise LongtailError(_one_line(shown.getvalue(), command)) from None
    return parsed


def _one_line(box: str, command: str) -> str:
    """Return what a box of tyro's says: its first paragraph, and the flags that it thinks were meant."""
    # a terminal that knows no box-drawing characters gets rules of hyphens from tyro
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    lines = ["" if not line.strip("-") else line for line in lines]
    while lines and not lines[0]:
        lines.pop(0)
    message = " ".join(lines[: next((i for i, line in enumerate(lines) if not line), len(lines))])
    message = message.split(" Got errors:")[0].rstrip(".")
    meant = ""
    if any(line.startswith("Perhaps you meant") for line in lines):
        flags = dict.fromkeys(line.split()[0].rstrip(",") for line in lines if line.startswith("--"))
        wrong = next((word.rstrip(",") for word in message.split() if word.startswith("--")), "")
        close = difflib.get_close_matches(wrong, flags, n=3, cutoff=0.5) or list(flags)[:3]
        meant = f"; perhaps you meant {' or '.join(close)}?"
    return f"{message}{meant} (longtail {command} --help lists all)"


def _split_recipe(arguments: list[str], default: str) -> tuple[str, list[str]]:
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return default, arguments


def _with_data(recipe: Recipe, arguments: list[str], named: bool) -> tuple[Recipe, list[str]]:
    """Take ``--data SOURCE`` out of the arguments: a set in the place of the recipe's, or the recipe for one's own."""
    for place, argument in enumerate(arguments):
        if argument != "--data" and not argument.startswith("--data="):
            continue
        from longtail.config import load_recipe
        from longtail.data.naming import source_of

        width = 1 if "=" in argument else 2
        text = argument.partition("=")[2] if width == 1 else next(iter(arguments[place + 1 : place + 2]), "")
        if not text or text.startswith("--"):
            raise LongtailError("--data: expected a named set, a folder, a list, a table or hub:NAME")
        changes = source_of(text)
        recipe = recipe if named else load_recipe("masks" if changes["source"] == "masks" else "folder")
        rest = arguments[:place] + arguments[place + width :]
        # the run is called after the set
        name = Path(text.removeprefix("hub:")).resolve().stem
        return dataclasses.replace(recipe, name=name, config=recipe.config.replace(data=changes)), rest
    return recipe, arguments


def _check_folder(path: Path) -> None:
    """Refuse at once a place where nothing can be written, rather than after the training."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise LongtailError(f"{path}: cannot be written: {place} is not a folder that you may write to; choose another")


def _check_json(path: Path | None) -> None:
    if path is not None:
        if path.is_dir():
            raise LongtailError(f"--json {path}: is a folder, expected a file")
        _check_folder(path.parent)


def _train(arguments: list[str]) -> None:
    from longtail.config import checked, load_recipe
    from longtail.options import Train

    name, rest = _split_recipe(arguments, "digits-lt")
    recipe, rest = _with_data(load_recipe(name), rest, named=rest != arguments)
    given = _parse(Train, "train", rest, Train(config=recipe.config))
    if given.resume and given.overwrite:
        raise LongtailError("--resume and --overwrite contradict each other; give one")
    config = checked(given.config)
    out = given.out or Path("runs") / f"{recipe.name}-{config.method}-seed{config.seed}"
    _check_folder(out)
    _check_json(given.json)

    from longtail.engine.evaluate import described
    from longtail.engine.fit import fit
    from longtail.engine.processes import leave, rank
    from longtail.files import write_made
    from longtail.report import run_report

    run = fit(config, out, resume=given.resume, overwrite=given.overwrite, quiet=given.quiet)
    first = rank() == 0
    leave()
    if not first:
        return
    page = run_report(out)
    judged = described(run.judged, run.card)
    if given.json:
        write_made(given.json, judged)
    show_metrics(judged)
    print(f"{run.student_passes:,} student passes in {run.seconds:.0f} s", end="")
    print(f", the teacher took {run.teacher_seconds:.0f} s" if run.teacher_seconds else "")
    print(f"recogniser: {out / 'recognizer'}\nreport:     {page}")


def _source(command: str, arguments: list[str]) -> tuple[Data, list[str]]:
    """Return what SOURCE stands for, and the other arguments."""
    from longtail.config import Data, load_recipe, recipe_names
    from longtail.data.naming import source_of

    if arguments and arguments[0] in recipe_names() and arguments[0] != "folder":
        return load_recipe(arguments[0]).config.data, arguments[1:]  # the tail that training on it would have
    if {"-h", "--help"} & set(arguments):
        return Data(), arguments
    if not arguments or arguments[0].startswith("-"):
        raise LongtailError(
            f"SOURCE: expected a named set, a folder, a list, a table or hub:NAME (longtail {command} --help)"
        )
    return Data(**source_of(arguments[0])), arguments[1:]


def _inspect(arguments: list[str]) -> None:
    from longtail.options import Inspect

    data, rest = _source("inspect", arguments)
    given = _parse(Inspect, "inspect SOURCE", rest, Inspect(data=data))
    for path in (given.json, given.plot):
        _check_json(path)
    if given.plot is not None and given.plot.suffix.lower() != ".png":
        raise LongtailError(f"--plot {given.plot}: expected a name that ends in .png")
    from longtail.config import checked_section
    from longtail.data.inspection import histogram, inspect
    from longtail.files import write_made

    settings = checked_section(given.data, "data")
    with _Counter(given.quiet) as counter:
        found = inspect(settings, given.seed, given.shots, counter.add)
    if given.json:
        write_made(given.json, found.to_dict())
    if given.plot:
        from longtail.report import plots

        order = sorted(range(len(found.class_names)), key=lambda index: -found.class_counts[index])
        figure = plots.class_histogram(
            [found.class_names[index] for index in order],
            [found.class_counts[index] for index in order],
            [found.groups[index] for index in order],
            found.counted,
        )
        given.plot.parent.mkdir(parents=True, exist_ok=True)
        plots.save_png(figure, given.plot)
    if given.quiet:
        return
    values = found.to_dict()
    factor = "∞ (a class has none)" if found.imbalance_factor is None else f"{found.imbalance_factor:.1f}"
    sizes = values["group_sizes"]
    rows = [
        ["images", ", ".join(f"{split} {count:,}" for split, count in found.splits.items())],
        ["classes", f"{len(found.class_names):,}"],
        ["imbalance factor", factor],
        ["Gini", f"{found.gini:.3f}"],
        [
            "groups",
            ", ".join(f"{group} {sizes[group]}" for group in sizes),
        ],
        ["smallest classes", ", ".join(f"{name} {count:,}" for name, count in found.least)],
    ]
    rows += [[f"{side} in pixels", f"{v[0]} to {v[2]}, median {v[1]}"] for side, v in found.sides.items()]
    print_table([found.source, "found"], [[a, b] for a, b in rows], left=True)
    print()
    print("\n".join(histogram(found.class_counts, found.counted)))
    problems = [
        *(("error", text) for text in found.errors),
        *(("unreadable", f"{entry['path']}: {entry['reason']}") for entry in found.unreadable),
        *(("in two splits", " = ".join(group)) for group in found.leaks),
        *(("same content", " = ".join(group)) for group in found.duplicates),
        *(("remark", text) for text in found.remarks),
    ]
    kinds = list(dict.fromkeys(kind for kind, _ in problems))
    print("\nno problems found" if not problems else "")
    for kind in kinds:
        texts = [text for other, text in problems if other == kind]
        for text in texts[:10]:
            print(f"{kind}: {text}")
        if len(texts) > 10:
            print(f"{kind}: and {len(texts) - 10:,} more; --json FILE lists all")


class _Counter:
    """Tells how far a long look has come."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __enter__(self) -> _Counter:
        from tqdm import tqdm

        self.bar = tqdm(unit="image", disable=self.quiet or not sys.stderr.isatty(), leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, count: int) -> None:
        self.bar.update(count)


def _split(arguments: list[str]) -> None:
    from longtail.options import Split

    data, rest = _source("split", arguments)
    given = _parse(Split, "split SOURCE", rest, Split(data=data, out=Path("split.csv")))
    if given.out.suffix.lower() != ".csv":
        raise LongtailError(f"--out {given.out}: expected a name that ends in .csv")
    for path in (given.json, given.out):
        _check_json(path)
    from longtail.config import checked_section
    from longtail.data.splits import write_split
    from longtail.files import write_made

    made = write_split(checked_section(given.data, "data"), given.out, given.val, given.test, given.seed)
    if given.json:
        write_made(given.json, made)
    if not given.quiet:
        print_table(["split", "images"], [[split, f"{count:,}"] for split, count in made["images"].items()])
        if made["short"]:
            print(f"too few images for every split: {', '.join(made['short'])}")
        print(f"split: {given.out}; longtail train --data {given.out} --data.root {made['root']}")


def _embed(arguments: list[str]) -> None:
    from longtail.options import Embed

    data, rest = _source("embed", arguments)
    given = _parse(Embed, "embed SOURCE", rest, Embed(data=data))
    if given.out.suffix.lower() != ".npz":
        raise LongtailError(f"--out {given.out}: expected a name that ends in .npz")
    for path in (given.json, given.out):
        _check_json(path)
    from longtail.config import checked_section
    from longtail.embedding import embed
    from longtail.files import write_made

    made = embed(
        checked_section(given.data, "data"),
        given.model,
        given.out,
        seed=given.seed,
        pretrained=given.pretrained,
        batch_size=given.batch_size,
        say=lambda line: None if given.quiet else print(line, file=sys.stderr),
    )
    if given.json:
        write_made(given.json, made)
    if not given.quiet:
        splits = [[split, f"{made[split]:,}"] for split in ("train", "val", "test") if split in made]
        print_table(["split", "images"], splits)
        print(f"embeddings of width {made['width']}: {given.out}")


def _evaluate(arguments: list[str]) -> None:
    from longtail.options import Evaluate

    given = _parse(Evaluate, "evaluate", arguments)
    _check_json(given.json)
    _check_run(given.run)
    from longtail.engine.evaluate import evaluate
    from longtail.files import write_made

    root = None if given.root is None else str(given.root)
    judged = evaluate(given.run, given.prior, root, _looks(given), given.target, given.imbalance, given.coverage)
    if given.json:
        write_made(given.json, judged)
    if not given.quiet:
        show_metrics(judged)
        show_trust(judged)


def _looks(given: Looking) -> Looks | None:
    """Return how an image is to be segmented, where that was said."""
    from longtail.segmenter import Looks

    looks = Looks(window=given.window, flip=given.flip, scales=given.scales)
    return None if looks == Looks() else looks


def _rebalance(arguments: list[str]) -> None:
    from longtail.options import Rebalance

    given = _parse(Rebalance, "rebalance", arguments)
    _check_json(given.json)
    _check_run(given.run)
    out = given.out or given.run.with_name(f"{given.run.resolve().name}-{given.how}")
    _check_folder(out)
    from longtail.engine.evaluate import described
    from longtail.engine.rebalance import Settings, rebalance
    from longtail.files import write_made
    from longtail.recognizer import Recognizer
    from longtail.report import run_report

    settings = Settings(given.how, epochs=given.epochs, views=given.views, tau=given.tau)
    judged = described(
        rebalance(given.run, out, settings, None if given.root is None else str(given.root)), Recognizer.load(out).card
    )
    page = run_report(out)
    if given.json:
        write_made(given.json, judged)
    if not given.quiet:
        show_metrics(judged)
        print(f"recogniser: {out / 'recognizer'}\nreport:     {page}")


def _check_run(folder: Path) -> None:
    if not folder.is_dir():
        raise LongtailError(f"{folder}: there is no such run folder")


def _predict(arguments: list[str]) -> None:
    from longtail.options import Predict

    given = _parse(Predict, "predict", arguments)
    _check_json(given.json)
    if given.run.suffix.lower() != ".onnx":
        _check_run(given.run)
    if not given.images:
        raise LongtailError("IMAGES: expected at least one image file or folder")
    if given.top < 1:
        raise LongtailError(f"--top {given.top}: expected at least 1")
    if given.run.suffix.lower() == ".onnx":
        _predict_deployed(given)
        return
    from longtail.data.pictures import find_images
    from longtail.segmenter import Segmenter, load_kept

    recognizer = load_kept(given.run)
    files = find_images(given.images)
    if isinstance(recognizer, Segmenter):
        _segment(recognizer, files, given)
        return
    if given.out is not None or _looks(given) is not None:
        raise LongtailError(f"{given.run}: is no segmenter: --out, --window, --flip and --scales are for segmentation")
    predictions = recognizer.predict(files, prior=_prior(given.prior, recognizer), coverage=given.coverage)
    best = predictions.top(given.top)
    sets: Sequence[list[str] | None] = predictions.sets or [None] * len(files)
    show_predictions(given, files, best, sets)
    if predictions.prior is not None and not given.quiet:
        found = {predictions.prior.method: dataclasses.asdict(predictions.prior)}
        show_trust({"estimates": found, "class_names": predictions.class_names})


def _predict_deployed(given: Predict) -> None:
    """Predict with an exported file, without torch."""
    from longtail.data.pictures import find_images
    from longtail.deployed import DeployedModel

    model = DeployedModel(given.run)
    if model.task == "segmentation":
        raise LongtailError(f"{given.run}: is a segmenter's file, for other programs; predict with its run instead")
    if given.out is not None or given.coverage is not None or given.window is not None or given.flip:
        raise LongtailError(f"{given.run}: --coverage and what is for segmentation need the run, not its ONNX file")
    files = find_images(given.images)
    probabilities = model.predict(files)
    if given.prior == "estimate":
        raise LongtailError(f"{given.run}: --prior estimate needs the run, not its ONNX file")
    probabilities = model.under(probabilities, model.frequencies(given.prior))
    order = (-probabilities).argsort(axis=1, kind="stable")[:, : given.top]
    best = [
        [(model.class_names[c], float(row[c])) for c in chosen]
        for row, chosen in zip(probabilities, order, strict=True)
    ]
    show_predictions(given, files, best, [None] * len(files))


def _export(arguments: list[str]) -> None:
    from longtail.options import Export

    given = _parse(Export, "export", arguments)
    _check_json(given.json)
    _check_run(given.run)
    out = given.out or given.run / "model.onnx"
    if out.suffix.lower() != ".onnx":
        raise LongtailError(f"--out {out}: expected a name that ends in .onnx")
    _check_folder(out.parent)
    if out.exists() and not given.overwrite:
        raise LongtailError(f"{out}: is there already; use --overwrite or another --out")
    from longtail.data.pictures import find_images
    from longtail.export import export_onnx
    from longtail.files import write_made

    prior: str | list[float] = given.prior
    if prior not in {"uniform", "train"}:
        from longtail.engine.evaluate import frequencies
        from longtail.recognizer import read_card

        prior = frequencies(given.prior, read_card(given.run))
    made = export_onnx(given.run, out, prior, find_images(given.images))
    height, width, channels = made.shape
    if given.json:
        write_made(given.json, {**dataclasses.asdict(made), "path": str(made.path)})
    if not given.quiet:
        print(f"{made.path}: takes (N, {height}, {width}, {channels}) uint8, prior {given.prior}")
        what = "images" if given.images else "random images"
        print(f"largest difference of a probability from PyTorch's on {made.images} {what}: {made.difference:.1e}")


def _serve(arguments: list[str]) -> None:
    from longtail.options import Serve

    given = _parse(Serve, "serve", arguments)
    _check_run(given.run)
    if not 0 <= given.port <= 65_535:
        raise LongtailError(f"--port {given.port}: expected 0 to 65535")
    from longtail.serve import serve

    serve(given.run, given.host, given.port, None if given.root is None else str(given.root), given.quiet)


def _segment(segmenter: Segmenter, files: list[Path], given: Predict) -> None:
    """Write the labels of every image as a PNG, and an overlay to look at."""
    from tqdm import tqdm

    from longtail.data.pictures import open_image
    from longtail.files import write_made
    from longtail.segmenter import write_segmentation

    out = given.out or Path("segmented")
    _check_folder(out)
    if given.prior == "estimate" or given.coverage is not None:
        raise LongtailError(f"{given.run}: is a segmenter: --prior estimate and --coverage are for whole images")
    prior = _prior(given.prior, segmenter)
    names = segmenter.card.class_names
    rows: list[dict[str, Any]] = []
    for file in tqdm(files, unit="image", disable=given.quiet or not sys.stderr.isatty(), leave=False):
        labels = next(segmenter.segment(open_image(file), prior, _looks(given)))
        counts = labels.flatten().bincount(minlength=len(names))
        best = [index for index in counts.argsort(descending=True).tolist() if counts[index]]
        paths = write_segmentation(out, file, labels, len(names))
        rows.append(
            {
                "path": str(file),
                "labels": str(paths[0]),
                "overlay": str(paths[1]),
                "shares": {names[index]: float(counts[index]) / labels.numel() for index in best},
            }
        )
    if given.json:
        write_made(given.json, rows)
    if not given.quiet:
        shown = [
            [row["path"], row["labels"], ", ".join(f"{n} {v:.3f}" for n, v in list(row["shares"].items())[: given.top])]
            for row in rows
        ]
        print_table(["path", "labels", "largest shares"], shown, left=True)
        print(f"labels (value 1 is {names[0]}) and overlays: {out}")


def _prior(text: str, recognizer: Recognizer) -> str | list[float]:
    """Return what --prior stands for, as the Python interface takes it."""
    from longtail.engine.evaluate import frequencies

    return text if text in {"uniform", "train", "estimate"} else frequencies(text, recognizer.card)


def _compare(arguments: list[str]) -> None:
    from longtail.config import checked, load_recipe
    from longtail.options import Compare

    name, rest = _split_recipe(arguments, "digits-lt")
    recipe, rest = _with_data(load_recipe(name), rest, named=rest != arguments)
    given = _parse(Compare, "compare", rest, Compare(config=recipe.config))
    for option, number in (("seeds", given.seeds), ("jobs", given.jobs)):
        if number < 1:
            raise LongtailError(f"--{option} {number}: expected at least 1")
    config = checked(given.config)
    out = given.out or Path("runs") / f"compare-{recipe.name}"
    _check_folder(out)
    _check_json(given.json)

    from longtail.engine.compare import as_json, as_json_lines, compare
    from longtail.evaluation.comparison import differences, run_name, table
    from longtail.files import write_made
    from longtail.report import comparison_report, run_report

    methods = [method.strip() for method in given.methods.split(",")]
    seeds = range(config.seed, config.seed + given.seeds)

    def say(line: str) -> None:
        if not given.quiet:
            print(line, file=sys.stderr)

    records = compare(
        config,
        methods,
        seeds,
        out,
        match=given.match,
        imbalances=_factors(given.imbalances),
        jobs=given.jobs,
        overwrite=given.overwrite,
        quiet=given.quiet,
        say=say,
    )
    for record in records:
        run_report(out / run_name(record.method, record.seed, record.imbalance))
    page = comparison_report(records, out, given.match)
    if given.json:
        write_made(given.json, as_json_lines(records) if given.json.suffix == ".jsonl" else as_json(records))
    print_table(*table(records))
    print(f"accuracy in %, mean ± standard deviation over {given.seeds} seed{'s' * (given.seeds != 1)}; ", end="")
    print("equal student passes" if given.match == "passes" else "equal epochs")
    for difference in differences(records):
        print(difference)
    print(f"report: {page}")


def _report(arguments: list[str]) -> None:
    from longtail.options import Report

    given = _parse(Report, "report", arguments)
    if not given.runs:
        raise LongtailError("report: expected the folder of a run, or of several")
    for run in given.runs:
        _check_run(run)
    page = given.out or Path("comparison.html")
    if len(given.runs) == 1 and given.out is not None:
        raise LongtailError(f"--out {given.out}: is for several runs; the page of one is {given.runs[0]}/report.html")
    if page.is_dir():
        raise LongtailError(f"--out {page}: is a folder, expected a file")
    _check_folder(page.parent)
    _check_json(given.json)

    from longtail.engine.compare import as_json
    from longtail.engine.finished import read_finished, record
    from longtail.evaluation.comparison import differences, table
    from longtail.files import write_made
    from longtail.report import run_report, runs_report

    if len(given.runs) == 1:
        records, page = [record(read_finished(given.runs[0]))], run_report(given.runs[0])
    else:
        records = runs_report(given.runs, page)
    if given.json:
        write_made(given.json, as_json(records))
    if not given.quiet:
        print_table(*table(records))
        for difference in differences(records):
            print(difference)
        print(f"report: {page}")


def _factors(text: str | None) -> list[float | None]:
    """Return the imbalance factors of a list with commas; None alone where none is given."""
    if text is None:
        return [None]
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise LongtailError(
            f"--imbalances '{text}': expected numbers with commas between them, 10,100 for one"
        ) from None


def _recipes(arguments: list[str]) -> None:
    from longtail.config import load_recipe, recipe_names
    from longtail.options import Recipes

    given = _parse(Recipes, "recipes", arguments)
    _check_json(given.json)
    recipes = [load_recipe(name) for name in recipe_names()]
    if given.json:
        table = [
            {
                "recipe": recipe.name,
                "summary": recipe.about.summary,
                "paper": recipe.about.paper,
                "command": recipe.about.command,
                "expected": recipe.about.expected or None,
            }
            for recipe in recipes
        ]
        from longtail.files import write_made

        write_made(given.json, table)
    if not given.quiet:
        rows = [[r.name, r.about.summary, r.about.expected or "–"] for r in recipes]
        width = max(len(row[1]) for row in rows)
        print_table(["recipe", "what".ljust(width), "expected"], [[a, b.ljust(width), c] for a, b, c in rows])


def _completion(arguments: list[str]) -> None:
    from longtail.completion import SHELLS, gathered, script
    from longtail.config import recipe_names
    from longtail.data.naming import NAMED

    if arguments[:1] in (["-h"], ["--help"]):
        print('usage: longtail completion bash | zsh | fish\n\nIn ~/.bashrc: eval "$(longtail completion bash)"')
        return
    if len(arguments) != 1:
        raise LongtailError(f"completion: expected one of {', '.join(SHELLS)}")
    named = {"train": recipe_names(), "compare": recipe_names(), "inspect": NAMED, "split": NAMED, "embed": NAMED}
    print(script(arguments[0], gathered(_commands(), {**named, "completion": SHELLS})), end="")
