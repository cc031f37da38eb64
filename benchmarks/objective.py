"""Time and memory of the two terms of the GML loss, relative to the matrix products that every formulation needs.

Four formulations of the same losses and gradients, forward + backward, timed in turn in one process, so that other load
on the machine affects all of them equally:

- dense: class sums through a one-hot matrix of keys × classes, as in the authors' code (reimplemented here);
- two logsumexp: masked similarities of all keys, in plain torch operations;
- ours: longtail.losses.GMLLoss;
- floor: the three matrix products only, queries · keys and the two of the backward pass.

Peak memory is that of a new process: the largest resident size during one call minus the size before it.

Command: python benchmarks/objective.py [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peak import elsewhere, peak_mib

from longtail.losses import GMLLoss, compute_log_prior

SHAPES = ((128, 4096, 100, 32), (128, 16384, 1000, 128), (128, 24526, 8142, 128), (1024, 65536, 8142, 128))
SLOW = 2**28  # entries of K × C above which the dense formulation is skipped, since a call takes half a minute
FORMULATIONS = ("dense", "two logsumexp", "ours", "floor")


class Problem:
    """Random queries and keys with long-tailed class frequencies."""

    def __init__(self, batch: int, keys: int, classes: int, dim: int) -> None:
        g = torch.Generator().manual_seed(0)
        counts = (1000 * 0.01 ** (torch.arange(classes) / max(classes - 1, 1))).long().clamp(min=1)
        self.counts = counts
        self.log_prior = compute_log_prior(counts)
        labels = torch.multinomial(counts.double(), batch + keys, replacement=True, generator=g)
        self.labels, self.key_labels = labels[:batch], labels[batch:].sort().values
        self.queries = F.normalize(torch.randn(batch, dim, generator=g), dim=1).requires_grad_()
        self.keys = F.normalize(torch.randn(keys, dim, generator=g), dim=1).requires_grad_()
        self.ids, self.key_ids = torch.arange(batch), torch.arange(keys)
        self.ours = GMLLoss(counts, validate=False)

    def run(self, name: str) -> None:
        """Compute both losses and all gradients once."""
        self.queries.grad = self.keys.grad = self.ours.temperature_logit.grad = None
        {"dense": self.dense, "two logsumexp": self.plain, "ours": self.fused, "floor": self.floor}[name]()

    def dense(self) -> None:
        """Sum over the keys of each class by a product with a one-hot matrix; the result is B × C."""
        one_hot = F.one_hot(self.key_labels, len(self.counts)).float()
        temperature = self.ours.temperature
        total = torch.zeros(())
        for leave_one_out in (False, True):
            queries, keys = (x.detach() if leave_one_out else x for x in (self.queries, self.keys))
            scores = queries @ keys.t() / (temperature if leave_one_out else temperature.detach())
            maximum = scores.detach().amax(dim=1, keepdim=True)
            exponentials = (scores - maximum).exp()
            counts = one_hot.sum(dim=0).expand(len(queries), -1)
            if leave_one_out:
                self_pairs = (self.ids[:, None] == self.key_ids[None]).float()
                exponentials = exponentials * (1 - self_pairs)
                counts = counts - self_pairs @ one_hot
            likelihood = (exponentials @ one_hot) / counts.clamp(min=1)
            joint = (likelihood.clamp(min=1e-30).log() + self.log_prior).masked_fill(counts == 0, -torch.inf)
            total = total + F.cross_entropy(joint, self.labels)
        total.backward()

    def plain(self) -> None:
        """Two logsumexp of the masked similarities."""
        temperature = self.ours.temperature
        total = torch.zeros(())
        positive = self.labels[:, None] == self.key_labels[None]
        sizes = torch.bincount(self.key_labels, minlength=len(self.counts)).clamp(min=1)
        bias = (self.log_prior - sizes.log())[self.key_labels]
        for leave_one_out in (False, True):
            queries, keys = (x.detach() if leave_one_out else x for x in (self.queries, self.keys))
            scores = queries @ keys.t() / (temperature if leave_one_out else temperature.detach()) + bias
            mask = positive
            if leave_one_out:
                self_pairs = positive & (self.ids[:, None] == self.key_ids[None])
                scores, mask = scores.masked_fill(self_pairs, -1e9), positive & ~self_pairs
            numerator = torch.logsumexp(scores.masked_fill(~mask, -1e9), dim=1)
            losses = torch.logsumexp(scores, dim=1) - numerator
            has_positive = mask.any(dim=1)
            total = total + torch.where(has_positive, losses, 0.0).sum() / has_positive.sum()
        total.backward()

    def fused(self) -> None:
        """Our implementation."""
        self.ours(self.queries, self.labels, self.keys, self.key_labels, self.ids, self.key_ids).backward()

    def floor(self) -> None:
        """The three matrix products only."""
        with torch.no_grad():
            scores = self.queries @ self.keys.t()
            self.queries.grad = scores @ self.keys
            self.keys.grad = scores.t() @ self.queries


def gradient_difference(problem: Problem) -> float:
    """Return the largest relative difference between the gradients of our and the plain formulation."""
    gradients = []
    for name in ("ours", "two logsumexp"):
        problem.run(name)
        assert problem.queries.grad is not None
        assert problem.keys.grad is not None
        gradients.append((problem.queries.grad, problem.keys.grad))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*gradients, strict=True))


def time_call(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(shape: tuple[int, int, int, int], name: str) -> None:
    """Print the peak of one call in MiB."""
    torch.set_num_threads(2)
    Problem(8, 64, 4, shape[3]).run(name)  # warm-up: threads and workspaces are not counted
    problem = Problem(*shape)
    print(peak_mib(lambda: problem.run(name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each formulation; the median is reported")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, median of {args.rounds} rounds, forward + backward")
    print(f"{'B × K × C × D':28}{'':16}{'ms':>10}{'× floor':>10}{'peak MiB':>10}{'gradients differ by':>22}")
    records = []
    for shape in SHAPES:
        problem = Problem(*shape)
        names = [name for name in FORMULATIONS if name != "dense" or shape[1] * shape[2] < SLOW]
        times: dict[str, list[float]] = {name: [] for name in names}
        rounds = args.rounds if shape[0] * shape[1] < 2**24 else max(3, args.rounds // 5)
        for index in range(rounds + 1):
            for name in names:
                if name == "dense" and index > 3 and shape[1] * shape[2] > 2**24:
                    continue  # takes seconds, and needs no exact time
                seconds = time_call(functools.partial(problem.run, name))
                if index:
                    times[name].append(seconds)
        base = statistics.median(times["floor"])
        for name in names:
            median = statistics.median(times[name])
            peak = elsewhere(f"from objective import measure; measure({shape!r}, {name!r})")
            difference = f"{gradient_difference(problem):.1e}" if name == "ours" else ""
            print(
                f"{' × '.join(map(str, shape)) if name == names[0] else '':28}{name:16}{1000 * median:10.2f}"
                f"{median / base:10.2f}{peak:10.0f}{difference:>22}",
                flush=True,
            )
            records.append(
                {"shape": shape, "formulation": name, "ms": 1000 * median, "floors": median / base, "peak_mib": peak}
            )
    print("\nten times the classes, 128 queries × 24526 keys × 128 dimensions:")
    problems = {classes: Problem(128, 24526, classes, 128) for classes in (1000, 10000)}
    durations: dict[int, list[float]] = {classes: [] for classes in problems}
    for index in range(3 * args.rounds + 1):
        for classes, problem in problems.items():
            seconds = time_call(problem.fused)
            if index:
                durations[classes].append(seconds)
    few, many = (statistics.median(durations[classes]) for classes in problems)
    print(f"1,000: {1000 * few:.2f} ms, 10,000: {1000 * many:.2f} ms, {100 * (many / few - 1):+.1f} %")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
