"""GML's task and the losses, in timm's tasks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtail.losses import LogitAdjustedLoss
from tests.integrations.tail import COUNTS, balanced_accuracy, long_tailed_digits

pytest.importorskip("timm.task")


def network(classes: int = 10) -> Any:
    import timm

    torch.manual_seed(classes)
    return timm.create_model("test_resnet", num_classes=classes, in_chans=1)


def enlarge(images: Tensor) -> Tensor:
    return F.interpolate(images, size=16, mode="bilinear") - 0.3


def gml_task(**options: Any) -> Any:
    from longtail.integrations.timm import GMLTask

    torch.manual_seed(0)
    return GMLTask(network(), network(0), COUNTS, LogitAdjustedLoss(COUNTS), verbose=False, **options)


def train(task: Any, epochs: int, ids: bool = False) -> list[float]:
    from timm.optim import create_optimizer_v2

    images, labels, *_ = long_tailed_digits()
    images = enlarge(images)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=5e-3, weight_decay=0.01)
    losses = []
    draws = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        task.train()
        for batch in torch.randperm(len(labels), generator=draws).split(32)[:-1]:
            result = task(images[batch], labels[batch], *([batch] if ids else []))
            optimizer.zero_grad()
            result["loss"].backward()
            nn.utils.clip_grad_norm_(task.get_clip_parameters(), 5.0)
            optimizer.step()
            task.update_ema()
            losses.append(result["loss"].item())
    return losses


def accuracy(model: nn.Module) -> float:
    *_, images, labels = long_tailed_digits()
    with torch.no_grad():
        return balanced_accuracy(model.eval()(enlarge(images)), labels)


@pytest.mark.slow
def test_a_loss_in_the_classification_task() -> None:
    from timm.task import ClassificationTask

    task = ClassificationTask(network(), criterion=LogitAdjustedLoss(COUNTS), verbose=False)
    train(task, 12)
    assert accuracy(task.get_eval_model()) > 0.7


def test_gml_learns_in_its_task() -> None:
    task = gml_task()
    task.setup_ema(decay=0.5)
    losses = train(task, 12)
    assert losses[-1] < 0.6 * losses[0]
    model = task.get_eval_model()
    assert type(model) is type(network())
    assert accuracy(model) > 0.7
    assert accuracy(task.get_eval_model(ema=True)) > 0.6
    assert len(task.trainable_module.terms.queues) == sum(COUNTS)
    assert not task.teacher.train(False).training
    task.train()
    assert not task.teacher.training


def test_ids_let_the_temperature_learn() -> None:
    for ids in (False, True):
        task = gml_task(learn_temperature=ids)
        before = task.trainable_module.terms.criterion.temperature.item()
        train(task, 1, ids)
        assert (task.trainable_module.terms.criterion.temperature.item() != before) == ids


def test_a_checkpoint_restores_the_task() -> None:
    task, other = gml_task(), gml_task(temperature=0.2)
    train(task, 1)
    saved = task.get_checkpoint_state()
    assert set(saved) == {"state_dict", "task_state"}
    other.load_checkpoint_state(saved["state_dict"], saved["task_state"])
    expected, restored = task.get_task_state(), other.get_task_state()
    for part in ("terms", "queues"):
        for name, tensor in expected[part].items():
            assert torch.equal(tensor, restored[part][name]), name
    network().load_state_dict(saved["state_dict"])  # the network alone


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from tests.integrations.tail import COUNTS, long_tailed_digits
from tests.integrations.test_timm import enlarge, gml_task

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], world_size=2, rank=rank)
task = gml_task().prepare_distributed()
images, labels, *_ = long_tailed_digits()
optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05)
task.train()
chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:64]
for batch in chosen.split(32):
    mine = batch[rank::2]
    optimizer.zero_grad()
    task(enlarge(images[mine]), labels[mine])["loss"].backward()
    optimizer.step()
terms = task.get_task_state()
weights = torch.cat([parameter.detach().flatten() for parameter in task.get_eval_model().parameters()])
torch.save({"terms": terms, "weights": weights, "labels": labels[chosen]}, sys.argv[2] + str(rank))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_one_network_on_one_memory(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(rank), store], cwd=Path(__file__).parents[2])
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (torch.load(store + str(rank)) for rank in range(2))
    assert torch.equal(first["weights"], second["weights"])
    for part in ("terms", "queues"):
        for name, tensor in first["terms"][part].items():
            assert torch.equal(tensor, second["terms"][part][name]) or "running" in name, name
    queued = first["terms"]["queues"]["labels"]
    assert torch.equal(queued[queued >= 0].sort().values, first["labels"].sort().values)


def test_soft_targets_raise() -> None:
    with pytest.raises(ValueError, match=r"target: expected class indices \(B,\), got \(2, 10\) of torch.float32"):
        gml_task()(torch.randn(2, 1, 16, 16), torch.full((2, 10), 0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_task_has_the_type_of_the_model(dtype: torch.dtype) -> None:
    from longtail.integrations.timm import GMLTask

    task = GMLTask(network().to(dtype), network(0), COUNTS, LogitAdjustedLoss(COUNTS), verbose=False, dtype=dtype)
    images, labels, *_ = long_tailed_digits()
    result = task(enlarge(images[:8]).to(dtype), labels[:8])
    result["loss"].backward()
    assert result["loss"].isfinite()
