"""Arrays that are computed once per image and kept on disk: resized copies, features of a frozen network.

Legend: N rows, each of one shape and type.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from longtail.errors import LongtailError

_Rows = np.memmap  # of NumPy's own types; (N, *shape)
_KEY = np.dtype("<i8")


def user_cache() -> Path:
    """Return the folder for downloads and kept results: LONGTAIL_CACHE, or ``longtail`` in the user's caches.

    Raises:
        LongtailError: that is in a home folder, and there is none.
    """
    if given := os.environ.get("LONGTAIL_CACHE"):
        return _expanded(given)
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "longtail"


def _expanded(path: str) -> Path:
    """Return a path with the home folder in place of ``~``; raise LongtailError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise LongtailError(
            f"{path}: there is no home folder; name one with LONGTAIL_CACHE, or use --data.cache none"
        ) from None


def cache_folder(setting: str) -> Path | None:
    """Return the folder for what is computed once per image; it may have to be created.

    Args:
        setting: a folder; ``auto`` for that of the user; ``none``, for which it is None, to keep nothing.

    Raises:
        LongtailError: it is in a home folder, and there is none.
    """
    if setting == "none":
        return None
    return user_cache() if setting == "auto" else _expanded(setting)


def content_hash(*parts: object) -> str:
    """Return a name for what rows depend on: of tensors their shapes and bytes, of anything else its JSON text."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = list(part.shape) if isinstance(part, Tensor) else part
        digest.update(json.dumps(text).encode() + b"\n")
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _size(path: Path) -> int:
    """Return the size of a file in bytes, as it is now: of one that is not opened, NFS may know an earlier size."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


class RowStoreError(LongtailError):
    """Rows cannot be written, or the files that are there cannot be read."""


class _Arrived:
    """Which of some keys a growing file of keys has got since a look at it.

    Each key of the file is read once. To read all of them at each of many additions would take a time that grows with
    the square of the number of keys.

    Args:
        read: returns the keys in the file from one position to another.
        keys: of which the file held none.
        seen: how many it held then.
    """

    def __init__(self, read: Callable[[int, int], np.ndarray], keys: np.ndarray, seen: int) -> None:
        self.read, self.keys, self.seen = read, np.unique(keys), seen
        self.there = np.zeros(len(self.keys), dtype=bool)

    def look(self, count: int) -> None:
        """Read the keys that were added, where there are ``count`` in all."""
        if count < self.seen:  # the file was removed or cut
            self.seen = 0
            self.there[:] = False
        added = self.read(self.seen, count)
        self.seen += len(added)
        place = np.searchsorted(self.keys, added).clip(max=len(self.keys) - 1)
        self.there[place[self.keys[place] == added]] = True

    def are_there(self, keys: np.ndarray) -> np.ndarray:
        """Return for each of some of the keys whether the file has it."""
        return self.there[np.searchsorted(self.keys, keys)]


class RowStore:
    """Rows on disk, found again by a key of 64 bits; rows of other images are added to the same file.

    Two files, ``NAME.rows`` and ``NAME.keys``, are appended to under a lock, rows first, so that a process that is
    killed leaves complete rows only. Several processes may fill one store, and a store that cannot be written to can
    be read as long as no row is missing. Nothing is written before :meth:`fill` finds rows missing.

    Args:
        folder: where the files are; it is created.
        name: of the files; everything that the rows depend on besides the image belongs in it, see
            :func:`content_hash`.
        shape: of a row.
        dtype: of a row.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.row_bytes = int(np.prod(shape)) * self.dtype.itemsize
        self.rows_path, self.keys_path = folder / f"{name}.rows", folder / f"{name}.keys"

    def __len__(self) -> int:
        """Return N, the number of complete rows."""
        with self._reading(self.keys_path):
            try:
                return min(_size(self.rows_path) // self.row_bytes, _size(self.keys_path) // _KEY.itemsize)
            except (FileNotFoundError, NotADirectoryError):
                return 0

    def find(self, keys: Tensor) -> Tensor:
        """Return the (M,) rows of (M,) int64 keys; −1 where there is none.

        Raises:
            LongtailError: the files cannot be read.
        """
        return self._find(keys, len(self))

    def _find(self, keys: Tensor, count: int) -> Tensor:
        known = self._read_keys(0, count)
        if len(known) == 0:
            return torch.full_like(keys, -1)
        order = np.argsort(known, kind="stable")
        place = np.searchsorted(known[order], keys.numpy()).clip(max=len(known) - 1)
        rows = order[place]
        return torch.from_numpy(np.where(known[rows] == keys.numpy(), rows, -1))

    def _read_keys(self, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.empty(0, dtype=_KEY)
        with self._reading(self.keys_path):
            return np.fromfile(self.keys_path, dtype=_KEY, count=stop - start, offset=start * _KEY.itemsize)

    def fill(self, keys: Tensor, make: Callable[[Tensor], Iterator[Tensor]], *, wait: bool = False) -> Tensor:
        """Return the (M,) rows of (M,) int64 keys, and compute those that are missing.

        Args:
            keys: of the images.
            make: yields the rows at some positions in ``keys``, in order, a part at a time; every part is on disk
                before the next is asked for.
            wait: if another process fills this store with ``wait``, wait until it ends, and compute only what is
                missing then: for processes that need the same rows. Otherwise both compute.

        Raises:
            LongtailError: the files cannot be written or read, or were removed meanwhile.
        """
        rows = self.find(keys)
        if bool((rows >= 0).all()):
            return rows
        with self._writing(self.rows_path):
            self.rows_path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.rows_path, self.keys_path):
                path.open("ab").close()  # fails before anything is computed
        with self._locked("filling") if wait else contextlib.nullcontext():
            count = len(self)
            missing = torch.nonzero(self._find(keys, count) < 0).flatten()
            arrived = _Arrived(self._read_keys, keys[missing].numpy(), count)
            done = 0
            for part in make(missing) if len(missing) else ():
                self._append(keys[missing[done : done + len(part)]], part, arrived)
                done += len(part)
            assert done == len(missing)
        rows = self.find(keys)
        if bool((rows < 0).any()):
            raise RowStoreError(f"{self.rows_path}: was removed while rows were added to it; start again")
        return rows

    def _append(self, keys: Tensor, rows: Tensor, arrived: _Arrived) -> None:
        assert rows.shape[1:] == self.shape
        with self._locked("lock"):
            count = len(self)
            arrived.look(count)
            new = torch.from_numpy(~arrived.are_there(keys.numpy()))  # another process may have been faster
            # what a process that was killed has left behind the last complete row is overwritten
            self._write(
                self.rows_path, count * self.row_bytes, rows[new].contiguous().numpy().astype(self.dtype, copy=False)
            )
            self._write(self.keys_path, count * _KEY.itemsize, keys[new].numpy().astype(_KEY, copy=False))

    def _write(self, path: Path, offset: int, values: np.ndarray) -> None:
        with self._writing(path), path.open("r+b") as file:
            file.seek(offset)
            file.write(values.data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    def open(self) -> _Rows:
        """Return the (N, *shape) rows, mapped to memory and read-only; there must be some.

        Raises:
            LongtailError: the file cannot be read.
        """
        with self._reading(self.rows_path):
            return np.memmap(self.rows_path, dtype=self.dtype, mode="r", shape=(len(self), *self.shape))

    @contextlib.contextmanager
    def _locked(self, suffix: str) -> Iterator[None]:
        path = self.rows_path.with_suffix(f".{suffix}")
        lock = FileLock(path)
        with self._writing(path):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @staticmethod
    @contextlib.contextmanager
    def _writing(path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, NotImplementedError) as error:  # the latter: the file system has no locks
            raise RowStoreError(
                f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}; choose another folder with "
                "--data.cache or LONGTAIL_CACHE, or keep nothing with --data.cache none"
            ) from None

    @staticmethod
    @contextlib.contextmanager
    def _reading(path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RowStoreError(
                f"{path}: cannot be read: {error.strerror or error}; remove it, or choose another folder with "
                "--data.cache or LONGTAIL_CACHE"
            ) from None
