"""Several methods, seeds and imbalances under one recipe: trained run by run; what is done is not done again."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.named import BALANCED
from longtail.data.sources import load_data
from longtail.engine.choices import resolve
from longtail.engine.files import FORMAT
from longtail.engine.finished import finished, record
from longtail.engine.fit import fit
from longtail.engine.processes import StopSignals
from longtail.errors import LongtailError, StoppedError, nearest
from longtail.evaluation.comparison import Record, columns, run_name
from longtail.files import write_json, write_text
from longtail.methods import METHODS, method_class

Match = Literal["passes", "epochs"]


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a comparison, before its data is known."""

    config: Config
    imbalance: float | None
    """The factor, where the comparison has several to choose from."""

    @property
    def name(self) -> str:
        """The run's folder."""
        return run_name(self.config.method, self.config.seed, self.imbalance)


def plan(
    config: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    match: Match,
    imbalances: Sequence[float | None] = (None,),
) -> list[Planned]:
    """Return every run: imbalance by imbalance, seed by seed.

    Args:
        config: the recipe.
        methods: names of the methods.
        seeds: seeds, the same for every method, so that their differences are paired.
        match: ``passes`` gives every method as many student passes as the hungriest of them has in the recipe's epochs;
            ``epochs`` gives all the recipe's epochs.
        imbalances: imbalance factors; None is the recipe's own.

    Raises:
        LongtailError: an unknown method, one named twice, or a factor below 1.
    """
    for name in methods:
        if name not in METHODS:
            raise LongtailError(f"--methods: '{name}' is not known{nearest(name, METHODS)}")
    if len(set(methods)) < len(methods) or not methods:
        raise LongtailError(f"--methods: expected different names, got {','.join(methods)}")
    for factor in imbalances:
        if factor is not None and not 1 <= factor < float("inf"):
            raise LongtailError(f"--imbalances: expected factors of at least 1, got {factor:g}")
    if len(set(imbalances)) < len(imbalances) or not imbalances:
        raise LongtailError("--imbalances: expected different factors")
    natural = config.data.profile == "natural" or (config.data.profile == "auto" and config.data.source not in BALANCED)
    if natural and any(factor is not None for factor in imbalances):
        raise LongtailError(
            f"--imbalances: {config.data.root or config.data.source} keeps the tail that it has; "
            "set --data.profile to exponential, step or pareto to make others"
        )
    assert isinstance(config.epochs, int)
    views = {name: method_class(name).student_views(config) for name in methods}
    most = max(views.values())
    epochs = {
        name: round(config.epochs * most / views[name]) if match == "passes" else config.epochs for name in methods
    }
    # the teacher is the recipe's, whatever its student's epochs become
    config = config.replace(teacher={"epochs": config.teacher.epochs or config.epochs})
    return [
        Planned(
            config.replace(
                method=name,
                seed=seed,
                epochs=epochs[name],
                data={} if factor is None else {"imbalance": factor},
            ),
            factor,
        )
        for factor in imbalances
        for seed in seeds
        for name in methods
    ]


def compare(
    config: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    match: Match = "passes",
    imbalances: Sequence[float | None] = (None,),
    jobs: int = 1,
    overwrite: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = lambda _line: None,
) -> list[Record]:
    """Train every method with every seed and return one record a run.

    Args:
        config: the recipe.
        methods: names of the methods.
        seeds: seeds.
        out: folder that holds the runs, ``METHOD-seedN`` each; what is finished there is read, not trained again.
            ``records.jsonl`` in it has a line for every run that has ended.
        match: see :func:`plan`.
        imbalances: see :func:`plan`.
        jobs: runs at a time, each in a process of its own with its share of the cores.
        overwrite: train everything anew.
        quiet: show no progress bars.
        say: told of every run that ends.

    Raises:
        LongtailError: an input cannot be used, or ``out`` holds runs with other settings.
        StoppedError: SIGTERM or SIGINT came; everything is saved.
    """
    data = load_data(config.data, seeds[0])  # before anything is removed
    if config.epochs == "auto":
        config = config.replace(epochs=resolve(config, data).epochs)
    runs = plan(config, methods, seeds, match, imbalances)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LongtailError("compare: is run by one process; give every training torchrun of its own")
    if out.exists() and any(out.iterdir()) and not (out / "comparison.json").is_file():
        raise LongtailError(f"{out}: is not empty and no comparison of longtail; choose another --out")
    if overwrite and out.exists():
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongtailError(f"{out}: cannot be made: {error.strerror}") from None
    write_json(out / "comparison.json", {"format": FORMAT, "recipe": config.to_dict()})
    records: dict[Planned, Record] = {}
    ended = _in_turn(runs, out, quiet) if jobs == 1 else _side_by_side(runs, out, jobs)
    for planned, entry in ended:
        records[planned] = entry
        in_order = [records[run] for run in runs if run in records]
        write_text(out / "records.jsonl", as_json_lines(in_order))
        what = f"{planned.config.method} seed {planned.config.seed}"
        what += "" if planned.imbalance is None else f" imbalance {planned.imbalance:g}"
        name, title = columns([entry])[0]
        say(f"{len(records)}/{len(runs)} {what}: {title} {getattr(entry, name):.1f} %, {entry.seconds:.0f} s")
    return [records[run] for run in runs]


_loaded: list[tuple[object, LongTailedData]] = []  # the set that this process used last


def _train(planned: Planned, out: Path, quiet: bool) -> Record:
    """Train one run, or read it where it is finished."""
    config = planned.config
    key = (config.data, config.seed)
    if not _loaded or _loaded[0][0] != key:
        _loaded[:] = [(key, load_data(config.data, config.seed))]
    data = _loaded[0][1]
    run, folder = resolve(config, data), out / planned.name
    done = finished(folder, run) or fit(run, folder, resume=True, quiet=quiet, teachers=out / "teachers", data=data)
    return dataclasses.replace(record(done), imbalance=planned.imbalance)


def _in_turn(runs: Sequence[Planned], out: Path, quiet: bool) -> Iterator[tuple[Planned, Record]]:
    try:
        # a signal outside a training's steps is noted, and heard before the next training or at its first step
        with StopSignals(quiet) as signals:
            for ended, planned in enumerate(runs):
                if signals.name:
                    raise StoppedError(signals.name, f"after {ended} of {len(runs)} runs")
                yield planned, _train(planned, out, quiet)
    finally:
        _loaded.clear()


def _side_by_side(runs: Sequence[Planned], out: Path, jobs: int) -> Iterator[tuple[Planned, Record]]:
    """Train ``jobs`` runs at a time, in processes that start once and share out the cores."""
    threads = max(1, torch.get_num_threads() // jobs)
    ended = 0
    with (
        concurrent.futures.ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), _start_worker, (threads,)
        ) as pool,
        _signals_handed_on() as told,
    ):
        waiting = {pool.submit(_train_in_worker, planned, out): planned for planned in runs}
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
                ended += 1
        except Exception as error:
            # what has not started does not start; what has is let finish, or has been told to stop
            pool.shutdown(wait=True, cancel_futures=True)
            if told:
                raise StoppedError(signal.Signals(told[0]).name, f"after {ended} of {len(runs)} runs") from None
            if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                raise LongtailError(
                    "a training process has gone, out of memory perhaps; use fewer --jobs; the same command goes on"
                ) from None
            raise


_signals = StopSignals(quiet=True, patient=True)  # what this worker was told; killed, it would leave its locks behind


def _train_in_worker(planned: Planned, out: Path) -> Record:
    # a run that was handed to this worker already must not start after the one that was stopped
    if _signals.name:
        raise StoppedError(_signals.name, "between two trainings")
    try:
        return _train(planned, out, quiet=True)
    except StoppedError as stop:
        _signals.name = stop.name
        raise


def _start_worker(threads: int) -> None:
    os.setsid()  # a terminal's signals reach the comparison alone, which hands them on
    _signals.__enter__()
    torch.set_num_threads(threads)


@contextlib.contextmanager
def _signals_handed_on() -> Iterator[list[int]]:
    """Tell the trainings to stop when this process is told, and return what it was told.

    A training saves and ends; a process that is not in one begins no other.
    """
    told: list[int] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_json(records: Sequence[Record]) -> list[dict[str, object]]:
    """Return the records as plain values."""
    return [dataclasses.asdict(entry) for entry in records]


def as_json_lines(records: Sequence[Record]) -> str:
    """Return the records as text, a line of JSON each."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in as_json(records))
