"""A set of image files before any of them is opened: paths and labels by split. Legend: N images, C classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

SPLITS = ("train", "val", "test")

SPLIT_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "holdout"),
}
"""Names of folders, and values in a column of splits, for every split; in any case."""

_SPLIT_OF = {alias: split for split, aliases in SPLIT_ALIASES.items() for alias in aliases}


def split_of(name: str) -> str | None:
    """Return which of :data:`SPLITS` a name of a folder or in a table stands for; None if it is none.

    >>> split_of("Validation"), split_of("holdout"), split_of("cats")
    ('val', 'test', None)
    """
    return _SPLIT_OF.get(name.strip().casefold())


@dataclass(frozen=True)
class Entries:
    """One split: files with their labels."""

    names: list[str]
    """(N,) paths below the root."""
    labels: Tensor
    """(N,) int64."""

    def __len__(self) -> int:
        return len(self.names)

    def at(self, positions: Tensor) -> Entries:
        """Return the entries at ``positions``, int64."""
        return Entries([self.names[position] for position in positions.tolist()], self.labels[positions])


@dataclass
class Listing:
    """Every image file of a set, by split, and what is wrong with them."""

    root: Path
    splits: dict[str, Entries]
    """By name: of :data:`SPLITS`, or all of them under ``all`` where the set has no splits."""
    class_names: list[str]
    """(C,)."""
    errors: list[str] = field(default_factory=list)
    """What prevents training on it; each names the file, class or field."""
    remarks: list[str] = field(default_factory=list)
    """What a user should know."""
    not_images: list[str] = field(default_factory=list)
    """Those of the errors that a file in a class folder is no image by its name."""
    beside: str | None = None
    """Which folders with images are beside the splits and not used, where there are some."""
    mean: tuple[float, ...] | None = None
    """Of each channel of its photographs in [0, 1]; ImageNet's if None."""
    std: tuple[float, ...] | None = None
    check_headers: bool = False
    """Whether the header of every training image is read when the set is loaded; a list may name too many for that."""

    @property
    def can_be_split(self) -> bool:
        """Whether its images can be divided and counted, since all errors are about other files."""
        return set(self.errors) <= set(self.not_images)

    @property
    def training(self) -> Entries:
        """The training images, or all where there are no splits."""
        return self.splits["train"] if "train" in self.splits else self.splits["all"]
