"""The package on an accelerator: that it works there, what it reaches at full length, and how fast it is.

Phases; each result is written to OUT as soon as it is there, and nothing else is:

product     train, a stop by SIGTERM and --resume, predict; every method, with losses against the CPU's (45 s at most)
core        does the package reach the figures of the prototype, and does the mixture of gml add anything to la on two
            views at equal operations? la and gml on two views, both classified and distilled, then la, gml distilled
            and la distilled, with their teacher, on seed 0; further seeds only while there is time
speed       milliseconds a step, beside its graph and its networks alone and operation by operation; views a second
best        two teachers, of both seeds: la on two views, experts; a teacher of the second generation
wide        ResNet-32 four times as wide, with a teacher of its width; its steps are timed first
compiled    milliseconds a step with compiled networks
rows        the other imbalance factors of the pack
longer      400 epochs
parts       the parts of GML, one left out at a time

The images come from one file of 36 MiB, made where CIFAR-100 is (CIFAR-10: --set cifar10, another file):

    python benchmarks/accelerator.py --prepare FOLDER_OF_CIFAR-100 --pack images.npz

The first lease of a machine, of at most ten minutes, and the second; --plan says beforehand what would be trained:

    python benchmarks/accelerator.py --pack images.npz --out $OUT --phases product,core,speed --minutes 9
    python benchmarks/accelerator.py --pack images.npz --out $OUT --phases best,wide --minutes 9 --teachers teachers.zip

core takes all the time that it can use; what is left of the first lease is for a second call, on the warm machine:

    python benchmarks/accelerator.py --pack images.npz --out $OUT --phases speed,compiled --minutes 3

OUT has at most five files: product.json, runs.json, predictions.npz (of the test images), steps.json and teachers.zip.
Several calls become one file, from which benchmarks/refresh.py makes a table:

    python benchmarks/accelerator.py --merge OUT1 OUT2 --json benchmarks/results/full-length.json

A bare machine with torch, torchvision, timm, numpy, scipy, scikit-learn, pillow, safetensors, matplotlib, jinja2, tqdm,
filelock, pyyaml, huggingface-hub and peft needs wheels of pydantic, pydantic-core, annotated-types, typing-inspection,
tyro, docstring-parser, typeguard and lightning-fabric besides; the package itself is read from src, beside this file.
--rehearse goes through every phase and variant on a CPU, with a small network and two epochs.
"""

# ruff: noqa: E402
from __future__ import annotations

import time

STARTED = time.monotonic()  # before the imports, which take seconds

import argparse
import functools
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]

import accelerator_images as images
from accelerator_context import RESERVE, Context, hardware, one_line, version_of_sources, write_json
from accelerator_plan import Schedule, Variant, make_jobs, simulate
from accelerator_product import SECONDS, product
from accelerator_results import merge
from accelerator_runs import Trainings, find_teachers
from accelerator_steps import compiled, measure, speed
from accelerator_variants import PHASES, VARIANTS, WIDE, WIDE_TWO_VIEWS, further_variants

from longtail.data.sources import load_data
from longtail.devices import select_device
from longtail.errors import LongtailError, StoppedError
from longtail.experiments.threads import MAX_AT_ONCE

ORDER = ("product", "core", "speed", "best", "wide", "compiled", "rows", "longer", "parts")
MEASUREMENTS: Mapping[str, Callable[[Context], None]] = {"product": product, "speed": speed, "compiled": compiled}
IMPORTS = 20.0  # seconds of a start, of --plan
OF_A_MEASUREMENT = {"product": SECONDS, "speed": 50.0, "compiled": 120.0}
STEPS = 85  # of an epoch of CIFAR-100-LT, of --plan


def all_variants(epochs: int, imbalances: Mapping[float, float]) -> tuple[dict[str, Variant], dict[str, list[str]]]:
    """Return every variant by name, and the names of each phase."""
    more, names = further_variants(epochs, imbalances)
    return {**VARIANTS, **more}, {**{phase: list(rows) for phase, rows in PHASES.items()}, **names}


def train(context: Context, phase: str) -> None:
    """Train the variants of a phase, as far as there is time."""
    base = len(load_data(context.recipe().data, 0).train)
    factors = [factor for factor in images.packed(context.pack)[1] if factor != 100]
    sizes = {
        factor: len(load_data(context.recipe(data={"imbalance": factor}).data, 0).train) / base for factor in factors
    }
    variants, names = all_variants(context.epochs, sizes)
    if phase == "wide":
        measure(context, {name: context.recipe(**variants[name].changes) for name in (WIDE, WIDE_TWO_VIEWS)}, phase)
    Trainings(context, phase, variants, names[phase]).run()


def print_plan(args: argparse.Namespace, phases: Sequence[str]) -> None:
    """Print what would be trained, and when, if every step took as long as is expected; nothing is trained."""
    variants, names = all_variants(args.epochs, dict.fromkeys(args.imbalances, 1.8))
    limit, now = 60 * args.minutes - RESERVE, IMPORTS if args.start is None else args.start
    keys = [f"{name}, seed {seed}" for name in variants for seed in range(args.seeds)]
    there = keys_there(args.teachers, keys)
    print(f"{now:6.0f} the phases start, and everything has to end at {limit:.0f}")
    for phase in phases:
        if phase in OF_A_MEASUREMENT:
            print(f"{now:6.0f} {phase}, {OF_A_MEASUREMENT[phase]:.0f} s at most")
            now += OF_A_MEASUREMENT[phase]
            continue
        seconds = {name: args.epochs * STEPS * each.milliseconds / 1000 for name, each in variants.items()}
        jobs = make_jobs(variants, names[phase], range(args.seeds), there, seconds, args.epochs)
        for when, what, job in simulate(Schedule(jobs, limit, args.jobs), now):
            print(f"{when:6.0f} {phase}: {job.key} {what}")
            now = when
            there += [job.key] if what == "ends" else []


def keys_there(teachers: Path | None, keys: Sequence[str]) -> list[str]:
    """Return the keys of the models of an earlier call."""
    if teachers is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        return list(find_teachers(teachers, Path(folder), keys))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    options.add_argument("--pack", type=Path, help="file of the images")
    options.add_argument("--out", type=Path, default=Path("accelerator"), help="folder of the results")
    options.add_argument("--runs", type=Path, help="folder of the trainings; a temporary one if not given")
    options.add_argument("--phases", default="product,core,speed", help=f"some of {', '.join(ORDER)}")
    options.add_argument("--minutes", type=float, default=9.0, help="since the start of the process")
    options.add_argument("--seeds", type=int, default=2, help="at most")
    options.add_argument("--epochs", type=int, default=200)
    options.add_argument("--jobs", type=int, default=MAX_AT_ONCE, help="trainings at a time, at most")
    options.add_argument("--teachers", type=Path, metavar="PATH", help="teachers.zip or --runs of an earlier call")
    options.add_argument("--commit", help="what to write as the version, if git is not there")
    options.add_argument("--plan", action="store_true", help="print what would be trained, and train nothing")
    options.add_argument("--start", type=float, help="with --plan: seconds before the first phase")
    options.add_argument("--rehearse", action="store_true", help="on a CPU, with a small network and two epochs")
    options.add_argument("--prepare", metavar="FOLDER", help="folder of CIFAR, to make the file of images of")
    options.add_argument("--set", choices=tuple(images.CLASSES), default="cifar100", help="with --prepare")
    options.add_argument(
        "--imbalances", type=float, nargs="+", default=[100.0], help="with --prepare or --plan: imbalance factors"
    )
    options.add_argument("--merge", type=Path, nargs="+", metavar="OUT", help="folders of results to merge")
    options.add_argument("--json", type=Path, help="with --merge: the file to write")
    args = options.parse_args(arguments)
    if args.merge and args.json is None:
        options.error("--merge: say where to write with --json FILE")
    if not (args.merge or args.plan) and args.pack is None:
        options.error("--pack: give the file of images")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        return run(args)
    except LongtailError as error:
        raise SystemExit(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Do what the options ask for, and return the exit code."""
    if args.merge:
        write_json(args.json, merge(args.merge))
        return 0
    if args.prepare is not None:
        print(images.prepare(args.set, args.prepare, args.imbalances, args.pack))
        return 0
    phases = list(ORDER) if args.rehearse and args.phases == "all" else args.phases.split(",")
    if unknown := sorted(set(phases) - set(ORDER)):
        raise SystemExit(f"--phases: there is no {', '.join(unknown)}; expected some of {', '.join(ORDER)}")
    args.imbalances = [factor for factor in args.imbalances if factor != 100]
    if args.plan:
        print_plan(args, phases)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        return run_phases(args, phases, Path(temporary) if args.runs is None else args.runs)


def run_phases(args: argparse.Namespace, phases: Sequence[str], runs: Path) -> int:
    """Go through phases; one that fails does not take the others with it."""
    images.register_packed()
    name, _ = images.packed(args.pack)
    device = select_device("cpu" if args.rehearse else "cuda")
    for folder in (args.out, runs):
        folder.mkdir(parents=True, exist_ok=True)
    context = Context(
        *(args.out, runs, args.pack, name, tuple(range(args.seeds)), 2 if args.rehearse else args.epochs, args.jobs),
        rehearse=args.rehearse,
        device=device,
        started=STARTED,
        minutes=args.minutes,
        commit=args.commit or version_of_sources(),
    )
    context.say(hardware(device), context.commit)
    if args.teachers is not None:
        keys = [f"{variant}, seed {seed}" for variant in VARIANTS for seed in context.seeds]
        context.models |= find_teachers(args.teachers, runs, keys)
        kept = args.out / "teachers.zip"
        if args.teachers.is_file() and args.teachers.resolve() != kept.resolve():
            shutil.copyfile(args.teachers, kept)  # those that are trained now are added
        context.say(f"found in {args.teachers}: {'; '.join(context.models) or 'nothing'}")
    failed = 0
    for phase in phases:
        try:
            MEASUREMENTS.get(phase, functools.partial(train, phase=phase))(context)
        except StoppedError as error:
            context.say(error)
            return error.code
        except Exception as error:
            failed += 1
            traceback.print_exc()
            context.say(f"{phase}: FAILED, {one_line(error)}")
            context.write(f"{phase}-error", {"error": one_line(error)})
    context.say("done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
