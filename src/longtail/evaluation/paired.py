"""How far the difference of two methods on the same test images would vary with other test images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def paired_half_width(labels: NDArray[Any], ours: Sequence[NDArray[Any]], theirs: Sequence[NDArray[Any]]) -> float:
    """Return the half width of the 95 % interval of a difference of balanced accuracy over test images, in points.

    Images are drawn class by class, and with them what both methods predict of them, so that errors which they have in
    common cancel. The variance is that of a stratified mean: of every class the variance of the images' differences,
    averaged over seeds; of a class with a single image, which has none, the square of its difference. With several
    seeds the part of it that changes from seed to seed is left out, since an interval over seeds contains it, as in
    studies of several readers and cases (Hillis, Obuchowski and Berbaum, 2011, https://doi.org/10.1016/j.acra.2010.09.007).
    To this comes the variance of one more image on which one method alone is right, so that two methods that hardly
    differ have a variance too (Agresti and Min, 2005, https://doi.org/10.1002/sim.1781).

    Args:
        labels: (N,) classes of the test images.
        ours: of one or more seeds, (N,) bool: whether each image is predicted correctly.
        theirs: the same of the other method, seed by seed.
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights = 1 / (len(counts) * counts)
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    for difference in differences:
        # a class with a single image is not centred, since nothing would be left
        means = np.where(counts > 1, np.bincount(classes, difference) / counts, 0.0)
        difference -= means[classes]
    squares = differences.mean(axis=0) ** 2
    if len(differences) > 1:
        squares -= differences.var(axis=0, ddof=1) / len(differences)
    by_class = np.bincount(classes, squares) * counts / np.maximum(counts - 1, 1)
    one_more = float(weights[classes] @ weights[classes]) / len(classes)
    return 100 * 1.96 * math.sqrt(max(float(weights**2 @ by_class), 0.0) + one_more)
