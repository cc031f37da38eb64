"""What commands print: tables, metrics, how far probabilities can be trusted. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtail.options import Predict


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: bool = False) -> None:
    """Print a table; its first column, or with ``left`` all of them, flush left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for index, row in enumerate([header, *rows]):
        cells = [
            cell.ljust(w) if i == 0 or left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if index == 0:
            print("  ".join("─" * width for width in widths))


def percent(value: float | None) -> str:
    """Return a percentage with one digit, n/a for None."""
    return "n/a" if value is None else f"{value:.1f}"


def show_metrics(judged: dict[str, Any]) -> None:
    """Print what a test set says under each prior."""
    from longtail.evaluation.comparison import DENSE_COLUMNS

    named = {name: name.replace("_", " ") for name in ("balanced_accuracy", "top1", "top5", "many", "medium", "few")}
    if "mean_iou" in judged:
        named = {**dict(DENSE_COLUMNS), "top1": "pixel accuracy"}
    if "target_accuracy" in judged:
        named = {"target_accuracy": "accuracy at target", **named}
    names, header = list(named), ["prior", *named.values()]
    rows = [
        ["training" if prior == "train" else prior, *(percent(values[name]) for name in names)]
        for prior, values in judged["priors"].items()
    ]
    print_table(header, rows)


def show_trust(judged: dict[str, Any]) -> None:
    """Print how far the probabilities can be trusted, and what was estimated."""
    if "calibration" in judged:
        found = judged["calibration"]
        of_groups = ", ".join(f"{name} {values['ece']:.1f}" for name, values in found["groups"].items())
        print(
            f"calibration under the {judged['prior']} prior: error {found['ece']:.1f} % ({of_groups}), of classes "
            f"{found['class_ece']:.2f} %, NLL {found['nll']:.3f}, Brier {found['brier']:.3f}"
        )
    for method, entry in judged.get("estimates", {}).items():
        rows = list(zip(entry["frequencies"], entry["low"], entry["high"], judged["class_names"], strict=True))
        shown = ", ".join(f"{name} {q:.3f} ({low:.3f} to {high:.3f})" for q, low, high, name in sorted(rows)[:-4:-1])
        print(f"class frequencies by {method}, the largest with 95 % intervals: {shown}")
        if entry.get("pull") is not None:
            print(f"  pulled, as by {entry['pull']:.2g} times the images, {_towards(entry['power'])}")
    if "conformal" in judged:
        sets = judged["conformal"]
        for name in ("all", "many", "medium", "few"):
            if name in sets:
                print(
                    f"sets for {100 * sets['coverage']:g} % of each class, {name}: hold the truth in "
                    f"{sets[name]['covered']:.1f} %, {sets[name]['size']:.1f} classes each"
                )


def _towards(power: float) -> str:
    return "to all classes alike" if power == 0 else f"to the training frequencies to the power {power:.2f}"


def show_predictions(
    given: Predict, files: Sequence[Path], best: Sequence[list[tuple[str, float]]], sets: Sequence[list[str] | None]
) -> None:
    """Print classes and probabilities of images, and write them where ``--json`` says."""
    if given.json:
        from longtail.files import write_made

        write_made(
            given.json,
            [
                {
                    "path": str(file),
                    "class": row[0][0],
                    "probability": row[0][1],
                    "top": [{"class": name, "probability": value} for name, value in row],
                    **({} if names is None else {"set": names}),
                }
                for file, row, names in zip(files, best, sets, strict=True)
            ],
        )
    if not given.quiet:
        rows = [
            [
                str(file),
                row[0][0],
                f"{row[0][1]:.3f}",
                ", ".join(f"{name} {value:.3f}" for name, value in row[1:]),
                *([] if names is None else [", ".join(names) or "none"]),
            ]
            for file, row, names in zip(files, best, sets, strict=True)
        ]
        header = ["path", "class", "probability", "next"]
        print_table(header if given.coverage is None else [*header, "set"], rows)
