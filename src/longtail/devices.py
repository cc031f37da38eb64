"""Selection of the device that a network runs on."""

from __future__ import annotations

import torch

from longtail.errors import LongtailError


def select_device(name: str = "auto") -> torch.device:
    """Return the device of that name.

    Args:
        name: ``auto`` (a CUDA GPU where there is one, else the CPU), or any device name that torch knows, such as
            ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        LongtailError: torch does not know the device, or cannot use it on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)  # initialises the accelerator, which is where a missing one shows
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise LongtailError(f"device '{name}': cannot be used: {reason}") from None
    return device
