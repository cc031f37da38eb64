"""What trainings of one process share."""

from __future__ import annotations

import pytest
import torch

from longtail.training.turns import return_streams, take_streams


def test_no_training_shares_the_streams_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has 32 of them, which it gives out in turn."""
    made: list[object] = []

    def stream(_device: torch.device) -> object:
        made.append(object())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    device = torch.device("cuda", 7)
    first = take_streams(device)
    assert first is not None
    for _ in range(20):
        second = take_streams(device)
        assert second is not None
        assert not set(first) & set(second)
        return_streams(device, second)
    assert len(made) == 4
    assert take_streams(torch.device("cpu")) is None
