from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The detectors have random weights; which they are must not depend on the order of the tests."""
    torch.manual_seed(0)
