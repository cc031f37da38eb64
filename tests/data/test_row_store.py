from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtail.data.row_store import RowStore, RowStoreError, cache_folder, content_hash
from longtail.errors import LongtailError


def make_store(folder: Path) -> RowStore:
    return RowStore(folder, "squares", (2, 3), "float32")


def expected(keys: Tensor) -> Tensor:
    """A row that tells its key."""
    return keys[:, None, None].float() + torch.arange(6).view(2, 3) / 8


def maker(keys: Tensor, calls: list[list[int]], part: int = 4) -> Callable[[Tensor], Iterator[Tensor]]:
    def make(missing: Tensor) -> Iterator[Tensor]:
        for positions in missing.split(part):
            calls.append(positions.tolist())
            yield expected(keys[positions])

    return make


def read(store: RowStore, rows: Tensor) -> Tensor:
    return torch.from_numpy(store.open()[rows.numpy()])


def test_only_missing_rows_are_computed(tmp_path: Path) -> None:
    keys = torch.tensor([5, -3, 2**62, 0, 7, -(2**63)])
    calls: list[list[int]] = []
    rows = make_store(tmp_path / "new").fill(keys[:4], maker(keys[:4], calls))
    assert calls == [[0, 1, 2, 3]]
    store = make_store(tmp_path / "new")  # as another process opens it
    assert torch.equal(store.find(keys), torch.tensor([*rows.tolist(), -1, -1]))
    assert torch.equal(read(store, store.fill(keys, maker(keys, calls))), expected(keys))
    assert calls[1:] == [[4, 5]]
    shuffled = keys[torch.tensor([3, 0, 5, 1])]
    assert torch.equal(read(store, store.fill(shuffled, maker(shuffled, calls))), expected(shuffled))
    assert len(calls) == 2
    assert len(store) == 6


def test_an_empty_store_writes_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path / "new")
    assert store.find(torch.tensor([1, 2])).tolist() == [-1, -1]
    assert len(store) == 0
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["rows", "part of a row", "part of a key", "keys", "everything"])
def test_what_a_killed_process_leaves_behind_is_computed_again(tmp_path: Path, damage: str) -> None:
    keys = torch.arange(10, 20)
    store = make_store(tmp_path)
    store.fill(keys, maker(keys, []))
    rows, names = store.rows_path.read_bytes(), store.keys_path.read_bytes()
    if damage == "rows":
        store.rows_path.write_bytes(rows[: 7 * store.row_bytes])
    elif damage == "part of a row":
        store.rows_path.write_bytes(rows[: 7 * store.row_bytes + 5])
    elif damage == "part of a key":
        store.keys_path.write_bytes(names[: 7 * 8 + 3])
    elif damage == "keys":
        store.keys_path.write_bytes(names[: 7 * 8])
    else:
        store.rows_path.unlink()
        store.keys_path.unlink()
    left = 0 if damage == "everything" else 7
    assert (store.find(keys) >= 0).tolist() == [True] * left + [False] * (10 - left)
    calls: list[list[int]] = []
    # other rows are written over the rest
    others = torch.cat([torch.tensor([1, 2]), keys])
    assert torch.equal(read(store, store.fill(others, maker(others, calls))), expected(others))
    assert sum(map(len, calls)) == 12 - left
    assert store.rows_path.stat().st_size == 12 * store.row_bytes
    assert store.keys_path.stat().st_size == 12 * 8


def test_parts_before_an_error_are_kept(tmp_path: Path) -> None:
    keys = torch.arange(10)

    def fail(missing: Tensor) -> Iterator[Tensor]:
        yield from (expected(keys[part]) for part in missing[missing < 8].split(4) if len(part))
        raise LongtailError("image 8 cannot be read")

    store = make_store(tmp_path)
    for wait in (False, True):
        with pytest.raises(LongtailError, match="image 8"):
            store.fill(keys, fail, wait=wait)
        assert (store.find(keys) >= 0).tolist() == [True] * 8 + [False] * 2
    calls: list[list[int]] = []
    store.fill(keys, maker(keys, calls), wait=True)  # no lock is held any more
    assert calls == [[8, 9]]


def test_a_store_is_filled_in_a_time_that_grows_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, counts = torch.arange(400), [0]
    fromfile = np.fromfile

    def counted(*arguments: Any, **options: Any) -> Any:
        values = fromfile(*arguments, **options)
        counts[0] += len(values)
        return values

    monkeypatch.setattr(np, "fromfile", counted)
    store = make_store(tmp_path)
    rows = store.fill(keys, maker(keys, []))
    assert counts[0] <= 2 * len(keys)
    assert torch.equal(read(store, rows), expected(keys))


def test_rows_of_another_process_are_seen_between_the_own(tmp_path: Path) -> None:
    keys, others = torch.arange(12), torch.tensor([100, 9, 5, 101])

    def make(missing: Tensor) -> Iterator[Tensor]:
        for part in missing.split(4):
            if part[0] == 4:
                make_store(tmp_path).fill(others, maker(others, []))
            yield expected(keys[part])

    store = make_store(tmp_path)
    assert torch.equal(read(store, store.fill(keys, make)), expected(keys))
    assert len(store) == 14


@pytest.mark.parametrize("others", [torch.tensor([100]), torch.arange(100, 120)])
def test_a_store_that_is_replaced_while_it_is_filled_gives_no_rows_of_other_images(
    tmp_path: Path, others: Tensor
) -> None:
    keys, store = torch.arange(12), make_store(tmp_path)

    def make(missing: Tensor) -> Iterator[Tensor]:
        for part in missing.split(4):
            if part[0] == 8:
                store.rows_path.unlink()
                store.keys_path.unlink()
                make_store(tmp_path).fill(others, maker(others, []))
            yield expected(keys[part])

    with pytest.raises(RowStoreError, match="was removed while rows were added to it; start again"):
        store.fill(keys, make)
    assert torch.equal(read(store, store.fill(keys, maker(keys, []))), expected(keys))
    assert (store.find(others) >= 0).all()


def fork(run: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.parametrize("wait", [False, True])
def test_a_process_that_is_killed_leaves_complete_rows(tmp_path: Path, wait: bool) -> None:
    keys, store = torch.arange(12), make_store(tmp_path)
    ready, told = os.pipe()

    def hang(missing: Tensor) -> Iterator[Tensor]:
        yield expected(keys[missing[:4]])
        os.write(told, b".")
        signal.pause()

    child = fork(lambda: store.fill(keys, hang, wait=wait))
    assert os.read(ready, 1) == b"."
    assert (store.find(keys) >= 0).sum() == 4  # readers need no lock
    if not wait:
        store.fill(torch.tensor([100]), maker(torch.tensor([100]), []))  # nor do writers wait for the computation
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    calls: list[list[int]] = []
    assert torch.equal(read(store, store.fill(keys, maker(keys, calls), wait=wait)), expected(keys))
    assert sum(map(len, calls)) == 8


def test_processes_that_need_the_same_rows_compute_them_once(tmp_path: Path) -> None:
    keys, log = torch.arange(40), tmp_path / "log"

    def run() -> None:
        def make(missing: Tensor) -> Iterator[Tensor]:
            for part in missing.split(8):
                with log.open("a") as file:
                    file.write("".join(f"{index}\n" for index in part.tolist()))
                yield expected(keys[part])

        store = make_store(tmp_path)
        assert torch.equal(read(store, store.fill(keys, make, wait=True)), expected(keys))

    statuses = [os.waitpid(child, 0)[1] for child in [fork(run) for _ in range(3)]]
    assert statuses == [0, 0, 0]
    assert sorted(map(int, log.read_text().split())) == keys.tolist()


def test_processes_that_do_not_wait_write_each_row_once(tmp_path: Path) -> None:
    keys, meet = torch.arange(40), threading.Barrier(2)
    results: list[Tensor] = []

    def run() -> None:
        def make(missing: Tensor) -> Iterator[Tensor]:
            meet.wait(10)  # both have found all rows missing
            yield from (expected(keys[part]) for part in missing.split(8))

        store = make_store(tmp_path)
        results.append(read(store, store.fill(keys, make)))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(make_store(tmp_path)) == 40
    assert all(torch.equal(rows, expected(keys)) for rows in results)
    assert len(results) == 2


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = make_store(tmp_path / "file" / "below")
    calls: list[list[int]] = []
    with pytest.raises(RowStoreError, match=r"below.squares.rows: cannot be written: .*--data.cache") as caught:
        store.fill(torch.arange(3), maker(torch.arange(3), calls))
    assert "\n" not in str(caught.value)
    assert not calls


def test_a_full_store_is_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    keys, store = torch.arange(6), make_store(tmp_path)
    store.fill(keys, maker(keys, []))
    mode = stat.S_IMODE(tmp_path.stat().st_mode)
    for path in (store.rows_path, store.keys_path):
        path.chmod(0o400)
    tmp_path.chmod(0o500)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    try:
        again = make_store(tmp_path)
        assert torch.equal(read(again, again.fill(keys, maker(keys, []))), expected(keys))
    finally:
        tmp_path.chmod(mode)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_a_disk_that_is_full_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    keys, store = torch.arange(6), make_store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(RowStoreError, match="No space left"):
            store.fill(keys, maker(keys, []))
    assert torch.equal(read(store, store.fill(keys, maker(keys, []))), expected(keys))


def test_rows_stay_readable_while_others_are_added_and_after_the_files_are_removed(tmp_path: Path) -> None:
    keys, store = torch.arange(6), make_store(tmp_path)
    rows = store.fill(keys, maker(keys, []))
    opened = store.open()
    assert opened.shape == (6, 2, 3)
    assert not opened.flags.writeable
    store.fill(torch.arange(50), maker(torch.arange(50), []))
    store.rows_path.unlink()
    assert torch.equal(torch.from_numpy(opened[rows.numpy()]), expected(keys))


def test_the_folder_follows_setting_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGTAIL_CACHE", str(tmp_path))
    assert cache_folder("auto") == tmp_path
    assert cache_folder("none") is None
    assert cache_folder("~/copies") == Path.home() / "copies"
    monkeypatch.delenv("LONGTAIL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "longtail"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("auto") == Path.home() / ".cache" / "longtail"


def test_without_a_home_folder_the_cache_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_user: object) -> object:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setenv("LONGTAIL_CACHE", str(tmp_path))
    assert cache_folder("auto") == tmp_path
    for given, setting in (("", "auto"), ("~nouser/x", "auto"), (str(tmp_path), "~nouser/x")):
        monkeypatch.setenv("LONGTAIL_CACHE", given)
        with pytest.raises(
            LongtailError, match=r"there is no home folder; name one with LONGTAIL_CACHE, or use --data"
        ):
            cache_folder(setting)


def test_rows_are_added_after_those_that_the_file_system_does_not_tell_of_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS tells of a file that is not opened what it was some seconds ago."""
    keys = torch.arange(6)
    make_store(tmp_path).fill(keys[:2], maker(keys[:2], []))
    told = {path: path.stat() for path in tmp_path.iterdir()}
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: told.get(path) or real(path, **options))
    for part in keys[2:].split(2):
        make_store(tmp_path).fill(part, maker(part, []))
    store = make_store(tmp_path)
    assert torch.equal(read(store, store.find(keys)), expected(keys))


def test_a_name_depends_on_every_part() -> None:
    weights = torch.arange(6.0).view(2, 3)
    names = [content_hash(weights, 1), content_hash(weights.T, 1), content_hash(weights, 2), content_hash(weights, "1")]
    assert len(set(names)) == 4
    assert content_hash(weights.clone(), 1) == names[0]
    assert content_hash("ab", "c") != content_hash("a", "bc")
    assert content_hash(1, 2) != content_hash(12)
    assert content_hash(torch.zeros(2), torch.zeros(1)) != content_hash(torch.zeros(1), torch.zeros(2))
