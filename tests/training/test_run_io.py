"""The folder of a run: which run is found in it, and what it lists."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from longtail.config import Config
from longtail.data.dataset import from_arrays
from longtail.training.run_io import find_finished, write_unreadable
from longtail.training.trainer import fit
from tests.processes import start_longtail


def test_a_finished_run_is_found_whatever_computed_it(tiny: Config, tmp_path: Path) -> None:
    run = fit(tiny.replace(method="la", epochs=1), tmp_path / "run", quiet=True)
    incidental = {"accelerator": {"memory": 0.05}, "data": {"workers": 1}, "log": ("csv",), "checkpoint_seconds": 1.0}
    found = find_finished(tmp_path / "run", run.config.replace(**incidental))
    assert found is not None
    assert found.test_metrics == run.test_metrics
    assert find_finished(tmp_path / "run", run.config.replace(epochs=2)) is None


def list_unreadable(rank: int, folder: str) -> None:
    """List, as one of two processes, the test image that this one could not read."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])
    data = from_arrays(images, images)
    data.test.images.unreadable[rank] = "is damaged"
    write_unreadable(Path(folder), data)
    torch.distributed.destroy_process_group()


def test_every_process_lists_what_it_could_not_read(tmp_path: Path) -> None:
    code = "from tests.training.test_run_io import list_unreadable; list_unreadable({}, {!r})"
    for process in [start_longtail("--version", prelude=code.format(rank, str(tmp_path))) for rank in range(2)]:
        assert process.wait(timeout=120) == 0, process.stderr
    with (tmp_path / "unreadable.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert [reason for _, reason in rows] == ["reason", "is damaged", "is damaged"]
    assert len({image for image, _ in rows}) == 3
