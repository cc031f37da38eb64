from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from longtail.data.samplers import ClassAwareSampler, class_shares, deferred_shares, ends_balanced, epoch_order
from longtail.errors import LongtailError
from longtail.registry import SAMPLERS
from tests.processes import start_longtail

COUNTS = torch.tensor([400, 90, 10])
LABELS = torch.repeat_interleave(torch.arange(3), COUNTS)[
    torch.randperm(500, generator=torch.Generator().manual_seed(9))
]


def shares(sampler: str, epoch: int, epochs: int = 11) -> list[float]:
    shown = torch.cat([LABELS[epoch_order(LABELS, sampler, seed, epoch, epochs)] for seed in range(40)])
    return [float(value) for value in torch.bincount(shown, minlength=3) / len(shown)]


@pytest.mark.parametrize(
    ("sampler", "epoch", "expected"),
    [
        ("instance", 5, [0.8, 0.18, 0.02]),
        ("class", 5, [1 / 3, 1 / 3, 1 / 3]),
        ("sqrt", 5, [20 / 32.649, 9.487 / 32.649, 3.162 / 32.649]),
        ("progressive", 0, [0.8, 0.18, 0.02]),
        ("progressive", 5, [0.5667, 0.2567, 0.1767]),
        ("progressive", 10, [1 / 3, 1 / 3, 1 / 3]),
        ("deferred", 8, [0.8, 0.18, 0.02]),
        ("deferred", 9, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_classes_are_shown_as_often_as_they_should(sampler: str, epoch: int, expected: list[float]) -> None:
    # 20,000 draws: five standard deviations
    for got, want in zip(shares(sampler, epoch), expected, strict=True):
        assert abs(got - want) < 5 * math.sqrt(want * (1 - want) / 20_000) + 1e-9


@pytest.mark.parametrize("sampler", ["instance", "class", "sqrt", "progressive", "deferred"])
def test_an_epoch_is_a_function_of_seed_and_number(sampler: str) -> None:
    once = epoch_order(LABELS, sampler, 3, 10, epochs=11)
    assert torch.equal(once, epoch_order(LABELS, sampler, 3, 10, epochs=11))
    assert len(once) == len(LABELS)
    assert not torch.equal(once, epoch_order(LABELS, sampler, 3, 9, epochs=11))
    assert not torch.equal(once, epoch_order(LABELS, sampler, 4, 10, epochs=11))


def test_images_of_a_class_are_shown_alike() -> None:
    shown = torch.cat([epoch_order(LABELS, "class", seed, 0) for seed in range(60)])
    tail = torch.bincount(shown, minlength=500)[LABELS == 2].double()
    assert abs(tail.mean().item() - 1000) < 60
    assert tail.std().item() < 4 * math.sqrt(1000)


def test_a_class_without_images_is_left_out() -> None:
    assert class_shares(torch.tensor([5, 0, 5]), 0, 1, 0.8).tolist() == [0.5, 0.0, 0.5]


def test_samplers_are_registered_and_others_are_errors() -> None:
    assert set(SAMPLERS) == {"instance", "class", "sqrt", "progressive", "deferred", "repeat_factor"}
    with pytest.raises(LongtailError, match=r"data\.sampler 'sqr' is not known; perhaps you meant sqrt"):
        epoch_order(LABELS, "sqr", 0, 0)


def test_labels_that_are_not_classes_are_named() -> None:
    for sampler in ("instance", "class"):
        with pytest.raises(LongtailError, match=r"^labels: expected values of at least 0, got -1 for image 2$"):
            epoch_order(torch.tensor([0, 1, -1]), sampler, 0, 0)
        with pytest.raises(
            LongtailError, match=r"^labels: expected shape \(N,\) of int64, got \(2,\) of torch.float32$"
        ):
            epoch_order(torch.zeros(2), sampler, 0, 0)
        assert epoch_order(torch.zeros(0, dtype=torch.int64), sampler, 0, 0).tolist() == []


@pytest.mark.parametrize("sampler", ["class", "sqrt", "progressive"])
def test_the_images_of_an_absent_class_are_never_shown(sampler: str) -> None:
    labels = torch.tensor([0] * 50 + [3] * 50)  # of classes 1 and 2 there is none
    order = epoch_order(labels, sampler, 0, 1, epochs=2)
    assert set(order.tolist()) <= set(range(100))
    assert 20 < (labels[order] == 0).sum() < 80


SCHEMES = ("instance", "class", "sqrt", "progressive", "deferred")


def make(labels: Any = LABELS, scheme: str = "class", replicas: int = 1, rank: int = 0, **changes: Any) -> Any:
    return ClassAwareSampler(labels, scheme, num_replicas=replicas, rank=rank, epochs=11, **changes)


@given(
    labels=st.lists(st.integers(0, 6), min_size=7, max_size=60),
    scheme=st.sampled_from(SCHEMES),
    replicas=st.integers(1, 7),
    epoch=st.integers(0, 12),
    seed=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_replicas_share_the_epoch_of_one(labels: list[int], scheme: str, replicas: int, epoch: int, seed: int) -> None:
    parts = []
    for rank in range(replicas):
        sampler = make(labels, scheme, replicas, rank, seed=seed)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == len(labels) // replicas
    whole = epoch_order(torch.tensor(labels), scheme, seed, epoch, 11).tolist()
    together = list(itertools.chain.from_iterable(zip(*parts, strict=True)))
    assert together == whole[: len(together)]
    if scheme == "instance" or (scheme == "deferred" and epoch < 9):
        assert len(set(together)) == len(together)  # nobody shows another's image


@pytest.mark.parametrize(("scheme", "tail"), [("instance", 0.02), ("class", 1 / 3), ("sqrt", 3.162 / 32.649)])
def test_each_replica_has_the_same_shares(scheme: str, tail: float) -> None:
    for rank in range(4):
        sampler, shown = make(scheme=scheme, replicas=4, rank=rank), []
        for epoch in range(80):
            sampler.set_epoch(epoch)
            shown += list(sampler)
        share = float((LABELS[shown] == 2).double().mean())
        assert abs(share - tail) < 5 * math.sqrt(tail * (1 - tail) / len(shown))


def test_images_that_are_left_out_change_with_the_epoch() -> None:
    sampler, seen = [make(range(10), "instance", 4, rank) for rank in range(4)], set[int]()
    for epoch in range(20):
        for part in sampler:
            part.set_epoch(epoch)
            seen.update(part)
    assert seen == set(range(10))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("drawn", [0, 1, 7, 249, 250])
def test_an_epoch_is_resumed_where_it_was(scheme: str, drawn: int) -> None:
    sampler = make(scheme=scheme, replicas=2, rank=1)
    sampler.set_epoch(9)
    whole = list(sampler)
    sampler.set_epoch(9)
    iterator = iter(sampler)
    assert [next(iterator) for _ in range(drawn)] == whole[:drawn]
    state = json.loads(json.dumps(sampler.state_dict()))
    assert (state["epoch"], state["drawn"]) == (9, 2 * drawn)
    resumed = make(scheme=scheme, replicas=2, rank=1)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # also before the first index
    resumed.set_epoch(9)  # as a trainer does
    rest = iter(resumed)
    assert [next(rest) for _ in range(3 if drawn < 249 else 0)] == whole[drawn : drawn + (3 if drawn < 249 else 0)]
    assert resumed.state_dict()["drawn"] == state["drawn"] + (6 if drawn < 249 else 0)
    assert list(rest) == whole[drawn + (3 if drawn < 249 else 0) :]
    resumed.set_epoch(9)
    assert list(resumed) == whole  # once more, it is whole again
    resumed.load_state_dict(state)
    resumed.set_epoch(10)  # of another epoch nothing was drawn
    assert len(list(resumed)) == len(whole)


def test_after_a_whole_epoch_comes_the_next_one() -> None:
    sampler = make(LABELS[:-1], replicas=2, rank=1)
    list(sampler)
    state, following = sampler.state_dict(), list(sampler)
    assert (state["epoch"], state["drawn"]) == (0, 498)
    resumed = make(LABELS[:-1], replicas=2, rank=1)
    resumed.load_state_dict(state)
    assert (list(resumed), list(resumed)) == ([], following)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)
    assert list(resumed) == following


def test_chunks_do_not_show() -> None:
    labels = torch.arange(150_000) % 3
    sampler = make(labels, "class")
    iterator, order = iter(sampler), epoch_order(labels, "class", 0, 0, 11).tolist()
    for drawn in (0, 1, 65_535, 65_536, 65_537, 131_072, 150_000):
        taken = list(itertools.islice(iterator, drawn - sampler.state_dict()["drawn"]))
        assert sampler.state_dict()["drawn"] == drawn
        assert taken == order[drawn - len(taken) : drawn]
    assert next(iterator, None) is None
    assert sampler.state_dict()["drawn"] == 150_000


def test_resumed_by_another_number_of_replicas() -> None:
    before = [make(replicas=3, rank=rank, scheme="instance") for rank in range(3)]
    iterators = [iter(part) for part in before]
    seen = [next(iterator) for _ in range(50) for iterator in iterators]
    after = [make(replicas=4, rank=rank, scheme="instance") for rank in range(4)]
    for part in after:
        part.load_state_dict(before[0].state_dict())
    parts = [list(part) for part in after]
    assert {len(part) for part in parts} == {(500 - 150) // 4}
    rest = list(itertools.chain.from_iterable(zip(*parts, strict=True)))
    assert seen + rest == epoch_order(LABELS, "instance", 0, 0, 11).tolist()[: 150 + len(rest)]


def test_the_state_belongs_to_the_latest_iterator() -> None:
    sampler = make()
    first = iter(sampler)
    sampler.set_epoch(0)
    second = iter(sampler)
    assert [next(first) for _ in range(5)] == [next(second) for _ in range(3)] + [next(second), next(second)]
    next(first)
    assert sampler.state_dict()["drawn"] == 5


def test_without_set_epoch_the_next_iterator_is_of_the_next_epoch() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    sampler, chosen = ClassAwareSampler(labels), ClassAwareSampler(labels)
    for epoch in range(3):
        chosen.set_epoch(epoch)
        assert list(sampler) == list(chosen)
    assert sampler.state_dict() == chosen.state_dict()
    chosen.set_epoch(2)  # once more the same one
    again = list(chosen)
    other = ClassAwareSampler(labels)
    other.set_epoch(2)
    assert again == list(other)


def test_a_state_of_something_else_is_refused() -> None:
    state = make().state_dict()
    for other, message in (
        (make(seed=1), "state: its seed is 0, this sampler's 1; make the sampler as before"),
        (make(scheme="sqrt"), "state: its scheme is 'class', this sampler's 'sqrt'"),
        (make(LABELS[:-1]), "state: its images is 500, this sampler's 499"),
    ):
        with pytest.raises(LongtailError, match=re.escape(message)):
            other.load_state_dict(state)
    for change in ({"drawn": 501}, {"drawn": -1}, {"drawn": None}, {"epoch": -1}, {"epoch": "a"}):
        with pytest.raises(LongtailError, match="state: expected an epoch of at least 0 and 0 to 500 images drawn"):
            make().load_state_dict(state | change)
    with pytest.raises(LongtailError, match="state: its scheme is None"):
        make().load_state_dict({})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"], "labels: expected a class number for every image"),
        ([0, -1], "labels: expected values of at least 0, got -1 for image 1"),
        ([0.5, 1.0], "labels: expected shape (N,) of int64, got (2,) of torch.float64"),
        ([[0], [1]], "labels: expected shape (N,) of int64, got (2, 1)"),
        ([0, 10**12], "labels: expected classes 0 to C − 1, the largest is 1000000000000"),
        ([], "labels: expected at least one image for each of 1 replicas, got 0"),
    ],
)
def test_labels_that_a_sampler_cannot_use(labels: Any, message: str) -> None:
    if labels == []:
        labels = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(LongtailError, match=re.escape(message)):
        ClassAwareSampler(labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "clas"}, "scheme 'clas' is not known; perhaps you meant class?"),
        ({"num_replicas": 2}, "num_replicas and rank: expected both or neither"),
        ({"num_replicas": 2, "rank": 2}, "rank: expected a number of replicas of at least 1 and a rank below it"),
        ({"num_replicas": 0, "rank": 0}, "got 0 and 0"),
        ({"num_replicas": 501, "rank": 0}, "expected at least one image for each of 501 replicas, got 500"),
        ({"scheme": "deferred"}, "epochs: is missing; the scheme deferred changes along the training"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"deferred_from": 1.5}, "deferred_from: expected a fraction in [0, 1], got 1.5"),
    ],
)
def test_arguments_that_a_sampler_cannot_use(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LongtailError, match=re.escape(message)):
        ClassAwareSampler(LABELS, **arguments)
    with pytest.raises(LongtailError, match="epoch: expected at least 0, got -1"):
        ClassAwareSampler(LABELS).set_epoch(-1)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda x: np.array(x, dtype=np.uint16), torch.tensor])
def test_labels_of_any_kind(kind: Any) -> None:
    assert list(ClassAwareSampler(kind(LABELS.tolist()))) == list(make())


def test_labels_of_pandas_and_numbers_that_are_stored_as_objects() -> None:
    pandas = pytest.importorskip("pandas")
    expected, numbers = list(make()), LABELS.tolist()
    for kind in (pandas.Series(numbers), pandas.Series(numbers, dtype=object), np.array(numbers, dtype=object)):
        assert list(ClassAwareSampler(kind)) == expected
    for names in (np.array(["1", "2"], dtype=object), np.array([1, None], dtype=object)):
        with pytest.raises(LongtailError, match="labels: expected a class number for every image"):
            ClassAwareSampler(names)


def test_the_epoch_of_a_state_is_an_integer() -> None:
    sampler = make()
    for epoch in (np.int64(3), torch.tensor(3)):
        sampler.set_epoch(epoch)
        assert type(sampler.state_dict()["epoch"]) is int
        make().load_state_dict(sampler.state_dict())


def test_many_classes_are_sorted_in_the_other_way() -> None:
    labels = torch.randint(0, 70_000, (3000,), generator=torch.Generator().manual_seed(0))
    assert list(make(labels)) == epoch_order(labels, "class", 0, 0, 11).tolist()


def test_epochs_after_the_last_have_its_shares() -> None:
    sampler = make(scheme="progressive")
    sampler.set_epoch(10)
    last = list(sampler)
    sampler.set_epoch(30)
    assert list(sampler) != last
    assert 120 < int((LABELS[list(sampler)] == 2).sum()) < 220  # a third of 500


def test_a_sampler_is_one_of_torchs() -> None:
    sampler = make(replicas=2, rank=1)
    assert isinstance(sampler, DistributedSampler)  # Lightning and Fabric replace others by their own
    assert (sampler.num_replicas, sampler.rank, sampler.total_size, sampler.num_samples) == (2, 1, 500, 250)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(copy.deepcopy(sampler)) == list(sampler)
    sampler.set_epoch(0)
    batches = list(DataLoader(list(range(500)), batch_size=32, sampler=sampler))  # type: ignore[arg-type]
    sampler.set_epoch(0)
    assert torch.cat(batches).tolist() == list(sampler)


@pytest.mark.filterwarnings("ignore:.*set_vital")  # torchdata calls it
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_with_the_stateful_loader_of_torchdata(workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader(sampler: Any) -> Any:
        return stateful.StatefulDataLoader(list(range(500)), batch_size=32, sampler=sampler, num_workers=workers)

    sampler = make(scheme="class", replicas=2, rank=0)
    sampler.set_epoch(4)
    whole = [batch.tolist() for batch in loader(sampler)]
    sampler.set_epoch(4)
    assert [index for batch in whole for index in batch] == list(sampler)
    for taken in (0, 1, 3, len(whole)):
        sampler = make(scheme="class", replicas=2, rank=0)
        sampler.set_epoch(4)
        first = loader(sampler)
        iterator = iter(first)
        assert [next(iterator).tolist() for _ in range(taken)] == whole[:taken]
        state = first.state_dict()
        resumed_sampler = make(scheme="class", replicas=2, rank=0)
        resumed = loader(resumed_sampler)
        resumed.load_state_dict(state)
        rest = [batch.tolist() for batch in resumed]
        assert rest == whole[taken:]
        resumed_sampler.set_epoch(4)
        assert [batch.tolist() for batch in resumed] == whole
    first = loader(make(scheme="class", replicas=2, rank=0))
    list(first)
    state, following = first.state_dict(), [batch.tolist() for batch in first]
    resumed = loader(make(scheme="class", replicas=2, rank=0))
    resumed.load_state_dict(state)  # of an iterator that has ended
    assert [batch.tolist() for batch in resumed] == following


def show_epochs(rank: int, world: int, folder: str) -> None:
    """Write what a replica shows, by a sampler that is older than the process group."""
    sampler, deferred = ClassAwareSampler(LABELS, "class"), ClassAwareSampler(LABELS, "deferred", epochs=4)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=world)
    shown: dict[str, list[int]] = {}
    for name, part in {"class": sampler, "deferred": deferred}.items():
        for epoch in range(4):
            part.set_epoch(epoch)
            shown[f"{name} {epoch}"] = torch.cat(
                list(DataLoader(list(range(500)), batch_size=50, sampler=part))  # type: ignore[arg-type]
            ).tolist()
    Path(folder, f"{rank}.json").write_text(json.dumps(shown))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_in_processes_that_train_together(tmp_path: Path, world: int) -> None:
    code = "from tests.data.test_samplers import show_epochs; show_epochs({}, {}, {!r})"
    processes = [start_longtail("--version", prelude=code.format(rank, world, str(tmp_path))) for rank in range(world)]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.stderr
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    assert set(parts[0]) == {f"{name} {epoch}" for name in ("class", "deferred") for epoch in range(4)}
    for name in parts[0]:
        scheme, epoch = name.split()
        shown = list(itertools.chain.from_iterable(zip(*(part[name] for part in parts), strict=True)))
        assert len(shown) == 500 // world * world
        assert shown == epoch_order(LABELS, scheme, 0, int(epoch), 4).tolist()[: len(shown)]
        if scheme == "deferred" and epoch != "3":
            assert len(set(shown)) == len(shown)


def test_which_samplers_end_with_classes_equally_often() -> None:
    balanced = {name for name in SAMPLERS if ends_balanced(name, 0.8, 100)}
    assert balanced == {"class", "progressive", "deferred"}
    assert not ends_balanced("deferred", 1.0, 100)
    # a single epoch is the first one of a progressive training
    assert not ends_balanced("progressive", 0.8, 1)


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 10])
def test_a_deferred_phase_begins_in_the_last_epoch_at_the_latest(epochs: int) -> None:
    assert ends_balanced("deferred", 0.8, epochs)
    assert shares("deferred", epochs - 1, epochs) == pytest.approx([1 / 3] * 3, abs=0.02)


def test_a_deferred_phase_begins_at_its_fraction() -> None:
    # 0.55 · 100 is above 55 in floating point
    assert [deferred_shares(COUNTS, epoch, 100, 0.55) is None for epoch in (54, 55)] == [True, False]
