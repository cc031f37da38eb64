"""Set-up of Lightning Fabric, which moves modules to the device, wraps them for DDP and sets the precision."""

from __future__ import annotations

import datetime
import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from longtail.config import Config
from longtail.devices import device_name, select_device
from longtail.errors import LongtailError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn


_WAIT = datetime.timedelta(days=2)
"""How long a process waits for another, which may compute features or a teacher's outputs alone for hours."""


def build_fabric(config: Config) -> Fabric:
    """Return Fabric for the processes that torchrun started; a single process where it started none.

    torchrun announces the number of processes by the environment variable ``WORLD_SIZE``; Fabric starts none itself.

    Raises:
        LongtailError: the device cannot be used, or not with this precision; there are more processes than GPUs on this
            machine, or other numbers of them on other machines; or ``batch_size`` has fewer than two images a process.
    """
    # imported here, since it adds seconds to the start-up of every command
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    world = int(os.environ.get("WORLD_SIZE", "1"))
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    device = device_name(config.device)
    if device == "cpu" and config.precision == "16-mixed":  # for which Fabric would take bf16-mixed
        raise LongtailError("precision 16-mixed: needs a GPU; use bf16-mixed or 32-true")
    options: dict[str, Any] = {"accelerator": device, "precision": config.precision}
    if world > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
        machines = int(os.environ.get("GROUP_WORLD_SIZE", str(world // local)))
        _check_processes(world, machines, local, device)
        if config.batch_size < 2 * world:
            raise LongtailError(
                f"batch_size {config.batch_size}: expected at least {2 * world}, two for each of {world} processes"
            )
        # BatchNorm statistics are synchronised on accelerators; on a CPU every process keeps its own
        strategy = DDPStrategy(timeout=_WAIT)
        options |= {"devices": local, "num_nodes": machines, "strategy": strategy}
    else:
        # a single process, however many tasks a cluster's job has, of which Fabric would count the processes
        options |= {"devices": 1, "plugins": [LightningEnvironment()]}
    try:
        fabric = Fabric(**options)
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        select_device(config.device)  # says more plainly why there is no such device
        raise LongtailError(f"device {config.device}: cannot be used: {' '.join(str(error).split())}") from None
    # Fabric would round every tensor of a batch to 16 bits: boxes, classes and a teacher's scores too, though autocast
    # rounds what the network computes with by itself
    fabric.strategy.precision.convert_input = lambda data: data  # type: ignore[method-assign]
    if world > 1:
        fabric.launch()
    return fabric


def _check_processes(world: int, machines: int, local: int, device: str) -> None:
    """Raise LongtailError where machines have different numbers of processes, or this one fewer GPUs than processes.

    Args:
        world: processes that train together.
        machines: on which they are.
        local: processes on this machine.
        device: what each takes, as :func:`~longtail.devices.device_name` returns it.
    """
    if machines * local != world:
        raise LongtailError(
            f"{local} of {world} processes on this machine: start equally many processes on every machine"
        )
    gpus = torch.cuda.device_count()
    if device == "cuda" and 0 < gpus < local:  # without any it is the device that cannot be used
        raise LongtailError(
            f"{local} processes on this machine, {gpus} GPU{'s' * (gpus != 1)}: start at most one process for each GPU"
        )


def wrap(fabric: Fabric, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Return a module and its optimizer as Fabric wraps them; the module is moved to the device."""
    wrapped, optimizer = fabric.setup(module, optimizer)
    # Fabric checks in every backward that fabric.backward has called it, by a flag of the whole process: one training
    # resets it while another, in a thread beside it, is still in its backward
    wrapped._register_backward_hook = lambda output: output
    return wrapped, optimizer


def synchronize_batch_norm(module: nn.Module) -> None:
    """Give the BatchNorm layers inside a module the statistics of all processes, in place."""
    # torch's own conversion would drop the activations that timm's layers contain
    from timm.layers import convert_sync_batchnorm

    convert_sync_batchnorm(module)
