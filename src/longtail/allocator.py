"""How the C library reuses memory, which decides about a third of a network's speed on a CPU. Imports no torch."""

from __future__ import annotations

import ctypes
import platform
import sys

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2  # parameters of mallopt, from glibc's malloc.h


def reuse_freed_memory() -> bool:
    """Keep memory that is freed instead of returning it to the system; for Linux with glibc.

    By default large blocks go back to the system as soon as they are freed and are mapped anew, page by page, at the
    next allocation. A network on a CPU does this at every layer, and up to half of its time goes to page faults. Every
    command calls this at its start; in a program of your own, call it once before the first step.

    Returns:
        Whether the allocator was changed.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # linked statically, or another allocator in its place
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())
