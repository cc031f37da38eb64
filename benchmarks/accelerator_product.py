"""The package as it is used on an accelerator: its commands, and the losses of every method beside the CPU's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerator_context import SMALL, SOURCES, Context, one_line
from accelerator_images import first_images
from accelerator_steps import Training
from PIL import Image
from torch import Tensor

from longtail.data.sources import load_data
from longtail.registry import METHODS

SECONDS, OF_A_METHOD = 45.0, 10.0  # of the phase, and of a method, at most
_FIRST = ("gml", "la", "experts", "ce")  # the methods that are compared first


def product(context: Context) -> None:
    """Train, stop by SIGTERM and resume, and predict; and meanwhile compare every method with the CPU."""
    deadline = time.monotonic() + min(SECONDS * (10 if context.rehearse else 1), context.limit - context.now)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # losses are compared in float32
    told: dict[str, Any] = {"methods": {}}
    names = [name for name in METHODS if "image" in METHODS[name].label_kinds]
    try:
        with ThreadPoolExecutor(1) as pool:
            commands = pool.submit(_commands, context, deadline)  # most of their time is that of imports
            for name in sorted(names, key=lambda name: (*_FIRST, name).index(name)):
                left = deadline - time.monotonic()
                told["methods"][name] = (
                    {"skipped": "no time was left"}
                    if left < 2
                    else _within(min(left, OF_A_METHOD * (10 if context.rehearse else 1)), context, name)
                )
                context.write("product", told)
                context.say(f"product: {name}: {told['methods'][name]}")
            told |= commands.result()
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    context.write("product", told)
    context.say(f"product: {told['train']['exit']}, {told['resume']['exit']}, {told['predict']['exit']}")
    context.say(f"product: resumed weights equal: {told['resume']['equal']}")
    for name in ("train", "resume", "predict"):
        if told[name]["exit"] not in (0, [143, 0], [0, 0]):
            context.say(f"product: {name}:", told[name]["errors"])


def _within(seconds: float, context: Context, name: str) -> dict[str, Any]:
    """Return the figures of a method; a method that takes longer is left behind."""
    found: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: found.update(_method(context, name)), daemon=True)
    thread.start()
    thread.join(seconds)
    return dict(found) or {"error": f"took more than {seconds:.0f} s"}


def _method(context: Context, name: str) -> dict[str, Any]:
    """Return the largest relative difference of the losses of a few steps from the CPU's, and milliseconds a step."""
    losses: dict[str, list[float]] = {}
    took, as_graph = 0.0, False
    try:
        network = SMALL if context.rehearse else "resnet8"
        config = context.recipe(method=name, precision="32-true", batch_size=64, epochs=1, network=network)
        config = config.replace(teacher={"network": network}, gml={"queue_size": 400, "distillation_weight": 1.0})
        data = first_images(load_data(config.data, 0), 128 if context.rehearse else 640)
        for device in ("cpu", context.device.type):
            with Training(config.replace(device=device), data, context.runs) as training:
                took, as_graph = training.run_epoch(), training.as_graph
                losses[device] = training.losses
    except Exception as error:
        return {"error": one_line(error)}
    ours, theirs = losses[context.device.type][:5], losses["cpu"][:5]
    apart = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours, theirs, strict=True))
    return {"losses_apart": apart, "epoch_seconds": round(took, 3), "as_graph": as_graph}


def _commands(context: Context, deadline: float) -> dict[str, Any]:
    """Train, stop by SIGTERM and resume, and predict, in processes of their own."""
    longtail, folder = [sys.executable, "-m", "longtail"], context.runs / "product"
    path = os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    options = ["--method", "gml", "--epochs", "4", "--teacher.epochs", "2", "--checkpoint_seconds", "0"]
    options += ["--device", "cpu" if context.rehearse else "cuda", "--quiet", "--accelerator.batches", "device"]

    def start(*command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*longtail, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def train(run: Path, *more: str) -> subprocess.Popen[str]:
        return start("train", "digits-lt", *options, "--out", str(run), *more)

    def finish(process: subprocess.Popen[str]) -> tuple[int | str, str, str]:
        try:
            output, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            return "stopped: no time was left", output[-300:], errors[-1000:]
        return process.returncode, output[-300:], errors[-1000:]

    folder.mkdir(parents=True, exist_ok=True)
    started, whole, run = time.monotonic(), folder / "whole" / "run", folder / "stopped" / "run"
    uninterrupted, process = train(whole, "--overwrite"), train(run, "--overwrite")
    wait_until(lambda: process.poll() is not None or (run / "last.ckpt").is_file(), deadline)
    process.send_signal(signal.SIGTERM)
    first, _, errors = finish(process)
    again, _, more = finish(train(run, "--resume"))
    exit_code, _, error = finish(uninterrupted)
    same = _same_weights(whole / "last.ckpt", run / "last.ckpt")
    image = folder / "image.png"
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(image)
    predicted, output, problem = finish(start("predict", str(run), str(image)))
    return {
        "train": {"exit": exit_code, "errors": error, "seconds": round(time.monotonic() - started, 1)},
        "resume": {"exit": [first, again], "errors": errors + more, "equal": same},
        "predict": {"exit": predicted, "output": output, "errors": problem},
    }


def wait_until(true: Callable[[], bool], deadline: float) -> None:
    """Wait until something is true, or a time has come."""
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)


def _same_weights(one: Path, other: Path) -> bool | str:
    try:
        first, second = (torch.load(path, map_location="cpu", weights_only=False)["method"] for path in (one, other))
    except (OSError, KeyError, RuntimeError) as error:
        return one_line(error)
    return all(torch.equal(second[key], value) for key, value in first.items() if isinstance(value, Tensor))
