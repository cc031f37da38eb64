"""What the report of a classifier's run shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from longtail import plots
from longtail.config import Config
from longtail.data.class_order import head_first
from longtail.data.data_uri import file_data_uri
from longtail.data.paths import printable
from longtail.inference.model_config import ModelConfig
from longtail.tasks.base import Metrics, ReportSections
from longtail.tasks.classification.diagnosis import diagnose
from longtail.tasks.classification.error_images import error_image

_ERROR_KINDS = {
    "to_larger": "A rare class predicted as a more frequent one",
    "to_smaller": "A frequent class predicted as a rarer one",
    "alike": "Between classes of similar frequency",
}


def report_sections(
    run: Path,
    model_config: ModelConfig,
    config: Config,
    test: Mapping[str, Metrics],
    epochs: Sequence[Mapping[str, Any]],
) -> ReportSections:
    """Return the sections, see :meth:`longtail.tasks.base.Task.report`."""
    names, counts = model_config.class_names, model_config.class_counts
    groups = config.shots.groups(counts)
    main = test[model_config.predicts_under]
    accuracy, intervals = main["per_class"], main.get("per_class_interval", [None] * len(groups))
    calibration = []
    if "calibration" in main:
        title = f"Reliability: expected calibration error {main['calibration']['ece']:.1f} %"
        calibration = [
            (title, plots.reliability(main["calibration"]["diagram"])),
            ("Accuracy without the least confident images", plots.rejection(main["calibration"]["rejection"])),
        ]
    columns = [
        ("balanced_accuracy", "balanced accuracy"),
        ("top1", "top-1"),
        ("top5", "top-5"),
        *((group, group) for group in ("many", "medium", "few")),
        ("worst_tenth", "worst tenth of the classes"),
        ("worst_class", "worst class"),
        ("harmonic_mean", "harmonic mean"),
    ]
    order = head_first(counts)
    ordered = [names[i] for i in order], [groups[i] for i in order]
    return ReportSections(
        counted="training images",
        note=f"Classes in many have more than {config.shots.many_above} training images, classes in few fewer than "
        f"{config.shots.few_below}.",
        # a run of an earlier version has not all of them
        columns=[(name, title) for name, title in columns if name in main],
        group_sizes={group: groups.count(group) for group in ("many", "medium", "few")},
        figures=[
            ("Class distribution", plots.class_histogram(ordered[0], [counts[i] for i in order], ordered[1])),
            ("Accuracy by class", plots.per_class(ordered[0], [accuracy[i] for i in order], ordered[1])),
            *calibration,
        ],
        header=["class", "training images", "group", "accuracy, %", "95 % interval"],
        classes=[[names[i], f"{counts[i]:,}", groups[i], accuracy[i], _interval(intervals[i])] for i in order],
        findings=diagnose(model_config, config, epochs, test) if epochs else (),
        confusions=[
            [
                *(
                    Markup("<bdi>{}</bdi> ({:,})").format(names[entry[key]], counts[entry[key]])
                    for key in ("class", "predicted")
                ),
                f"{entry['share']:.0f} % ({entry['images']})",
            ]
            for entry in main.get("confusions", ())
        ],
        errors=_errors(run, names, main.get("errors", {})),
    )


def _errors(
    run: Path, names: Sequence[str], errors: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[tuple[str, list[tuple[str, Any, str]]]]:
    """Return the most confident errors by kind, those whose image the run has kept."""
    sections: list[tuple[str, list[tuple[str, Any, str]]]] = []
    for kind, entries in errors.items():
        images: list[tuple[str, Any, str]] = []
        for entry in entries:
            file = error_image(run, entry["image"])
            if file is not None:
                label, predicted = names[entry["class"]], names[entry["predicted"]]
                confidence = f"{entry['confidence']:.0f}\N{NO-BREAK SPACE}%"
                caption = Markup("<bdi>{}</bdi><br><span class=soft>predicted</span> <bdi>{}</bdi>, {}").format(
                    label, predicted, confidence
                )
                text = f"{label}, predicted {predicted}, {confidence}"
                if path := printable(entry.get("path", "")):  # an image in memory, or of an earlier version, has none
                    caption += Markup("<br><bdi class=soft>{}</bdi>").format(path)
                    text += f": {path}"
                images.append((file_data_uri(file), caption, text))
        if images:
            sections.append((_ERROR_KINDS[kind], images))
    return sections


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.0f} to {ends[1]:.0f}"
