"""Queues against deques of Python."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import multiprocessing

from longtail.memory import ClassQueues, Slots, queue_sizes, repeat_filled


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60).filter(any), st.integers(1, 4), st.integers(0, 5000))
def test_sizes_add_up_and_keep_the_minimum(counts: list[int], minimum: int, more: int) -> None:
    size = len(counts) * minimum + more
    sizes = queue_sizes(counts, size, minimum)
    assert sum(sizes) == size
    assert min(sizes) >= minimum
    for count, slots in zip(counts, sizes, strict=True):
        assert abs(slots - (minimum + more * count / sum(counts))) < 1


def test_impossible_sizes_raise() -> None:
    with pytest.raises(ValueError, match="at least 3 classes × 2 slots"):
        queue_sizes([5, 5, 5], 5, 2)
    with pytest.raises(ValueError, match="class_counts"):
        queue_sizes([0, 0], 10, 2)


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_pushes_equal_plain_queues(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 50, (5,), generator=g).tolist()
    queues = ClassQueues(counts, size=31, minimum=2, dim=3)
    plain: list[deque[int]] = [deque(maxlen=size) for size in queues.sizes.tolist()]
    serial = 0
    for _ in range(1000):
        batch = int(torch.randint(0, 40, (1,), generator=g))
        labels = torch.randint(-1, 5, (batch,), generator=g)
        ids = torch.arange(serial, serial + batch)
        features = ids[:, None].float().expand(-1, 3)
        queues.push(features, labels, ids)
        for label, number in zip(labels.tolist(), ids.tolist(), strict=True):
            if label >= 0:
                plain[label].append(number)
        serial += batch
        contents = {label: sorted(queues.ids[queues.labels == label].tolist()) for label in range(5)}
        assert contents == {label: sorted(expected) for label, expected in enumerate(plain)}
        assert torch.equal(queues.features[:, 0].long(), queues.ids)
        assert len(queues) == sum(map(len, plain))


def test_a_cleared_queue_is_filled_like_a_new_one() -> None:
    queues, new = (ClassQueues([3, 1], size=4, minimum=1, dim=1, shared=True) for _ in range(2))
    ids = torch.arange(3)
    queues.push(torch.ones(3, 1), torch.zeros(3, dtype=torch.int64), ids)
    queues.clear()
    assert len(queues) == 0
    assert not queues.slots().features.any()
    assert queues.slots().ids.tolist() == [-1] * 4
    assert queues.turnovers == 0.75
    for each in (queues, new):
        each.push(torch.ones(3, 1) * 2, torch.ones(3, dtype=torch.int64), ids + 10)
    assert sorted(queues.ids.tolist()) == sorted(new.ids.tolist()) == [10, 11, 12]


def test_one_push_of_more_than_fits_keeps_the_newest() -> None:
    queues = ClassQueues([3, 1], size=4, minimum=1, dim=1)
    for start in (0, 100):
        ids = torch.arange(start, start + 10)
        queues.push(ids[:, None].float(), torch.zeros(10, dtype=torch.int64), ids)
        slots = int(queues.sizes[0])
        assert sorted(queues.ids.tolist()) == list(range(start + 10 - slots, start + 10))


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    queues = ClassQueues([5, 3, 1], size=12, minimum=2, dim=2)
    for features, labels, ids in _pushes():
        bounds = [0, 5, 8] if world == 2 else [0, 2, 4, 6, 8]  # of two processes one is padded
        part = slice(bounds[rank], bounds[rank + 1])
        queues.push(features[part], labels[part], ids[part], max_local_batch=bounds[1])
    torch.save(queues.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _pushes() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 2, generator=g), torch.randint(0, 3, (8,), generator=g), torch.arange(8 * n, 8 * n + 8))
        for n in range(5)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_have_the_queues_of_one(tmp_path: Path, world: int) -> None:
    multiprocessing.spawn(_rank, (world, str(tmp_path)), nprocs=world)  # type: ignore[attr-defined, no-untyped-call]
    single = ClassQueues([5, 3, 1], size=12, minimum=2, dim=2)
    for push in _pushes():
        single.push(*push)
    for rank in range(world):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(tensor, state[name]) for name, tensor in single.state_dict().items())


def test_unfilled_slots_are_marked() -> None:
    queues = ClassQueues([4, 2], size=6, minimum=1, dim=2)
    queues.push(torch.ones(1, 2), torch.tensor([1]), torch.tensor([9]))
    slots = queues.slots()
    assert slots.features.shape == (6, 2)
    assert (slots.labels >= 0).sum() == (slots.ids >= 0).sum() == 1
    assert torch.equal(slots.features, torch.ones(6, 2))
    assert queues.features.shape == (1, 2)


def test_a_later_push_does_not_change_the_slots() -> None:
    queues = ClassQueues([4, 4], size=8, minimum=2, dim=2)
    queues.push(torch.ones(2, 2), torch.tensor([0, 1]), torch.tensor([1, 2]))
    slots = queues.slots()
    before = [tensor.clone() for tensor in slots]
    queues.push(5 * torch.ones(3, 2), torch.tensor([0, 1, 1]), torch.tensor([7, 8, 9]))
    assert all(torch.equal(now, then) for now, then in zip(slots, before, strict=True))


def test_features_of_filled_slots_are_mapped() -> None:
    queues = ClassQueues([4, 4], size=8, minimum=2, dim=2)
    queues.push(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0]), torch.tensor([1, 2]))
    expected = queues.state_dict()
    expected["features"][expected["labels"] >= 0] += 10
    queues.map_features(lambda features: features + 10)
    assert queues.features.tolist() == [[13, 14], [11, 12]]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in queues.state_dict().items())


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_unfilled_slots_repeat_filled_ones_equally_often(filled: list[bool]) -> None:
    mask, features = torch.tensor(filled), torch.arange(1.0, len(filled) + 1)[:, None]
    features = features.masked_fill(~mask[:, None], 0)
    labels, ids = torch.where(mask, 3, -1), torch.arange(len(filled))
    repeated = repeat_filled(Slots(features, labels, ids))
    assert repeated.labels is labels
    assert repeated.ids is ids
    assert torch.equal(repeated.features[mask], features[mask])
    numbers = torch.bincount(repeated.features[:, 0].long(), minlength=len(filled) + 1)[1:]
    if any(filled):
        assert numbers[~mask].sum() == 0
        assert numbers[mask].max() - numbers[mask].min() <= 1
    else:
        assert not repeated.features.any()


def test_the_repeats_have_the_shares_of_the_classes() -> None:
    queues = ClassQueues([60, 20, 20], size=100, minimum=1, dim=1)
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 10)
    queues.push(labels[:, None].float(), labels, torch.arange(60))
    for slots in (queues.slots(), Slots(*(tensor.flip(0) for tensor in queues.slots()))):
        repeats = repeat_filled(slots).features[slots.labels < 0, 0].long()
        assert torch.bincount(repeats).sub(40 * torch.tensor([4, 1, 1]) / 6).abs().max() < 1


def test_full_slots_are_unchanged() -> None:
    queues = ClassQueues([4, 2], size=6, minimum=1, dim=2)
    queues.push(torch.randn(9, 2), torch.tensor([0, 1, 0, 0, 0, 1, 1, 0, 0]), torch.arange(9))
    assert len(queues) == 6
    assert all(
        torch.equal(a, b) for a, b in zip(queues.slots(), (queues.features, queues.labels, queues.ids), strict=True)
    )


def test_state_round_trips() -> None:
    queues = ClassQueues([4, 2], size=6, minimum=1, dim=2)
    queues.push(torch.randn(9, 2), torch.tensor([0, 1, 0, 0, 0, 1, 1, 0, 0]), torch.arange(9))
    other = ClassQueues([4, 2], size=6, minimum=1, dim=2)
    other.load_state_dict(queues.state_dict())
    for push in (torch.randn(2, 2), torch.randn(3, 2)):
        for each in (queues, other):
            each.push(push, torch.zeros(len(push), dtype=torch.int64), torch.arange(len(push)))
    assert all(torch.equal(a, b) for a, b in zip(queues.slots(), other.slots(), strict=True))
    with pytest.raises(ValueError, match="expected queues of 7 slots"):
        ClassQueues([4, 2], size=7, minimum=1, dim=2).load_state_dict(queues.state_dict())
    partial = {name: part for name, part in queues.state_dict().items() if name not in {"sizes", "ids"}}
    with pytest.raises(ValueError, match=r"^state: expected the entries of state_dict\(\), ids, sizes is missing"):
        queues.load_state_dict(partial)


def test_wrong_shapes_are_named() -> None:
    queues = ClassQueues([4, 2], size=6, minimum=1, dim=2)
    with pytest.raises(ValueError, match=r"features: expected shape \(B, 2\)"):
        queues.push(torch.ones(1, 3), torch.tensor([1]), torch.tensor([9]))
    with pytest.raises(ValueError, match="ids: expected shape"):
        queues.push(torch.ones(1, 2), torch.tensor([1]), torch.tensor([9, 8]))
    with pytest.raises(ValueError, match=r"labels: expected shape \(1,\) of int64, got \(1,\) of torch.float32"):
        queues.push(torch.ones(1, 2), torch.tensor([1.0]), torch.tensor([9]))


def test_a_shared_queue_is_one_for_all_classes() -> None:
    queues = ClassQueues([50, 5], size=7, dim=2, shared=True)
    plain: deque[tuple[int, int]] = deque(maxlen=7)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        labels = torch.randint(-1, 2, (5,), generator=generator)
        ids = torch.arange(5) + 5 * step
        queues.push(torch.stack([ids.float(), labels.float()], dim=1), labels, ids)
        plain.extend((i, label) for i, label in zip(ids.tolist(), labels.tolist(), strict=True) if label >= 0)
        assert sorted(zip(queues.ids.tolist(), queues.labels.tolist(), strict=True)) == sorted(plain)
        assert queues.features[:, 0].tolist() == queues.ids.tolist()
    other = ClassQueues([50, 5], size=7, dim=2, shared=True)
    other.load_state_dict(queues.state_dict())
    assert torch.equal(other.ids, queues.ids)


@pytest.mark.parametrize("shared", [False, True])
def test_a_label_out_of_range_is_named_and_nothing_is_written(shared: bool) -> None:
    queues = ClassQueues([5, 3, 2], size=10, minimum=2, dim=1, shared=shared)
    features, ids = torch.ones(3, 1), torch.arange(3)
    for labels in ([1, 2, 3], [0, -2, 1], [0, 255, 1]):
        with pytest.raises(ValueError, match=r"^labels: expected values in \[0, 3\), or −1 to ignore it, got"):
            queues.push(features, torch.tensor(labels), ids)
    assert len(queues) == 0


@pytest.mark.parametrize("shared", [False, True])
def test_where_labels_are_not_read_samples_out_of_range_are_discarded(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator; the same code runs here, for tensors that say that they are on one."""
    queues, expected = (ClassQueues([5, 3, 2], size=10, minimum=2, dim=1, shared=shared) for _ in range(2))
    features, ids = torch.arange(5.0)[:, None], torch.arange(5)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_meta", True)
        queues.push(features, torch.tensor([3, 1, 2**40, -7, 2]), ids)
    expected.push(features[[1, 4]], torch.tensor([1, 2]), ids[[1, 4]])
    for name, values in expected.state_dict().items():
        assert torch.equal(queues.state_dict()[name], values)


def test_counts_of_every_kind() -> None:
    counts = [5, 3, 0]
    kinds = (
        tuple(counts),
        np.array(counts),
        np.array(counts, np.uint16),
        np.array(counts, float),
        torch.tensor(counts),
    )
    for kind in kinds:
        assert queue_sizes(kind, 10, 1) == queue_sizes(counts, 10, 1) == [6, 3, 1]
        assert ClassQueues(kind, 10, 1).sizes.tolist() == [6, 3, 1]
    for wrong in ([5, -1], [0.5, 1], [float("nan"), 1], [float("inf"), 1], [[1, 2]]):
        with pytest.raises(ValueError, match=r"^class_counts: expected one count for each class, whole and at least 0"):
            ClassQueues(wrong, 10)
