"""Images that cannot be read when a set is loaded: left out up to a limit, each with its reason."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from longtail.config import Data
from longtail.data.dataset import LongTailedData
from longtail.data.image_io import StorageError
from longtail.data.images import LazyImages
from longtail.errors import LongtailError
from longtail.registry import SOURCES

logger = logging.getLogger(__name__)


class Unreadable:
    """The images of a set that cannot be read.

    Args:
        config: what is done about them.
        total: number of images in all splits.
    """

    def __init__(self, config: Data, total: int) -> None:
        self.config, self.total = config, total
        self.found: list[tuple[str, str]] = []
        """Path and reason of each."""

    @property
    def refuses(self) -> bool:
        """Whether a single unreadable image is an error."""
        return self.config.unreadable == "error" or self.config.max_unreadable_fraction == 0

    def add(self, reasons: Mapping[str, str]) -> None:
        """Add images by path, with the reasons.

        Raises:
            LongtailError: they are more than the settings accept.
        """
        self.found += reasons.items()
        message = refusal(self.config, [reason for _, reason in self.found], self.total, least=True)
        if message is not None:
            raise LongtailError(message)

    def check(self, remarks: list[str]) -> None:
        """Add a remark on the images, if there are any."""
        if self.found:
            remarks.append(
                f"{len(self.found):,} of {self.total:,} images cannot be read, and are left out (unreadable.csv in the "
                f"run's folder lists them); the first: {self.found[0][1]}"
            )


def log_unreadable(data: LongTailedData) -> None:
    """Log how many images of a set could not be read so far, and are left out, and why the first one is."""
    reasons = list(data.all_unreadable().values())
    if reasons:
        count = f"{len(reasons):,} images" if len(reasons) > 1 else "1 image"
        logger.info("%s cannot be read, and left out; the first: %s", count, reasons[0])


def refusal(config: Data, reasons: Collection[str], total: int, least: bool = False) -> str | None:
    """Return why a set with unreadable images is refused; None if they are left out.

    Args:
        config: what is done about unreadable images.
        reasons: of the unreadable images.
        total: number of images.
        least: whether there may be others that cannot be read.
    """
    if not reasons:
        return None
    first = next(iter(reasons))
    if config.unreadable == "error":
        return first
    if len(reasons) > config.max_unreadable_fraction * total:
        files = SOURCES[config.source].listing is not None  # of which there can be a table
        advice = " (longtail inspect DATA --fix FILE.csv writes a table of the good ones)" if files else ""
        count = f"{'at least ' * least}{len(reasons):,}"
        return (
            f"{count} of {total:,} images cannot be read, more than data.max_unreadable_fraction "
            f"{config.max_unreadable_fraction:g} accepts{advice}; the first: {first}"
        )
    return None


def decode_readable(images: LazyImages, positions: Tensor) -> tuple[Tensor, dict[int, str]]:
    """Decode the images at (N,) positions.

    Returns:
        (M, S, S, channels) uint8 of those that can be read, in order, and the reasons for the others by position.

    Raises:
        StorageError: one cannot be read for another reason than the image.
    """

    def decode(index: int) -> Tensor | str:
        try:
            square = images.open_square(index)
        except StorageError:
            raise
        except LongtailError as error:
            return str(error)
        return torch.from_numpy(np.array(square)).view(images.size, images.size, images.channels)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(decode, positions.tolist()))
    squares = [result for result in results if isinstance(result, Tensor)]
    reasons = {
        index: result for index, result in zip(positions.tolist(), results, strict=True) if isinstance(result, str)
    }
    shape = (0, images.size, images.size, images.channels)
    return torch.stack(squares) if squares else torch.empty(shape, dtype=torch.uint8), reasons


def without(values: Tensor, positions: Collection[int]) -> Tensor:
    """Return (N,) values without those at some positions."""
    kept = torch.ones(len(values), dtype=torch.bool)
    kept[list(positions)] = False
    return values[kept]
