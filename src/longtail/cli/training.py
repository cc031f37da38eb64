"""Commands that train: train, compare, rebalance; and the list of recipes."""

from __future__ import annotations

import time
from pathlib import Path

from longtail.cli.checks import check_folder, check_is_not_data, check_output, check_outside_data, check_run
from longtail.cli.console import print_metrics, print_table, show_messages
from longtail.cli.options import Compare, Rebalance, Recipes, Train
from longtail.cli.parsing import parse, parse_with_config, recipe_with_data
from longtail.errors import LongtailError
from longtail.files import write_json_output

_NOT_COMPARED = {
    "method": "a comparison takes --methods, such as --methods la,gml",
    "minutes": "the runs of a comparison have equal epochs or passes",
}
"""Settings that a comparison does not take, with what to do instead."""


def train(arguments: list[str]) -> None:
    """Train, evaluate and save a model."""
    started = time.monotonic()
    from longtail.config import choose_method

    recipe, rest = recipe_with_data(arguments, "digits-lt")
    options, config = parse_with_config(Train, "train", rest, recipe.config)
    if options.resume and options.overwrite:
        raise LongtailError("--resume and --overwrite contradict each other; give one")
    out = options.out or Path("runs") / f"{recipe.name}-{choose_method(config)[0].method}-seed{config.seed}"
    check_folder(out)
    check_outside_data(out, config.data)
    check_output(options.json)
    check_is_not_data(options.json, "--json", config.data)
    show_messages(options.quiet)

    from longtail.distributed import rank, shutdown
    from longtail.report import run_report
    from longtail.tasks.evaluate import format_metrics
    from longtail.training.trainer import fit

    run = fit(config, out, resume=options.resume, overwrite=options.overwrite, quiet=options.quiet, started=started)
    is_first = rank() == 0
    shutdown()
    if not is_first:
        return
    page = run_report(out)
    metrics = format_metrics(run.test_metrics, run.model_config)
    if options.json:
        write_json_output(options.json, metrics)
    print_metrics(run.model_config.task, metrics)
    if run.model_config.calibrated_on:
        print(run.model_config.calibrated_on)
    print(f"{run.student_passes:,} student passes in {run.seconds:.0f} s", end="")
    print(f", the teacher took {run.teacher_seconds:.0f} s" if run.teacher_seconds else "")
    print(f"model:  {out / 'recognizer'}\nreport: {page}")


def compare(arguments: list[str]) -> None:
    """Train several methods with several seeds under one recipe."""
    from longtail.config import choose_method

    recipe, rest = recipe_with_data(arguments, "digits-lt")
    for flag, advice in _NOT_COMPARED.items():
        if any(argument.partition("=")[0] == f"--{flag}" for argument in rest):
            raise LongtailError(f"--{flag}: is for longtail train; {advice}")
    options, config = parse_with_config(Compare, "compare", rest, recipe.config, hidden=tuple(_NOT_COMPARED))
    for flag, number in (("seeds", options.seeds), ("jobs", options.jobs)):
        if number is not None and number < 1:
            raise LongtailError(f"--{flag} {number}: expected at least 1")
    if config.minutes is not None:
        raise LongtailError(f"minutes: is for longtail train; {_NOT_COMPARED['minutes']}")
    methods = ["ce", "la", choose_method(config)[0].method]  # of the recipe
    methods = list(dict.fromkeys(methods)) if options.methods is None else options.methods.split(",")
    out = options.out or Path("runs") / f"compare-{recipe.name}"
    check_folder(out)
    check_outside_data(out, config.data)
    check_output(options.json, lines=True)
    check_is_not_data(options.json, "--json", config.data)
    show_messages(options.quiet)

    from longtail.experiments.compare import as_json, as_json_lines
    from longtail.experiments.compare import compare as compare_methods
    from longtail.experiments.priors import training_prior_lines
    from longtail.experiments.records import differences, recommendation, run_name, table
    from longtail.report import comparison_report, run_report

    records = compare_methods(
        config,
        [method.strip() for method in methods],
        range(config.seed, config.seed + options.seeds),
        out,
        budget=options.budget,
        imbalances=_imbalances(options.imbalances),
        jobs=options.jobs,
        overwrite=options.overwrite,
        quiet=options.quiet,
    )
    runs = [out / run_name(record.method, record.seed, record.imbalance) for record in records]
    for run in runs:
        run_report(run)
    page = comparison_report(records, out, options.budget)
    if options.json:
        write_json_output(
            options.json, as_json_lines(records) if options.json.suffix.lower() == ".jsonl" else as_json(records)
        )
    print_table(*table(records))
    print(f"in %, mean ± standard deviation over {options.seeds} seed{'s' * (options.seeds != 1)}; ", end="")
    print("equal student passes" if options.budget == "passes" else "equal epochs")
    for line in (*training_prior_lines(records, runs), *differences(records)):
        print(line)
    if advice := recommendation(records):
        pairs = len(differences(records))
        doubt = f", without correction for {pairs} comparisons" if pairs > 1 else ""
        print(f"{advice}; chosen by the test images{doubt}")
    print(f"report: {page}")


def _imbalances(text: str | None) -> list[float | None]:
    """Return the imbalance factors of a list separated by commas; only None where none is given."""
    if text is None:
        return [None]
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise LongtailError(
            f"--imbalances '{text}': expected numbers separated by commas, for example 10,100"
        ) from None


def rebalance(arguments: list[str]) -> None:
    """Train a new classifier on a run's encoder."""
    options = parse(Rebalance, "rebalance", arguments)
    check_output(options.json)
    check_run(options.run)
    beside = options.run if options.run.name not in {"", ".."} else options.run.resolve()  # such as . has no name
    out = options.out or beside.with_name(f"{options.run.resolve().name}-{options.method}")
    check_folder(out)
    show_messages(options.quiet)

    from longtail.experiments.rebalance import RebalanceSettings
    from longtail.experiments.rebalance import rebalance as rebalance_run
    from longtail.inference.model_config import read_model_config
    from longtail.report import run_report
    from longtail.tasks.evaluate import format_metrics

    settings = RebalanceSettings(options.method, epochs=options.epochs, views=options.views, tau=options.tau)
    root = None if options.root is None else str(options.root)
    test_metrics = rebalance_run(options.run, out, settings, root)
    model_config = read_model_config(out)
    metrics = format_metrics(test_metrics, model_config)
    page = run_report(out)
    if options.json:
        write_json_output(options.json, metrics)
    if not options.quiet:
        print_metrics(model_config.task, metrics)
        print(f"model:  {out / 'recognizer'}\nreport: {page}")


def recipes(arguments: list[str]) -> None:
    """List the recipes."""
    from longtail.config import load_header, recipe_names

    options = parse(Recipes, "recipes", arguments)
    check_output(options.json)
    headers = {name: load_header(name) for name in recipe_names()}
    if options.json:
        table = [
            {
                "recipe": name,
                "summary": header.summary,
                "paper": header.paper,
                "command": header.command,
                "expected": header.expected or None,
            }
            for name, header in headers.items()
        ]
        write_json_output(options.json, table)
    if not options.quiet:
        rows = [[name, header.summary, header.expected or "–"] for name, header in headers.items()]
        width = max(len(row[1]) for row in rows)
        print_table(["recipe", "what".ljust(width), "expected"], [[a, b.ljust(width), c] for a, b, c in rows])
