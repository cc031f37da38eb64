"""Compares two versions of longtail bit by bit: the loss of every step and the final weights.

    python benchmarks/equality.py BEFORE/src AFTER/src [--shared FOLDER] [--only digits-gml,camvid-la]

Every case is one epoch of ``longtail train`` in a process of its own, once with each version's ``src`` on the path and
the same number of threads. Losses are recorded where Lightning Fabric gets them for the backward pass (a teacher's
too), weights from the file that the run leaves. Prints one line per case; the exit code is 1 where any differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

THREADS = 2
CASES: dict[str, list[str]] = {
    **{f"digits-{name}": ["digits-lt", "--method", name, "--epochs", "1"] for name in ("ce", "la", "gml", "paco")},
    **{
        f"cifar100-{name}": [
            *("cifar100-lt", "--data.root", "{shared}/cifar100", "--data.imbalance", "400", "--network", "resnet8"),
            *("--teacher.network", "resnet14", "--method", name, "--epochs", "1"),
        ]
        for name in ("la", "gml")
    },
    **{
        f"camvid-{name}": [
            *("camvid", "--data.root", "{shared}/camvid", "--network", "upernet:test_efficientnet:8"),
            *("--pretrained", "none", "--segmentation.crop", "96", "128", "--method", name, "--epochs", "1"),
        ]
        for name in ("ce", "la", "gml")
    },
}

# runs in the process of one version; what it uses of longtail is the command line alone
DRIVER = """
import json, sys
import torch
from lightning_fabric import Fabric
torch.set_num_threads({threads})
losses, backward = [], Fabric.backward
def recorded(self, tensor, *args, **kwargs):
    losses.append(float(tensor.detach()).hex())
    return backward(self, tensor, *args, **kwargs)
Fabric.backward = recorded
from longtail.cli import main
try:
    main(sys.argv[2:])
except SystemExit as stop:
    if stop.code:
        raise
json.dump(losses, open(sys.argv[1], "w"))
"""


def run(source: Path, arguments: list[str]) -> tuple[list[str], str]:
    """Return the losses of every step, and a digest of the final weights."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        out, losses = Path(folder) / "run", Path(folder) / "losses.json"
        environment = {**os.environ, "PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": str(THREADS)}
        driver = DRIVER.format(threads=THREADS)
        subprocess.run(
            [sys.executable, "-c", driver, str(losses), "train", *arguments, "--out", str(out), "--quiet"],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        weights: dict[str, Any] = load_file(out / "recognizer" / "model.safetensors")
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(name.encode() + weights[name].tobytes())
        return json.loads(losses.read_text()), digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--shared", default="../shared/data", help="folder of cifar100/ and camvid/")
    parser.add_argument("--only", help="names of cases, with commas between them")
    parser.add_argument("--keep", type=Path, help="file that remembers what the first version gave")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(CASES)
    known = json.loads(options.keep.read_text()) if options.keep and options.keep.is_file() else {}
    differ = False
    for name in names:
        arguments = [argument.format(shared=options.shared) for argument in CASES[name]]
        if name not in known:
            known[name] = run(options.before, arguments)
            if options.keep:
                options.keep.write_text(json.dumps(known))
        (old_losses, old_weights), (losses, weights) = known[name], run(options.after, arguments)
        first = next((i for i, (a, b) in enumerate(zip(old_losses, losses, strict=False)) if a != b), None)
        same = first is None and len(losses) == len(old_losses) and weights == old_weights
        differ |= not same
        where = "equal" if same else f"DIFFERENT from step {first} of {len(old_losses)}, {len(losses)}"
        print(f"{name:>16}: {len(losses)} losses and the weights {where} (sha256 {weights[:12]})", flush=True)
    sys.exit(int(differ))


if __name__ == "__main__":
    main()
