"""Accuracy of each method for imbalance factors up to thousands.

Fashion-MNIST (Debian's package dataset-fashion-mnist) has 6,000 images per class, enough for a tail class of one image
and a head class of thousands. Images have 14 × 14 pixels, so that two cores suffice; the number of student passes is
about the same for every factor.

The classes of CIFAR-100 have 500 images, so its largest imbalance factor is 500.

Commands:
    python benchmarks/studies/imbalance.py fashion --seeds 3      (--fashion FOLDER where it is not Debian's)
    python benchmarks/studies/imbalance.py cifar --seeds 3        (--root DATA)
each with --out FOLDER and --json FILE.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
from common import Variant, cifar, parser, study
from PIL import Image

from longtail.config import load_recipe

NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
METHODS: dict[str, Variant] = {
    name: {"method": name, "gml": {"distillation_weight": 0.0}} for name in ("ce", "la", "gml")
}
PASSES = 60_000
CIFAR_EPOCHS = 8
FACTORS = (10, 100, 500, 1000, 5000)


def convert(fashion: Path, out: Path) -> Path:
    """Write the data set as Parquet in the layout of the Hugging Face Hub, and return its folder."""
    import pyarrow as pa
    from pyarrow import parquet

    paths = {split: out / "data" / f"{split}-00000-of-00001.parquet" for split in ("train", "test")}
    for split, stem in (("train", "train"), ("test", "t10k")):
        if paths[split].is_file():
            continue
        pixels = _read(fashion / f"{stem}-images-idx3-ubyte.gz", 16)
        labels = _read(fashion / f"{stem}-labels-idx1-ubyte.gz", 8)
        images = []
        for image in pixels.reshape(-1, 28, 28):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue()})
        paths[split].parent.mkdir(parents=True, exist_ok=True)
        # names are sorted; the digit keeps the order of the labels
        names = [f"{label} {NAMES[label]}" for label in labels.tolist()]
        parquet.write_table(pa.table({"image": images, "label": names}), paths[split])
    return out


def _read(path: Path, header: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("study", choices=["fashion", "cifar"])
    options.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    args = options.parse_args()
    command = f"python benchmarks/studies/imbalance.py {args.study} --seeds {args.seeds}"
    if args.study == "cifar":
        base = cifar(args.root, CIFAR_EPOCHS, 500)
        budget = (
            f"ResNet-8, {CIFAR_EPOCHS} epochs of one student view, batch 128, crop and mirror, one-cycle; "
            f"gml's teacher: ResNet-14, {CIFAR_EPOCHS} epochs"
        )
        study(base, METHODS, args, command=command, budget=budget, baseline="la")
        return
    base = load_recipe("digits-lt").config
    data: dict[str, Any] = {"source": "hub", "profile": "exponential", "class_order": "index", "image_size": 14}
    root = str(convert(args.fashion, args.out / "set"))
    base = base.replace(data={**data, "augment": "cifar-plain", "root": root})
    factors = {}
    for factor in FACTORS:
        images = sum(int(6000 * (1 / factor) ** (c / 9)) for c in range(10))
        epochs = round(PASSES / images)
        factors[float(factor)] = {"epochs": epochs, "teacher": {"epochs": epochs}}
    study(
        base,
        METHODS,
        args,
        command=command,
        budget=f"Fashion-MNIST at 14 × 14, head of 6,000 images; conv8 student and teacher, about {PASSES:,} student "
        "passes, batch 64, one-cycle, crop and mirror",
        baseline="la",
        factors=factors,
    )


if __name__ == "__main__":
    main()
