"""The trainings of ``accelerator.py``: side by side as a schedule says, each result written as soon as it is there."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import re
import statistics
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerator_context import Context, Remarks, about_graph, one_line
from accelerator_plan import Job, Schedule, Variant, make_jobs
from accelerator_results import Results
from accelerator_variants import PAPER
from safetensors.torch import load_file, save_file

from longtail.config import Config
from longtail.data.sources import load_data
from longtail.errors import LongtailError, StoppedError
from longtail.experiments.records import run_record
from longtail.experiments.threads import run_in_threads
from longtail.registry import METHODS
from longtail.training.metric_log import read_metrics
from longtail.training.preemption import PreemptionHandler
from longtail.training.run_io import Run
from longtail.training.trainer import fit
from longtail.training.turns import Turn

POLL = 0.5  # seconds between two looks at what runs
ZIP_BYTES = 15 * 2**20  # of the teachers: files of 16 MiB travel


class Stops(PreemptionHandler):
    """Signals to the process, and stops of single trainings: a thread that asks is told of its own."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.signal = ""
        super().__init__(quiet=False)

    @property
    def name(self) -> str:
        """The signal that the thread which asks has to follow; empty while there is none."""
        return self.signal or ("SIGTERM" if threading.get_ident() in self.threads else "")

    @name.setter
    def name(self, value: str) -> None:
        self.signal = value


@dataclasses.dataclass
class Outcome:
    """What a training has come to."""

    run: Run | None = None
    predictions: np.ndarray[Any, Any] | None = None
    """(N,) uint8, classes of the test images under the prior that the method predicts under."""
    labels: np.ndarray[Any, Any] | None = None
    error: str = ""
    remarks: Sequence[str] = ()


def folder_of(key: str) -> str:
    """Return the name of the folder of a training."""
    return re.sub(r"[^\w]+", "-", key)


class Trainings:
    """The trainings of one phase."""

    def __init__(self, context: Context, phase: str, variants: Mapping[str, Variant], wanted: Sequence[str]) -> None:
        self.context, self.phase, self.variants = context, phase, variants
        self.results = Results.read(context.out, context.origin())
        seconds = {
            name: self._steps(name) * context.milliseconds.get(name, variant.milliseconds) / 1000
            for name, variant in variants.items()
        }
        jobs = make_jobs(variants, wanted, context.seeds, list(context.models), seconds, context.epochs)
        self.schedule = Schedule(jobs, context.limit, context.jobs, context.gains)
        self.stops, self.remarks, self.lock = Stops(), Remarks(), threading.Lock()
        self._threads: dict[str, int] = {}

    def _steps(self, name: str) -> int:
        config = self.context.recipe(**self.variants[name].changes)
        assert isinstance(config.epochs, int)
        return config.epochs * -(-len(load_data(config.data, 0).train) // config.batch_size)

    def run(self) -> None:
        """Train what fits, and write every result."""
        context, schedule = self.context, self.schedule
        ended = threading.Event()
        coordinator = threading.Thread(target=self._coordinate, args=(ended,), daemon=True)
        tasks = [functools.partial(self._task, job) for job in schedule.jobs]
        planned = [job.key for job in schedule.plan(context.now)]
        context.say(f"{self.phase}: {context.limit - context.now:.0f} s are left for {'; '.join(planned) or 'no run'}")
        with self.stops, self.remarks.attached():
            coordinator.start()
            try:
                for number, outcome in run_in_threads(tasks, max(1, len(tasks)), context.device, lambda: None):
                    try:
                        self._note(schedule.jobs[number], outcome)
                    except Exception:  # the others go on
                        context.say(f"{self.phase}: {schedule.jobs[number].key}\n{traceback.format_exc()}")
            finally:
                ended.set()
                coordinator.join()
                self._skip_waiting()  # none, unless the phase was interrupted
                self.stops.threads.update(self._threads.values())
        context.gains |= schedule.measured_gains
        for name, seconds in schedule.alone.items():
            context.milliseconds[name] = 1000 * seconds / self._steps(name)
        for job in schedule.jobs:
            if job.state != "ended":
                context.say(f"{self.phase}: {job.key}: {job.state} after {job.done} of {job.epochs} epochs")
        for line in self.results.summary(self.phase):
            context.say(f"{self.phase}: {line}")
        if self.stops.signal:
            raise StoppedError(self.stops.signal, f"in phase {self.phase}")

    def _skip_waiting(self) -> None:
        for job in self.schedule.jobs:
            job.state = "skipped" if job.state == "waiting" else job.state

    def _coordinate(self, ended: threading.Event) -> None:
        """Start and stop trainings as the schedule says, until all have ended."""
        context, schedule = self.context, self.schedule
        try:
            while not ended.wait(POLL):
                with self.lock:
                    now = context.now
                    schedule.measure({job.key: self._epochs(job) for job in schedule.running}, now)
                    if self.stops.signal:
                        schedule.limit = now
                    for job in schedule.startable(now):
                        schedule.set_state(job, "running")
                        context.say(f"{self.phase}: {job.key} starts, about {job.left:.0f} s alone")
                    over = now > context.limit + 2
                    for job in schedule.running if over else schedule.late(now):
                        if (thread := self._threads.get(job.key)) not in {None, *self.stops.threads}:
                            context.say(f"{self.phase}: {job.key} is stopped, it would not end in time")
                            self.stops.threads.add(thread or 0)
        except Exception as error:  # what waits would wait for ever
            context.say(f"{self.phase}: FAILED, {one_line(error)}\n{traceback.format_exc()}")
            self._skip_waiting()

    def _epochs(self, job: Job) -> int:
        try:
            return (self._folder(job) / "metrics.jsonl").read_bytes().count(b'"kind": "epoch"')
        except OSError:
            return 0

    def _folder(self, job: Job) -> Path:
        return self.context.runs / folder_of(job.key)

    def config(self, job: Job) -> Config:
        """Return the settings of a training, whose teachers are there."""
        variant = self.variants[job.name]
        config = self.context.recipe(**variant.changes).replace(seed=job.seed)
        keys = [f"{name}, seed {job.seed if seed is None else seed}" for name, seed in variant.taught_by]
        folders = [str(self.context.models[key]) for key in keys]
        if not folders:
            return config
        return config.replace(teacher={"source": folders[0] if len(folders) == 1 else tuple(folders)})

    def _task(self, job: Job, turn: Turn) -> Outcome:
        """Wait until the schedule starts a training, then train it; an error is a result as well."""
        with turn.taken():  # and given back, so that the next one can wait too
            pass
        while job.state == "waiting":
            time.sleep(0.2)
        if job.state != "running":
            return Outcome()
        thread = threading.get_ident()
        self._threads[job.key] = thread
        self.remarks.lines.pop(thread, None)
        outcome, state = Outcome(), "failed"
        try:
            config = self.config(job)
            data = load_data(config.data, config.seed)
            run = fit(config, self._folder(job), resume=True, quiet=True, data=data, turn=turn)
            outcome.run, state = run, "ended"
            self.context.models[job.key] = run.folder
            if (kept := run.image_results()) is not None:
                outcome.predictions, outcome.labels = (kept[name].astype(np.uint8) for name in ("predicted", "labels"))
        except StoppedError:
            state = "stopped"
        except Exception as error:
            outcome.error = one_line(error)
            self.context.say(f"{self.phase}: {job.key} FAILED\n{traceback.format_exc()}")
        outcome.remarks = self.remarks.lines.pop(thread, [])
        with self.lock:
            self.stops.threads.discard(thread)
            del self._threads[job.key]
            self.schedule.set_state(job, state)
        return outcome

    def _note(self, job: Job, outcome: Outcome) -> None:
        """Write what a training has come to."""
        if outcome.run is None:
            self.results.add_unfinished(job.name, job.seed, self.phase, job.state, job.done, outcome.error)
        else:
            entry = self._entry(job, outcome, outcome.run)
            self.results.add(entry, outcome.predictions, outcome.labels)
            self.context.say(f"{self.phase}: {job.key}: {entry['balanced_accuracy']:.2f}, {entry['seconds']:.0f} s")
            teaches = {teacher for variant in self.variants.values() for teacher, _ in variant.taught_by}
            if job.name in teaches and not add_to_zip(self.context.out / "teachers.zip", job.key, outcome.run.folder):
                self.context.say(f"{self.phase}: {job.key} is too large for teachers.zip")
        self.results.budget = self._budget()
        self.results.gains = {str(number): round(value, 3) for number, value in self.schedule.measured_gains.items()}
        self.results.alone |= {name: round(value, 2) for name, value in self.schedule.alone.items()}
        self.results.write(self.context.now)

    def _budget(self) -> dict[str, Any]:
        """Return the settings that all variants start from."""
        return {"minutes": self.context.minutes, "settings": self.context.recipe().to_dict()}

    def _entry(self, job: Job, outcome: Outcome, run: Run) -> dict[str, Any]:
        """Return a finished training as plain values."""
        record, info = run_record(run), run.model_config.training_info
        epochs = [line for line in read_metrics(run.folder / "metrics.jsonl") if line["kind"] == "epoch"]
        took = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(epochs)]
        variant = self.variants[job.name]
        return {
            "run": job.name,
            "seed": job.seed,
            "phase": self.phase,
            "views": METHODS[run.config.method].view_plan(run.config).num_student,
            "paper": PAPER.get(job.name) if self.context.images == "cifar100" else None,
            **record.metrics,
            "class_accuracies": run.metrics["per_class"],
            "epochs": record.epochs,
            "student_passes": record.student_passes,
            "seconds": record.seconds,
            "epoch_seconds": round(statistics.median(took), 4) if took else None,
            "steps": about_graph(outcome.remarks),
            "peak_mib": epochs[-1]["memory_mib"] if epochs else None,
            "changes": dict(variant.changes),
            "taught_by": list(run.config.teacher.sources) if variant.taught_by else [],
            "commit": self.context.commit,
            "error": outcome.error,
            "test_images": info.get("test_images"),
        }


def add_to_zip(path: Path, key: str, run: Path) -> bool:
    """Add the model of a run, in half precision, to a file that travels; return False if it would be too large."""
    stream = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.safetensors"
        tensors = load_file(run / "recognizer" / "model.safetensors")
        save_file({name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}, weights)
        before = path.read_bytes() if path.is_file() else b""
        stream.write(before)
        with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as archive:
            place = f"{folder_of(key)}/recognizer"
            if f"{place}/config.json" in archive.namelist():
                return True
            archive.write(weights, f"{place}/model.safetensors")
            archive.write(run / "recognizer" / "config.json", f"{place}/config.json")
    if stream.tell() > ZIP_BYTES and before:
        return False
    part = path.with_suffix(".part")
    part.write_bytes(stream.getvalue())
    part.replace(path)
    return True


def find_teachers(place: Path, runs: Path, keys: Sequence[str]) -> dict[str, Path]:
    """Return the folders of the models of an earlier call, by the key of their training.

    Args:
        place: folder of the trainings, or ``teachers.zip``.
        runs: where the zip is unpacked.
        keys: of the trainings that are looked for.

    Raises:
        LongtailError: there is no such place.
    """
    if not place.exists():
        raise LongtailError(f"--teachers {place}: there is no such file or folder; leave it out to train them")
    if place.is_file():
        folder = runs / "teachers"
        with zipfile.ZipFile(place) as archive:
            archive.extractall(folder)
        for weights in folder.rglob("model.safetensors"):
            tensors = load_file(weights)
            save_file({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, weights)
        place = folder
    there = {key: place / folder_of(key) for key in keys}
    return {key: folder for key, folder in there.items() if (folder / "recognizer" / "config.json").is_file()}
