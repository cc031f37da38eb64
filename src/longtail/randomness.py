"""Counter-based random numbers: a function of integer keys, not of a state that earlier draws have changed.

The keys (seed, epoch, image id, …) are hashed, so that a resumed run, another batch order or another number of
processes gives every image the same random crop.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def mix(*keys: int) -> int:
    """Return a 63-bit hash of the integers ``keys`` (chained splitmix64)."""
    state = 0
    for key in keys:
        state = (state + _GOLDEN + (key & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
        state ^= state >> 31
    return state >> 1


@enum.unique
class Stream(enum.IntEnum):
    """What random numbers are drawn for: the second key, by which draws of one seed for different purposes differ."""

    EPOCH_ORDER = 1
    VIEWS = 2
    INITIAL_WEIGHTS = 3
    STEP = 4
    CACHED_VIEWS = 5
    SECOND_STAGE = 6
    FEATURE_VIEWS = 7
    MIXING_PARTNERS = 8
    MIXING_SHARES = 9
    TEACHERS = 10
    CLASS_ORDER = 11
    SPLIT = 12
    GROUPED_SPLIT = 13
    FOLDS = 14
    EMPTY_IMAGES = 15


_OCCURRENCE = mix(11)  # a salt of :func:`draw_ids`, which is no key of a generator


def generator(*keys: int) -> torch.Generator:
    """Return a CPU generator seeded with the hash of ``keys``."""
    return torch.Generator().manual_seed(mix(*keys))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    # int64 shifts are arithmetic; the mask makes them logical
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw_ids(ids: Tensor, occurrences: Tensor | None) -> Tensor:
    """Return what takes the place of image ids in draws, (B,) int64: another number for each occurrence of an image.

    Args:
        ids: (B,) int64 image ids.
        occurrences: (B,) int64 how often an image was shown before in the epoch, one that was not keeps its id; None
            if none was.
    """
    if occurrences is None:
        return ids
    x = (ids + 1) * _signed(_GOLDEN) + occurrences * _signed(_MIX_2)
    for salt in (_OCCURRENCE, 1):
        x = x + salt
        x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
        x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
        x = x ^ _shift(x, 31)
    return torch.where(occurrences == 0, ids, _shift(x, 1))


def uniform(ids: Tensor, draws: int, *keys: int) -> Tensor:
    """Draw uniform random numbers for each image.

    Args:
        ids: (B,) int64 image ids.
        draws: number of draws for each image.
        keys: keys that distinguish this use from others: seed, epoch, view, ….

    Returns:
        (B, draws) float32 in [0, 1), on the device of ``ids``; row i depends on ``ids[i]`` and ``keys`` alone.
    """
    column = torch.arange(1, draws + 1, device=ids.device, dtype=torch.int64)
    x = (ids[:, None] + 1) * _signed(_GOLDEN) + mix(*keys)
    for salt in (column * _signed(_MIX_2), mix(*keys, 1)):
        x = x + salt
        x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
        x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
        x = x ^ _shift(x, 31)
    return _shift(x, 40).to(torch.float32) / (1 << 24)
