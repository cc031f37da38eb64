"""Selection of the device that a network runs on."""

from __future__ import annotations

import torch

from longtail.errors import LongtailError


def device_name(name: str = "auto") -> str:
    """Return the name of a device, for ``auto`` that of a CUDA GPU where there is one, else of the CPU."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def select_device(name: str = "auto") -> torch.device:
    """Return the device of that name.

    Args:
        name: ``auto`` (see :func:`device_name`), or any device name that torch knows, such as ``cpu``, ``cuda``,
            ``cuda:1`` or ``mps``.

    Raises:
        LongtailError: torch does not know the device, or cannot use it on this machine.
    """
    name = device_name(name)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)  # initialises the accelerator, which is where a missing one shows
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise LongtailError(f"device '{name}': cannot be used: {reason}") from None
    return device
