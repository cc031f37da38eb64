"""PriorCorrectedClassifier on re-sampled digits, beside the model trained on the right class frequencies.

    python benchmarks/prior_correction.py [--seeds 10] [--imbalance 20] [--components 4]

scikit-learn's digits with a long tail in the training set (90 images of the largest class, the smallest 20 times
fewer, in another order of the classes for each seed), and 80 test images of each class, weighted by the class
frequencies where the model is used. The features are the first 4 principal components, with which the classes
overlap; with all pixels (--components 64) logistic regression fits nearly every image, its weights hardly matter
then, and so a correction for them goes too far. Every model is scikit-learn's logistic regression behind a
StandardScaler. imbalanced-learn re-samples the training set (pip install imbalanced-learn; without it, those rows are
left out); its own way to other class frequencies is to re-sample to them and train again.

Prints the NLL of each model, mean ± standard deviation over the seeds, and its ratio to that of the model trained on
the right frequencies: the mean of the ratios in pairs, with its 95 % t-interval.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import t
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from longtail.prior_correction import PriorCorrectedClassifier

Array = np.ndarray[Any, Any]
HAS_IMBALANCED_LEARN = importlib.util.find_spec("imblearn") is not None


def draw(seed: int, imbalance: float, components: int) -> tuple[Array, Array, Array, Array]:
    """Return features of training images, their labels, features of test images, their labels."""
    images, labels = load_digits(return_X_y=True)
    features = images if components >= images.shape[1] else PCA(components, random_state=0).fit_transform(images)
    rng = np.random.default_rng(seed)
    train, test = [], []
    for rank, digit in enumerate(rng.permutation(10)):
        indices = rng.permutation(np.flatnonzero(labels == digit))
        test.append(indices[:80])
        train.append(indices[80 : 80 + int(90 * imbalance ** (-rank / 9))])
    first, second = np.concatenate(train), np.concatenate(test)
    return features[first], labels[first], features[second], labels[second]


def classifier(class_weight: str | None = None) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight=class_weight, max_iter=2000))


def over_sampled(seed: int) -> Any:
    sampler = importlib.import_module("imblearn.over_sampling").RandomOverSampler(random_state=seed)
    steps = [step for _, step in classifier().steps]
    return importlib.import_module("imblearn.pipeline").make_pipeline(sampler, *steps)


def to_tail(seed: int) -> dict[str, Callable[[Array, Array], Any]]:
    """Return the ways to models for data with the tail of the training set; the first is the reference."""
    rows: dict[str, Callable[[Array, Array], Any]] = {
        "trained on the tail as it is": lambda x, y: classifier().fit(x, y),
        "class weights": lambda x, y: classifier("balanced").fit(x, y),
        "class weights, PriorCorrectedClassifier": lambda x, y: PriorCorrectedClassifier(
            classifier("balanced"), target="train"
        ).fit(x, y),
    }
    if HAS_IMBALANCED_LEARN:
        rows |= {
            "imbalanced-learn, over-sampled": lambda x, y: over_sampled(seed).fit(x, y),
            "imbalanced-learn, over-sampled, CalibratedClassifierCV": lambda x, y: CalibratedClassifierCV(
                over_sampled(seed), cv=3
            ).fit(x, y),
            "imbalanced-learn, over-sampled, PriorCorrectedClassifier": lambda x, y: PriorCorrectedClassifier(
                over_sampled(seed), "uniform", "train"
            ).fit(x, y),
        }
    return rows


def to_balanced(seed: int) -> dict[str, Callable[[Array, Array], Any]]:
    """Return the ways to models for equally frequent classes; the first is the reference."""
    rows: dict[str, Callable[[Array, Array], Any]] = {
        "trained with class weights": lambda x, y: classifier("balanced").fit(x, y),
        "trained on the tail as it is": lambda x, y: classifier().fit(x, y),
        "trained on the tail, PriorCorrectedClassifier": lambda x, y: PriorCorrectedClassifier(classifier()).fit(x, y),
    }
    if HAS_IMBALANCED_LEARN:
        rows["imbalanced-learn, over-sampled"] = lambda x, y: over_sampled(seed).fit(x, y)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--imbalance", type=float, default=20.0)
    parser.add_argument(
        "--components", type=int, default=4, help="principal components of the images; 64 for all pixels"
    )
    options = parser.parse_args()
    results: dict[tuple[str, str], list[float]] = {}
    for seed in range(options.seeds):
        images, labels, test, truth = draw(seed, options.imbalance, options.components)
        tail = (np.bincount(labels) / len(labels))[truth]
        for used, rows, weights in (
            ("the tail", to_tail(seed), tail),
            ("equal classes", to_balanced(seed), np.ones(len(truth))),
        ):
            for name, fit in rows.items():
                nll = log_loss(truth, fit(images, labels).predict_proba(test), sample_weight=weights)
                results.setdefault((used, name), []).append(float(nll))
    print("| used on | model | NLL | ratio to the first |")
    print("| --- " * 4 + "|")
    for used in ("the tail", "equal classes"):
        names = [name for where, name in results if where == used]
        reference = np.array(results[used, names[0]])
        for name in names:
            values = np.array(results[used, name])
            ratios = values / reference
            half_width = t.ppf(0.975, len(ratios) - 1) * ratios.std(ddof=1) / len(ratios) ** 0.5
            print(
                f"| {used} | {name} | {values.mean():.3f} ± {values.std(ddof=1):.3f} | "
                f"{ratios.mean():.3f} ± {half_width:.3f} |"
            )


if __name__ == "__main__":
    main()
