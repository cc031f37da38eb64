"""Collections of images: decoded once and kept in memory or on disk, or decoded when they are needed.

Legend: N images, B of them in a batch, S side in pixels.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longtail.data.image_io import StorageError, image_errors, open_image, open_square, resize_center_crop
from longtail.data.row_store import RowStore
from longtail.data.transforms.batched import center, to_float
from longtail.errors import LongtailError


class Images(Protocol):
    """A sequence of images of one size."""

    lazy: bool
    """Whether taking images reads and decodes them, so that it pays to do it ahead of their use."""
    unreadable: dict[int, str]
    """Images that could not be read, by position, with the reason."""

    def __len__(self) -> int:
        """Return N."""
        ...

    def take(self, indices: Tensor) -> Tensor:
        """Return (B, channels, S, S) uint8 for (B,) int64 indices."""
        ...

    def name(self, index: int) -> str | None:
        """Return where an image is found: its path below the data's folder, or its table and row; None in memory."""
        ...

    def open(self, index: int) -> Image.Image:
        """Return one image as it is stored; raise LongtailError, which names it, where it cannot be read."""
        ...

    def open_with_fallback(self, index: int) -> Image.Image:
        """Return one image as it is stored, or another of its class where it cannot be read."""
        ...

    def open_sample(self, index: int) -> Any:
        """Return what a per-image transform of these images takes: the Pillow image, or it with its annotation."""
        ...

    def record_unreadable(self, reasons: dict[int, str]) -> None:
        """Add images that could not be read, by position, with the reason; raise LongtailError if they are too many."""
        ...

    def signature(self, index: int) -> bytes:
        """Return bytes by which another training set is recognised: an image's pixels, or the size of its file."""
        ...

    def version(self, index: int) -> bytes:
        """Return bytes that change with the image, see :meth:`ImageSet.keys`: its content, or of a file its status."""
        ...

    def plain(self, indices: Tensor, size: int) -> Tensor:
        """Return what a network is given without augmentation: (B, channels, size, size) float32 centres in [0, 1]."""
        ...


class ArrayImages:
    """Images in memory.

    Args:
        pixels: (N, channels, S, S) uint8.
    """

    lazy = False

    def __init__(self, pixels: Tensor) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.ndim == 4
        self.pixels = pixels
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``."""
        return torch.from_numpy(self.pixels.numpy()[indices.numpy()])  # torch copies bytes one by one, NumPy images

    def _take_one(self, index: int) -> Tensor:
        return self.take(torch.tensor([index]))[0]

    def name(self, index: int) -> str | None:  # noqa: ARG002
        """Return None: what is in memory is found nowhere else."""
        return None

    def open(self, index: int) -> Image.Image:
        """Return one image."""
        pixels = self._take_one(index).permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    def open_with_fallback(self, index: int) -> Image.Image:
        """Return one image."""
        return self.open(index)

    def open_sample(self, index: int) -> Image.Image:
        """Return one image."""
        return self.open(index)

    def record_unreadable(self, reasons: dict[int, str]) -> None:
        """Do nothing: what is in memory has been read."""
        assert not reasons

    def signature(self, index: int) -> bytes:
        """Return an image's pixels."""
        return self._take_one(index).numpy().tobytes()

    def version(self, index: int) -> bytes:
        """Return an image's pixels."""
        return self.signature(index)

    def plain(self, indices: Tensor, size: int) -> Tensor:
        """Return the centres of the images at ``indices``."""
        return to_float(center(self.take(indices), size))


class LazyImages(ABC):
    """Images that are decoded when they are taken, by several threads (Pillow decodes outside the interpreter's lock).

    Args:
        size: S.
        channels: 3 or 1.
        labels: (N,) classes, from which the replacement of an unreadable image is chosen.
        max_unreadable_fraction: largest fraction of the images that may be unreadable and replaced, in [0, 1).
    """

    lazy = True

    def __init__(
        self, size: int, channels: int = 3, labels: Tensor | None = None, max_unreadable_fraction: float = 0.0
    ) -> None:
        self.size, self.channels, self.labels = size, channels, labels
        self.max_unreadable_fraction = max_unreadable_fraction
        self.unreadable: dict[int, str] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return where an image is found: its path below the data's folder, or its table and row."""

    @abstractmethod
    def signature(self, index: int) -> bytes:
        """Return the size of an encoded image in bytes, as text."""

    @abstractmethod
    def version(self, index: int) -> bytes:
        """Return bytes that change with the image, and are not those of another image with its id."""

    def plain(self, indices: Tensor, size: int) -> Tensor:
        """Return the centres of the images at ``indices``."""
        return to_float(center(self.take(indices), size))

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Return one image as it is stored.

        Raises:
            LongtailError: it cannot be read; the message names it.
        """

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``, channels last in memory; raises as :meth:`open_with_fallback` does."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            squares = torch.stack(list(pool.map(self._take_one, indices.tolist())))
        return squares.permute(0, 3, 1, 2)

    @abstractmethod
    def open_square(self, index: int) -> Image.Image:
        """Return one image as a square of S pixels, see :func:`~longtail.data.image_io.open_square`; or raise as
        :meth:`open` does.
        """

    def _take_one(self, index: int) -> Tensor:
        square = self._with_fallback(index, self.open_square)
        return torch.from_numpy(np.array(square)).view(self.size, self.size, self.channels)

    def open_with_fallback(self, index: int) -> Image.Image:
        """Return an image as it is stored, or the next readable one of its class.

        Raises:
            LongtailError: a larger fraction than ``max_unreadable_fraction`` is unreadable, or the whole class is.
        """
        return self._with_fallback(index, self.open)

    def _with_fallback(self, index: int, open_one: Callable[[int], Image.Image]) -> Image.Image:
        try:
            return open_one(index)
        except StorageError:
            raise
        except LongtailError as error:
            self.record_unreadable({index: str(error)})
        assert self.labels is not None
        same_class = torch.nonzero(self.labels == self.labels[index]).flatten().tolist()
        position = same_class.index(index)
        for other in same_class[position + 1 :] + same_class[:position]:
            if other not in self.unreadable:
                try:
                    return open_one(other)
                except StorageError:
                    raise
                except LongtailError as error:
                    self.record_unreadable({other: str(error)})
        raise LongtailError(f"{self.unreadable[index]}; and no other image of its class can be read")

    def open_sample(self, index: int) -> Any:
        """Return what a per-image transform takes: the Pillow image, see :meth:`open_with_fallback`."""
        return self.open_with_fallback(index)

    def record_unreadable(self, reasons: dict[int, str]) -> None:
        """Add images that could not be read.

        Raises:
            LongtailError: a larger fraction than ``max_unreadable_fraction`` is unreadable.
        """
        self.unreadable |= reasons
        if len(self.unreadable) > self.max_unreadable_fraction * len(self):
            first = next(iter(self.unreadable.values()))
            if self.max_unreadable_fraction == 0:
                raise LongtailError(first)
            raise LongtailError(
                f"{len(self.unreadable)} of {len(self)} images cannot be read, more than data.max_unreadable_fraction "
                f"{self.max_unreadable_fraction:g}; the first: {first}"
            )


class FileImages(LazyImages):
    """Image files below a folder.

    Args:
        root: the folder.
        names: N paths below it; as strings, since a Path takes ten times the memory.
        size: see :class:`LazyImages`.
        channels: see :class:`LazyImages`.
        labels: see :class:`LazyImages`.
        max_unreadable_fraction: see :class:`LazyImages`.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        size: int,
        channels: int = 3,
        labels: Tensor | None = None,
        max_unreadable_fraction: float = 0.0,
    ) -> None:
        super().__init__(size, channels, labels, max_unreadable_fraction)
        self.root, self.names = root, names
        self._root = str(root.resolve())

    def __len__(self) -> int:
        return len(self.names)

    def at(self, positions: Tensor) -> FileImages:
        """Return the images at (M,) positions, int64."""
        names = [self.names[index] for index in positions.tolist()]
        labels = None if self.labels is None else self.labels[positions]
        return FileImages(self.root, names, self.size, self.channels, labels, self.max_unreadable_fraction)

    def name(self, index: int) -> str:
        """Return the path of the image at ``index``."""
        return self.names[index]

    def open(self, index: int) -> Image.Image:
        """Return the image at ``index``."""
        return open_image(self.root / self.names[index])

    def open_square(self, index: int) -> Image.Image:
        """Return the image at ``index`` as a square."""
        return open_square(self.root / self.names[index], self.size, self.channels)

    def signature(self, index: int) -> bytes:
        """Return the size of a file in bytes, as text; −1 where it is missing."""
        path = self.root / self.names[index]
        return str(path.stat().st_size if path.exists() else -1).encode()

    def version(self, index: int) -> bytes:
        """Return a file's folder, size, times of modification and of change, and number in the file system."""
        try:
            status = (self.root / self.names[index]).stat()
        except OSError:
            return b""
        # archives set the time of modification, so a file of another set, or of a class whose folder now has the name
        # of another, may have the same name, size and time; it has another number, or if it took over the number of a
        # file that was removed, another time of change. Some network file systems number a file anew at each mount: it
        # is then only decoded again
        parts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return f"{self._root} {' '.join(map(str, parts))}".encode("utf-8", "surrogateescape")


class CopiedImages(ArrayImages):
    """Resized copies of image files, read from a file that is mapped to memory; the images' own files stay closed.

    Args:
        files: the images.
        store: the copies, (S, S, channels) uint8.
        rows: (N,) int64 where they are in it.
        lazy: whether the copies are more than memory holds, so that they have to be read again and again.
    """

    def __init__(self, files: FileImages, store: RowStore, rows: Tensor, *, lazy: bool) -> None:
        self.files, self.store, self.rows, self.lazy = files, store, rows, lazy
        self.unreadable: dict[int, str] = {}
        self._copies = store.open()

    def __getstate__(self) -> dict[str, Any]:
        # the data loader's processes map the file themselves
        return {name: value for name, value in vars(self).items() if name != "_copies"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._copies = self.store.open()

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``."""
        return torch.from_numpy(np.asarray(self._copies[self.rows[indices].numpy()])).permute(0, 3, 1, 2)

    def name(self, index: int) -> str:
        """Return the path of the image's file."""
        return self.files.name(index)

    def signature(self, index: int) -> bytes:
        """Return what the images' signature is without copies, so that both are the same training set."""
        return self.files.signature(index) if self.lazy else super().signature(index)

    def version(self, index: int) -> bytes:
        """Return the version of the image's file."""
        return self.files.version(index)


class EncodedImages(LazyImages):
    """Encoded images in the rows of a table (Parquet files, data sets of the Hugging Face Hub).

    Args:
        read_row: returns the encoded image of a row.
        count: N.
        table: its name, for messages.
        size: see :class:`LazyImages`.
        channels: see :class:`LazyImages`.
        labels: see :class:`LazyImages`.
        max_unreadable_fraction: see :class:`LazyImages`.
        numbers: (N,) numbers of the rows in the table, for messages; 0 to N − 1 if not given.
    """

    def __init__(
        self,
        read_row: Callable[[int], bytes],
        count: int,
        table: str,
        size: int,
        channels: int = 3,
        labels: Tensor | None = None,
        max_unreadable_fraction: float = 0.0,
        numbers: Tensor | None = None,
    ) -> None:
        super().__init__(size, channels, labels, max_unreadable_fraction)
        self.read_row, self.count, self.table, self.numbers = read_row, count, table, numbers

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """Return the table and the row of the image at ``index``."""
        return f"{self.table}, row {index if self.numbers is None else int(self.numbers[index])}"

    def open(self, index: int) -> Image.Image:
        """Return the image of row ``index``."""
        place = self.name(index)
        return open_image(io.BytesIO(self._content(index, place)), place)

    def open_square(self, index: int) -> Image.Image:
        """Return the image of row ``index`` as a square."""
        place = self.name(index)
        return open_square(io.BytesIO(self._content(index, place)), self.size, self.channels, place)

    def _content(self, index: int, place: str) -> bytes:
        """Return the encoded image of a row.

        Raises:
            LongtailError: it has none, or names a file that cannot be read.
        """
        with image_errors(place):
            content = self.read_row(index)
        if not content:
            raise LongtailError(f"{place}: has no image; remove or replace the row")
        return content

    def signature(self, index: int) -> bytes:
        """Return the number of bytes of a row's image, as text."""
        return str(len(self.read_row(index))).encode()

    def version(self, index: int) -> bytes:
        """Return a digest of a row's image, since rows of other splits and other sets have the same numbers."""
        try:
            with image_errors(self.name(index)):
                content = self.read_row(index)
        except StorageError:
            raise
        except LongtailError:  # what is done about it is decided when the image is opened
            return b""
        return hashlib.blake2b(content, digest_size=16).digest()


def to_square(image: Image.Image, size: int, channels: int = 3) -> Tensor:
    """Return a Pillow image as (channels, size, size) uint8, see :func:`~longtail.data.image_io.resize_center_crop`."""
    pixels = torch.from_numpy(np.array(resize_center_crop(image, size, channels)))
    return pixels.permute(2, 0, 1) if channels == 3 else pixels[None]
