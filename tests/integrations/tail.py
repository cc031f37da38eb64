"""A small real task for the bridges: handwritten digits with a long tail."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

COUNTS = [int(90 * 20 ** (-digit / 9)) for digit in range(10)]


def long_tailed_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images (N, 1, 8, 8) with the counts above, their labels, and 80 test images of each digit."""
    digits = load_digits()
    rng = np.random.default_rng(0)
    train, test = [], []
    for digit, count in enumerate(COUNTS):
        indices = rng.permutation(np.flatnonzero(digits.target == digit))
        test.append(indices[:80])
        train.append(indices[80 : 80 + count])
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    first, second = np.concatenate(train), np.concatenate(test)
    return images[first], labels[first], images[second], labels[second]


def encoder(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())


def balanced_accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).float().mean())  # of a test set with equal classes
