"""Commands on data sets: inspect, split, embed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtail.cli.checks import check_folder, check_is_not_data, check_output
from longtail.cli.console import Counter, print_table, show_messages
from longtail.cli.options import Embed, Inspect, Split
from longtail.cli.parsing import parse, split_source
from longtail.config import validate_section
from longtail.data.paths import printable
from longtail.errors import LongtailError
from longtail.files import write_json_output

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from longtail.data.inspection import Inspection

_SHOWN_PROBLEMS = 10  # of each kind
_SHOWN_NAMES = 20  # of classes or groups
_LISTED_CLASSES = 30  # of which all are listed, else the largest and the smallest
_WIDTH = 100  # of a line of classes
_CONFLICT = "same content in two classes"


def inspect(arguments: list[str]) -> None:
    """Print the class distribution and the problems of a data set; exit with code 1 where training would refuse it."""
    data, rest = split_source("inspect", arguments)
    options = parse(Inspect, "inspect SOURCE", rest, Inspect(data=data))
    check_output(options.json)
    check_output(options.plot, "--plot", ".png")
    check_output(options.fix, "--fix", ".csv")
    settings, shots = validate_section(options.data, "data"), validate_section(options.shots, "shots")
    check_is_not_data(options.json, "--json", settings)
    check_is_not_data(options.fix, "--fix", settings)
    from longtail.data.inspection import inspect as inspect_data

    with Counter(options.quiet) as counter:
        inspection = inspect_data(settings, options.seed, shots, counter.add, fix=options.fix)
    if options.json:
        write_json_output(options.json, inspection.to_dict())
    if options.plot:
        _plot(inspection, options.plot)
    if not options.quiet:
        _print_inspection(inspection)
        if options.fix:
            _print_fixed(inspection, options.fix)
    if inspection.errors or inspection.fixed_error is not None:
        sys.stdout.flush()
        sys.exit(1)


def _plot(inspection: Inspection, path: Path) -> None:
    from longtail import plots
    from longtail.data.class_order import head_first

    order = head_first(inspection.class_counts)
    figure = plots.class_histogram(
        [inspection.class_names[index] for index in order],
        [inspection.class_counts[index] for index in order],
        [inspection.groups[index] for index in order],
        inspection.counted,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save_png(figure, path)


def _print_inspection(inspection: Inspection) -> None:
    from longtail.data.inspection import histogram

    factor = inspection.imbalance_factor
    sizes = inspection.to_dict()["group_sizes"]
    rows = [
        [
            "images",
            _sizes(inspection.splits) + (f": {_sizes(inspection.split_sizes)}" if inspection.split_sizes else ""),
        ],
        ["classes", f"{len(inspection.class_names):,}"],
        ["counted", inspection.counted],
        ["imbalance factor", "∞ (a class has no images)" if factor is None else f"{factor:.1f}"],
        ["Gini", f"{inspection.gini:.3f}"],
        ["groups", ", ".join(f"{group} {sizes[group]}" for group in sizes)],
    ]
    rows += [[f"{side} in pixels", f"{v[0]} to {v[2]}, median {v[1]}"] for side, v in inspection.sides.items()]
    rows += [list(row) for row in inspection.details.rows]
    print_table([inspection.source, ""], rows, left=True)
    print()
    print("\n".join(histogram(inspection.class_counts, inspection.counted)))
    details = inspection.details
    if not 0 < len(details.class_rows) <= _SHOWN_NAMES:  # else the table below has all classes
        print()
        print("\n".join(_class_lines(inspection)))
    if details.class_rows:
        smallest = sorted(range(len(details.class_rows)), key=lambda index: inspection.class_counts[index])
        print()
        print_table(list(details.class_columns), [list(details.class_rows[i]) for i in smallest[:_SHOWN_NAMES]])
        if len(smallest) > _SHOWN_NAMES:
            print(f"and {len(smallest) - _SHOWN_NAMES:,} larger classes; --json FILE lists all")
    problems = [
        *(("error", text) for text in inspection.errors),
        *(("unreadable", f"{entry['path']}: {entry['reason']}") for entry in inspection.unreadable),
        *((_CONFLICT, " = ".join(group)) for group in inspection.conflicts),
        *(("same content in two splits", " = ".join(group)) for group in inspection.leaks),
        *(("same content", " = ".join(group)) for group in inspection.duplicates),
        *inspection.details.problems,
        *(("remark", text) for text in inspection.remarks),
    ]
    print("\nno problems found" if not problems else "")
    for kind in dict.fromkeys(kind for kind, _ in problems):
        texts = [text for other, text in problems if other == kind]
        for text in texts[:_SHOWN_PROBLEMS]:
            print(f"{kind}: {printable(text)}")
        if len(texts) > _SHOWN_PROBLEMS:
            print(f"{kind}: and {len(texts) - _SHOWN_PROBLEMS:,} more; --json FILE lists all")


def _print_fixed(inspection: Inspection, path: Path) -> None:
    copies, conflicts = inspection.fixed_copies, len(inspection.conflicts)
    without = f", without {copies:,} cop{'ies' if copies != 1 else 'y'} of others" if copies else ""
    if inspection.fixed_error is None:
        advice = f"longtail train {shlex.quote(str(path))} --data.root {shlex.quote(str(inspection.root))}"
    else:
        advice = f"training would refuse it too: {printable(inspection.fixed_error)}"
    print(f"fixed: {path} lists the {inspection.fixed:,} images that can be read{without}; {advice}")
    if conflicts:
        are = "image is" if conflicts == 1 else "images are"
        print(f"fixed: {conflicts:,} {are} in it under two classes ('{_CONFLICT}' above): remove the wrong rows")


def _class_lines(inspection: Inspection) -> list[str]:
    """Return the classes with their counts, head first, in columns; of many, the largest and the smallest."""
    from longtail.data.class_order import head_first

    cells = [
        f"{printable(inspection.class_names[index])} {inspection.class_counts[index]:,}"
        for index in head_first(inspection.class_counts)
    ]
    if len(cells) <= _LISTED_CLASSES:
        return _columns(cells)
    half = _LISTED_CLASSES // 3
    more = len(cells) - 2 * half
    return [*_columns(cells[:half]), f"… {more:,} more; --json FILE lists all …", *_columns(cells[-half:])]


def _columns(cells: Sequence[str]) -> list[str]:
    width = max(map(len, cells)) + 2
    per_line = max(1, _WIDTH // width)
    lines = (cells[start : start + per_line] for start in range(0, len(cells), per_line))
    return ["".join(cell.ljust(width) for cell in line).rstrip() for line in lines]


def _sizes(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in splits.items())


def split(arguments: list[str]) -> None:
    """Split a data set and write the table of its splits, or the files that its source writes."""
    data, rest = split_source("split", arguments)
    options = parse(Split, "split SOURCE", rest, Split(data=data))
    check_output(options.json)
    settings = validate_section(options.data, "data")
    check_is_not_data(options.json, "--json", settings)
    from longtail.data.splits import write_split, writes_table

    table = writes_table(settings)
    out = options.out or Path("split.csv" if table else "split")
    if table:
        check_output(out, "--out", ".csv")
        check_is_not_data(out, "--out", settings)
    elif out.suffix:
        raise LongtailError(f"--out {out}: expected the name of a folder, which gets a file for every split")
    else:
        check_folder(out)

    written = [out] if table else [out / f"{name}.json" for name in ("train", "val", "test")]
    there = next((path for path in written if path.exists()), None)
    if there is not None and not options.overwrite:
        raise LongtailError(f"{there}: exists already; use --overwrite, or another --out")
    if options.strict_groups and options.groups is None:
        raise LongtailError("--strict_groups: needs --groups COLUMN")
    summary = write_split(
        settings,
        out,
        options.val,
        options.test,
        options.seed,
        group_column=options.groups,
        strict_groups=options.strict_groups,
    )
    if options.json:
        write_json_output(options.json, summary)
    if not options.quiet:
        print_table(["split", "images"], [[split, f"{count:,}"] for split, count in summary["images"].items()])
        if summary["short"]:
            what = "images" if options.groups is None else "images or groups"
            print(f"too few {what} for every split: {printable(_listed(summary['short']))}")
        if options.test > 0 and not summary["images"].get("test", 1):
            print("no test images: no class has a second image; add some, since longtail train evaluates on them")
        if options.groups is not None:
            _print_groups(summary)
        for remark in summary.get("remarks", ()):
            print(printable(remark))
        print(f"split: {out}; longtail train {summary['data']}")


def _print_groups(summary: dict[str, Any]) -> None:
    divided, groups, ungrouped = summary["divided"], summary["groups"], summary["ungrouped"]
    if divided:
        print(
            f"groups in several splits: {len(divided):,} of {groups:,} ({printable(_listed(divided))}); without that, "
            f"these classes would be missing from train or test: {printable(_listed(summary['divided_for']))}; "
            "--strict_groups divides no group"
        )
    else:
        print(f"each of {groups:,} groups is in one split")
    if ungrouped:
        print(f"{ungrouped:,} images have no group, and are split as single images")


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more:,} more (--json FILE lists all)" if more > 0 else "")


def embed(arguments: list[str]) -> None:
    """Write the embeddings of a data set's images."""
    data, rest = split_source("embed", arguments)
    options = parse(Embed, "embed SOURCE", rest, Embed(data=data))
    check_output(options.json)
    check_output(options.out, "--out", ".npz")
    settings = validate_section(options.data, "data")
    check_is_not_data(options.json, "--json", settings)
    show_messages(options.quiet)
    from longtail.experiments.embed import embed as embed_data

    summary = embed_data(
        settings,
        options.model,
        options.out,
        seed=options.seed,
        pretrained=options.pretrained,
        batch_size=options.batch_size,
    )
    if options.json:
        write_json_output(options.json, summary)
    if not options.quiet:
        splits = [[split, f"{summary[split]:,}"] for split in ("train", "val", "test") if split in summary]
        print_table(["split", "images"], splits)
        print(f"embeddings of width {summary['width']}: {options.out}")
