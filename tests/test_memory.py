"""Queues against plain Python ones."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtail.memory import ClassQueues, queue_sizes


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60).filter(any), st.integers(1, 4), st.integers(0, 5000))
def test_sizes_add_up_and_keep_the_minimum(counts: list[int], minimum: int, more: int) -> None:
    size = len(counts) * minimum + more
    sizes = queue_sizes(counts, size, minimum)
    assert sum(sizes) == size
    assert min(sizes) >= minimum
    for count, slots in zip(counts, sizes, strict=True):
        assert abs(slots - (minimum + more * count / sum(counts))) < 1


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 classes × 2 slots"):
        queue_sizes([5, 5, 5], 5, 2)
    with pytest.raises(ValueError, match="class_counts"):
        queue_sizes([0, 0], 10, 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_thousand_pushes_equal_plain_queues(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 50, (5,), generator=g).tolist()
    queues = ClassQueues(counts, size=31, minimum=2, dim=3)
    plain = [deque(maxlen=size) for size in queues.sizes.tolist()]  # type: ignore[var-annotated]
    serial = 0
    for _ in range(40):
        batch = int(torch.randint(0, 40, (1,), generator=g))
        labels = torch.randint(0, 5, (batch,), generator=g)
        ids = torch.arange(serial, serial + batch)
        features = ids[:, None].float().expand(-1, 3)
        queues.push(features, labels, ids)
        for label, number in zip(labels.tolist(), ids.tolist(), strict=True):
            plain[label].append(number)
        serial += batch
        assert len(queues) == sum(map(len, plain))
        for label, expected in enumerate(plain):
            mine = queues.labels == label
            assert sorted(queues.ids[mine].tolist()) == sorted(expected)
        assert torch.equal(queues.features[:, 0].long(), queues.ids)


def test_unfilled_slots_are_marked() -> None:
    queues = ClassQueues([4, 2], size=6, minimum=1, dim=2)
    queues.push(torch.ones(1, 2), torch.tensor([1]), torch.tensor([9]))
    slots = queues.slots()
    assert slots.features.shape == (6, 2)
    assert (slots.labels >= 0).sum() == 1
    assert queues.features.shape == (1, 2)


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


def test_wrong_shapes_are_named() -> None:
    queues = ClassQueues([4, 2], size=6, minimum=1, dim=2)
    with pytest.raises(ValueError, match=r"features: expected shape \(B, 2\)"):
        queues.push(torch.ones(1, 3), torch.tensor([1]), torch.tensor([9]))
    with pytest.raises(ValueError, match="ids: expected shape"):
        queues.push(torch.ones(1, 2), torch.tensor([1]), torch.tensor([9, 8]))
