from __future__ import annotations

import pytest
import torch

from longtail.devices import select_device
from longtail.errors import LongtailError


def test_devices() -> None:
    assert select_device("cpu") == torch.device("cpu")
    assert select_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(LongtailError, match=r"^device 'gpu': cannot be used: "):
        select_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(LongtailError, match=r"^device 'cuda': cannot be used: "):
            select_device("cuda")
