"""The package on an accelerator: that it works there, how fast, and what it reaches at full length.

Phases, in the order of their worth; each writes OUT/PHASE.json as soon as a figure is there:

product     train, a stop by SIGTERM and --resume, predict; every method, with losses against the CPU's in float32
speed       milliseconds a step (la, gml, the teacher), beside its networks alone; views a second; runs side by side
mixture     gml with both views classified and distilled, beside la on two views, distilled: equal operations
generation  a ResNet-56 distilled on two views teaches the ResNet-32
best        what gained in the search on two cores (docs/evidence/search.md): weight decay, mixup, Remix, one view and
            twice the epochs at the operations of two views, two teachers with averaged weights, experts
rows        imbalance 50 and 10, and CIFAR-10 where it is in the pack
longer      400 epochs
wide        ResNet-32, four times as wide
parts       the parts of GML, one left out at a time, which docs/evidence/gml.md has at 16 epochs
compiled    milliseconds a step with compiled networks

The images come from one file, made where CIFAR is:

    python benchmarks/accelerator.py --prepare FOLDER_OF_CIFAR-100 --pack images.npz [--cifar10 FOLDER]
    python benchmarks/accelerator.py --pack images.npz --out OUT --minutes 12 [--phases product,speed] [--seeds 3]

A phase that does not fit into the minutes that are left is trained with fewer seeds, or skipped; what it takes follows
from the milliseconds of `speed`. --rehearse goes through everything on a CPU with small networks and two epochs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longtail.config import Config, Data, load_recipe
from longtail.data.dataset import CIFAR_MEAN, CIFAR_STD, ImageSet, LongTailedData
from longtail.data.images import ArrayImages
from longtail.data.imbalance import hold_out_balanced, long_tailed, resolve_profile
from longtail.data.loader import TrainLoader
from longtail.data.sources import Source, load_data
from longtail.data.transforms import PerImageTransform, build_transform
from longtail.devices import select_device
from longtail.errors import LongtailError
from longtail.experiments.records import Record, run_record
from longtail.experiments.threads import MAX_AT_ONCE, train_in_threads
from longtail.nn import CosineClassifier, Encoder
from longtail.registry import METHODS, SOURCES, TASKS
from longtail.training.auto_config import auto_config
from longtail.training.fabric import build_fabric
from longtail.training.metric_log import MetricTracker, NonFiniteLossGuard
from longtail.training.optim import build_optimizer
from longtail.training.steps import DeviceSteps, Student, build_steps
from longtail.training.turns import Turn

STARTED = time.monotonic()
SMALL = "conv8-tiny"  # the network of a rehearsal
RESERVE = 15.0  # seconds that are left for the end of the script
CLASSES = {"cifar100": 100, "cifar10": 10}
IMBALANCES = (100.0, 50.0, 10.0)


def say(*words: object) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f}]", *words, flush=True)


# ---------------------------------------------------------------------------------------------- the images in one file


def prepare(folders: Mapping[str, str], pack: Path) -> None:
    """Write the training images that the smallest imbalance factor keeps, and all test images, as lossless WebP."""
    arrays: dict[str, Any] = {}
    blobs: list[bytes] = []
    for name, folder in folders.items():
        largest = load_data(Data(source=f"{name}-lt", root=folder, imbalance=min(IMBALANCES), seed=0), 0)
        # the sets are nested: the images of larger factors first, so that a prefix of every class is the set
        position = {int(index): row for row, index in enumerate(largest.train.ids)}
        left = set(position)
        kept: list[int] = []
        for factor in IMBALANCES:
            ids = load_data(Data(source=f"{name}-lt", root=folder, imbalance=factor, seed=0), 0).train.ids.tolist()
            kept += [index for index in ids if index in left]
            left -= set(ids)
        rows = torch.tensor([position[index] for index in kept])
        pixels = torch.cat([largest.train.images.take(rows), largest.test.images.take(torch.arange(len(largest.test)))])
        with ThreadPoolExecutor(2) as pool:
            encoded = list(pool.map(encode, pixels.permute(0, 2, 3, 1).numpy()))
        blobs += encoded
        arrays |= {
            f"{name}_ends": np.cumsum([len(blob) for blob in encoded]),
            f"{name}_labels": torch.cat([largest.train.labels[rows], largest.test.labels]).numpy().astype(np.uint8),
            f"{name}_ids": np.array(kept),
            f"{name}_names": np.array(largest.class_names),
        }
        say(f"{name}: {len(kept):,} training and {len(largest.test):,} test images")
    np.savez(pack, blob=np.frombuffer(b"".join(blobs), dtype=np.uint8), **arrays)
    say(f"{pack}: {pack.stat().st_size / 2**20:.1f} MiB")


def encode(pixels: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True, quality=90, method=4)
    return stream.getvalue()


def _decode(blob: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))


@functools.cache
def unpack(pack: str, name: str) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Return the pixels of the training and then the test images, their labels, the training images' ids, and names."""
    stored = np.load(pack)
    if f"{name}_ends" not in stored:
        raise LongtailError(f"{pack}: does not contain {name}")
    before = 0
    for other in CLASSES:
        if other == name:
            break
        before += int(stored[f"{other}_ends"][-1]) if f"{other}_ends" in stored else 0
    ends = stored[f"{name}_ends"]
    blob = stored["blob"][before : before + int(ends[-1])].tobytes()
    parts = [blob[start:end] for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pixels = torch.from_numpy(np.stack(list(pool.map(_decode, parts)))).permute(0, 3, 1, 2).contiguous()
    labels, ids = (torch.from_numpy(stored[f"{name}_{kind}"].astype(np.int64)) for kind in ("labels", "ids"))
    return pixels, labels, ids, stored[f"{name}_names"].tolist()


def load_packed(config: Data, seed: int, name: str) -> LongTailedData:
    """Return a CIFAR set of the pack: as the package loads it with ``data.seed`` 0."""
    pixels, labels, ids, names = unpack(str(config.root), name)
    count = len(ids)
    order = [torch.nonzero(labels[:count] == index).flatten() for index in range(CLASSES[name])]
    val, order = hold_out_balanced(order, config.val_fraction)
    rows = long_tailed(order, names, resolve_profile(config.profile, balanced=True), config.imbalance, "index", seed)
    rows = rows[torch.argsort(ids[rows])]
    test = torch.arange(count, len(pixels))
    return LongTailedData(
        train=ImageSet(ArrayImages(pixels[rows]), labels[rows], ids[rows]),
        val=None if val is None else ImageSet(ArrayImages(pixels[val]), labels[val], ids[val]),
        test=ImageSet(ArrayImages(pixels[test]), labels[test], test - count),
        class_names=tuple(names),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        image_size=32,
        augment="cifar",
    )


def register_packed() -> None:
    for name in CLASSES:
        if f"{name}-packed" not in SOURCES:
            source = Source(load=functools.partial(load_packed, name=name), balanced=True)
            SOURCES.register(f"{name}-packed")(source)


# --------------------------------------------------------------------------------------------------------- the phases


@dataclasses.dataclass
class Context:
    """What every phase needs."""

    out: Path
    pack: Path
    seeds: int
    epochs: int
    jobs: int
    rehearse: bool
    deadline: float
    device: torch.device
    images: str = "cifar100"
    """The set of every phase but `rows`."""
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of a step of la, gml, the teacher and la on two views; of several side by side."""
    gain: float = 1.0
    """How many times faster runs are side by side than one after another."""

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.monotonic()

    def write(self, phase: str, result: Mapping[str, Any]) -> None:
        """Write what a phase has found so far."""
        told = {
            "command": "python benchmarks/accelerator.py " + " ".join(sys.argv[1:]),
            "hardware": _hardware(self.device),
            "seconds": round(time.monotonic() - STARTED, 1),
            **result,
        }
        path = self.out / f"{phase}.json"
        path.with_suffix(".part").write_text(json.dumps(told, indent=1) + "\n")
        path.with_suffix(".part").replace(path)

    def recipe(self, **changes: Any) -> Config:
        """Return the paper's recipe on the packed images."""
        config = load_recipe("cifar100-lt").config
        config = config.replace(
            epochs=self.epochs,
            data={"source": f"{self.images}-packed", "root": str(self.pack)},
            device="cpu" if self.rehearse else "cuda",
            precision="32-true" if self.rehearse else "bf16-mixed",
            accelerator={"batches": "device"},
            checkpoint_seconds=1e6,
        )
        if self.rehearse:
            config = config.replace(network=SMALL, teacher={"network": SMALL}, gml={"queue_size": 400})
        return config.replace(**changes)


def _hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__.partition('+')[0]}"


TWO_VIEWS = {"views": 2, "distillation_weight": 1.0, "distill_every_view": True}


def product(context: Context) -> None:
    """The command line on this device, and meanwhile every method beside the CPU."""
    torch.backends.cudnn.allow_tf32 = False  # losses are compared in float32
    told: dict[str, Any] = {"methods": {}}
    with ThreadPoolExecutor(1) as pool:
        commands = pool.submit(_commands, context)  # most of their time is that of imports
        for name in METHODS:
            if "image" not in METHODS[name].label_kinds:
                continue
            told["methods"][name] = _method(context, name, Path(context.out))
            context.write("product", told)
            say(f"product: {name} {told['methods'][name]}")
        told |= commands.result()
    context.write("product", told)
    exits = {name: told[name]["exit"] for name in ("train", "resume", "predict")}
    say(f"product: {exits}, resumed weights equal: {told['resume']['equal']}")
    if errors := [told[name]["errors"] for name in exits if told[name]["exit"] not in (0, [143, 0], [0, 0])]:
        say("product:", *errors)


def _commands(context: Context) -> dict[str, Any]:
    """Train, stop by SIGTERM and resume, and predict, in processes of their own."""
    longtail = [sys.executable, "-m", "longtail"]
    options = ["--method", "gml", "--epochs", "4", "--teacher.epochs", "2", "--checkpoint_seconds", "0"]
    options += ["--device", "cpu" if context.rehearse else "cuda", "--quiet", "--accelerator.batches", "device"]

    def train(out: Path, *more: str) -> subprocess.Popen[str]:
        command = [*longtail, "train", "digits-lt", *options, "--out", str(out), *more]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    started, whole, run = time.monotonic(), context.out / "whole" / "run", context.out / "stopped" / "run"
    uninterrupted, process = train(whole, "--overwrite"), train(run, "--overwrite")
    while process.poll() is None and not (run / "last.ckpt").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1][-1000:]
    resumed = train(run, "--resume")
    errors += resumed.communicate()[1][-1000:]
    told: dict[str, Any] = {"train": {"errors": uninterrupted.communicate()[1][-2000:]}}
    told["train"] |= {"exit": uninterrupted.returncode, "seconds": time.monotonic() - started}
    same = _same_weights(whole / "last.ckpt", run / "last.ckpt")
    told["resume"] = {"exit": [process.returncode, resumed.returncode], "equal": same, "errors": errors}
    image = context.out / "image.png"
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(image)
    found = subprocess.run([*longtail, "predict", str(run), str(image)], capture_output=True, text=True, check=False)
    told["predict"] = {"exit": found.returncode, "output": found.stdout[-300:], "errors": found.stderr[-500:]}
    return told


def _same_weights(one: Path, other: Path) -> bool | str:
    try:
        first, second = (torch.load(path, map_location="cpu", weights_only=False)["method"] for path in (one, other))
    except (OSError, KeyError, RuntimeError) as error:
        return str(error)[:200]
    return all(torch.equal(second[key], value) for key, value in first.items() if isinstance(value, Tensor))


def _method(context: Context, name: str, folder: Path) -> dict[str, Any]:
    """Return the largest relative difference of the losses of a few steps from the CPU's, and milliseconds a step."""
    network = SMALL if context.rehearse else "resnet8"
    config = context.recipe(method=name, precision="32-true", batch_size=64, epochs=1, network=network)
    config = config.replace(teacher={"network": network}, gml={"queue_size": 400, "distillation_weight": 1.0})
    data = _first(load_data(config.data, 0), 640)
    losses: dict[str, list[float]] = {}
    took = 0.0
    for device in ("cpu", "cpu" if context.rehearse else "cuda"):
        try:
            with Training(config.replace(device=device), data, folder) as training:
                started = time.monotonic()
                training.run_epoch()
                took = time.monotonic() - started
                losses[device] = training.losses
        except Exception as error:
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    ours, theirs = losses.get("cuda", losses["cpu"]), losses["cpu"]
    apart = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours[:5], theirs[:5], strict=True))
    return {"losses_apart": apart, "milliseconds": 1000 * took / len(ours), "as_graph": training.as_graph}


def _first(data: LongTailedData, count: int) -> LongTailedData:
    """Return a set with ``count`` of its training images, at least one of every class."""
    rows = torch.arange(len(data.train))
    _, first = np.unique(data.train.labels.numpy(), return_index=True)
    rows = torch.cat([torch.from_numpy(first), rows[~torch.isin(rows, torch.from_numpy(first))]])[:count]
    train = ImageSet(ArrayImages(data.train.images.take(rows)), data.train.labels[rows], data.train.ids[rows])
    return dataclasses.replace(data, train=train)


class Training:
    """A training on the device without its run: random teachers, no evaluation, no files."""

    def __init__(self, config: Config, data: LongTailedData, folder: Path) -> None:
        config, _ = auto_config(config, data)
        torch.manual_seed(config.seed)
        kind, task = METHODS[config.method], TASKS[data.task]
        parts: tuple[Any, ...] = ()
        if kind.needs_teacher(config):
            network = config.teacher.network if config.teacher.network != "auto" else config.network
            teacher = Encoder(network, data.mean, data.std).eval()
            parts = (teacher, CosineClassifier(teacher.num_features, len(data.class_names)))
        self.encoder = Encoder(config.network, data.mean, data.std)
        self.method = kind(config, self.encoder, data.class_counts, *parts).train()
        self.method.to(memory_format=torch.channels_last)
        fabric = build_fabric(config)
        assert isinstance(config.epochs, int)
        transforms = task.build_transforms(config, data, kind.views(config))
        self.loader = TrainLoader(data.train, config.batch_size, transforms, config.seed, epochs=config.epochs)
        optimizer: Any = build_optimizer(self.method, config, on_device=True)
        wrapped, optimizer = fabric.setup(self.method, optimizer)
        self.student = Student(
            *(config, fabric, self.method, wrapped, optimizer, None, MetricTracker()),
            guard=NonFiniteLossGuard(folder),
            total=self.loader.steps * config.epochs,
            turn=Turn(),
        )
        steps = build_steps(self.student, self.loader, True, ())
        assert isinstance(steps, DeviceSteps)
        self.steps = steps
        self.losses: list[float] = []
        self.epoch = 0

    def __enter__(self) -> Training:
        self._context = self.steps.context()
        self._context.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._context.__exit__(None, None, None)

    @property
    def as_graph(self) -> bool:
        """Whether the steps are CUDA graphs."""
        return self.steps.record

    def run_epoch(self) -> float:
        """Train an epoch, and return its seconds."""
        started, tracker = time.monotonic(), self.student.tracker
        tracker.clear()
        before = 0.0
        for _ in self.steps.epoch(self.epoch, 0):
            if self.epoch == 0 and len(self.losses) < 10:  # read one by one for the comparison of devices
                self.steps.check()
                total = sum(float(value) for value in tracker.sums.values())
                images = tracker.images - getattr(self, "_images", 0)
                self.losses.append((total - before) / images)
                before, self._images = total, tracker.images
        self.steps.check()
        self.epoch += 1
        return time.monotonic() - started


def speed(context: Context) -> None:
    """Milliseconds of a step, alone and side by side, beside the networks alone."""
    told: dict[str, Any] = {"steps": {}}
    variants = {
        "la": context.recipe(method="la"),
        "gml": context.recipe(gml={"distillation_weight": 0.0}),
        "la on two views, distilled": context.recipe(method="la", classifier=TWO_VIEWS),
        "teacher": context.recipe(method="la", network=SMALL if context.rehearse else "resnet56"),
    }
    _step_times(context, variants, told)
    told["views_per_second"] = _views(context)
    say(f"speed: {told['views_per_second']:,.0f} views a second")
    context.write("speed", told)
    if context.left() < 60:
        return
    # seven runs of one length after another, and side by side
    config = context.recipe(method="la", epochs=context.epochs if context.rehearse else 20)
    alone = context.milliseconds["la"] / 1000 * -(-len(load_data(config.data, 0).train) // config.batch_size)
    number = 2 if context.rehearse else 7
    folders = {context.out / "beside" / f"la-{seed}": config.replace(seed=seed) for seed in range(number)}
    started = time.monotonic()
    of_each = [run.seconds for _, run in train_in_threads(folders, context.out / "teachers", number)]
    wall = time.monotonic() - started
    assert isinstance(config.epochs, int)
    context.gain = max(1.0, number * config.epochs * alone / wall)
    told["side_by_side"] = {
        "runs": number,
        "epochs": config.epochs,
        "seconds": wall,
        "of_each": of_each,
        "gain": context.gain,
    }
    say(f"speed: {number} runs side by side: {json.dumps(told['side_by_side'])}")
    context.write("speed", told)


def compiled(context: Context) -> None:
    """Milliseconds of a step with compiled networks; the compilation takes most of a minute."""
    variants = {
        "la, compiled": context.recipe(method="la", compile=True),
        "gml, compiled": context.recipe(gml={"distillation_weight": 0.0}, compile=True),
    }
    told: dict[str, Any] = {"steps": {}}
    _step_times(context, {} if context.rehearse else variants, told)
    context.write("compiled", told)


def _step_times(context: Context, variants: Mapping[str, Config], told: dict[str, Any]) -> None:
    """Measure a step of each variant, and write it."""
    for name, config in variants.items():
        if context.left() < 60:
            break
        config = config.replace(epochs=4)
        data = load_data(config.data, 0) if not context.rehearse else _first(load_data(config.data, 0), 640)
        if context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            with Training(config, data, context.out) as training:
                if config.compile:
                    training.encoder.backbone.compile(dynamic=False)
                first = training.run_epoch()
                seconds = min(training.run_epoch(), training.run_epoch())
                networks = _networks(training)
        except RuntimeError as error:  # a compiler that is missing, for one, is a figure as well
            told["steps"][name] = {"error": " ".join(str(error).split())[:300]}
            say(f"{name}: {told['steps'][name]}")
            continue
        steps = training.loader.steps
        context.milliseconds[name] = 1000 * seconds / steps
        told["steps"][name] = {
            "milliseconds": 1000 * seconds / steps,
            "networks_alone": networks,
            "first_epoch_seconds": first,
            "images_per_second": len(data.train) / seconds,
            "epochs_of_200_seconds": 200 * seconds,
            "as_graph": training.as_graph,
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if context.device.type == "cuda" else None,
        }
        say(f"{name}: {json.dumps(told['steps'][name])}")
        context.write("compiled" if config.compile else "speed", told)


def _networks(training: Training) -> float:
    """Return milliseconds of the networks of a step alone: forward and backward of the student, a graph as well."""
    student, device = training.student, training.student.fabric.device
    views = student.method.num_student_views(student.config)
    batch = torch.rand(student.config.batch_size, 3, 32, 32, device=device).contiguous(
        memory_format=torch.channels_last
    )

    def run() -> None:
        student.optimizer.zero_grad(set_to_none=True)
        with student.fabric.autocast():
            features = torch.cat([training.encoder(batch) for _ in range(views)])
        features.float().square().mean().backward()

    rounds = 2 if device.type == "cpu" else 100
    for _ in range(3):
        run()
    call: Callable[[], None] = run
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        student.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            run()
        call = graph.replay
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started) / rounds


def _views(context: Context) -> float:
    config = context.recipe(method="la")
    data = load_data(config.data, 0)
    transform = build_transform("cifar", 32)
    assert not isinstance(transform, PerImageTransform)
    count = len(data.train)
    pixels = data.train.images.take(torch.arange(count)).to(context.device)
    ids = torch.arange(count, device=context.device)
    times = []
    for epoch in range(3):
        started = time.perf_counter()
        for part in torch.arange(count).split(16384 if context.device.type == "cuda" else 1365):
            transform(pixels[part[0] : part[-1] + 1], ids[part[0] : part[-1] + 1], (0, epoch, 0))
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return count / min(times)


def train_variants(context: Context, phase: str, variants: Mapping[str, Config], costs: Mapping[str, float]) -> None:
    """Train every variant with as many seeds as fit, side by side, and write each result as it comes.

    Args:
        context: of the script.
        phase: its name.
        variants: settings by name.
        costs: how many steps of la a step of each takes; teachers that are trained first are part of it.
    """
    if context.rehearse:
        variants = dict(list(variants.items())[:2])
    steps, milliseconds = 0.0, context.milliseconds.get("la", 3.2)
    for name, config in variants.items():
        assert isinstance(config.epochs, int)
        images = len(load_data(config.data, 0).train)
        steps += config.epochs * -(-images // config.batch_size) * costs.get(name, 1.0)
    expected = steps * milliseconds / 1000 / context.gain + 10
    seeds = context.seeds
    while seeds > 0 and not context.rehearse and seeds * expected > context.left() - RESERVE:
        seeds -= 1
    if seeds == 0:
        say(f"{phase}: skipped, a seed would take {expected:.0f} s and {context.left():.0f} s are left")
        context.write(phase, {"skipped": f"{expected:.0f} s for a seed, {context.left():.0f} s were left"})
        return
    say(f"{phase}: {', '.join(variants)}; {seeds} seeds, about {seeds * expected:.0f} s")
    runs = {
        context.out / phase / f"{name.replace(' ', '-')}-{seed}": (name, config.replace(seed=seed))
        for seed in range(seeds)
        for name, config in variants.items()
    }
    started, records = time.monotonic(), []
    configs = {folder: config for folder, (_, config) in runs.items()}
    # what has ended by then is kept, and the phase after this one is not begun
    limit = threading.Timer(max(1.0, context.left() - RESERVE / 3), os.kill, (os.getpid(), signal.SIGTERM))
    limit.daemon = True
    limit.start()
    for folder, run in train_in_threads(configs, context.out / "teachers", context.jobs):
        record = dataclasses.replace(run_record(run), method=runs[folder][0])
        records.append(record)
        accuracy = record.metrics["balanced_accuracy"]
        say(f"{phase}: {record.method} seed {record.seed}: {accuracy:.2f}, {run.seconds:.0f} s")
        found = [each.to_dict() for each in records]
        context.write(phase, {"training_seconds": time.monotonic() - started, "records": found})
    limit.cancel()
    for line in summary(records):
        say(f"{phase}: {line}")


def summary(records: Sequence[Record]) -> Iterator[str]:
    """Yield the mean and the seeds of every variant."""
    for name in dict.fromkeys(record.method for record in records):
        values = [record.metrics["balanced_accuracy"] or 0.0 for record in records if record.method == name]
        yield f"{name}: {np.mean(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"


def mixture(context: Context) -> None:
    """Does the mixture add anything at equal operations?"""
    variants = {
        "la distilled on two views": context.recipe(method="la", classifier=TWO_VIEWS),
        "gml with both views classified and distilled": context.recipe(
            classifier={"every_view": True, "distill_every_view": True}
        ),
    }
    train_variants(context, "mixture", variants, dict.fromkeys(variants, 3.2))


def generation(context: Context) -> None:
    """A ResNet-56 that was distilled on two views teaches the ResNet-32."""
    network = SMALL if context.rehearse else "resnet56"
    first = {
        f"teacher-{seed}": context.recipe(method="la", classifier=TWO_VIEWS, network=network, seed=seed)
        for seed in range(1)
    }
    train_variants(dataclasses.replace(context, seeds=1), "second-teacher", first, dict.fromkeys(first, 6.0))
    teacher = context.out / "second-teacher" / "teacher-0-0"
    if not (teacher / "recognizer" / "config.json").is_file():
        return
    student = context.recipe(method="la", classifier=TWO_VIEWS, teacher={"source": str(teacher)})
    train_variants(context, "generation", {"la distilled on two views by the second teacher": student}, {})


def best(context: Context) -> None:
    """What gained in the search on two cores."""
    longer: dict[str, Any] = {
        "classifier": {"distillation_weight": 1.0},
        "epochs": 2 * context.epochs,
        "teacher": {"epochs": context.epochs},
    }
    decay: dict[str, Any] = {"optimizer": {"weight_decay": 5e-3}}
    changes: dict[str, dict[str, Any]] = {
        "weight decay 0.002": {"optimizer": {"weight_decay": 2e-3}},
        "weight decay 0.005": decay,
        "mixup": {"mixing": {"kind": "mixup"}},
        "Remix": {"mixing": {"kind": "remix"}},
        "one view, twice the epochs": longer,
        "one view, twice the epochs, weight decay 0.005": {**longer, **decay},
        "two teachers, weight decay 0.001, average of the weights": {
            "teacher": {"count": 2},
            "optimizer": {"weight_decay": 1e-3, "ema_decay": 0.999},
        },
        "three experts": {"method": "experts"},
    }
    variants = {
        name: context.recipe(**{"method": "la", "classifier": TWO_VIEWS, **change}) for name, change in changes.items()
    }
    costs = dict.fromkeys(variants, 5.0)
    costs |= {"mixup": 3.2, "Remix": 3.2, "one view, twice the epochs": 2.5, "three experts": 7.0}
    train_variants(context, "best", variants, costs)


def rows(context: Context) -> None:
    """The paper's other rows."""
    variants: dict[str, Config] = {}
    stored = np.load(context.pack)
    for name in CLASSES:
        if f"{name}_ends" not in stored:
            continue
        for factor in IMBALANCES:
            if (name, factor) != (context.images, 100.0):
                data = {"source": f"{name}-packed", "imbalance": factor}
                variants[f"gml {name} {factor:g}"] = context.recipe(data=data)
                variants[f"la two views {name} {factor:g}"] = context.recipe(
                    method="la", classifier=TWO_VIEWS, data=data
                )
    train_variants(dataclasses.replace(context, seeds=1), "rows", variants, dict.fromkeys(variants, 4.0))


def longer(context: Context) -> None:
    """400 epochs."""
    epochs = context.epochs * 2
    variants = {
        "gml 400 epochs": context.recipe(epochs=epochs),
        "la two views 400 epochs": context.recipe(method="la", classifier=TWO_VIEWS, epochs=epochs),
    }
    train_variants(dataclasses.replace(context, seeds=1), "longer", variants, dict.fromkeys(variants, 3.2))


def wide(context: Context) -> None:
    """ResNet-32, four times as wide."""
    network = SMALL if context.rehearse else "resnet32x4"
    variants = {
        "la, wide": context.recipe(method="la", network=network),
        "la two views, wide": context.recipe(method="la", classifier=TWO_VIEWS, network=network),
    }
    train_variants(dataclasses.replace(context, seeds=1), "wide", variants, dict.fromkeys(variants, 8.0))


def parts(context: Context) -> None:
    """The parts of GML, one left out at a time."""
    changes: dict[str, dict[str, Any]] = {
        "gml": {},
        "without the mixture": {"gml": {"mixture_weight": 0.0}},
        "without distillation": {"gml": {"distillation_weight": 0.0}},
        "fixed temperature": {"gml": {"learn_temperature": False}},
        "one shared queue": {"gml": {"queues": "shared"}},
        "keys of the batch": {"gml": {"queues": "batch"}},
        "one student view": {"gml": {"share_query": True}},
    }
    variants = {name: context.recipe(**change) for name, change in changes.items()}
    train_variants(dataclasses.replace(context, seeds=1), "parts", variants, dict.fromkeys(variants, 2.4))


PHASES: dict[str, Callable[[Context], None]] = {
    each.__name__: each for each in (product, speed, mixture, generation, best, rows, longer, wide, parts, compiled)
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    options.add_argument("--pack", type=Path, required=True, help="file of the images")
    options.add_argument("--prepare", metavar="FOLDER", help="folder of CIFAR-100, to make the file of")
    options.add_argument("--cifar10", metavar="FOLDER", help="folder of CIFAR-10, with --prepare")
    options.add_argument("--out", type=Path, default=Path("accelerator"))
    options.add_argument("--minutes", type=float, default=12.0)
    options.add_argument("--phases", default=",".join(PHASES))
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=200)
    options.add_argument("--jobs", type=int, default=MAX_AT_ONCE)
    options.add_argument("--rehearse", action="store_true", help="on a CPU, with small networks and two epochs")
    return options.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.prepare is not None:
        folders = {"cifar100": args.prepare} | ({"cifar10": args.cifar10} if args.cifar10 else {})
        prepare(folders, args.pack)
        return 0
    if unknown := sorted(set(args.phases.split(",")) - set(PHASES)):
        raise SystemExit(f"--phases: there is no {', '.join(unknown)}; expected some of {', '.join(PHASES)}")
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --rehearse goes through the phases on a CPU")
    register_packed()
    args.out.mkdir(parents=True, exist_ok=True)
    context = Context(
        *(args.out, args.pack, args.seeds, 2 if args.rehearse else args.epochs, args.jobs, args.rehearse),
        deadline=STARTED + 60 * args.minutes,
        device=select_device("cpu" if args.rehearse else "cuda"),
        images=next(name for name in CLASSES if f"{name}_ends" in np.load(args.pack)),
    )
    say(_hardware(context.device))
    failed = 0
    for name in args.phases.split(","):
        if context.left() < 30:
            say(f"{name}: skipped, no time is left")
            continue
        try:
            PHASES[name](context)
        except Exception as error:  # a phase that fails must not take the others with it
            failed += 1
            traceback.print_exc()
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            say(f"{name}: FAILED, {message}")
            context.write(f"{name}-error", {"error": message})
    say("done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
