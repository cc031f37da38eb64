from __future__ import annotations

import pytest
import torch
from lightning_fabric.accelerators.mps import MPSAccelerator

from longtail.config import Config
from longtail.devices import select_device
from longtail.errors import LongtailError
from longtail.training.fabric import build_fabric


def test_devices() -> None:
    assert select_device("cpu") == torch.device("cpu")
    assert select_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(LongtailError, match=r"^device 'gpu': cannot be used: "):
        select_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(LongtailError, match=r"^device 'cuda': cannot be used: "):
            select_device("cuda")


def test_auto_is_the_same_device_everywhere(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac, Fabric's own auto would be MPS."""
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    assert build_fabric(tiny.replace(device="auto")).device.type == select_device().type
    assert build_fabric(tiny.replace(device="mps")).device.type == "mps"
