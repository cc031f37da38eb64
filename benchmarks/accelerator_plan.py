"""Which trainings fit into the time that is left on one accelerator, in which order, and side by side with which.

Nothing here trains: :class:`Schedule` is asked which training may start and which has to stop, and told how far each
is. :func:`simulate` asks it with a clock of its own, for ``accelerator.py --plan`` and the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

GAINS: Mapping[int, float] = {1: 1.0, 2: 1.4, 3: 1.6, 4: 1.75, 5: 1.85, 6: 1.9}
"""How many times faster trainings are side by side than one after the other, by their number; measured on an H200 by a
prototype. More than six gain nothing."""
OVERHEAD = 5.0  # seconds of a training beside its steps: networks and graphs first, evaluation at the end
SETTLED, WINDOW = 3, 8.0  # epochs of every training that runs, and seconds, from which on a measurement is believed
MARGIN, FURTHER_MARGIN = 0.02, 0.08  # of the time that is left, which a new training leaves free; of a further seed


@dataclasses.dataclass
class Job:
    """One training, and how far it is."""

    name: str
    seed: int
    seconds: float
    """That its epochs take alone on the accelerator; expected, later measured."""
    epochs: int = 200
    after: tuple[str, ...] = ()
    """Keys of the trainings whose models it needs."""
    wanted: bool = True
    """Whether it is asked for, not only what teaches one that is."""
    further: bool = False
    """Whether it is of a further seed: begun only once those of the first run as fast as was expected."""
    state: str = "waiting"
    """waiting, running, ended, skipped (there was no time), stopped (there was no longer any), or failed."""
    done: int = 0
    """Epochs that have ended."""

    @property
    def key(self) -> str:
        """Its name among the trainings of all seeds."""
        return f"{self.name}, seed {self.seed}"

    @property
    def left(self) -> float:
        """Seconds that it still takes alone."""
        return self.seconds * (1 - self.done / self.epochs) + OVERHEAD / (2 if self.done else 1)


def gain(number: int, gains: Mapping[int, float]) -> float:
    """Return the gain of ``number`` trainings side by side; where it is not known, that of the next smaller number."""
    return gains[max((known for known in gains if known <= number), default=1)]


def expected_ends(jobs: Sequence[Job], gains: Mapping[int, float], now: float, at_once: int) -> dict[str, float]:
    """Return when each of these ends if no other is trained; those that wait start in their order.

    Args:
        jobs: running or waiting. One that waits for another, which is neither among them nor ended, has no end.
        gains: see :data:`GAINS`.
        now: the time, in seconds.
        at_once: how many run at a time, at most.
    """
    left = {job.key: job.left for job in jobs}
    active = [job.key for job in jobs if job.state == "running"]
    waiting = [job for job in jobs if job.state == "waiting"]
    ends: dict[str, float] = {}
    while True:
        for job in list(waiting):
            if len(active) < at_once and not any(key in left for key in job.after):
                waiting.remove(job)
                active.append(job.key)
        if not active:
            return ends
        speed = gain(len(active), gains) / len(active)
        passed = min(left[key] for key in active) / speed
        now += passed
        for key in list(active):
            left[key] -= passed * speed
            if left[key] <= 1e-9:
                ends[key] = now
                active.remove(key)
                del left[key]


class Schedule:
    """Decides which trainings start, and which stop.

    The order of the jobs is that of their worth. A job is planned, with those that teach it, if they and all that are
    planned before end in time. What is measured replaces what was expected: the seconds of a training that runs alone,
    and the gain of those that run side by side.

    Args:
        jobs: with what they need before them.
        limit: when everything has to be ended, on the clock of ``now``.
        at_once: how many run at a time, at most.
        gains: that were measured before, by the number of trainings side by side.
    """

    def __init__(
        self, jobs: Sequence[Job], limit: float, at_once: int = 8, gains: Mapping[int, float] | None = None
    ) -> None:
        self.jobs, self.limit, self.at_once = list(jobs), limit, at_once
        self.measured_gains = dict(gains or {})
        self.gains = {**GAINS, **self.measured_gains}
        self.alone: dict[str, float] = {}
        """Measured seconds of a training that runs alone, by its name."""
        self._expected = {job.name: job.seconds for job in self.jobs}
        self._factor = 1.0  # measured over expected
        self._planned: set[str] = set()
        self.settled = False
        """Whether the speed of those that run has been measured."""
        self._by_key = {job.key: job for job in self.jobs}
        self._base: dict[str, tuple[int, float]] = {}  # epochs and time of each, since the same ones run

    @property
    def running(self) -> list[Job]:
        """What runs, the most worth first."""
        return [job for job in self.jobs if job.state == "running"]

    @property
    def open(self) -> bool:
        """Whether anything runs or waits."""
        return any(job.state in {"running", "waiting"} for job in self.jobs)

    def plan(self, now: float) -> list[Job]:
        """Return what runs, and what can be started beside and after it and end in time."""
        planned = self.running
        for job in self.jobs:
            needed = {each.key: each for each in [*self._teachers(job), job]}.values()
            group = [each for each in needed if each.state == "waiting" and each not in planned]
            if not job.wanted or job not in group or any(self._lost(each) for each in group):
                continue
            margin = FURTHER_MARGIN if job.further else 0.0 if job.key in self._planned else MARGIN
            ends = expected_ends([*planned, *group], self.gains, now, self.at_once)
            if all(end <= self.limit - margin * (self.limit - now) for end in ends.values()):
                planned += group
        self._planned = {job.key for job in planned}  # which need no margin the next time
        return planned

    def _teachers(self, job: Job) -> list[Job]:
        """Return what a job needs, and what that needs, the first to be trained first."""
        direct = [self._by_key[key] for key in job.after]
        return [each for teacher in direct for each in [*self._teachers(teacher), teacher]]

    def _lost(self, job: Job) -> bool:
        return any(self._by_key[key].state in {"skipped", "stopped", "failed"} for key in job.after)

    def startable(self, now: float) -> list[Job]:
        """Return what starts now; what cannot end in time any more is skipped meanwhile."""
        for job in self.jobs:
            if job.state == "waiting" and (self._lost(job) or now + job.left > self.limit):
                job.state = "skipped"
        planned, running = self.plan(now), self.running
        first_waits = any(job.state == "waiting" and not job.further for job in self.jobs)
        starting = [
            job
            for job in planned
            if job.state == "waiting" and all(self._by_key[key].state == "ended" for key in job.after)
            # those of a further seed once all of the first run, as fast as was expected
            if not job.further or (not first_waits and (self.settled or not running))
        ][: self.at_once - len(running)]
        if not running and not starting:  # nothing will change any more for those of the first seed, or for any
            for job in self.jobs:
                if job.state == "waiting" and job.further != first_waits:
                    job.state = "skipped"
        return starting

    def late(self, now: float) -> list[Job]:
        """Return what has to stop, so that others end in time.

        That is what would be late even alone; if there is nothing such, the least worth of what is late, where more of
        the others then end in time.
        """
        running = self.running
        if not self.settled:
            return []
        latest = self.limit + MARGIN * (self.limit - now)
        if hopeless := [job for job in running if now + job.left / self.gains[1] > latest]:
            return hopeless

        def in_time(jobs: Sequence[Job]) -> int:
            ends = expected_ends(jobs, self.gains, now, self.at_once)
            return sum(end <= self.limit for end in ends.values())

        ends, before = expected_ends(running, self.gains, now, self.at_once), in_time(running)
        stopped: list[Job] = []
        for job in reversed([job for job in running if ends[job.key] > self.limit]):
            stopped.append(job)
            if in_time([each for each in running if each not in stopped]) > before:
                return stopped
        return []

    def set_state(self, job: Job, state: str) -> None:
        """Note that a job runs, has ended, was stopped or has failed; what runs is measured anew from then on."""
        job.state = state
        self._base, self.settled = {}, False

    def measure(self, epochs: Mapping[str, int], now: float) -> None:
        """Note how many epochs those that run have ended, by key."""
        running = self.running
        for job in running:
            job.done = epochs.get(job.key, job.done)
        if not running or any(job.done < 1 for job in running):  # the first epoch records graphs
            return
        if not self._base:
            self._base = {job.key: (job.done, now) for job in running}
            return
        since = {job.key: (job.done - self._base[job.key][0], now - self._base[job.key][1]) for job in running}
        if any(ended < SETTLED or seconds < WINDOW for ended, seconds in since.values()):
            return
        if len(running) == 1:
            ((ended, seconds),) = since.values()
            self.alone[running[0].name] = running[0].epochs * seconds / ended
            before, ratios = self._factor, [self.alone[name] / self._expected[name] for name in self.alone]
            self._factor = sum(ratios) / len(ratios)
            for job in self.jobs:
                job.seconds = self.alone.get(job.name, self._expected[job.name] * self._factor)
            for number in self.measured_gains:  # which are relative to the seconds alone
                self.measured_gains[number] *= self._factor / before
        else:
            alone = (job.seconds / job.epochs * since[job.key][0] / since[job.key][1] for job in running)
            self.measured_gains[len(running)] = max(0.01, sum(alone))
        ratios = [found / gain(number, GAINS) for number, found in self.measured_gains.items()] or [1.0]
        usual = sum(ratios) / len(ratios)  # those that are not measured are as far from what was expected
        self.gains = {number: value * usual for number, value in GAINS.items()} | self.measured_gains
        self.gains[1] = 1.0 if self.alone else min(1.0, usual)
        self.settled = True


def simulate(schedule: Schedule, now: float, slower: float = 1.0) -> Iterator[tuple[float, str, Job]]:
    """Yield when each job starts, ends or is stopped, and skipped ones at last, as a schedule decides it.

    Args:
        schedule: before anything has started.
        now: when it begins.
        slower: how many times longer all trainings take than is expected.
    """
    true = {job.key: job.seconds * slower for job in schedule.jobs}
    progress: dict[str, float] = {}
    while schedule.open:
        for job in schedule.startable(now):
            schedule.set_state(job, "running")
            progress[job.key] = -OVERHEAD / 2  # seconds of its work alone
            yield now, "starts", job
        running, now = schedule.running, now + 1.0
        for job in running:
            progress[job.key] += gain(len(running), GAINS) / len(running)
        schedule.measure({j.key: int(max(0.0, progress[j.key]) / true[j.key] * j.epochs) for j in running}, now)
        late = schedule.late(now)
        for job in running:
            if progress[job.key] >= true[job.key] + OVERHEAD / 2:
                schedule.set_state(job, "ended")
                yield now, "ends", job
            elif job in late or now >= schedule.limit:
                schedule.set_state(job, "stopped")
                yield now, "is stopped", job
    yield from ((now, "is skipped", job) for job in schedule.jobs if job.state == "skipped")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a phase: what is trained, with every seed."""

    name: str
    changes: Mapping[str, Any]
    """Settings that differ from the paper's recipe."""
    milliseconds: float
    """Of a step alone on an H200: measured, or estimated from the networks."""
    taught_by: tuple[tuple[str, int | None], ...] = ()
    """Names of the variants that teach it, and their seeds; None is its own."""


def make_jobs(
    variants: Mapping[str, Variant],
    wanted: Sequence[str],
    seeds: Sequence[int],
    there: Sequence[str],
    seconds: Mapping[str, float],
    epochs: int,
) -> list[Job]:
    """Return the jobs of a phase, each seed's after those of the seed before, and teachers before those they teach.

    Args:
        variants: all variants by name.
        wanted: names of those that are asked for, the most worth first.
        seeds: of the trainings.
        there: keys of models that exist.
        seconds: that a training of each variant takes alone.
        epochs: of each.
    """
    jobs: dict[str, Job] = {}

    def add(name: str, seed: int, further: bool, asked: bool) -> None:
        needed = [(teacher, seed if own is None else own) for teacher, own in variants[name].taught_by]
        for teacher, its in needed:
            if f"{teacher}, seed {its}" not in there:
                add(teacher, its, further, False)
        after = tuple(key for teacher, its in needed if (key := f"{teacher}, seed {its}") not in there)
        length = int(variants[name].changes.get("epochs", epochs))
        job = Job(name, seed, seconds[name], length, after, asked, further)
        if job.key not in there:
            jobs.setdefault(job.key, job).wanted |= asked

    for seed in seeds:
        for name in wanted:
            add(name, seed, seed != seeds[0], True)
    return list(jobs.values())
