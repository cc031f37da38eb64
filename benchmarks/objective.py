"""What do the two terms of the GML loss cost, beside the matrix products that no formulation can do without?

Four formulations of the same losses and gradients, forward + backward, timed turn by turn in one process, so that a
slow minute of the machine hits all alike:

- dense: class sums through a one-hot matrix of keys × classes, as the released code has them (written here anew);
- two logsumexp: the similarities of all keys, masked, in plain torch operations;
- ours: longtail.objectives.GMLLoss;
- floor: the three products alone, queries · keys and the two of backward.

Peak memory is that of a fresh process: the highest resident size during one call over the size before it.

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

from longtail.objectives import GMLLoss, log_prior

SHAPES = ((128, 4096, 100, 32), (128, 16384, 1000, 128), (128, 24526, 8142, 128), (1024, 65536, 8142, 128))
SLOW = 2**28  # entries of K × C beyond which the dense formulation is not waited for: half a minute a call
FORMULATIONS = ("dense", "two logsumexp", "ours", "floor")


class Problem:
    """Queries and keys whose classes are as frequent as in a long tail."""

    def __init__(self, batch: int, keys: int, classes: int, dim: int) -> None:
        g = torch.Generator().manual_seed(0)
        counts = (1000 * 0.01 ** (torch.arange(classes) / max(classes - 1, 1))).long().clamp(min=1)
        self.counts = counts
        self.log_prior = log_prior(counts)
        drawn = torch.multinomial(counts.double(), batch + keys, replacement=True, generator=g)
        self.labels, self.key_labels = drawn[:batch], drawn[batch:].sort().values
        self.queries = F.normalize(torch.randn(batch, dim, generator=g), dim=1).requires_grad_()
        self.keys = F.normalize(torch.randn(keys, dim, generator=g), dim=1).requires_grad_()
        self.ids, self.key_ids = torch.arange(batch), torch.arange(keys)
        self.ours = GMLLoss(counts, validate=False)

    def run(self, name: str) -> None:
        """Compute both losses and all gradients once."""
        self.queries.grad = self.keys.grad = self.ours.temperature_logit.grad = None
        {"dense": self.dense, "two logsumexp": self.plain, "ours": self.fused, "floor": self.floor}[name]()

    def dense(self) -> None:
        """Sum over the keys of every class by a product with a one-hot matrix, B × C in the end."""
        one_hot = F.one_hot(self.key_labels, len(self.counts)).float()
        temperature = self.ours.temperature
        total = torch.zeros(())
        for left_out in (False, True):
            queries, keys = (x.detach() if left_out else x for x in (self.queries, self.keys))
            scores = queries @ keys.t() / (temperature if left_out else temperature.detach())
            highest = scores.detach().amax(dim=1, keepdim=True)
            exponentials = (scores - highest).exp()
            counts = one_hot.sum(dim=0).expand(len(queries), -1)
            if left_out:
                own = (self.ids[:, None] == self.key_ids[None]).float()
                exponentials = exponentials * (1 - own)
                counts = counts - own @ one_hot
            likelihood = (exponentials @ one_hot) / counts.clamp(min=1)
            joint = (likelihood.clamp(min=1e-30).log() + self.log_prior).masked_fill(counts == 0, -torch.inf)
            total = total + F.cross_entropy(joint, self.labels)
        total.backward()

    def plain(self) -> None:
        """Mask the similarities, and leave the rest to logsumexp."""
        temperature = self.ours.temperature
        total = torch.zeros(())
        of_class = self.labels[:, None] == self.key_labels[None]
        sizes = torch.bincount(self.key_labels, minlength=len(self.counts)).clamp(min=1)
        bias = (self.log_prior - sizes.log())[self.key_labels]
        for left_out in (False, True):
            queries, keys = (x.detach() if left_out else x for x in (self.queries, self.keys))
            scores = queries @ keys.t() / (temperature if left_out else temperature.detach()) + bias
            kept = of_class
            if left_out:
                own = of_class & (self.ids[:, None] == self.key_ids[None])
                scores, kept = scores.masked_fill(own, -1e9), of_class & ~own
            numerator = torch.logsumexp(scores.masked_fill(~kept, -1e9), dim=1)
            losses = torch.logsumexp(scores, dim=1) - numerator
            counted = kept.any(dim=1)
            total = total + torch.where(counted, losses, 0.0).sum() / counted.sum()
        total.backward()

    def fused(self) -> None:
        """Ours."""
        self.ours(self.queries, self.labels, self.keys, self.key_labels, self.ids, self.key_ids).backward()

    def floor(self) -> None:
        """The products alone."""
        with torch.no_grad():
            scores = self.queries @ self.keys.t()
            self.queries.grad = scores @ self.keys
            self.keys.grad = scores.t() @ self.queries


def agree(problem: Problem) -> float:
    """Return the largest difference between the gradients of ours and of the plain formulation, relative."""
    found = []
    for name in ("ours", "two logsumexp"):
        problem.run(name)
        assert problem.queries.grad is not None
        assert problem.keys.grad is not None
        found.append((problem.queries.grad, problem.keys.grad))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))


def timed(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(shape: tuple[int, int, int, int], name: str) -> None:
    """Print the peak of one call in MiB."""
    torch.set_num_threads(2)
    Problem(8, 64, 4, shape[3]).run(name)  # threads and workspaces are not the call's
    problem = Problem(*shape)
    print(peak_mib(lambda: problem.run(name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each formulation; the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, median of {given.rounds} rounds, forward + backward")
    print(f"{'B × K × C × D':28}{'':16}{'ms':>10}{'× floor':>10}{'peak MiB':>10}{'gradients differ by':>22}")
    records = []
    for shape in SHAPES:
        problem = Problem(*shape)
        names = [name for name in FORMULATIONS if name != "dense" or shape[1] * shape[2] < SLOW]
        times: dict[str, list[float]] = {name: [] for name in names}
        rounds = given.rounds if shape[0] * shape[1] < 2**24 else max(3, given.rounds // 5)
        for index in range(rounds + 1):
            for name in names:
                if name == "dense" and index > 3 and shape[1] * shape[2] > 2**24:
                    continue  # seconds each, and no close call
                took = timed(functools.partial(problem.run, name))
                if index:
                    times[name].append(took)
        base = statistics.median(times["floor"])
        for name in names:
            median, peak = (
                statistics.median(times[name]),
                elsewhere(f"from objective import measure; measure({shape!r}, {name!r})"),
            )
            difference = f"{agree(problem):.1e}" if name == "ours" else ""
            print(
                f"{' × '.join(map(str, shape)) if name == names[0] else '':28}{name:16}{1000 * median:10.2f}"
                f"{median / base:10.2f}{peak:10.0f}{difference:>22}",
                flush=True,
            )
            records.append(
                {"shape": shape, "formulation": name, "ms": 1000 * median, "floors": median / base, "peak_mib": peak}
            )
    print("\nten times the classes, 128 × 24526 keys × 128 wide:")
    problems = {classes: Problem(128, 24526, classes, 128) for classes in (1000, 10000)}
    taken: dict[int, list[float]] = {classes: [] for classes in problems}
    for index in range(3 * given.rounds + 1):
        for classes, problem in problems.items():
            took = timed(problem.fused)
            if index:
                taken[classes].append(took)
    few, many = (statistics.median(taken[classes]) for classes in problems)
    print(f"1,000: {1000 * few:.2f} ms, 10,000: {1000 * many:.2f} ms, {100 * (many / few - 1):+.1f} %")
    if given.json:
        given.json.write_text(json.dumps({"torch": torch.__version__, "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
