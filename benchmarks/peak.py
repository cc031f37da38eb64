"""The most memory that a call takes, from the books that Linux keeps of a process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (at most) in kB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1))


def peak_mib(function: Callable[[], object]) -> float:
    """Return by how much a call raises this process's resident size at most, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest size is counted anew from here
    before = resident("VmRSS")
    function()
    return (resident("VmHWM") - before) / 1024


def elsewhere(code: str) -> float:
    """Return the number that a piece of code prints, run in a process of its own beside these files."""
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    return float(done.stdout)
