"""LongTailClassifier on many classes: time and accuracy beside nearest centroid and logistic regression.

    python benchmarks/estimator.py [--classes 1000 10000] [--samples 5] [--dim 64] [--without logistic]

Every class is a Gaussian around a random unit vector, with the same number of training and of test samples. Prints one
line per classifier: seconds of the fit, balanced accuracy on the test samples, and whether it warned.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import NearestCentroid

from longtail import LongTailClassifier

Array = np.ndarray[Any, Any]


def draw(classes: int, samples: int, dim: int, noise: float, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Return training samples, their labels, test samples, their labels."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, dim))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    labels = np.repeat(np.arange(classes), samples)
    train, test = (centers[labels] + noise * rng.normal(size=(len(labels), dim)) for _ in range(2))
    return train, labels, test, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--samples", type=int, default=5, help="training samples of a class, and test samples")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.12, help="standard deviation of a feature within a class")
    parser.add_argument(
        "--epochs", type=int, default=20, help="of LongTailClassifier, whose least number of steps holds"
    )
    parser.add_argument("--without", nargs="*", default=[], choices=["longtail", "centroid", "logistic"])
    options = parser.parse_args()
    classifiers = {
        "longtail": lambda: LongTailClassifier(epochs=options.epochs, random_state=0, device="cpu"),
        "centroid": NearestCentroid,
        "logistic": lambda: LogisticRegression(max_iter=200, C=100.0),
    }
    print("| classes | samples | classifier | seconds | balanced accuracy | warned |")
    print("| --- " * 6 + "|", flush=True)
    for classes in options.classes:
        samples, labels, test, truth = draw(classes, options.samples, options.dim, options.noise)
        for name, create in classifiers.items():
            if name in options.without:
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                start = time.perf_counter()
                model = create().fit(samples, labels)
                seconds = time.perf_counter() - start
            accuracy = balanced_accuracy_score(truth, model.predict(test))
            print(
                f"| {classes:,} | {len(samples):,} | {name} | {seconds:.1f} | {100 * accuracy:.1f} | "
                f"{'yes' if caught else 'no'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
