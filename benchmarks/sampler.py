"""ClassAwareSampler on many labels: seconds to make one, and indices of an epoch per second, beside torch's samplers.

    python benchmarks/sampler.py [--images 10000000] [--classes 10000] [--rounds 3]

The labels have a long tail (exponential, imbalance factor 1000). A row counts from the call of ``iter`` to the last
index as a Python integer, in seconds of the process's one thread, so that other work on the machine counts less. With
several replicas, one of them draws the whole epoch and yields its part. WeightedRandomSampler with a weight for every
image and DistributedSampler are the nearest that torch has.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, WeightedRandomSampler

from longtail.data.imbalance import profile_counts
from longtail.data.samplers import ClassAwareSampler

SCHEMES = ("instance", "class", "sqrt", "progressive", "deferred")


def draw_labels(images: int, classes: int) -> Tensor:
    """Return (N,) int64 labels of an exponential tail in random order."""
    shares = torch.tensor(profile_counts("exponential", images, classes, 1000.0), dtype=torch.float64)
    counts = (shares / shares.sum() * images).long().clamp(min=1)
    counts[0] += images - counts.sum()
    labels = torch.repeat_interleave(torch.arange(classes), counts)
    return labels[torch.randperm(images, generator=torch.Generator().manual_seed(0))]


def seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def exhaust(sampler: Iterable[int]) -> None:
    collections.deque(sampler, maxlen=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3, help="timings of each row; the median counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    labels = draw_labels(args.images, args.classes)
    title = f"torch {torch.__version__}, one thread, median of {args.rounds}"
    print(f"{title}, {len(labels):,} labels, {args.classes:,} classes")
    made = statistics.median(seconds(lambda: ClassAwareSampler(labels)) for _ in range(args.rounds))
    print(f"{'ClassAwareSampler(labels)':44}{made:12.2f} s", flush=True)
    weights = 1 / torch.bincount(labels)[labels].double()
    ones = torch.ones(len(labels))
    samplers: dict[str, Iterable[int]] = {
        "torch DistributedSampler, one replica": DistributedSampler(ones, 1, 0),  # type: ignore[arg-type]
        "torch WeightedRandomSampler": WeightedRandomSampler(weights, len(labels)),  # type: ignore[arg-type]
    }
    for name in SCHEMES:
        samplers[name] = ClassAwareSampler(labels, name, num_replicas=1, rank=0, epochs=10)
    samplers["class, replica 0 of 8"] = ClassAwareSampler(labels, "class", num_replicas=8, rank=0)
    for name, sampler in samplers.items():
        if isinstance(sampler, ClassAwareSampler):
            sampler.set_epoch(5)
        taken = statistics.median(seconds(lambda sampler=sampler: exhaust(sampler)) for _ in range(args.rounds))  # type: ignore[misc]
        own, together = len(sampler) / taken, len(labels) / taken  # type: ignore[arg-type]
        print(f"{name:44}{own / 1e6:12.1f} M indices/s{together / 1e6:8.1f} M/s of all replicas", flush=True)


if __name__ == "__main__":
    main()
