"""Several trainings on one accelerator at once, each in a thread and on a stream of its own.

A small network leaves most of an accelerator idle: its kernels are too short to fill it. A step that is one CUDA graph
is launched without the interpreter's lock, so that threads launch beside one another.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from longtail.config import Config
from longtail.data.dataset import LongTailedData
from longtail.data.device_loader import SharedViews
from longtail.data.loader import TrainLoader
from longtail.data.sources import load_data
from longtail.devices import select_device
from longtail.errors import StoppedError
from longtail.methods.gml import GML, GMLSettings
from longtail.nn.network_name import is_timm_network
from longtail.registry import METHODS, TASKS
from longtail.training.auto_config import auto_config
from longtail.training.preemption import PreemptionHandler
from longtail.training.run_io import Run, find_finished
from longtail.training.steps import batches_on_device, reason_against_batches
from longtail.training.teacher import teacher_runs, train_once
from longtail.training.trainer import fit
from longtail.training.turns import Turn

logger = logging.getLogger(__name__)

MAX_AT_ONCE = 8
"""Trainings at a time, if not given: more gain nothing, since the accelerator is busy by then."""
_VIEW_BYTES = 2 * 2**30  # of views that are shared
_POLL = 0.2  # seconds between two looks for a signal

Result = TypeVar("Result")


def reason_against_threads(config: Config, data: LongTailedData) -> str:
    """Return why a run cannot be trained in a thread beside others; empty if it can.

    Args:
        config: settings of the run, without open ones.
        data: what it trains on.
    """
    task, method = TASKS[data.task], METHODS[config.method]
    if task.label_kind != "image":
        return "pixels or regions are drawn at random in every step"
    networks = [config.network] + [config.teacher.network] * method.needs_teacher(config)
    if any(is_timm_network(name) for name in networks) or config.tune == "head":
        return "the networks of timm may draw random numbers, whose state belongs to the whole process"
    if issubclass(method, GML) and config.section(GMLSettings).feature_transfer > 0:
        return "gml.feature_transfer draws random numbers, whose state belongs to the whole process"
    device = select_device(config.device)
    # torch's version compares with a text as versions do
    if device.type == "cuda" and config.accelerator.graph and torch.__version__ < "2.7":
        return f"in torch {torch.__version__} no step can run while another is recorded (2.7 or later is needed)"
    on_device, reason = batches_on_device(config, _loader(config, data), device)
    return "" if on_device else reason or "training batches are not made on the device"


def fitting_jobs(config: Config, data: LongTailedData, most: int) -> int:
    """Return how many runs at a time, up to ``most``, each have room for their images in their share of the memory.

    Args:
        config: settings of a run that can be trained in a thread, see :func:`reason_against_threads`.
        data: what it trains on.
        most: runs at a time that are wanted, at least 1.
    """
    loader, device = _loader(config, data), select_device(config.device)
    wanted = range(most, 1, -1)
    return next((jobs for jobs in wanted if not reason_against_batches(_share(config, jobs), loader, device)), 1)


def _loader(config: Config, data: LongTailedData) -> TrainLoader:
    transforms = TASKS[data.task].build_transforms(config, data, METHODS[config.method].view_plan(config).uses)
    return TrainLoader(data.train, config.batch_size, transforms, config.seed)


def _share(config: Config, jobs: int) -> Config:
    """Return the settings of one of ``jobs`` runs at a time."""
    return config.replace(accelerator={"memory": config.accelerator.memory / jobs})


def train_in_threads(
    configs: Mapping[Path, Config], teachers: Path, jobs: int, say: Callable[[Sequence[str]], None]
) -> Iterator[tuple[Path, Run]]:
    """Train several runs at a time on one accelerator, and yield the folder and result of each as it ends.

    The teachers that they need are trained first, side by side as well. Finished runs are not trained again.

    Args:
        configs: settings of every run, by its folder.
        teachers: folder that keeps trained teachers.
        jobs: runs at a time, each with an equal share of the memory for images and views.
        say: called with the remarks on the data of the runs, which these do not log themselves.

    Raises:
        LongtailError: an input cannot be used.
        StoppedError: SIGTERM or SIGINT came; everything is saved.
    """
    loaded: dict[object, LongTailedData] = {}
    data: dict[Path, LongTailedData] = {}
    for folder, config in configs.items():
        key = (config.data, config.seed)
        if key not in loaded:
            images = load_data(config.data, config.seed)
            say(images.remarks)
            loaded[key] = dataclasses.replace(images, remarks=())
        data[folder] = loaded[key]
    configs = {folder: auto_config(_share(config, jobs), data[folder])[0] for folder, config in configs.items()}

    def train_a_teacher(settings: Config, folder: Path, turn: Turn, *, images: LongTailedData) -> None:
        def train() -> object:
            return fit(settings, folder, resume=True, quiet=True, teachers=teachers, data=images, turn=turn)

        with turn.taken():
            train_once(folder, train, f"teacher: training {settings.network} first, kept in {folder}")

    methods = tuple(dict.fromkeys(config.method for config in configs.values()))

    def train(folder: Path, turn: Turn) -> Run:
        config, images = configs[folder], data[folder]
        return find_finished(folder, config, images) or fit(
            config, folder, resume=True, quiet=True, teachers=teachers, data=images, turn=turn, methods=methods
        )

    # generation by generation: no training then waits, with its turn, for one that needs the turn to end
    stages: list[dict[Path, Callable[[Turn], None]]] = []
    for folder, config in configs.items():
        if find_finished(folder, config, data[folder]):
            continue
        for number, generation in enumerate(teacher_runs(config, data[folder], teachers)):
            if number == len(stages):
                stages.append({})
            for teacher, settings in generation.items():
                stages[number][teacher] = functools.partial(train_a_teacher, settings, teacher, images=data[folder])
    device = select_device(next(iter(configs.values())).device)
    folders, ended = list(configs), 0
    with PreemptionHandler(quiet=False) as signals:

        def stopped() -> None:
            if signals.name:
                raise StoppedError(signals.name, f"after {ended} of {len(folders)} runs")

        for stage in stages:
            for _ in run_in_threads(list(stage.values()), jobs, device, stopped):
                pass
        for number, run in run_in_threads([functools.partial(train, each) for each in folders], jobs, device, stopped):
            ended += 1
            yield folders[number], run


def run_in_threads(
    tasks: Sequence[Callable[[Turn], Result]], at_once: int, device: torch.device, stopped: Callable[[], None]
) -> Iterator[tuple[int, Result]]:
    """Run tasks side by side, and yield the number and result of each as it ends.

    A task starts when the one before has given its turn, and while as much of the device's memory is free as the
    largest so far has taken. Once one has failed no other starts; those that run end first and are yielded, then its
    error is raised.

    Args:
        tasks: functions of their turn.
        at_once: most of them that run at a time.
        device: where they run.
        stopped: raises if the user has asked to stop; called before a task is started.
    """
    lock, views = threading.Lock(), SharedViews(_VIEW_BYTES)
    pending = collections.deque(enumerate(tasks))
    running: dict[concurrent.futures.Future[Result], int] = {}
    needed = 0
    failure: BaseException | None = None
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        while running or (pending and failure is None):
            while (
                pending
                and failure is None
                and len(running) < at_once
                and (not running or _free(device) >= 1.3 * needed)
            ):
                stopped()
                before, turn = _free(device), Turn(lock, views)
                number, task = pending.popleft()
                running[pool.submit(_run, task, turn, device)] = number
                while not turn.given.wait(_POLL):  # in parts, so that signals are heard
                    pass
                needed = max(needed, before - _free(device))
            ended, _ = concurrent.futures.wait(running, _POLL, concurrent.futures.FIRST_COMPLETED)
            # all that have failed first: what is yielded may take long, and no task may start meanwhile
            for future in ended:
                failure = failure or future.exception()
            for future in ended:
                number = running.pop(future)
                if future.exception() is None:
                    yield number, future.result()
    if failure is not None:
        raise failure


def _run(task: Callable[[Turn], Result], turn: Turn, device: torch.device) -> Result:
    try:
        return task(turn)
    finally:
        if device.type == "cuda":
            # memory that a finished training has left to Python's collector and to torch's cache counts as free;
            # in the turn, since it must not be freed while a graph is recorded
            with turn.taken():
                gc.collect()
                try:
                    torch.cuda.empty_cache()
                except RuntimeError as error:  # after a recording that failed; what was trained is whole
                    logger.debug("%s", error)
        turn.give()
        turn.given.set()


def _free(device: torch.device) -> int:
    """Return the free bytes of the device; none are counted on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
