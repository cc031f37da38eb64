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
    """Return the folder for downloads and kept results: LONGTAIL_CACHE, or ``longtail`` in the user's caches."""
    given = os.environ.get("LONGTAIL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given).expanduser() if given else Path(base).expanduser() / "longtail"


def cache_folder(setting: str) -> Path | None:
    """Return the folder for what is computed once per image; it may have to be created.

    Args:
        setting: a folder; ``auto`` for that of the user; ``none``, for which it is None, to keep nothing.
    """
    if setting == "none":
        return None
    return user_cache() if setting == "auto" else Path(setting).expanduser()


def content_hash(*parts: object) -> str:
    """Return a name for what rows depend on: of tensors their shapes and bytes, of anything else its JSON text."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = list(part.shape) if isinstance(part, Tensor) else part
        digest.update(json.dumps(text).encode() + b"\n")
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class RowStoreError(LongtailError):
    """Rows cannot be written, or the files that are there cannot be read."""


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
                return min(
                    self.rows_path.stat().st_size // self.row_bytes, self.keys_path.stat().st_size // _KEY.itemsize
                )
            except (FileNotFoundError, NotADirectoryError):
                return 0

    def find(self, keys: Tensor) -> Tensor:
        """Return the (M,) rows of (M,) int64 keys; −1 where there is none.

        Raises:
            LongtailError: the files cannot be read.
        """
        count = len(self)
        if count == 0:
            return torch.full_like(keys, -1)
        with self._reading(self.keys_path):
            known = np.fromfile(self.keys_path, dtype=_KEY, count=count)
        order = np.argsort(known, kind="stable")
        place = np.searchsorted(known[order], keys.numpy()).clip(max=len(known) - 1)
        rows = order[place]
        return torch.from_numpy(np.where(known[rows] == keys.numpy(), rows, -1))

    def fill(self, keys: Tensor, make: Callable[[Tensor], Iterator[Tensor]], *, wait: bool = False) -> Tensor:
        """Return the (M,) rows of (M,) int64 keys, and compute those that are missing.

        Args:
            keys: of the images.
            make: yields the rows at some positions in ``keys``, in order, a part at a time; every part is on disk
                before the next is asked for.
            wait: if another process fills this store with ``wait``, wait until it ends, and compute only what is
                missing then: for processes that need the same rows. Otherwise both compute.

        Raises:
            LongtailError: the files cannot be written or read.
        """
        if bool((self.find(keys) >= 0).all()):
            return self.find(keys)
        with self._writing(self.rows_path):
            self.rows_path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.rows_path, self.keys_path):
                path.open("ab").close()  # fails before anything is computed
        with self._locked("filling") if wait else contextlib.nullcontext():
            missing = torch.nonzero(self.find(keys) < 0).flatten()
            done = 0
            for part in make(missing) if len(missing) else ():
                self._append(keys[missing[done : done + len(part)]], part)
                done += len(part)
            assert done == len(missing)
        return self.find(keys)

    def _append(self, keys: Tensor, rows: Tensor) -> None:
        assert rows.shape[1:] == self.shape
        with self._locked("lock"):
            new = self.find(keys) < 0  # another process may have been faster
            count = len(self)
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
