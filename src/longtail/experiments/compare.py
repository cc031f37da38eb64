"""Several methods, seeds and imbalance factors under one recipe, run by run; finished runs are not trained again."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from longtail.config import Config, Data, first_stage_epochs
from longtail.data.dataset import LongTailedData
from longtail.data.sources import is_balanced, load_data, split_sizes
from longtail.devices import select_device
from longtail.errors import LongtailError, StoppedError
from longtail.experiments.records import Record, columns, run_name, run_record
from longtail.experiments.threads import MAX_AT_ONCE, fitting_jobs, reason_against_threads, train_in_threads
from longtail.files import make_folder, write_json, write_text
from longtail.registry import METHODS, TASKS, load_plugin, plugins
from longtail.run_folder import is_comparison
from longtail.training.auto_config import auto_config, find_weights
from longtail.training.checkpoint import FORMAT
from longtail.training.init_weights import fit_init, with_init
from longtail.training.mixing import build_mixer
from longtail.training.preemption import PreemptionHandler
from longtail.training.run_io import (
    alone_in,
    check_nobody_trains_in,
    check_reads_nothing_in,
    check_run_folder,
    find_finished,
)
from longtail.training.sharpness import check_sharpness, passes_per_step
from longtail.training.trainer import fit

logger = logging.getLogger(__name__)

Budget = Literal["passes", "epochs"]
_SEEDS = 2**31  # as many as there are, from 0


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a comparison, before its data is known."""

    config: Config
    imbalance: float | None
    """The factor, where the comparison has several to choose from."""
    methods: tuple[str, ...]
    """Those of the comparison, which have the settings in common."""

    @property
    def name(self) -> str:
        """The run's folder."""
        return run_name(self.config.method, self.config.seed, self.imbalance)


def plan(
    config: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    budget: Budget,
    imbalances: Sequence[float | None] = (None,),
) -> list[Planned]:
    """Return every run: imbalance by imbalance, seed by seed.

    Args:
        config: the recipe.
        methods: names of the methods.
        seeds: seeds, the same for every method, so that their differences are paired.
        budget: ``passes``: every method has as many student passes as the most expensive one in the recipe's epochs, a
            pass of a network with experts counted as its operations, and an epoch of a second stage as one pass per
            image; ``epochs``: every method has the recipe's epochs.
        imbalances: imbalance factors; None is the recipe's own.

    Raises:
        LongtailError: an unknown method, one named twice, a factor below 1, or a seed that is too large.
    """
    _check_methods(methods)
    for factor in imbalances:
        if factor is not None and not 1 <= factor < float("inf"):
            raise LongtailError(f"--imbalances: expected factors of at least 1, got {factor:g}")
    last = max(seeds, default=0)
    if last >= _SEEDS:
        raise LongtailError(f"--seeds {len(seeds)}: the last seed would be {last}, expected at most {_SEEDS - 1}")
    if len(set(imbalances)) < len(imbalances) or not imbalances:
        raise LongtailError("--imbalances: expected different factors")
    natural = config.data.profile == "natural" or (
        config.data.profile == "auto" and not is_balanced(config.data.source)
    )
    if natural and any(factor is not None for factor in imbalances):
        raise LongtailError(
            f"--imbalances: {config.data.root or config.data.source} keeps the tail that it has; "
            "set --data.profile to exponential, step or pareto to make others"
        )
    assert isinstance(config.epochs, int)
    costs = {name: METHODS[name].view_plan(config).num_student * METHODS[name].pass_cost(config) for name in methods}
    epochs = _equal_epochs(config, costs) if budget == "passes" else dict.fromkeys(methods, config.epochs)
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
            tuple(methods),
        )
        for factor in imbalances
        for seed in seeds
        for name in methods
    ]


def _equal_epochs(config: Config, costs: Mapping[str, float]) -> dict[str, int]:
    """Return the epochs in which each method has the passes of the most expensive one in the recipe's epochs.

    Args:
        config: the recipe.
        costs: passes per image and epoch of each method, without a second stage.
    """
    assert isinstance(config.epochs, int)
    if config.second_stage == "none":
        most = max(costs.values())
        return {name: round(config.epochs * most / cost) for name, cost in costs.items()}

    def passes(epochs: int, cost: float) -> float:
        """Return the passes per image of both stages."""
        first = first_stage_epochs(config.replace(epochs=epochs))
        return first * cost * passes_per_step(config) + epochs - first

    wanted = max(passes(config.epochs, cost) for cost in costs.values())

    def nearest(cost: float) -> int:
        most = math.ceil(wanted / min(1.0, cost))  # every epoch as cheap as one can be
        return min(range(2, 1 + max(2, most)), key=lambda epochs: abs(passes(epochs, cost) - wanted))

    return {name: nearest(cost) for name, cost in costs.items()}


def describe(runs: Sequence[Planned], epochs: int) -> str:
    """Return how many runs a comparison has and of how many epochs, in one line.

    Args:
        runs: of :func:`plan`.
        epochs: those of the recipe.
    """
    methods: dict[object, list[str]] = {}
    for name, own in dict.fromkeys((run.config.method, run.config.epochs) for run in runs):
        methods.setdefault(own, []).append(name)
    line = f"{len(runs)} run{'s' * (len(runs) != 1)}: "
    if len(methods) == 1:
        return f"{line}{epochs} epoch{'s' * (epochs != 1)} each"
    first, *others = (f"{', '.join(names)} {own}" for own, names in methods.items())
    return f"{line}{', '.join([f'{first} epochs', *others])}: equal student passes (--budget epochs: {epochs} each)"


def _check_methods(methods: Sequence[str]) -> None:
    for name in methods:
        if name == "auto":
            raise LongtailError("--methods: auto is for train, which chooses a method; compare takes their names")
        METHODS.check(name, "--methods:")
    if len(set(methods)) < len(methods) or not methods:
        raise LongtailError(f"--methods: expected different names, got {','.join(methods)}")


def compare(
    config: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path | str,
    *,
    budget: Budget = "passes",
    imbalances: Sequence[float | None] = (None,),
    jobs: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[Record]:
    """Train every method with every seed and return one record per run.

    Args:
        config: the recipe.
        methods: names of the methods.
        seeds: seeds.
        out: folder that holds the runs, ``METHOD-seedN`` each; finished runs in it are not trained again.
            ``records.jsonl`` in it has one line per finished run of this call.
        budget: see :func:`plan`.
        imbalances: see :func:`plan`.
        jobs: runs at a time. On a CPU each is a process of its own with its share of the cores, and it is one if not
            given; on an accelerator they are threads of this process, as many as fit, at most 8 if not given.
        overwrite: train everything again.
        quiet: show no progress bars.

    Raises:
        LongtailError: an input cannot be used, or ``out`` holds runs with other settings.
        StoppedError: SIGTERM or SIGINT came; everything is saved.
    """
    out = Path(out)
    _check_methods(methods)
    config = config.replace(method=methods[0])  # a recipe's own method does not count, but it has to be one
    # what a training does first: open settings are chosen for the weights that it starts from
    config = find_weights(with_init(config, out))
    data = load_data(config.data, seeds[0])  # before anything is removed
    config, _ = fit_init(config, data)
    if config.epochs == "auto":
        config = config.replace(epochs=auto_config(config, data)[0].epochs)
    assert isinstance(config.epochs, int)
    runs = plan(config, methods, seeds, budget, imbalances)
    _check_runs([run for run in runs if run.config.seed == seeds[0]], config.data, data)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LongtailError("compare: runs in one process; to use several, start torchrun for each training")
    if out.exists() and any(out.iterdir()) and not is_comparison(out):
        raise LongtailError(f"{out}: is not empty and not a comparison of longtail; choose another --out")
    if not overwrite:
        for planned in _of_first(runs):
            check_run_folder(out / planned.name, auto_config(planned.config, data)[0], resume=True, overwrite=False)
    with alone_in(out):
        remarks = _Remarks()
        if any(run.config.data == config.data for run in runs):
            remarks.say(data.remarks)
        logger.info("%s", describe(runs, config.epochs))
        return _compare(config, runs, out, data, jobs, remarks, overwrite=overwrite, quiet=quiet)


class _Remarks:
    """What there is to say of the data of all runs, most of which they have in common: each line is logged once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, lines: Sequence[str]) -> None:
        for line in lines:
            if line not in self._said:
                self._said.add(line)
                logger.info("%s", line)


def _check_runs(runs: Sequence[Planned], of_recipe: Data, data: LongTailedData) -> None:
    """Raise LongtailError where a run is not possible, which its training would find after those before it.

    Args:
        runs: of one seed, of all methods and imbalance factors.
        of_recipe: the recipe's settings of the data, whose factor may be none of those.
        data: what they stand for.
    """
    checked = {of_recipe}
    for planned in runs:
        if planned.config.data == of_recipe:
            _check_settings(planned, data)
        elif planned.config.data not in checked:
            checked.add(planned.config.data)
            try:
                split_sizes(planned.config.data, planned.config.seed)
            except LongtailError as error:
                raise LongtailError(f"--imbalances {planned.imbalance:g}: {error}") from None


def _of_first(runs: Sequence[Planned]) -> list[Planned]:
    """Return the runs of the first seed and imbalance factor, whose data are loaded."""
    return [run for run in runs if (run.config.seed, run.config.data) == (runs[0].config.seed, runs[0].config.data)]


def _compare(
    config: Config,
    runs: Sequence[Planned],
    out: Path,
    data: LongTailedData,
    jobs: int | None,
    remarks: _Remarks,
    *,
    overwrite: bool,
    quiet: bool,
) -> list[Record]:
    if overwrite and out.exists():
        check_reads_nothing_in(out, config)
        check_nobody_trains_in(out)
        shutil.rmtree(out)
    make_folder(out)
    comparison = {"format": FORMAT, "recipe": config.to_dict()}
    if not (out / "comparison.json").exists():  # what is there is replaced when a run of it has been accepted
        write_json(out / "comparison.json", comparison)
    if earlier := sorted(_earlier(out) - {run.name for run in runs}):
        logger.info(
            "%s: has %d runs of an earlier call (%s), which are not in this table; longtail report %s/*-seed* compares "
            "all of them",
            *(out, len(earlier), ", ".join(earlier[:3]) + ("…" if len(earlier) > 3 else ""), out),
        )
    records: dict[Planned, Record] = {}
    for planned, entry in _train_all(config, runs, out, data, jobs, remarks, quiet):
        if not records:
            write_json(out / "comparison.json", comparison)
        records[planned] = entry
        in_order = [records[run] for run in runs if run in records]
        write_text(out / "records.jsonl", as_json_lines(in_order))
        what = f"{planned.config.method} seed {planned.config.seed}"
        what += "" if planned.imbalance is None else f" imbalance {planned.imbalance:g}"
        name, title = columns([entry])[0]
        value = entry.metrics[name]
        shown = "n/a" if value is None else f"{value:.1f} %"
        logger.info("%d/%d %s: %s %s, %.0f s", len(records), len(runs), what, title, shown, entry.seconds)
    return [records[run] for run in runs]


def _train_all(
    config: Config,
    runs: Sequence[Planned],
    out: Path,
    data: LongTailedData,
    jobs: int | None,
    remarks: _Remarks,
    quiet: bool,
) -> Iterator[tuple[Planned, Record]]:
    """Train the runs in threads of this process, in processes or in turn; see :func:`compare`."""
    on_accelerator = _on_accelerator(config)
    at_once = min(jobs or (MAX_AT_ONCE if on_accelerator else 1), len(runs))
    if at_once > 1 and on_accelerator:
        configs = [auto_config(run.config, data)[0] for run in _of_first(runs)]
        if reason := next(filter(None, (reason_against_threads(each, data) for each in configs)), ""):
            logger.info("the runs cannot share one process: %s", reason)
            at_once = 1 if jobs is None else at_once
        else:
            fitting = min(fitting_jobs(each, data, at_once) for each in configs)
            if fitting < at_once:
                what = f"{fitting} at a time" if fitting > 1 else "one after another"
                logger.info("the runs are trained %s: accelerator.memory holds the images of no more", what)
            if fitting > 1:
                return _in_threads(runs, out, fitting, remarks)
            at_once = 1
    return _in_turn(runs, out, remarks, quiet) if at_once == 1 else _side_by_side(runs, out, at_once, remarks)


def _earlier(out: Path) -> set[str]:
    """Return the names of the finished runs in the folder of a comparison."""
    return {path.parent.parent.name for path in out.glob("*-seed*/recognizer/config.json")}


def _check_settings(planned: Planned, data: LongTailedData) -> None:
    """Raise LongtailError where a method does not fit, which its training would find after those before it."""
    config = auto_config(planned.config, data)[0]
    method, label_kind = METHODS[config.method], TASKS[data.task].label_kind
    method.check(config, data.class_counts)
    check_sharpness(config, method, data.class_counts, label_kind)
    build_mixer(config, method, data.class_counts, label_kind)


def _on_accelerator(config: Config) -> bool:
    return config.accelerator.batches == "device" or select_device(config.device).type == "cuda"


# the set that this process used last, and its remarks
_loaded: list[tuple[object, LongTailedData, tuple[str, ...]]] = []


def _train(planned: Planned, out: Path, say: Callable[[Sequence[str]], None], quiet: bool) -> Record:
    """Train one run, or read it where it is finished; ``say`` is called with the remarks on its data."""
    config = planned.config
    key = (config.data, config.seed)
    if not _loaded or _loaded[0][0] != key:
        loaded = load_data(config.data, config.seed)
        _loaded[:] = [(key, dataclasses.replace(loaded, remarks=()), loaded.remarks)]
    _, data, remarks = _loaded[0]
    say(remarks)
    run, folder = auto_config(config, data)[0], out / planned.name
    done = find_finished(folder, run, data) or fit(
        run, folder, resume=True, quiet=quiet, teachers=out / "teachers", data=data, methods=planned.methods
    )
    return dataclasses.replace(run_record(done), imbalance=planned.imbalance)


def _in_threads(runs: Sequence[Planned], out: Path, jobs: int, remarks: _Remarks) -> Iterator[tuple[Planned, Record]]:
    """Train ``jobs`` runs at a time on one accelerator."""
    planned = {out / run.name: run for run in runs}
    configs = {folder: run.config for folder, run in planned.items()}
    for folder, done in train_in_threads(configs, out / "teachers", jobs, remarks.say):
        run = planned[folder]
        yield run, dataclasses.replace(run_record(done), imbalance=run.imbalance)


def _in_turn(runs: Sequence[Planned], out: Path, remarks: _Remarks, quiet: bool) -> Iterator[tuple[Planned, Record]]:
    try:
        # a signal outside a training's steps is noted, and heard before the next training or at its first step
        with PreemptionHandler(quiet) as signals:
            for ended, planned in enumerate(runs):
                if signals.name:
                    raise StoppedError(signals.name, f"after {ended} of {len(runs)} runs")
                yield planned, _train(planned, out, remarks.say, quiet)
    finally:
        _loaded.clear()


def _side_by_side(runs: Sequence[Planned], out: Path, jobs: int, remarks: _Remarks) -> Iterator[tuple[Planned, Record]]:
    """Train ``jobs`` runs at a time, in processes that start once and share out the cores."""
    threads = max(1, torch.get_num_threads() // jobs)
    ended = 0
    with (
        concurrent.futures.ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), _start_worker, (threads, plugins())
        ) as pool,
        _forward_signals() as received,
    ):
        waiting = {pool.submit(_train_in_worker, planned, out): planned for planned in runs}
        try:
            for future in concurrent.futures.as_completed(waiting):
                entry, lines = future.result()
                remarks.say(lines)  # of another seed or factor than the first, of which they have been said
                yield waiting[future], entry
                ended += 1
        except Exception as error:
            # runs that have not started are cancelled; the others finish, or have received the signal
            pool.shutdown(wait=True, cancel_futures=True)
            if received:
                raise StoppedError(signal.Signals(received[0]).name, f"after {ended} of {len(runs)} runs") from None
            if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                raise LongtailError(
                    "a training process ended unexpectedly, perhaps out of memory; repeat the command with fewer "
                    "--jobs to continue"
                ) from None
            raise


# of this worker; it ignores repeated signals, since a killed worker would leave its locks behind
_signals = PreemptionHandler(quiet=True, ignore_repeat=True)


def _train_in_worker(planned: Planned, out: Path) -> tuple[Record, list[str]]:
    """Train one run; returns its record and the remarks on its data, since the messages of a worker are not shown."""
    remarks: list[str] = []
    # a run that is queued for this worker must not start after the one that was stopped
    if _signals.name:
        raise StoppedError(_signals.name, "between two trainings")
    try:
        return _train(planned, out, remarks.extend, quiet=True), remarks
    except StoppedError as stop:
        _signals.name = stop.name
        raise


def _start_worker(threads: int, plugin_files: Sequence[str]) -> None:
    os.setsid()  # signals of a terminal reach the main process only, which forwards them
    _signals.__enter__()
    torch.set_num_threads(threads)
    for file in plugin_files:
        load_plugin(file)


@contextlib.contextmanager
def _forward_signals() -> Iterator[list[int]]:
    """Forward SIGTERM and SIGINT to the workers as SIGTERM, and return the signals received.

    A worker in the middle of a training saves and stops; an idle one starts no other.
    """
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_json(records: Sequence[Record]) -> list[dict[str, object]]:
    """Return the records as plain values."""
    return [entry.to_dict() for entry in records]


def as_json_lines(records: Sequence[Record]) -> str:
    """Return the records as text, one line of JSON each."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in as_json(records))
