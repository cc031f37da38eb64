"""The moving average of the student's weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from longtail.config import Config
from longtail.training.checkpoint import load_checkpoint
from longtail.training.trainer import fit
from longtail.training.weight_average import WeightAverage
from tests.losses.host import TensorsOfTheHost
from tests.training.runs import equal, fit_in_two


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def _change(network: nn.Module, step: int) -> None:
    """Change weights, statistics and the count of a network."""
    network(torch.randn(8, 4, generator=torch.Generator().manual_seed(step)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_it_is_that_of_timm(decay: float) -> None:
    network = _network()
    ours, theirs = WeightAverage(network, decay), ModelEmaV3(network, decay=decay, use_warmup=True)
    for step in range(40):
        _change(network, step)
        ours.update()
        theirs.update(network, step=step)
        for key, value in theirs.module.state_dict().items():
            torch.testing.assert_close(ours.module.state_dict()[key], value)


def test_one_that_is_restored_goes_on_with_the_same_bits() -> None:
    network = _network()
    average = WeightAverage(network, 0.9)
    for step in range(5):
        _change(network, step)
        average.update()
    other_network = copy.deepcopy(network)
    other = WeightAverage(other_network, 0.9)
    other.restore(average.module.state_dict(), 5)
    for step in range(5, 10):
        for one in (network, other_network):
            _change(one, step)
        average.update()
        other.update()
    for key, value in average.module.state_dict().items():
        assert torch.equal(other.module.state_dict()[key], value)


def test_no_update_reads_a_value_on_the_host() -> None:
    """What a CUDA graph of a step requires."""
    network = _network().to("meta")
    average = WeightAverage(network, 0.9)
    average.update()
    with TensorsOfTheHost() as host:
        average.update()
    assert not host.operations


@pytest.mark.parametrize("batches", ["host", "device"])
def test_a_training_that_is_resumed_has_the_same_average(
    tiny: Config, batches: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.replace(method="la", optimizer={"ema_decay": 0.9}, accelerator={"batches": batches})
    fit(config, tmp_path / "whole", quiet=True)
    fit_in_two(config, tmp_path / "parts", 8, monkeypatch)
    whole, parts = (load_checkpoint(tmp_path / name / "last.ckpt")["ema"] for name in ("whole", "parts"))
    assert equal(whole, parts)
