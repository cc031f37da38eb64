"""Losses over regions of label maps."""

from __future__ import annotations

import pytest
import torch

from longtail.config import Config
from longtail.data.batch import Batch
from longtail.nn import Encoder
from longtail.registry import METHODS


@pytest.mark.parametrize("name", ["dice", "lovasz"])
def test_a_batch_without_a_labelled_pixel_adds_nothing(tiny: Config, name: str) -> None:
    method = METHODS[name](tiny.replace(method=name), Encoder("conv8-tiny", [0.3], [0.4]), [5, 3, 2])
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.full((2, 4, 4), -1)
    loss = method.loss(scores, labels, Batch(views=(), labels=labels, ids=torch.arange(2)))
    assert loss.shape == ()
    assert loss.item() == 0
    loss.backward()
    assert scores.grad is not None
    assert scores.grad.abs().max() == 0
