"""Time and memory of the correction of a detector's scores: NorCal and LogN on 10,000 images of LVIS's size.

    python benchmarks/detector_calibration.py [--images 10000] [--candidates 300] [--classes 1203]

The scores of an image, (candidates, classes + 1) float32, are corrected where they lie, one image after another, as a
stream: 14.4 GB at the default sizes pass through. Each image's scores are a copy of one of eight random ones, the time
of which is measured and printed beside it. A loop over classes, as in a plain implementation in NumPy, is timed on
fewer images and extrapolated; a folded correction costs nothing, for the weights are those of the class layer. Then a
result file: 300 detections for each image with one score each.

Prints seconds, the peak of the resident memory beyond the start, and the largest difference from a float64 result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from peak import peak_mib
from torch import Tensor

from longtail.evaluation.detector_scores import (
    LogitStatistics,
    logn_correction,
    norcal,
    norcal_shift,
    scale_scores,
)


def stream(images: int, sources: Tensor, work: Callable[[Tensor], object]) -> float:
    """Return the seconds that ``work`` takes on copies of the sources, one for each image."""
    buffer = torch.empty_like(sources[0])
    start = time.perf_counter()
    for image in range(images):
        buffer.copy_(sources[image % len(sources)])
        work(buffer)
    return time.perf_counter() - start


def by_class(probabilities: Tensor, factors: Tensor) -> Tensor:
    values = probabilities.clone()
    for label in range(len(factors)):
        values[:, label + 1] *= factors[label]
    return values / values.sum(dim=1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--candidates", type=int, default=300)
    parser.add_argument("--classes", type=int, default=1203)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, options.candidates, options.classes + 1, generator=generator) * 3
    probabilities = logits.softmax(dim=-1)
    counts = (30_000 * torch.arange(1, options.classes + 1).double() ** -1.3).ceil()
    shift = norcal_shift(counts, 0.6)
    statistics = LogitStatistics(options.classes + 1)
    statistics.update(logits)
    correction = logn_correction(statistics, "first")
    few = max(1, options.images // 500)
    rows: dict[str, tuple[int, Tensor, Callable[[Tensor], object]]] = {
        "copy alone": (options.images, probabilities, lambda values: values),
        "NorCal on probabilities, in place": (
            options.images,
            probabilities,
            lambda values: norcal(values, counts, 0.6, "first", inplace=True),
        ),
        "LogN on logits": (options.images, logits, correction.apply),
        "LogN's statistics": (options.images // 10, logits, statistics.update),
        "NorCal, a loop over classes": (few, probabilities, lambda values: by_class(values, shift.exp().float())),
    }
    print(
        f"torch {torch.__version__}, one thread, {options.images:,} images × {options.candidates} candidates × "
        f"{options.classes:,} classes"
    )
    print(f"{'':42}{'seconds':>9}{'peak MiB':>10}")
    for name, (images, sources, work) in rows.items():
        seconds = 0.0

        def measured(images: int = images, sources: Tensor = sources, work: Callable[[Tensor], object] = work) -> None:
            nonlocal seconds
            seconds = stream(images, sources, work)

        peak = peak_mib(measured)
        scaled = seconds * options.images / images
        note = "" if images == options.images else f"  ({images:,} images, extrapolated)"
        print(f"{name:42}{scaled:9.1f}{peak:10.0f}{note}")
    detections = options.images * 300
    scores = torch.rand(detections, generator=generator)
    labels = torch.randint(0, options.classes, (detections,), generator=generator)
    start = time.perf_counter()
    scale_scores(scores, labels, counts, 0.6)
    print(f"{f'result file, {detections:,} scores':42}{time.perf_counter() - start:9.2f}")
    exact = norcal(probabilities.double(), counts, 0.6, "first")
    difference = (norcal(probabilities, counts, 0.6, "first") - exact).abs().max()
    print(f"largest difference of a float32 probability from float64: {difference:.1e}")


if __name__ == "__main__":
    main()
