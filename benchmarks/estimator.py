"""LongTailClassifier on many classes: time and accuracy beside nearest centroid and logistic regression.

    python benchmarks/estimator.py [--classes 1000 10000] [--samples 5] [--dim 64] [--hidden 512] [--without logistic]

Every class is a Gaussian around a random unit vector, with the same number of training and of test samples. Prints one
line per classifier, as a table: seconds of the fit, balanced accuracy on the test samples, and whether it warned.
Logistic regression keeps scores of all samples for all classes, in float64: 4 GB for each copy at 10,000 classes of 5
samples. Its tolerance is 0.001 / classes: the gradients of a class are as small as its frequency, and with the default
tolerance it ends at once at 10,000 classes.
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
CLASSIFIERS = ("longtail", "centroid", "logistic")


def draw(classes: int, samples: int, dim: int, noise: float, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Return training samples, their labels, test samples, their labels."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, dim))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    labels = np.repeat(np.arange(classes), samples)
    train, test = (centers[labels] + noise * rng.normal(size=(len(labels), dim)) for _ in range(2))
    return train, labels, test, labels


def build(name: str, classes: int, options: argparse.Namespace) -> Any:
    """Return a classifier that is not fitted."""
    if name == "longtail":
        return LongTailClassifier(hidden=options.hidden, epochs=options.epochs, random_state=0, device="cpu")
    if name == "centroid":
        return NearestCentroid()
    return LogisticRegression(max_iter=options.max_iter, C=100.0, tol=1e-3 / classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--samples", type=int, default=5, help="training samples of a class, and test samples")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--noise", type=float, default=0.12, help="standard deviation of a feature within a class")
    parser.add_argument(
        "--epochs", type=int, default=20, help="of LongTailClassifier, whose least number of steps holds"
    )
    parser.add_argument("--hidden", type=int, default=512, help="width of LongTailClassifier's hidden layer, or 0")
    parser.add_argument("--max_iter", type=int, default=200, help="most iterations of logistic regression")
    parser.add_argument("--without", nargs="*", default=[], choices=CLASSIFIERS)
    options = parser.parse_args()
    print("| classes | samples | classifier | seconds | balanced accuracy | warned |")
    print("| --- " * 6 + "|", flush=True)
    for classes in options.classes:
        samples, labels, test, truth = draw(classes, options.samples, options.dim, options.noise)
        for name in CLASSIFIERS:
            if name in options.without:
                continue
            model = build(name, classes, options)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                start = time.perf_counter()
                model.fit(samples, labels)
                seconds = time.perf_counter() - start
            accuracy = balanced_accuracy_score(truth, model.predict(test))
            print(
                f"| {classes:,} | {len(samples):,} | {name} | {seconds:.1f} | {100 * accuracy:.1f} | "
                f"{'yes' if caught else 'no'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
