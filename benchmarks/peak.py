"""Peak memory of a call, as Linux records it for a process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def resident(field: str) -> int:
    """Return the resident size in kB: VmRSS (current) or VmHWM (peak)."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1))


def peak_mib(function: Callable[[], object]) -> float:
    """Return the peak resident size of this process during a call minus the size before it, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    function()
    return (resident("VmHWM") - before) / 1024


def elsewhere(code: str) -> float:
    """Return the number that Python code prints when it runs in a new process in this folder."""
    folder = Path(__file__).parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    return float(result.stdout)
