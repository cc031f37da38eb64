"""Which images an epoch shows, and in which order: a function of (seed, epoch), so that nothing is lost on resume.

Legend: N images, C classes, n_c images of class c.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longtail.randomness import generator, mix

_ORDER = mix(1)  # a stream of draws of its own

SAMPLERS = ("instance", "class", "sqrt", "progressive", "deferred")


def class_shares(counts: Tensor, sampler: str, epoch: int, epochs: int, deferred_from: float) -> Tensor | None:
    """Return each class's share of an epoch, (C,) float64; None where every image is shown once.

    - instance: n_c / N, every image once;
    - class: 1 / C, with replacement;
    - sqrt: √n_c / Σ √n_c (Mahajan et al., 2018);
    - progressive: from the first to the second along the epochs (Kang et al., ICLR 2020);
    - deferred: the first, and from a share of the training on the second (Cao et al., NeurIPS 2019).

    Args:
        counts: (C,) images a class.
        sampler: one of these.
        epoch: from 0.
        epochs: of the training.
        deferred_from: share of the training after which deferred turns to classes.
    """
    present = (counts > 0).double()
    natural, balanced = counts.double() / counts.sum(), present / present.sum()
    if sampler == "instance" or (sampler == "deferred" and epoch < math.ceil(deferred_from * epochs)):
        return None
    if sampler == "sqrt":
        roots = counts.double().sqrt()
        return roots / roots.sum()
    if sampler == "progressive":
        done = epoch / max(epochs - 1, 1)
        return (1 - done) * natural + done * balanced
    return balanced


def epoch_order(
    labels: Tensor, sampler: str, seed: int, epoch: int, epochs: int = 1, deferred_from: float = 0.8
) -> Tensor:
    """Return the positions of the images that an epoch shows, (N,), in their order.

    Args:
        labels: (N,) int64.
        sampler: see :func:`class_shares`.
        seed: of the training.
        epoch: from 0.
        epochs: of the training.
        deferred_from: see :func:`class_shares`.
    """
    draws = generator(seed, _ORDER, epoch)
    counts = torch.bincount(labels)
    shares = class_shares(counts, sampler, epoch, epochs, deferred_from)
    if shares is None:
        return torch.randperm(len(labels), generator=draws)
    # the class first, then one of its images: weights of single images would lose digits where there are millions
    classes = torch.multinomial(shares, len(labels), replacement=True, generator=draws)
    starts = counts.cumsum(0) - counts
    within = (torch.rand(len(labels), generator=draws, dtype=torch.float64) * counts[classes]).long()
    return torch.argsort(labels, stable=True)[starts[classes] + within]
