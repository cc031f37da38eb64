"""Write the tables of benchmarks/results to README.md and docs, and plot the figures of docs/figures.

A table is between ``<!-- table: PATH -->`` and ``<!-- end -->``; a test compares the pages with the results.

Command: python benchmarks/refresh.py
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longtail.config import load_recipe, recipe_names
from longtail.experiments.records import Record, differences, imbalances_of, markdown, methods_of, summarize

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"
COLORS = {"ce": "#808890", "la": "#4477aa", "bcl": "#228833", "proco": "#b8860b", "gml": "#cc5566"}


def read(name: str) -> tuple[dict[str, Any], list[Record]]:
    """Return a results file and its records."""
    results: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return results, [Record.from_dict(record) for record in results["records"]]


def refreshed(text: str) -> str:
    """Return the text of a page with up-to-date tables."""

    def table(match: re.Match[str]) -> str:
        kind, path = match[1], match[2]
        formats = {"features": features, "priors": priors, "runs": runs}
        if kind in formats:
            lines = formats[kind](json.loads((ROOT / path).read_text(encoding="utf-8")))
        else:
            results, records = read(Path(path).name)
            lines = "\n".join(markdown(records, results.get("baseline")))
        return f"<!-- {kind}: {path} -->\n{lines}\n<!-- end -->"

    text = re.sub(r"<!-- recipes -->\n.*?<!-- end -->", lambda _: recipes(), text, flags=re.DOTALL)
    return re.sub(r"<!-- (table|features|priors|runs): (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def recipes() -> str:
    """Return the headers of all recipes as Markdown."""
    lines = ["<!-- recipes -->"]
    for recipe in map(load_recipe, recipe_names()):
        about = recipe.about
        lines += [f"## {recipe.name}", "", f"{about.summary[0].upper()}{about.summary[1:]}. Source: {about.paper}.", ""]
        lines += [f"Expected: {about.expected}.", ""] if about.expected else []
        lines += ["```", about.command, "```", ""]
    return "\n".join([*lines[:-1], "<!-- end -->"])


def features(results: dict[str, Any]) -> str:
    """Return the results of the study of the features as two tables of Markdown."""
    values = results["mean and deviation"]

    def cell(pair: list[float | None], digits: int) -> str:
        mean, deviation = pair
        assert mean is not None
        return f"{mean:.{digits}f} ± {deviation or 0:.{digits}f}".replace("-", "−")

    models = ("one component, the mixture's width", "one von Mises–Fisher, its own width", "mixture")
    lines = ["| on test images | many | medium | few |", "| --- | --- | --- | --- |"]
    rows = [(f"log-likelihood (nats), {model}", f"log-likelihood {model}", 2) for model in models]
    rows += [("keys a class", "keys", 1), ("components that an image uses", "components", 1)]
    rows += [("spread within classes, 1 − ‖mean‖", "spread", 3)]
    rows += [(f"accuracy %, {model} alone", f"accuracy {model}", 1) for model in models]
    rows += [("accuracy %, classifier alone", "accuracy classifier", 1)]
    rows += [
        (f"accuracy %, classifier + {share} · mixture", f"accuracy classifier + {share} mixture", 1)
        for share in ("0.25", "0.5", "1")
    ]
    for title, name, digits in rows:
        cells = [cell(values[name][group], digits) for group in ("many", "medium", "few")]
        if name.startswith("accuracy"):
            title += f" (all: {cell(values[name]['balanced_accuracy'], 1)})"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    names = ("ce", "la", "gml")
    lines += ["", f"| features of the student | {' | '.join(names)} |", "| --- | --- | --- | --- |"]
    for measure in values["geometry ce"]:
        cells = [cell(values[f"geometry {name}"][measure], 3) for name in names]
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    lines += ["", f"- temperature learned: {cell(values['temperature'], 3)}"]
    lines += [f"- correlation of spread and log count: {cell(values['correlation of spread and log count'], 2)}"]
    return "\n".join(lines)


def priors(results: dict[str, Any]) -> str:
    """Return the accuracies of the study of the priors as two tables of Markdown."""
    rows = {title: values for title, values in results["mean and deviation"].items() if title != "recogniser"}
    columns = [name for name in next(iter(rows.values())) if not name.startswith("held by")]
    lines = [f"| the target's frequencies | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for title, values in rows.items():
        cells = [f"{mean:.1f} ± {deviation or 0:.1f}" for mean, deviation in (values[name] for name in columns)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| coverage of the 95 % intervals, % of the classes | map | em | bbse |", "| --- | --- | --- | --- |"]
    for title, values in rows.items():
        cells = [f"{values[f'held by {method}'][0]:.0f}" for method in ("map", "em", "bbse")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs(results: dict[str, Any]) -> str:
    """Return runs as a table of Markdown: mean and deviation over their seeds, and the columns of the file.

    Below it are the paired differences that the file has, see ``benchmarks/accelerator_results.py``.
    """
    metrics = ("balanced_accuracy", "many", "medium", "few")
    columns: dict[str, str] = results["columns"]
    header = ["run", "seeds", "balanced accuracy", "many", "medium", "few", *columns.values()]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for run in dict.fromkeys(entry["run"] for entry in results["runs"]):
        entries = [entry for entry in results["runs"] if entry["run"] == run]
        cells = [run, str(len(entries))]
        for name in (*metrics, *columns):
            values = [entry[name] for entry in entries if entry[name] is not None]
            if not values:
                cells.append("")
                continue
            cells.append(f"{statistics.fmean(values):.{1 if name in metrics or name == 'paper' else 0}f}")
            if name in metrics and len(values) > 1:
                cells[-1] += f" ± {statistics.stdev(values):.1f}"
        lines.append(f"| {' | '.join(cells)} |")
    if gaps := results.get("differences"):
        lines += ["", *map(_difference, gaps)]
    return "\n".join(lines)


def _difference(gap: dict[str, Any]) -> str:
    mean, low, high, *by_seed = (
        f"{value:+.2f}".replace("-", "−") for value in (gap["mean"], gap["low"], gap["high"], *gap["by_seed"])
    )
    seeds = f"by seed {', '.join(by_seed)}" if len(by_seed) > 1 else "one seed"
    pair = f"{gap['run']} − {gap['baseline']}"
    return f"- {pair}: {mean} points, 95 % interval {low} to {high} over test images, {seeds}"


def style(axes: Axes, title: str) -> None:
    """Set the title, small labels, and only the left and bottom spines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)


def methods(figure: Figure) -> None:
    """Plot every run of the study of the methods as a dot, and the mean of each method."""
    files = {
        "methods-cifar-100.json": "CIFAR-100-LT, imbalance 100",
        "methods-cifar-10.json": "CIFAR-100-LT, imbalance 10",
        "methods-digits.json": "digits-lt",
    }
    for column, (name, title) in enumerate(files.items()):
        axes = figure.add_subplot(1, len(files), column + 1)
        _, records = read(name)
        names = methods_of(records)
        for row, method in enumerate(names):
            accuracies = [r.metrics["balanced_accuracy"] for r in records if r.method == method]
            values = [accuracy for accuracy in accuracies if accuracy is not None]
            color = COLORS.get(method, "#9977aa")
            axes.plot(values, [row] * len(values), "o", color=color, markersize=3.5, alpha=0.6)
            axes.plot(statistics.fmean(values), row, "|", color=color, markersize=16, markeredgewidth=2)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("balanced accuracy, %", fontsize=8)
        style(axes, title)


def parts(figure: Figure) -> None:
    """Plot the paired difference of every variant from distilled logit adjustment with its t-interval."""
    for column, (name, title) in enumerate(
        {"parts-cifar.json": "CIFAR-100-LT", "parts-digits.json": "digits-lt"}.items()
    ):
        axes = figure.add_subplot(1, 2, column + 1)
        results, records = read(name)
        gaps = differences(records, results["baseline"])
        for row, difference in enumerate(gaps):
            assert difference.low is not None
            assert difference.high is not None
            significant = not difference.low <= 0 <= difference.high
            axes.plot(
                [difference.low, difference.high],
                [row, row],
                color="#cc5566" if significant else "#9098a0",
                linewidth=1.5,
            )
            axes.plot(difference.mean, row, "o", color="#cc5566" if significant else "#606870", markersize=4)
        axes.axvline(0, color="#9098a0", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(gaps)), [difference.method for difference in gaps])
        axes.invert_yaxis()
        axes.set_xlabel(f"points ahead of {results['baseline']}, 95 % interval", fontsize=8)
        style(axes, title)


def imbalance(figure: Figure) -> None:
    """Plot balanced accuracy and accuracy of the few classes against the imbalance factor."""
    _, records = read("imbalance-fashion.json")
    for column, (name, title) in enumerate({"balanced_accuracy": "balanced accuracy, %", "few": "few, %"}.items()):
        axes = figure.add_subplot(1, 2, column + 1)
        for method in methods_of(records):
            points = []
            for factor in imbalances_of(records):
                summary = summarize([r for r in records if r.imbalance == factor], method, name)
                if summary is not None and factor is not None:
                    points.append((factor, summary.mean, summary.deviation or 0.0))
            if points:
                x, y, deviation = zip(*points, strict=True)
                axes.errorbar(
                    x, y, yerr=deviation, color=COLORS[method], marker="o", markersize=3, capsize=2, label=method
                )
        axes.set_xscale("log")
        axes.set_xlabel("imbalance factor", fontsize=8)
        style(axes, title)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False)


def queues(figure: Figure) -> None:
    """Plot accuracy and time against K and k_m."""
    _, records = read("queues-digits.json")
    for row, (field, label) in enumerate({"balanced_accuracy": "balanced accuracy, %", "seconds": "seconds"}.items()):
        for column, name in enumerate(("K", "k_m")):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            points = []
            for method in methods_of(records):
                if method.startswith(f"{name} = ") or (name == "k_m" and method == "K = 400"):
                    summary = summarize(records, method, field)
                    assert summary is not None
                    value = 2 if name == "k_m" and method == "K = 400" else int(method.partition(" = ")[2])
                    points.append((value, summary.mean, summary.deviation or 0.0))
            x, y, deviation = zip(*sorted(points), strict=True)
            axes.errorbar(x, y, yerr=deviation, color=COLORS["gml"], marker="o", markersize=3, capsize=2)
            axes.set_xscale("log")
            axes.set_xlabel(name, fontsize=8)
            if field == "seconds":
                axes.set_ylim(bottom=0)
            style(axes, label)


PLOTS: dict[str, tuple[Callable[[Figure], None], tuple[float, float], Sequence[str]]] = {
    "methods": (methods, (10, 3.2), ("methods-cifar-100.json", "methods-cifar-10.json", "methods-digits.json")),
    "parts": (parts, (10, 4.6), ("parts-cifar.json", "parts-digits.json")),
    "imbalance": (imbalance, (8, 3), ("imbalance-fashion.json",)),
    "queues": (queues, (8, 4.6), ("queues-digits.json",)),
}


def main() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")
    FIGURES.mkdir(exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "longtail"}):
        for name, (plot, size, files) in PLOTS.items():
            if all((RESULTS / file).is_file() for file in files):
                figure = Figure(figsize=size, layout="constrained")
                plot(figure)
                figure.savefig(FIGURES / f"{name}.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
