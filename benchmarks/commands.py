"""Where does the time of a whole command go: the network, decoding, resizing, or what is left?

`longtail embed`, `train` and `predict` on a folder of 2,000 JPEG photographs of 640 × 480, each as a process of its
own, with EfficientNet-Lite0 of random weights: the first time, and again with the resized copies that this one kept.

- network: the part of the time from start to end in which the process was inside the network (training: forward,
  losses, backward and optimizer). Images that other threads decode meanwhile cost their share of the cores.
- imports: until the command's own code begins.
- decoding, resizing: seconds of a processor, in whatever thread.

Command: python benchmarks/commands.py [--images 2000] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch

from data import detailed

CHILD = """
import atexit, functools, json, os, sys, threading, time
started = float(os.environ["STARTED"])
import longtail.cli
from PIL import Image, ImageFile
from longtail.nn.encoder import Encoder, FrozenEncoder
from longtail.training.steps import Student

told = {"imports": time.time() - started, "network": 0.0, "decoding": 0.0, "resizing": 0.0}
inside = threading.local()

def counted(owner, name, part, clock):
    function = getattr(owner, name)

    @functools.wraps(function)
    def run(*args, **options):
        if getattr(inside, part, False):  # counted by the call around this one
            return function(*args, **options)
        setattr(inside, part, True)
        before = clock()
        try:
            return function(*args, **options)
        finally:
            told[part] += clock() - before
            setattr(inside, part, False)

    setattr(owner, name, run)

counted(FrozenEncoder, "forward", "network", time.perf_counter)
counted(Encoder, "forward", "network", time.perf_counter)
counted(Student, "optimize", "network", time.perf_counter)
counted(ImageFile.ImageFile, "load", "decoding", time.thread_time)
counted(Image.Image, "resize", "resizing", time.thread_time)

def write():
    told["processors"] = sum(os.times()[:2])
    with open(os.environ["TOLD"], "w") as file:
        json.dump(told, file)

atexit.register(write)
sys.argv = ["longtail", *sys.argv[1:]]
longtail.cli.main()
"""


def measure(folder: Path, threads: int, arguments: list[str]) -> dict[str, float]:
    """Return the seconds of a command by part."""
    told = folder / "told.json"
    environment = {
        **os.environ,
        "TOLD": str(told),
        "LONGTAIL_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": str(threads),
    }
    started = time.time()
    environment["STARTED"] = str(started)
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.time() - started
    if ended.returncode != 0:
        sys.exit(f"{arguments[0]}: {ended.stderr[-2000:]}")
    return {"seconds": seconds, **json.loads(told.read_text())}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=2000)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--json", type=Path, default=None)
    args = options.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos, run = folder / "photos", folder / "runs" / "run"
        for index in range(args.images):
            path = photos / f"class {index % 10}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            detailed((640, 480), index).save(path, quality=90)
        torch.manual_seed(0)
        weights = folder / "weights.pth"
        torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), weights)
        network = ["--network", "tf_efficientnet_lite0", "--pretrained", str(weights)]
        train = ["train", str(photos), *network, "--epochs", "1", "--out", str(run), "--overwrite", "--quiet"]
        encoder = ["--model", "tf_efficientnet_lite0", "--pretrained", str(weights)]
        embed = ["embed", str(photos), *encoder, "--out", str(folder / "embeddings.npz"), "--quiet"]
        predict = ["predict", str(run), str(photos), "--quiet", "--json", str(folder / "table.json")]
        commands = {
            "train": train,
            "train, again": train,
            "train --tune head": [*train, "--tune", "head"],
            "train --tune head, again": [*train, "--tune", "head"],
            "predict": predict,
            "embed": embed,
        }
        print(f"{'':28}" + "".join(f"{part:>12}" for part in ("seconds", "network", "not network", "imports")), end="")
        print("".join(f"{part:>12}" for part in ("decoding", "resizing", "processors")))
        for name, command in commands.items():
            if name == "embed":  # which reads the copies otherwise
                shutil.rmtree(folder / "cache", ignore_errors=True)
            parts = measure(folder, args.threads, command)
            parts["not network"] = 1 - parts["network"] / parts["seconds"]
            found[name] = {part: round(value, 3) for part, value in parts.items()}
            print(
                f"{name:28}{parts['seconds']:12.1f}{parts['network']:12.1f}{100 * parts['not network']:11.0f}%", end=""
            )
            print(
                "".join(f"{parts[part]:12.1f}" for part in ("imports", "decoding", "resizing", "processors")),
                flush=True,
            )
    if args.json:
        args.json.write_text(
            json.dumps({"images": args.images, "threads": args.threads, "commands": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
