"""scikit-learn's 8 × 8 digits: real images that come with the package, so that nothing is downloaded."""

from __future__ import annotations

import numpy as np
import torch

from longtail.config import Data
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.images import ArrayImages
from longtail.data.imbalance import hold_out_balanced, long_tailed, permuted_by_class, resolve_profile
from longtail.data.sources import Source
from longtail.errors import LongtailError

DIGITS_MEAN, DIGITS_STD = (0.305,), (0.376,)


def load_digits_lt(config: Data, seed: int) -> LongTailedData:
    """Load the digits, made long-tailed, with ``config.test_per_class`` test images of each class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    names = tuple(map(str, range(10)))
    order = permuted_by_class(labels, 10, seed)
    tested = config.test_per_class
    smallest = min(len(positions) for positions in order)
    if tested >= smallest:
        raise LongtailError(f"data.test_per_class {tested}: expected less than {smallest}, the images of a digit")
    val, rest = hold_out_balanced([positions[tested:] for positions in order], config.val_fraction)
    profile = resolve_profile(config.profile, balanced=True)
    train = long_tailed(rest, names, profile, config.imbalance, config.class_order, seed)
    test = torch.cat([positions[:tested] for positions in order])
    return LongTailedData(
        train=ImageSet(ArrayImages(pixels[train]), labels[train], train),
        val=None if val is None else ImageSet(ArrayImages(pixels[val]), labels[val], val),
        test=ImageSet(ArrayImages(pixels[test]), labels[test], test),
        class_names=names,
        mean=DIGITS_MEAN,
        std=DIGITS_STD,
        image_size=8,
        augment="digits",
    )


DIGITS = Source(load=load_digits_lt, balanced=True)
