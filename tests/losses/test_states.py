"""What the modules of scores and labels save and load."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longtail.losses import SeesawLoss
from tests.losses.test_score_losses import COUNTS, LABELS, LOSSES, SCORES, Make


@pytest.mark.parametrize("make", [*LOSSES.values(), SeesawLoss], ids=[*LOSSES, "seesaw"])
def test_a_state_has_what_the_counts_gave_and_an_earlier_one_without_is_loaded(make: Make) -> None:
    scores, labels = SCORES.float(), LABELS.masked_fill(LABELS == 1, 0)
    expected, other = make(COUNTS)(scores, labels), make([1, 50, 2, 3])
    own = other(scores, labels)
    other.load_state_dict({})
    assert torch.equal(other(scores, labels), own)
    nn.Sequential(nn.Linear(2, 2), other).load_state_dict(nn.Linear(2, 2).state_dict(prefix="0."))
    assert torch.equal(other(scores, labels), own)
    other.load_state_dict(make(COUNTS).state_dict())
    assert torch.equal(other(scores, labels), expected)


@pytest.mark.parametrize("make", [*LOSSES.values(), SeesawLoss], ids=[*LOSSES, "seesaw"])
def test_a_network_without_memory_can_have_a_loss(make: Make) -> None:
    with torch.device("meta"):
        loss = make(COUNTS)
    assert torch.equal(loss(SCORES, LABELS), make(COUNTS)(SCORES, LABELS))
